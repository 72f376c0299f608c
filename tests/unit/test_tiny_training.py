"""Training the tiny model: a corpus that keeps its sides apart, a run that goes on where it was left, true figures."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from dataclasses import replace
from email.message import Message
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from echelon.cli.trace.drawing import Line
from examples.tiny import corpus, train
from examples.tiny.corpus import is_held_out, read_corpus, without_duplicates, write_corpus
from examples.tiny.curve import MOST_POINTS, draw_curve, thinned
from examples.tiny.evaluate import compressed_bits_per_byte, expert_load, score
from examples.tiny.export import read_weights
from examples.tiny.held_out import chosen, write_held_out
from examples.tiny.layers import Mixture
from examples.tiny.model import TinyModel
from examples.tiny.sources import Document, declared_licence, documents
from examples.tiny.train import SHAPES
from examples.tiny.training import WARM_UP, Progress, Settings, Trainer, rate_at

MICRO = replace(
    SHAPES["small"], vocab_size=300, hidden_size=16, intermediate_size=16, layers=2, num_attention_heads=2, context=16
)


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(seed: int = 0) -> TinyModel:
    made = TinyModel(MICRO)
    made.initialise(seed)
    return made


def ids_of(count: int, seed: int = 0) -> Any:
    """A text that can be learnt: counting up, with a step now and then."""
    steps = np.random.default_rng(seed).integers(1, 3, count)
    return (steps.cumsum() % MICRO.vocab_size).astype(np.uint16)


def settings_of(steps: int) -> Settings:
    return Settings(seconds=1e9, steps=steps, batch=4, peak_rate=1e-2)


def test_it_learns(tmp_path: Path) -> None:
    trainer = Trainer(model_of(), ids_of(3000), settings_of(40), tmp_path)
    seen: set[tuple[int, ...]] = set()
    trainer.model.register_forward_pre_hook(lambda _, given: seen.update(map(tuple, given[0].tolist())))
    curve = trainer.run(lambda line: None).curve
    assert len(seen) > 0.9 * 40 * 4, "each step draws other windows"
    assert all(len(window) == MICRO.context + 2 for window in seen)
    assert [entry[0] for entry in curve] == [20, 40]
    guessing = math.log(MICRO.vocab_size)
    assert all(last < first < guessing for first, last in zip(curve[0][1:], curve[1][1:], strict=True))
    assert curve[1][1] < guessing - 0.5
    assert trainer.tokens_seen == 40 * 4 * 16


@pytest.mark.long
def test_torch_compiles_both_losses_into_one_graph() -> None:
    model, tokens = model_of(), torch.from_numpy(ids_of(36).astype(np.int64)).view(2, 18)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(tokens)
        assert all(torch.equal(one, other) for one, other in zip(compiled, model(tokens), strict=True))


def test_a_run_that_paused_ends_as_one_that_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second: three steps, then the rest from the state."""
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Trainer(model_of(), ids_of(900), settings_of(8), tmp_path / "whole")
    whole.run(lambda line: None)
    parts = Trainer(model_of(), ids_of(900), settings_of(8), tmp_path / "parts")
    assert parts.run(lambda line: None, call_s=3).step == 3
    again = Trainer(model_of(5), ids_of(900), settings_of(8), tmp_path / "parts")
    assert again.progress.step == 3
    again.run(lambda line: None)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert any(mixture.correction.any() for mixture in again.model.mixtures)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    assert 0 < rate_at(0, 1.0) < 0.02
    assert rate_at(WARM_UP, 1.0) == 1.0
    assert rate_at(0.5 + WARM_UP / 2, 1.0) == pytest.approx(0.5)
    assert rate_at(1, 1.0) == pytest.approx(0)


def test_a_run_is_over_by_steps_or_by_time() -> None:
    assert Progress(5, 50).done(Settings(seconds=100)) == 0.5
    assert Progress(5, 50).done(Settings(seconds=100, steps=20)) == 0.25
    assert Progress(5, 500).done(Settings(seconds=100)) == 1


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="18 tokens, of which no window of 16 \\+ 2 is drawn"):
        Trainer(model_of(), ids_of(18), settings_of(1), tmp_path)


