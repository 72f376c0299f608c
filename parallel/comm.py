"""Group: the ranks that share one axis of the mesh, and the collectives between them; Channel: one way between two.

In rank processes only. A group of one is the same object with identity collectives, so no caller asks for a degree.
CPU tensors travel over gloo, CUDA tensors over NCCL; on CUDA a collective is queued on the current stream and the
host does not wait. It knows no model and no epoch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions, ReduceScatterOptions


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class Backend(Protocol):
    """What a group uses of torch's ProcessGroupGloo and ProcessGroupNCCL. None: NCCL has queued it on the stream."""

    def allreduce(self, tensors: list[Tensor], options: AllreduceOptions) -> Work | None: ...
    def _allgather_base(self, output: Tensor, input: Tensor, options: AllgatherOptions) -> Work | None: ...
    def _reduce_scatter_base(self, output: Tensor, input: Tensor, options: ReduceScatterOptions) -> Work | None: ...
    def alltoall_base(
        self, output: Tensor, input: Tensor, output_rows: list[int], input_rows: list[int], options: AllToAllOptions
    ) -> Work | None: ...
    def barrier(self) -> Work: ...
    def send(self, tensors: list[Tensor], to_rank: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], from_rank: int, tag: int) -> Work: ...
    def abort(self) -> None: ...


def of_peer(error: BaseException) -> bool:
    """Whether an error came out of a collective, a channel or the rendezvous: another rank or the way to it is gone."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return False
    inside = trace is not None and trace.tb_frame.f_code.co_filename == __file__
    return inside or isinstance(error, torch.distributed.DistError)


@dataclass(frozen=True, slots=True)
class Group:
    """rank of size. Every rank of the group must call the same collectives in the same order with equal shapes."""

    rank: int = 0
    size: int = 1
    backend: Backend | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"
        assert (self.backend is None) == (self.size == 1), "a group of several needs a backend, a group of one has none"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.backend is not None:
            _done(self.backend.allreduce([tensor], _in_turn(AllreduceOptions())))
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """tensor [n, ...] -> [size * n, ...]: the ranks' tensors, in rank order."""
        if self.backend is None:
            return tensor
        joined = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        _done(self.backend._allgather_base(joined, tensor.contiguous(), _in_turn(AllgatherOptions())))
        return joined

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """tensor [size, ...]: part r goes to rank r; part r of the result came from rank r."""
        assert tensor.shape[0] == self.size, f"{tuple(tensor.shape)} in a group of {self.size}"
        if self.backend is None:
            return tensor
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        _done(self.backend.alltoall_base(received, tensor.contiguous(), [], [], _in_turn(AllToAllOptions())))
        return received

    def all_to_all_rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """The first sent[0] rows go to rank 0, the next sent[1] to rank 1, and so on; received[r] rows come from
        rank r, and lie in the same order. What one rank sends another must be what that one receives."""
        if self.backend is None:
            return rows
        arrived = rows.new_empty((sum(received), *rows.shape[1:]))
        _done(self.backend.alltoall_base(arrived, rows.contiguous(), received, sent, _in_turn(AllToAllOptions())))
        return arrived

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """tensor [size * n, ...] -> [n, ...]: the sum over ranks of the rank-th n rows."""
        assert tensor.shape[0] % self.size == 0, f"{tuple(tensor.shape)} in a group of {self.size}"
        if self.backend is None:
            return tensor
        mine = tensor.new_empty((tensor.shape[0] // self.size, *tensor.shape[1:]))
        _done(self.backend._reduce_scatter_base(mine, tensor.contiguous(), _in_turn(ReduceScatterOptions())))
        return mine

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        if self.backend is not None:
            self.backend.barrier().wait()


Options = TypeVar("Options", AllreduceOptions, AllgatherOptions, ReduceScatterOptions, AllToAllOptions)


def _in_turn(options: Options) -> Options:
    """On the current stream: NCCL would else queue it on one of its own, with an event there and one back."""
    options.asyncOp = False
    return options


def _done(work: Work | None) -> None:
    """On a CPU, waits for it."""
    if work is not None:
        work.wait()


class Channel:
    """Tensors from one rank to another, in order, over a communicator that only these two have.

    room: how many may be on their way before the sender waits; on CUDA only its stream does. Both know every shape.
    """

    def __init__(self, backend: Backend, device: torch.device, room: int) -> None:
        assert room >= 1, f"room for {room}"
        self.backend = backend
        self._device = device
        self._room = room
        self._sending: deque[tuple[Work, Tensor]] = deque()
        # What is received must not wait for what was computed before it was asked for.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensor: Tensor) -> None:
        """Put a tensor on its way; it must not be changed afterwards."""
        while len(self._sending) >= self._room:
            work, _ = self._sending.popleft()
            work.wait()
        kept = tensor.contiguous()
        self._sending.append((self.backend.send([kept], 1, 0), kept))

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor. A CPU waits for it here; on CUDA what reads it waits."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
            work = self.backend.recv([tensor], 0, 0)
        work.wait()
        if self._stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensor
