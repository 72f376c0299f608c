"""One Ray for all cluster tests, and the clusters that several tests share."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coordinator.supervisor.ray_head import RayHead, RayHeadConfig
from echelon.errors import EchelonError, InternalError
from echelon.testing import LocalCluster
from tests.cluster.reference import Reference
from tests.tiny import LLAMA3_ROPE, make_checkpoint

# Odd on purpose: head_dim is not hidden / heads, the vocabulary is a multiple of nothing, layers are three.
ODD: dict[str, object] = {
    "hidden_size": 60,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 88,
}
ODD |= {"num_hidden_layers": 3, "vocab_size": 331}

LLAMA3: dict[str, object] = {"rope_parameters": LLAMA3_ROPE}
TIED_ODD = ODD | {"tie_word_embeddings": True}
WINDOWS: dict[str, object] = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
# An original context of one token: transformers, too, turns all of them by the long factors.
LONGROPE: dict[str, object] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.5, 2.5, 6.0, 20.0, 40.0],
        "attention_factor": 1.2,
        "partial_rotary_factor": 0.75,
    },
    "original_max_position_embeddings": 1,
    "sliding_window": 24,
}
MOE: dict[str, object] = {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True}
BIASED: dict[str, object] = {"attention_bias": True, "num_key_value_heads": 1, "vocab_size": 322}


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint's family and shape, the degree, and the flags it is served with."""

    family: str
    tensor: int
    shape: dict[str, Any]
    flags: dict[str, Any] = field(default_factory=dict)
    long: bool = False

    @property
    def checkpoint(self) -> str:
        """The same for layouts that share a checkpoint."""
        return f"{self.family} {self.shape}"


CHUNKED = {"max_step_tokens": 7, "max_running": 7}
LAYOUTS = {
    "llama-1": Layout("llama", 1, LLAMA3, long=True),
    "llama-2": Layout("llama", 2, LLAMA3),
    "qwen3-1-chunked": Layout("qwen3", 1, TIED_ODD, CHUNKED),
    "qwen3-2": Layout("qwen3", 2, TIED_ODD),
    "phi3-1-chunked": Layout("phi3", 1, LONGROPE, CHUNKED, long=True),
    "gemma2-2": Layout("gemma2", 2, {}, long=True),
    "llama-2-chunked": Layout("llama", 2, LLAMA3, CHUNKED, long=True),
    "llama-1-plain": Layout("llama", 1, {}, long=True),
    "llama-1-biased": Layout("llama", 1, BIASED, long=True),
    "llama-2-biased": Layout("llama", 2, BIASED, long=True),  # one KV head, on both ranks
    "llama-3-odd": Layout("llama", 3, ODD | {"num_key_value_heads": 3, "intermediate_size": 90}, long=True),
    "qwen3-1": Layout("qwen3", 1, TIED_ODD, long=True),
    "qwen3-2-chunked": Layout("qwen3", 2, TIED_ODD, CHUNKED, long=True),
    "qwen2-2": Layout("qwen2", 2, {"tie_word_embeddings": True}, long=True),
    "mistral-2-chunked": Layout("mistral", 2, {"sliding_window": 24}, CHUNKED, long=True),
    "qwen3-2-upper-windows": Layout("qwen3", 2, WINDOWS, long=True),
    "phi3-2": Layout("phi3", 2, LONGROPE, long=True),
    "phi3-3-odd": Layout("phi3", 3, ODD | {"num_key_value_heads": 3, "intermediate_size": 90}, long=True),
    "gemma2-1-chunked": Layout("gemma2", 1, {}, CHUNKED, long=True),
    "gemma3-1": Layout("gemma3", 1, {}, long=True),
    "gemma3-2-chunked": Layout("gemma3", 2, {}, CHUNKED, long=True),
    "qwen3-moe-2-expert-2-chunked": Layout("qwen3-moe", 2, MOE, CHUNKED | {"expert": 2}),
    "qwen3-moe-2": Layout("qwen3-moe", 2, MOE, long=True),
    "mixtral-1": Layout("mixtral", 1, {"sliding_window": 24}, long=True),
    "mixtral-2-expert-2": Layout("mixtral", 2, {"sliding_window": 24}, {"expert": 2}, long=True),
    "mixtral-4-expert-2": Layout("mixtral", 4, {"sliding_window": 24}, {"expert": 2}, long=True),
    "mixtral-2-expert-2-pipeline-2": Layout(
        "mixtral", 2, {"sliding_window": 24}, {"expert": 2, "pipeline": 2}, long=True
    ),
    "qwen3-4": Layout("qwen3", 4, {"head_dim": 32, "num_key_value_heads": 4}, long=True),
}
PARAMETERS = [
    pytest.param(name, id=name, marks=[pytest.mark.long] if layout.long else []) for name, layout in LAYOUTS.items()
]


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster in float64, and transformers on the same checkpoint."""

    name: str
    cluster: LocalCluster
    reference: Reference

    def counters(self) -> Counter[str]:
        """Of the epoch that serves, once the answers that were given are in them: nothing may run."""
        status = self.cluster.wait(lambda now: now.replicas[0].kv_blocks_referenced == 0, "no referenced block")
        return Counter(status.replicas[0].counters)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray that outlives the clusters which join it."""
    with tempfile.TemporaryDirectory(prefix="echelon-ray-") as folder:
        head, address = start_ray(Path(folder))
        try:
            yield address
        finally:
            head.stop()


def start_ray(folder: Path, tries: int = 3) -> tuple[RayHead, str]:
    """On a machine that is busy with other things Ray may not be up in time at the first try."""
    for number in range(1, tries + 1):
        port, client_port = free_ports(2)
        config = RayHeadConfig("127.0.0.1", port, client_port, num_cpus=16, folder=folder / str(number))
        head = RayHead(config)
        head.start(dict(os.environ))
        try:
            while not head.is_up():
                time.sleep(0.1)
            return head, config.address
        except InternalError:
            head.stop()
            if number == tries:
                raise
    raise AssertionError("tries is at least 1")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by `Layout.checkpoint`, made once."""
    made: dict[str, Path] = {}
    for layout in LAYOUTS.values():
        if layout.checkpoint not in made:
            folder = tmp_path_factory.mktemp(layout.family) / "model"
            made[layout.checkpoint] = make_checkpoint(folder, layout.family, shards=2, **layout.shape)
    return made


class Walker:
    """One cluster that walks over models and layouts; a new one after a test that broke it."""

    def __init__(self, ray_address: str) -> None:
        self._ray_address = ray_address
        self._cluster: LocalCluster | None = None
        self._unused: dict[str, None] = {}  # flags of earlier layouts, which go back to their defaults

    def serve(self, model: Path, layout: Layout) -> LocalCluster:
        """The cluster, serving so."""
        wanted: dict[str, Any] = self._unused | {"model": model, "tensor": layout.tensor} | layout.flags
        self._unused |= dict.fromkeys(layout.flags)
        if self._cluster is not None:
            try:
                self._cluster.reconfigure(**wanted)
            except (EchelonError, RuntimeError, TimeoutError):
                self.close()
        if self._cluster is None:
            self._cluster = LocalCluster(dtype="float64", ray_address=self._ray_address, **wanted)
        return self._cluster

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
        self._cluster = None


@pytest.fixture(scope="session")
def walker(ray_address: str) -> Iterator[Walker]:
    made = Walker(ray_address)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module", params=PARAMETERS)
def case(request: pytest.FixtureRequest, walker: Walker, checkpoints: dict[str, Path]) -> Case:
    """Each layout once a module."""
    layout = LAYOUTS[request.param]
    directory = checkpoints[layout.checkpoint]
    return Case(request.param, walker.serve(directory, layout), Reference(directory))


@pytest.fixture(scope="session")
def pair(ray_address: str, checkpoints: dict[str, Path]) -> Iterator[Case]:
    """Two tensor ranks with room for everything, made to be killed."""
    directory = checkpoints[LAYOUTS["llama-2"].checkpoint]
    with LocalCluster(directory, tensor=2, dtype="float64", ray_address=ray_address, lease_s=30) as cluster:
        yield Case("pair", cluster, Reference(directory))


@pytest.fixture(scope="session")
def tight(ray_address: str, checkpoints: dict[str, Path]) -> Iterator[Case]:
    """One rank with steps of seven tokens, and a cache that one request of max-context fills."""
    directory = checkpoints[LAYOUTS["llama-1"].checkpoint]
    flags: dict[str, Any] = CHUNKED | {"max_context": 384, "kv_cache_tokens": 384}
    with LocalCluster(directory, dtype="float64", ray_address=ray_address, **flags) as cluster:
        yield Case("tight", cluster, Reference(directory))