def test_the_bias_evens_out_what_experts_are_given() -> None:
    mixture = Mixture(MICRO)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        mixture.gate.copy_(torch.randn(mixture.gate.shape, generator=random))
        mixture.correction.copy_(torch.linspace(-0.3, 0.3, MICRO.n_routed_experts))
    hidden = torch.randn(1, 400, MICRO.hidden_size, generator=random)
    before = mixture.shares(hidden)[1]
    for _ in range(300):
        mixture.balance(mixture.shares(hidden)[1], 0.01)
    shares, after = mixture.shares(hidden)
    assert before.sum() == after.sum() == 400 * MICRO.num_experts_per_tok
    assert before.max() > 1.5 * before.mean() and after.max() < 1.1 * after.mean()
    torch.testing.assert_close(shares.sum(-1), torch.full((1, 400), 2.0))  # the chosen ones' 1, and the shared one's


def test_the_score_is_the_cross_entropy_of_every_token() -> None:
    """Of documents of one window, of two, and of one token."""
    model = model_of(3).eval()
    texts = [Document("here", str(size), "x" * size) for size in (5, 30, 1)]
    ids = [np.append(ids_of(size, size), 1).astype(np.uint16) for size in (9, 22, 1)]  # an end token behind each
    total, drafts = score(model, texts, ids)
    assert (total.documents, total.text_bytes, total.scored) == (3, 36, 8 + 21)
    nats = 0.0
    for first, last, scored in ((0, 9, 1), (0, 15, 1), (7, 22, 15)):  # 15 tokens fit, every other is 7 further
        tokens = torch.from_numpy(ids[0 if last == 9 else 1][first:last].astype(np.int64))[None]
        logits = model.both_logits(tokens)[0][0, scored - first - 1 : -1]
        nats += F.cross_entropy(logits, tokens[0, scored - first :], reduction="sum").item()
    assert total.nats == pytest.approx(nats, rel=1e-5)
    assert drafts.drafted == 7 + 13 + 6 and 0 <= drafts.accepted <= drafts.drafted
    load = expert_load(model, ids)
    assert len(load) == MICRO.routed_layers - 1 and sum(load[0]) == pytest.approx(MICRO.n_routed_experts)


