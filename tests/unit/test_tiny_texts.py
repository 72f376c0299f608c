"""The texts that the tiny model is shown with, and the arithmetic of what it is shown to do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from coordinator.jobs.batch_input import parse_batch
from echelon.cli.trace.drawing import Box, Label
from examples.tiny import measuring
from examples.tiny.held_out import TEXT
from examples.tiny.measuring import Decoded, settled
from examples.tiny.show import Shown
from examples.tiny.specialists import Specialist, differing, draw_kinds, farthest, specialists
from examples.tiny.texts import READABLE, code_prompts, held_out, job, kinds

CODE = '''"""What it is for."""

import os


def told(path):
    """Says it."""
    return os.fspath(path)  # as it is


class Empty:
    """Nothing else."""
'''
CHOICES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "code": {1: (10, 10, 0, 0), 2: (5, 5, 5, 5)},
    "prose": {1: (0, 10, 10, 0), 2: (5, 5, 5, 5)},
    "numbers": {1: (0, 0, 4, 4), 2: (8, 0, 0, 0)},
}


def model_with(folder: Path, documents: Mapping[str, str]) -> Path:
    lines = (json.dumps({"path": path, "text": text}) for path, text in documents.items())
    (folder / TEXT).write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_prompts_are_cut_from_documents_that_ship_and_all_begin_differently() -> None:
    prompts = code_prompts(212, 5)
    assert len(set(prompts)) == 212 and max(prompt.count("\n") for prompt in prompts) == 5
    documents = held_out().values()
    assert all(any(prompt in text for text in documents) and prompt.endswith("\n") for prompt in prompts)
    assert code_prompts(10, 5) == prompts[:10]
    with pytest.raises(ValueError, match="fewer than 100000"):
        code_prompts(100_000)


def test_prompts_come_from_every_long_document(tmp_path: Path) -> None:
    long, short = ("".join(f"{name}{line} = {line}\n" for line in range(60)) for name in "ab")
    folder = model_with(tmp_path, {"a.py": long, "b.py": short, "few.py": "x = 1\n", "prose.txt": long})
    first, second = code_prompts(2, model=folder)
    assert first.startswith("a") and second.startswith("b") and max(map(len, (first, second))) < 200


def test_the_job_is_one_that_a_cluster_takes() -> None:
    items = parse_batch(job(code_prompts(40)).encode())
    assert [item.prompt for item in items[: len(READABLE)]] == list(READABLE)
    assert len(items) == len(READABLE) + 40
    temperatures = [item.sampling.temperature or 0.0 for item in items]
    assert 0 < sum(temperature > 0 for temperature in temperatures) < len(items) / 2
    assert not any(temperatures[: len(READABLE)])
    assert len({item.sampling.max_tokens for item in items}) >= 5


def test_code_and_docstrings_are_told_apart(tmp_path: Path) -> None:
    found = kinds(model_with(tmp_path, {"a.py": CODE, "topic": "A page."}))
    code = "import os\n\ndef told(path):\n    return os.fspath(path)\n\nclass Empty:\n    pass\n"
    assert "".join(found["code"]) == code
    assert "".join(found["docstrings"]) == "What it is for.\n\nSays it.\n\nNothing else.\n\nA page."


def test_kinds_have_text_enough_and_no_piece_is_long() -> None:
    found = kinds()
    assert len(found) == 7
    assert all(sum(map(len, pieces)) > 300 for pieces in found.values())
    pieces = list(itertools.chain(*found.values()))
    assert len(set(pieces)) == len(pieces), "nothing is read twice, for the cache would answer"


def test_what_differs_between_kinds() -> None:
    assert differing(CHOICES, "code", "code") == 0
    assert differing(CHOICES, "code", "prose") == pytest.approx(0.25), "half of layer 1, nothing of layer 2"
    assert differing(CHOICES, "numbers", "code") == pytest.approx((1 + 0.75) / 2)
    one, other, share = farthest(CHOICES)
    assert (one, other) == ("code", "numbers") and share == pytest.approx(0.875)
    assert specialists(CHOICES) == [
        Specialist(1, 0, "code", 2.0),
        Specialist(1, 1, "prose", 2.0),
        Specialist(2, 0, "numbers", 4.0),
    ]


def test_the_heat_map_has_a_cell_for_each_expert_of_each_layer_and_kind() -> None:
    picture = draw_kinds(CHOICES, "Title")
    told = [shape.text for shape in picture.shapes if isinstance(shape, Label)]
    assert {"Title", "layer 1", "layer 2", *CHOICES} <= set(told)
    cells = [shape for shape in picture.shapes if isinstance(shape, Box) and shape.width > 10]
    assert len(cells) == 3 * 2 * 4 and len({(cell.x, cell.y) for cell in cells}) == len(cells)
    assert max(cell.x + cell.width for cell in cells) < picture.width
    even = {cell.fill for cell in cells if cell.x >= cells[4].x and cell.y < cells[16].y}
    assert len(even) == 1 and cells[0].fill not in even


def test_figures_of_decoding() -> None:
    found = Decoded(((1, 2, 3, 4), (5, 6)), rows=3, drafted=4, accepted=1, seconds=0.5)
    assert (found.tokens, found.acceptance) == (4, 0.25)
    assert found.tokens_per_step == pytest.approx(4 / 3)
    assert Decoded(((1, 2),), rows=1, drafted=0, accepted=0, seconds=0.1).acceptance == 0


def test_counters_are_read_until_they_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(measuring, "time", clock)
    assert settled(lambda: min(int(now[0] / 0.4), 5)) == 5
    assert now[0] >= 5 * 0.4 + measuring.STILL_S


SHOWN = {
    "differing": 0.5,
    "drafts": {},
    "tokens_per_step": 1.4,
    "identical": True,
    "perplexity": 4.0,
    "transformers_perplexity": 4.003,
    "bits_per_byte": 0.6,
}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"identical": False}, "not those without"),
        ({"tokens_per_step": 1.3}, "1.30 tokens a step"),
        ({"perplexity": 4.008}, "0.12 % off"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(changed: Mapping[str, object], problem: str | None) -> None:
    found = Shown(**{**SHOWN, **changed}).problems()  # type: ignore[arg-type]
    assert [problem in told for told in found if problem] == [True] * len(found) == [True] * (problem is not None)
