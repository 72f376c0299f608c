"""The devices of a plan: what a GPU holds, reads, computes and sends, and how long a collective takes at least.

Pure, for the planner; it knows no model. Numbers of a device are those of its data sheet, and a share of each is
taken, which was measured on two H200 of one node (NVLink, torch 2.11, NCCL 2.28): no device gives what its sheet says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Measured of the data sheet's: 4.49 of 4.8 TB/s read, 802 of 989 TFLOP/s (bf16, 8192^3), 329 of 450 GB/s (all-reduce of
# 1 GiB).
READ_SHARE, MATMUL_SHARE, LINK_SHARE = 0.935, 0.81, 0.73
NODE_LATENCY_S = 9.3e-6  # of an all-reduce of 8 KiB in a CUDA graph, measured
# Between nodes nothing was measured: what DeepEP states for 400 Gb/s NICs (43 of 50 GB/s), and a usual latency.
NETWORK_SHARE, NETWORK_LATENCY_S = 0.86, 25e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device by its data sheet: dense 16-bit FLOP a second, bytes a second of memory, and of links one way."""

    name: str
    memory_bytes: float
    read_bytes_s: float
    flops: float
    link_bytes_s: float
    float8: bool = True  # twice the rate of 16 bit
    float8_blocks: bool = False  # products of them with scales of blocks were measured to be faster


# NVIDIA's data sheets of the SXM modules (H200, H100, A100 80GB) and of HGX B200; without sparsity, links one way.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h200", memory_bytes=141e9, read_bytes_s=4.8e12, flops=989e12, link_bytes_s=450e9, float8_blocks=True),
        Gpu(name="h100", memory_bytes=80e9, read_bytes_s=3.35e12, flops=989e12, link_bytes_s=450e9, float8_blocks=True),
        Gpu(name="b200", memory_bytes=180e9, read_bytes_s=8e12, flops=2250e12, link_bytes_s=900e9),
        Gpu(name="a100", memory_bytes=80e9, read_bytes_s=2.04e12, flops=312e12, link_bytes_s=300e9, float8=False),
    )
}


def nearest_gpu(memory_bytes: float) -> Gpu:
    """The known device with the most similar memory, the first listed of equals."""
    return min(GPUS.values(), key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Devices, so many a node, and a network card for each. memory_fraction: what weights and KV cache may take."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    network_bytes_s: float = 50e9
    memory_fraction: float = 0.9

    @property
    def usable_bytes(self) -> float:
        """Of a device's memory."""
        return self.gpu.memory_bytes * self.memory_fraction

    @property
    def read_bytes_s(self) -> float:
        """What reading memory was seen to reach."""
        return self.gpu.read_bytes_s * READ_SHARE

    def flops(self, weight_bytes: int) -> float:
        """Of matrix products of numbers of that size: float8 is twice as fast as 16 bit where there is hardware."""
        faster = 2.0 / weight_bytes if weight_bytes > 1 or self.gpu.float8 else 1.0
        return self.gpu.flops * MATMUL_SHARE * faster

    def spans_nodes(self, size: int, ranks: int) -> bool:
        """Whether any of the groups of `size` neighbours among that many ranks lies on more than one node."""
        starts = range(0, ranks, size)
        return any(start // self.gpus_per_node != (start + size - 1) // self.gpus_per_node for start in starts)


@dataclass(frozen=True, slots=True)
class Wire:
    """What connects the ranks of a group: bytes a second of each rank, and of a ring over all of them."""

    size: int
    latency_s: float
    bytes_s: float
    ring_bytes_s: float

    def all_reduce_s(self, count: float) -> float:
        """Every rank has `count` bytes and gets their sum: each sends its share twice (ring, 2 (n - 1) / n)."""
        return self._collective_s(2 * count, self.ring_bytes_s)

    def gather_s(self, count: float) -> float:
        """All-gather to, or reduce-scatter from, `count` bytes on every rank."""
        return self._collective_s(count, self.ring_bytes_s)

    def all_to_all_s(self, count: float) -> float:
        """Every rank has `count` bytes for all of them together, itself included."""
        return self._collective_s(count, self.bytes_s)

    def send_s(self, count: float) -> float:
        """From one rank to another."""
        return self.latency_s + count / self.bytes_s

    def _collective_s(self, count: float, bytes_s: float) -> float:
        return self.latency_s + count * (self.size - 1) / self.size / bytes_s if self.size > 1 else 0.0


def wire(machines: Machines, size: int, spans_nodes: bool) -> Wire:
    """The wire of groups of that size.

    Across nodes a ring enters and leaves each node once for each of the node's cards, so all of them carry it; what
    goes from rank to rank has one card alone.
    """
    link_bytes_s = machines.gpu.link_bytes_s * LINK_SHARE
    if not spans_nodes:
        return Wire(size, NODE_LATENCY_S, link_bytes_s, link_bytes_s)
    card_bytes_s = machines.network_bytes_s * NETWORK_SHARE
    cards = min(size, machines.gpus_per_node)
    return Wire(size, NETWORK_LATENCY_S, card_bytes_s, min(link_bytes_s, card_bytes_s * cards))
