"""Where kernels run, whole models by kernels, and that nothing is left to be compiled once a rank serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.quantize_fp8 import quantise_checkpoint
from parallel import kernels
from parallel.context import solo_context
from tests.kernel_device import DEVICE
from tests.tiny import make_checkpoint
from tests.unit.plans import CPU, FENCE, Ask, answers_of, new_runner, plans_of
from worker.memory import largest_step, rehearse, rehearsed_steps
from worker.plan import StepPlan, decode, encode
from worker.runner import RunnerLimits

# isort: split
# Not without Triton: this file is skipped before.
from triton.runtime.interpreter import InterpretedFunction

from parallel.kernels import by_slot, trial

interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels of whole models are interpreted")
ASKS = [
    Ask(tuple(range(3, 3 + length)), 3, slot=slot, start=slot, chunk=9, logprobs=0)
    for slot, length in enumerate((1, 17))
]
LATER = (1, 1, 1), (2, 3, 1), (2, 600, 2), (1, 40, 30), (20, 2, 19), (60, 2, 59), (1, 90, 70)  # of steps
Variant = tuple[object, ...]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the CPU had kernels, of float32 too, and few processors."""
    monkeypatch.setattr(kernels, "can_run", lambda device: True)
    monkeypatch.setattr(kernels, "has_float8", lambda device: True)
    monkeypatch.setattr(kernels, "FLOAT8_COLUMNS", 16)
    monkeypatch.setattr(kernels, "DTYPES", (torch.float16, torch.float32))
    device = SimpleNamespace(multi_processor_count=4, shared_memory_per_multiprocessor=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_: device)
    return monkeypatch


def logprobs(directory: Path) -> list[list[float]]:
    """Of the ids that requests of the tiny model are answered with, and the ids."""
    runner, plans = new_runner(directory, solo_context(CPU, torch.float32, FENCE.epoch)), plans_of(ASKS)
    answers = answers_of(ASKS, plans, [runner.run(decode(encode(plan))) for plan in plans])
    return [[*map(float, answer.ids), *(found.logprob for found in answer.logprobs if found)] for answer in answers]


@interpreted
@pytest.mark.parametrize("family", ["qwen3-moe", "gemma2", "phi3", "deepseek-v2"])
def test_models_answer_as_they_do_without_kernels(family: str, tmp_path: Path, on_cpu: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path / family, family)
    with on_cpu.context() as plain:
        plain.setattr(kernels, "can_run", lambda device: False)
        expected = logprobs(directory)
    for found, wanted in zip(logprobs(directory), expected, strict=True):
        assert found == pytest.approx(wanted, abs=2e-5)


def variants(on_cpu: pytest.MonkeyPatch, runs: Callable[[], object]) -> set[Variant]:
    """What would have been compiled for what is launched meanwhile: kernels by what they are specialised for."""
    seen: set[Variant] = set()
    run = InterpretedFunction.run

    def watched(kernel: Any, *arguments: Any, **options: Any) -> object:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        left = kernel.kwargs["do_not_specialize"] or ()
        special = [special_of(name, value) for name, value in named.items() if name not in (*left, "grid", "warmup")]
        seen.add((kernel.__name__, *special))
        # What others compute matters to nobody here, but these are places of rows.
        return run(kernel, *arguments, **options) if kernel.__name__ == "_place" else None

    with on_cpu.context() as patched:
        patched.setattr(InterpretedFunction, "run", watched)
        runs()
    return seen


def special_of(name: str, value: Any) -> object:
    """As Triton has it: a constant itself, of an address whether 16 divides it, of a number also whether it is 1."""
    if name.isupper() or name.startswith("num_"):
        return name, value
    if isinstance(value, torch.Tensor):
        return name, value.dtype, value.data_ptr() % 16 == 0
    return name, type(value), isinstance(value, int) and (value == 1, value % 16 == 0)


@interpreted
@pytest.mark.parametrize("graphs", [(), (3, 1)], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gemma2", "deepseek-v2", "qwen3-moe, kept", "llama, kept"])
def test_nothing_is_left_to_be_compiled_in_a_step_with_a_deadline(
    family: str, graphs: tuple[int, ...], tmp_path: Path, on_cpu: pytest.MonkeyPatch
) -> None:
    """With graphs of few rows, what is later is all that has none: prompts beside decode rows, and more rows."""
    layers = {"num_hidden_layers": 2, "sliding_window": 300} if family == "gemma2" else {"num_hidden_layers": 2}
    family, _, kept = family.partition(", ")
    directory = make_checkpoint(tmp_path / family, family, max_position_embeddings=2048, **layers)
    if kept:
        quantise_checkpoint(directory, tmp_path / "float8", (8, 16))
        directory = tmp_path / "float8"
    context = solo_context(CPU, torch.float16, FENCE.epoch)
    limits = RunnerLimits(max_running=70, max_context=1200, block_tokens=16)

    def run(plan: StepPlan) -> None:
        new_runner(directory, context, limits, 1, keep_float8=bool(kept)).run(decode(encode(plan)))

    def before() -> None:
        runner = new_runner(directory, context, limits, 1, graphs=graphs, keep_float8=bool(kept))
        rehearse(runner, rehearsed_steps(3, 1200, 72 if kept else 40, FENCE.epoch, bool(graphs)), context)

    def later() -> None:
        for running, stored, tokens in LATER:
            run(largest_step(running, stored + 1, tokens, FENCE.epoch))

    known = variants(on_cpu, before)
    unknown = variants(on_cpu, later) - known
    assert not unknown, unknown
    if "moe" in family or "deepseek" in family:  # what rows enough for it would need
        assert {"_take", "_gate", "_sum", "_count_part", "_place_part"} <= {name for name, *_ in known}


@interpreted
def test_what_sorts_many_choices_is_tried_with_one(on_cpu: pytest.MonkeyPatch) -> None:
    many = torch.zeros(by_slot.MOST_CHOICES + 1, dtype=torch.int64)
    known = variants(on_cpu, lambda: by_slot.try_parts(5, CPU))
    assert variants(on_cpu, lambda: by_slot.by_slot(many, 5)) == known and len(known) == 2


@pytest.mark.parametrize("broken", [RuntimeError("no C compiler"), PermissionError("a folder")], ids=repr)
def test_where_no_kernel_can_be_compiled_torch_stands_in(broken: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device: torch.device) -> None:
        raise broken

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trial, "launch", launch)
    found_out = kernels._work_on.__wrapped__  # not what other tests are told afterwards
    assert not found_out(torch.device("cuda"))
    monkeypatch.setattr(trial, "launch", lambda device: None)
    assert found_out(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not found_out(torch.device("cuda"))


def test_the_trial_is_a_kernel_that_writes() -> None:
    trial.launch(DEVICE)
