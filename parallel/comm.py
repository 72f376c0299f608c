"""Group: the ranks that share one axis of the mesh, and the collectives between them.

In rank processes only. A group of one is the same object with identity collectives, so no caller asks for a degree.
CPU tensors travel over gloo, CUDA tensors over NCCL; on CUDA a collective is queued on the current stream and the
host does not wait. It knows no model and no epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class Backend(Protocol):
    """What a group uses of torch's ProcessGroupGloo and ProcessGroupNCCL."""

    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work: ...
    def alltoall_base(self, output: Tensor, input: Tensor, output_rows: list[int], input_rows: list[int]) -> Work: ...
    def barrier(self) -> Work: ...
    def abort(self) -> None: ...


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
            self.backend.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The ranks' tensors joined along dim, in rank order."""
        if self.backend is None:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self.backend.allgather([parts], [tensor.contiguous()]).wait()
        return torch.cat(parts, dim)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """tensor [size, ...]: part r goes to rank r; part r of the result came from rank r."""
        assert tensor.shape[0] == self.size, f"{tuple(tensor.shape)} in a group of {self.size}"
        if self.backend is None:
            return tensor
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self.backend.alltoall_base(received, tensor.contiguous(), [], []).wait()
        return received

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        if self.backend is not None:
            self.backend.barrier().wait()