def test_drafts_count_where_they_are_the_models_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always holds the same token for likeliest agrees with itself; one that alternates does not."""
    model = model_of()
    ids = [np.arange(12, dtype=np.uint16)]

    def logits(second: int) -> Any:
        def both(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first = torch.zeros(*tokens.shape, MICRO.vocab_size)
            first[..., 7] = 1.0
            further = torch.zeros_like(first[:, 1:])
            further[..., second] = 1.0
            return first, further

        return both

    for second, accepted in ((7, 9), (8, 0)):
        monkeypatch.setattr(model, "both_logits", logits(second))
        total, drafts = score(model, [Document("here", "", "x")], ids)
        assert (drafts.drafted, drafts.accepted) == (9, accepted) and total.correct == 1
    assert drafts.tokens_per_step == 1


def test_both_compressors_have_the_whole_text() -> None:
    texts = [Document("here", str(number), "again and again\n" * 50) for number in range(4)]
    whole = b"again and again\n" * 200
    found = compressed_bits_per_byte(texts)
    assert found[0] == 8 * len(gzip.compress(whole, 9, mtime=0)) / len(whole)
    assert found[1] == 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / len(whole)


def prose(number: int, lines: int = 12) -> str:
    return "".join(f"line {line} of the document with the number {number}\n" for line in range(lines))


def test_sides_are_kept_by_content_and_share_no_documents() -> None:
    found = [Document("here", f"{number}.py", prose(number)) for number in range(400)]
    kept, held_out = without_duplicates([*found, *found])
    assert len(kept) + len(held_out) == 400 and 1 <= len(held_out) <= 20
    assert all(is_held_out(document.text) for document in held_out)
    assert not any(is_held_out(document.text) for document in kept)
    assert without_duplicates(reversed(found)) == (kept, held_out)
    other = Document("there", "copy.py", held_out[0].text + prose(1000, 4))
    assert other not in without_duplicates([*found, other])[0], "three quarters of it are held out"
    fresh = Document("there", "new.py", held_out[0].text[:100] + prose(1001))
    assert fresh in without_duplicates([*found, fresh])[0]


def test_a_corpus_comes_back_and_is_not_changed_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "HELD_OUT_SHARE", 0.3)
    path = tmp_path / "corpus.jsonl.xz"
    found = [Document("python", f"{number}.py", prose(number)) for number in range(20)]
    manifest = write_corpus(path, [*found, Document("python", "short.py", "x")], [{"source": "python"}])
    made = read_corpus(path)
    assert {*made.training, *made.held_out} == {*found} and made.manifest == manifest
    assert made.training and made.held_out
    changed = lzma.decompress(path.read_bytes()).replace(b"number 7", b"number 8")
    path.write_bytes(lzma.compress(changed))
    with pytest.raises(ValueError, match="not what its manifest says"):
        read_corpus(path)


def test_what_ships_is_pythons_and_small(tmp_path: Path) -> None:
    """As long as it fits; what does not is left out, and what comes behind it may fit again."""
    sizes = (300, 900, 400, 500)
    found = [Document("python", f"{size}.py", "é" * (size // 2)) for size in sizes]
    found.insert(0, Document("rich", "rich.py", "x" * 10))
    assert [document.path for document in chosen(found, 1000)] == ["300.py", "400.py"]
    assert write_held_out(found, tmp_path) == sum(sizes)
    lines = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [document.text for document in found[1:]]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (tmp_path / "LICENSE-PYTHON.txt").read_text()


class Declares:
    """In place of an installed package."""

    def __init__(self, **fields: str) -> None:
        self.metadata = Message()
        for name, value in {"Name": "x", **fields}.items():
            self.metadata[name.replace("_", "-")] = value


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"License_Expression": "MIT"}, "MIT"),
        ({"License": "Apache 2.0"}, "Apache 2.0"),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, "BSD License"),
        ({"License_Expression": "MPL-2.0 AND MIT"}, None),
        ({"License": "LGPLv3"}, None),
        ({}, None),
    ],
)
def test_only_licences_that_permit_it(fields: dict[str, str], line: str | None) -> None:
    package: Distribution = Declares(**fields)  # type: ignore[assignment]
    if line is None:
        with pytest.raises(ValueError, match="is not known to permit this"):
            declared_licence(package)
    else:
        assert declared_licence(package) == line


def test_a_package_is_its_files_and_its_description() -> None:
    found = list(documents("pluggy"))
    assert found == list(documents("pluggy"))
    paths = {document.path for document in found}
    assert {"pluggy/_hooks.py", "README"} <= paths and not any("site-packages" in path for path in paths)


def test_the_curve_is_thinned_and_within_its_frame() -> None:
    curve = [(20 * step, 9 * math.exp(-step / 300) + 2, 9 * math.exp(-step / 300) + 3) for step in range(1, 1001)]
    assert len(thinned(curve)) <= MOST_POINTS and thinned(curve[:3]) == curve[:3]
    picture = draw_curve(curve, 2.5)
    lines = [shape for shape in picture.shapes if isinstance(shape, Line)]
    assert all(0 <= line.x1 <= 760 and 0 <= line.y2 <= 420 for line in lines) and len(lines) > 400


def test_the_script_trains_pauses_goes_on_and_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", MICRO)
    monkeypatch.setattr(corpus, "HELD_OUT_SHARE", 0.3)
    monkeypatch.setattr(train, "to_png", lambda picture: b"")
    monkeypatch.setattr("examples.tiny.training.LOGGED_STEPS", 2)
    path, output = tmp_path / "corpus.jsonl.xz", tmp_path / "out"
    named = [{"source": "pluggy", "version": "1", "licence": "MIT"}]
    write_corpus(path, [document for document in documents("pluggy") if len(document.text) < 6000], named)
    flags = ["--corpus", str(path), "--output", str(output), "--shape", "small", "--device", "cpu", "--batch", "2"]
    assert train.train(train.parser().parse_args([*flags, "--steps", "6", "--pause-after", "0"])) is None
    assert not (output / "model").exists()
    options = train.parser().parse_args([*flags, "--steps", "6"])
    report = train.train(options)
    assert report is not None and report["steps"] == 6 and report["tokens_seen"] == 6 * 2 * 16
    assert json.loads((output / "model/report.json").read_text()) == report
    card = (output / "model/README.md").read_text()
    assert f"| perplexity per token | {report['perplexity']:.3f} |" in card and "| pluggy 1 | MIT |" in card
    assert {"config.json", "model.safetensors", "tokenizer.json", "loss.png"} <= {
        path.name for path in (output / "model").iterdir()
    }
    train.show(report)
    shipped, prepared = TinyModel(MICRO), train.prepare(options)
    read_weights(shipped, output / "model")
    again = score(shipped, prepared.corpus.held_out, prepared.held_out)[0]
    assert again.nats_per_token == pytest.approx(report["held_out_loss"], rel=1e-9), "what was measured is what ships"
