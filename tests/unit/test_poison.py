"""Scores that are not finite: one request's are its own fault and nobody else notices; several requests' the device's.

The poison is real: a checkpoint in which the embedding of one token is NaN, so that whatever has it in its prompt has
nothing but NaN behind it, in its keys and values too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from echelon.internal.link import Assign, Command, Progress, Released
from parallel.degrees import Degrees
from parallel.largest import NOT_FINITE, largest
from tests.tiny import POISON, make_poisoned_checkpoint
from tests.unit.paged_device import request
from tests.unit.pipelines import Pipeline
from tests.unit.plans import FENCE
from worker.engine import Broken, Commanded, Completed, Effect, EngineCore, LinkOpened, SendReport
from worker.limits import EngineLimits
from worker.plan import NO_ID, NON_FINITE, StepResult
from worker.scheduler import Scheduler
from worker.sequence import SPOILT, Outcome
from worker.slots import SlotState

COMMON = tuple(range(10, 19))  # two full blocks, and the beginning of a third


def asked(name: str, *prompt: int, attempt: int = 1, generated: tuple[int, ...] = ()) -> Assign:
    bias = ((POISON, -100.0),)
    progress = [Progress(0, generated)]
    return request(name, prompt, 6, attempt=attempt, choices=progress, logit_bias=bias, temperature=0.8)


def ask_all() -> list[Assign]:
    return [asked("a", *COMMON, 30, 31), asked("p", *COMMON, POISON, 32), asked("b", *COMMON, 33), asked("c", 40)]


Ends = dict[str, tuple[list[int], str]]  # by request: its ids, and why it failed


def answers(checkpoint: Path, degrees: Degrees, assigns: list[Assign]) -> tuple[Ends, int]:
    """As a coordinator has it: what is let go of without a reason is assigned again. And how often that was."""
    limits = EngineLimits(
        max_running=4, kv_blocks=32, block_tokens=4, max_step_tokens=12, max_context=64,
        stages=degrees.pipeline, depth=degrees.pipeline, data=degrees.data,
    )  # fmt: skip
    ends: Ends = {assign.request: ([], "") for assign in assigns}
    wanted, again = {assign.request: assign for assign in assigns}, 0
    with Pipeline(checkpoint, degrees, limits) as pipeline:
        while wanted:
            pipeline.outcome = Outcome()
            outcome = pipeline.answer(wanted.values())
            for run in outcome.runs:
                ends[run.request][0].extend(run.ids)
            finished = {run.request for run in outcome.runs if run.finish}
            for released in outcome.released:
                assign = wanted.pop(released.request)
                ends[released.request] = ends[released.request][0], released.reason
                if not released.error and released.request not in finished:
                    again += 1
                    held = tuple(ends[released.request][0])
                    wanted[released.request] = asked(
                        released.request, *assign.prompt, attempt=assign.attempt + 1, generated=held
                    )
    return ends, again


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("llama", Degrees()),
        ("llama", Degrees(tensor=2)),
        ("llama", Degrees(pipeline=2)),
        ("qwen3-moe", Degrees(data=2, expert=2)),
        ("deepseek-v3", Degrees(tensor=2, expert=2)),
        ("deepseek-v2", Degrees(data=2, expert=2)),
    ],
    ids=["one rank", "tensor 2", "pipeline 2", "data 2", "latent, tensor and expert 2", "latent, data and expert 2"],
)
def test_a_poisonous_request_fails_and_all_others_are_answered_as_without_it(
    tmp_path: Path, family: str, degrees: Degrees
) -> None:
    checkpoint = make_poisoned_checkpoint(tmp_path, family)
    undisturbed, _ = answers(checkpoint, degrees, [assign for assign in ask_all() if assign.request != "p"])
    ends, _ = answers(checkpoint, degrees, ask_all())
    assert ends.pop("p") == ([], "NON_FINITE")
    assert ends == undisturbed
    assert all(len(ids) == 6 for ids, _ in ends.values())


def test_what_a_poisonous_request_left_in_the_cache_is_not_found(tmp_path: Path) -> None:
    """In the layer above, the NaN of its last token is in the keys of the common beginning: 0 times NaN is NaN."""
    checkpoint = make_poisoned_checkpoint(tmp_path)
    alone, _ = answers(checkpoint, Degrees(), [asked("late", *COMMON, 34)])
    limits = EngineLimits(max_running=4, kv_blocks=32, block_tokens=4, max_step_tokens=32, max_context=64)
    with Pipeline(checkpoint, Degrees(), limits) as pipeline:
        pipeline.answer([asked("p", *COMMON, POISON)])
        assert pipeline.outcome.released == [Released("p", 1, SPOILT, "NON_FINITE")]
        outcome = pipeline.answer([asked("late", *COMMON, 34)])
    assert [token for run in outcome.runs for token in run.ids] == alone["late"][0]


@pytest.mark.parametrize(
    ("family", "degrees", "spoilt", "layer", "position"),
    [
        ("llama", Degrees(), "model.embed_tokens.weight", 0, 2),  # the third token is poison
        ("llama", Degrees(), "model.layers.0.self_attn.o_proj.weight", 1, 0),
        ("llama", Degrees(), "model.layers.1.mlp.down_proj.weight", "behind the keys of layer 1", None),
        ("deepseek-v3", Degrees(tensor=2, expert=2), "model.embed_tokens.weight", 0, 2),
        ("deepseek-v3", Degrees(tensor=2, expert=2), "model.layers.1.mlp.experts.", 2, 0),
        ("deepseek-v2", Degrees(data=2, expert=2), "model.layers.1.mlp.shared_experts.", 2, 0),
    ],
)
def test_the_log_says_in_which_layer_it_began(
    tmp_path: Path, family: str, degrees: Degrees, spoilt: str, layer: int | str, position: int | None
) -> None:
    checkpoint = make_poisoned_checkpoint(tmp_path, family, **({"num_hidden_layers": 3} if family != "llama" else {}))
    if "layers" in spoilt:
        weights = load_file(checkpoint / "model.safetensors")
        weights["model.embed_tokens.weight"][POISON] = 0.1
        for name, weight in weights.items():
            if name.startswith(spoilt):
                weight[:] = torch.nan
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    limits = EngineLimits(
        max_running=4, kv_blocks=32, block_tokens=4, max_step_tokens=32, max_context=64, data=degrees.data
    )
    with capture_logs() as told, Pipeline(checkpoint, degrees, limits) as pipeline:
        pipeline.answer([asked("p", 10, 11, POISON, 12, 13)])
    found = [
        (entry["layer"], entry.get("position"), entry["tokens"])
        for entry in told
        if entry["event"] == "scores are not finite"
    ]
    assert found[0] == (layer, position, 5)
    assert found[1:] in ([], [(layer, position, 6)])  # the next step was on its way


def test_scores_are_finite_row_by_row() -> None:
    logits = torch.zeros(5, 7, dtype=torch.bfloat16)
    logits[1, 3], logits[2, 0], logits[3, 6] = torch.nan, torch.inf, -torch.inf
    logits[4] = torch.finfo(torch.bfloat16).max
    assert (largest(logits)[:, 1] != NOT_FINITE).tolist() == [True, False, False, False, True]


# In the scheduler and the engine.


def limits(depth: int = 1) -> EngineLimits:
    return EngineLimits(max_running=4, kv_blocks=32, block_tokens=4, max_step_tokens=32, max_context=64, depth=depth)


def plan(scheduler: Scheduler) -> int:
    made = scheduler.schedule(FENCE)
    assert made is not None
    return len([row for row in made.rows if row.sampled])


def result(step: int, rows: int, *spoilt: int) -> StepResult:
    ids = tuple(NON_FINITE if row in spoilt else 7 for row in range(rows))
    return StepResult(step, ids, (None,) * rows, non_finite=spoilt)


def test_what_began_with_what_others_computed_begins_anew_before_it_fails() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", *COMMON, 30))
    scheduler.commit(result(1, plan(scheduler)))
    scheduler.add(asked("b", *COMMON, 31))
    assert plan(scheduler) == 2
    assert scheduler.commit(result(2, 2, 1)).released == [Released("b", 1)]
    scheduler.add(asked("b", *COMMON, 31, attempt=2))
    assert plan(scheduler) == 2
    assert scheduler.commit(result(3, 2, 1)).released == [Released("b", 2, SPOILT, "NON_FINITE")]
    scheduler.release("a")
    scheduler.check_integrity()


def engine(*assigns: Assign) -> EngineCore:
    """That has been given these, and whose first step computes a part of each."""
    core = EngineCore(FENCE, limits())
    core.step(0.0, LinkOpened(1))
    core.step(0.0, Commanded(Command(FENCE, 0, assigns)))
    return core


def complete(core: EngineCore, *spoilt: str) -> list[Effect]:
    """The oldest step, with no finite scores for any row of these requests."""
    flight = core._lanes.schedulers[0].flights[0]
    rows = [row for row, sequence in enumerate(flight.sampled) if sequence.assign.request in spoilt]
    return core.step(0.0, Completed(result(flight.step, len(flight.sampled), *rows)))


def test_several_rows_of_one_request_are_one_requests_fault() -> None:
    core = engine(request("a", COMMON, 6, choices=[Progress(choice) for choice in range(3)]), asked("b", 40))
    complete(core)
    (report,) = [effect for effect in complete(core, "a") if isinstance(effect, SendReport)]
    assert [released.reason for released in report.report.released] == ["NON_FINITE"]
    assert {run.request for run in report.report.runs} == {"b"}


def test_several_requests_at_once_are_the_devices_fault_and_nothing_of_the_step_is_believed() -> None:
    core = engine(asked("a", 30), asked("b", 40), asked("c", 50))
    (broken,) = complete(core, "a", "c")
    assert broken == Broken(1, "step 1: the scores of 2 requests are not finite (NaN or infinite)", ("a", "c"))
    assert core.step(0.0, Completed(result(2, 3))) == [], "nor of a later one"
    assert core.in_steps(1, 2) == ("a", "b", "c")


def test_who_has_failed_already_makes_nobody_elses_row_the_devices_fault() -> None:
    core = engine(asked("a", 30), asked("b", 40))
    complete(core, "a")
    told = complete(core, "a", "b") + complete(core)
    (report,) = [effect for effect in told if isinstance(effect, SendReport)]
    assert [released.request for released in report.report.released] == ["b"]


def test_an_id_that_was_not_drawn_is_no_place_in_the_vocabulary() -> None:
    state, zeros = SlotState(2, 8, 4, torch.device("cpu")), torch.zeros(2, dtype=torch.int64)
    state.write(torch.tensor([0, 1]), zeros, torch.tensor([NON_FINITE, NO_ID], dtype=torch.float64))
    assert state.history[:, 0].tolist() == [0, 0]


def test_rows_of_what_has_ended_do_not_count() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 30, 31))
    plan(scheduler)
    plan(scheduler)
    assert scheduler.commit(result(1, 1, 0)).released[0].reason == "NON_FINITE"
    assert scheduler.commit(result(2, 1, 0)).released == []


def test_a_row_that_broke_its_constraint_is_not_one_of_these() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 30, 31))
    plan(scheduler)
    outcome = scheduler.commit(StepResult(1, (NO_ID,), (None,), faults=((0, "it broke"),)))
    assert outcome.released == [Released("a", 1, "it broke", "CONSTRAINT_FAILED")]
