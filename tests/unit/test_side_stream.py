"""Work beside other work: what waits for what on a device with streams, and that nothing changes on one without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.moe import Experts, MixtureOfExperts
from models.router import SoftmaxRouter
from parallel.comm import Group
from parallel.context import solo_context
from parallel.expert import PREFILL, Dispatched, ExpertStep, SplitExperts
from parallel.float8 import SOME_ROWS
from parallel.linear import LEAST_ROWS
from parallel.side_stream import IN_TURN, SideStream

HIDDEN, EXPERTS = 4, 3


class Streams:
    """What is queued, by the stream that it is queued on; streams that wait for others say so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[str] = []
        self.main, self.side = (self._stream(name) for name in ("main", "side"))
        self._current = self.main
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._current)
        monkeypatch.setattr(torch.cuda, "stream", self._enter)

    def note(self, what: str) -> None:
        self.queued.append(f"{self._current.name}: {what}")

    def _stream(self, name: str) -> Any:
        class Stream:
            device = "cuda"

            def wait_stream(_, other: Any) -> None:
                self.queued.append(f"{name} waits for {other.name}")

        stream: Any = Stream()
        stream.name = name
        return stream

    @contextlib.contextmanager
    def _enter(self, stream: Any) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before


def layer(side: SideStream, note: Callable[[str], None]) -> MixtureOfExperts:
    """One of two ranks' partial sums, say, with what each part does told."""
    random = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    class Told(Experts):
        def outputs(self, rows: Tensor, ends: Tensor) -> Tensor:
            note("experts")
            return super().outputs(rows, ends)

    class Dispatcher(SplitExperts):
        def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, step: ExpertStep) -> Dispatched:
            note("dispatch")
            return super().dispatch(rows, expert_ids, weights, step)

        def restore(self, rows: Tensor, total: int, step: ExpertStep) -> Tensor:
            note("combined")
            return rows

    def shared(rows: Tensor, step: ExpertStep) -> Tensor:
        note("shared")
        return rows * 3

    router = SoftmaxRouter(weight(EXPERTS, HIDDEN), 2, normalizes=True, rounds=False)
    experts = Told(weight(EXPERTS, 2 * HIDDEN, HIDDEN), weight(EXPERTS, HIDDEN, HIDDEN), F.silu)
    return MixtureOfExperts(router, experts, Dispatcher(Group(), EXPERTS), shared, side)


def test_shared_experts_run_beside_the_others_and_are_waited_for_when_they_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    in_turn: list[str] = []
    expected = layer(IN_TURN, in_turn.append)(hidden.clone(), PREFILL)
    assert in_turn == ["dispatch", "experts", "shared", "combined"]
    streams = Streams(monkeypatch)
    found = layer(SideStream(streams.side), streams.note)(hidden.clone(), PREFILL)
    assert torch.equal(found, expected)
    assert streams.queued == [
        "side waits for main",
        "side: shared",
        "main: dispatch",
        "main: experts",
        "main waits for side",
        "main: combined",
    ]


@pytest.mark.parametrize(("most", "beside"), [(4, False), (5, True)])
def test_more_rows_than_leave_room_beside_the_experts_are_computed_in_turn(
    most: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    moe = replace(layer(SideStream(streams.side), streams.note), beside_rows=most)
    moe(torch.zeros(5, HIDDEN, dtype=torch.float64), PREFILL)
    assert ("side: shared" in streams.queued) is beside and ("main: shared" in streams.queued) is not beside


def test_shared_experts_are_tried_with_as_many_rows_as_cut_a_product_otherwise() -> None:
    tried: list[int] = []

    def shared(rows: Tensor, step: ExpertStep) -> Tensor:
        tried.append(len(rows))
        return rows

    replace(layer(IN_TURN, print), shared=shared).try_kernels(torch.zeros(1, HIDDEN, dtype=torch.float64))
    assert tried == [*LEAST_ROWS, SOME_ROWS]


def test_a_cpu_has_no_stream_beside() -> None:
    assert solo_context(torch.device("cpu"), torch.float32).beside == IN_TURN
