"""Experts of DeepSeek models move between ranks under running requests: every token stays, and ranks share the work.

Routers are made to favour the experts of the first rank, so that it has nearly all to do until these are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from echelon import SamplingParams
from echelon.testing import LocalCluster
from echelon.types import ExpertLoad
from parallel.degrees import Degrees
from tests.cluster.calls import eventually
from tests.cluster.conftest import Case, Walker
from tests.cluster.layouts import DEEPSEEK, DEEPSEEK_V3, Layout
from tests.cluster.reference import Reference
from tests.cluster.streams import PROMPT
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.long]

GREEDY = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True, logprobs=0)
PROMPTS = [f"{number} {PROMPT}" for number in range(12)]
FAVOURED = 4  # of eight experts, those that the first of two expert ranks begins with
EVERY_STEPS = 16
LAYOUTS = [
    Layout("deepseek-v3", Degrees(tensor=2, expert=2), DEEPSEEK_V3),
    Layout("deepseek-v2", Degrees(data=2, expert=2), DEEPSEEK),
    Layout("deepseek-v3", Degrees(data=2, expert=2), DEEPSEEK_V3, {"redundant_experts": 2}),
]


def make_skewed(directory: Path, layout: Layout) -> Path:
    """V3 adds a correction to scores; in V2 the others' scores are all the same, and one of the favoured is greater."""
    make_checkpoint(directory, layout.family, **layout.shape)
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            weight[:FAVOURED] += 2.0
        elif name.endswith(".gate.weight") and layout.family == "deepseek-v2":
            weight[FAVOURED:] = 0.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_share_the_work_once_experts_have_moved(
    layout: Layout, walker: Walker, tmp_path: Path, reference_of: Callable[[Path], Reference]
) -> None:
    directory = make_skewed(tmp_path / "model", layout)
    reference = reference_of(directory)
    before = Case("before", walker.serve(directory, layout), reference)
    answer_all(before)
    still = settled(before.cluster)
    copies = layout.flags.get("redundant_experts", 0)
    first = ((0, 1, 2, 3, 4), (4, 5, 6, 7, 0)) if copies else ((0, 1, 2, 3), (4, 5, 6, 7))
    assert {load.slots for load in still} == {first}
    assert all(load.rank_max_over_mean > 1.3 for load in still)

    after = Case("after", walker.serve(directory, layout, rebalance_steps=EVERY_STEPS), reference)
    answer_all(after)
    moved = settled(after.cluster)
    answer_all(after)
    again = settled(after.cluster)
    assert len(moved) == len(again) == len(still)
    for load, one, other in zip(still, moved, again, strict=True):
        assert one.slots != load.slots
        assert sum(map(len, one.slots)) == len(one.rows) + copies
        since = ExpertLoad(
            replica=0,
            epoch=one.epoch,
            layer=one.layer,
            rows=tuple(late - early for early, late in zip(one.rows, other.rows, strict=True)),
            slots=one.slots,
        )
        assert 1.0 <= since.rank_max_over_mean < 0.85 * load.rank_max_over_mean
        if copies:  # of the experts with most rows, which whole experts cannot share so evenly
            assert since.rank_max_over_mean < 1.15


def answer_all(case: Case) -> None:
    """All prompts at once; no answer is lost or cut, and each is transformers'."""
    client = case.cluster.client()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda text: client.generate(text, sampling=GREEDY), PROMPTS))
    for text, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.token_ids) == GREEDY.max_tokens
        expected = case.reference.after_each(text, answer.token_ids)
        assert answer.token_ids == expected.ids
        assert [one.logprob for one in answer.logprobs] == pytest.approx(expected.logprobs, abs=1e-6, rel=0)


def settled(cluster: LocalCluster) -> Sequence[ExpertLoad]:
    """Once ranks, which tell once a second, have told nothing new for some."""
    looks: list[Sequence[ExpertLoad]] = []

    def changing() -> bool:
        looks.append(cluster.client().expert_load())
        return not looks[-1] or looks[-8:].count(looks[-1]) < 8

    list(eventually(changing, timeout_s=60.0, pause_s=0.4))
    assert looks[-1]
    return looks[-1]
