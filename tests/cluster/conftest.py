"""One Ray for all cluster tests, and the clusters that several tests share."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.ray_head import RayHead, RayHeadConfig
from echelon.testing import LocalCluster
from tests.cluster.reference import Reference
from tests.tiny import LLAMA3_ROPE, make_checkpoint

# Odd on purpose: head_dim is not hidden / heads, the vocabulary is a multiple of nothing, layers are three.
ODD = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14, "intermediate_size": 88}
ODD |= {"num_hidden_layers": 3, "vocab_size": 331}

LAYOUTS: dict[str, dict[str, object]] = {
    "llama-1": {"family": "llama", "tensor": 1, "shape": {"rope_parameters": LLAMA3_ROPE}, "flags": {}},
    "llama-2": {"family": "llama", "tensor": 2, "shape": {"rope_parameters": LLAMA3_ROPE}, "flags": {}},
    "qwen3-1-chunked": {
        "family": "qwen3",
        "tensor": 1,
        "shape": ODD | {"tie_word_embeddings": True},
        "flags": {"max_step_tokens": 7, "max_running": 7},
    },
    "qwen3-2": {"family": "qwen3", "tensor": 2, "shape": ODD | {"tie_word_embeddings": True}, "flags": {}},
}


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster in float64, and transformers on the same checkpoint."""

    name: str
    cluster: LocalCluster
    reference: Reference


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray that outlives the clusters which join it."""
    port, client_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="echelon-ray-") as folder:
        config = RayHeadConfig("127.0.0.1", port, client_port, num_cpus=16, folder=Path(folder))
        head = RayHead(config)
        head.start(dict(os.environ))
        try:
            while not head.is_up():
                time.sleep(0.1)
            yield config.address
        finally:
            head.stop()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Tiny checkpoints by (family, shape), made once."""
    made: dict[tuple[str, str], Path] = {}
    for layout in LAYOUTS.values():
        key = str(layout["family"]), str(layout["shape"])
        if key not in made:
            shape = layout["shape"]
            assert isinstance(shape, dict)
            made[key] = make_checkpoint(tmp_path_factory.mktemp(key[0]) / "model", key[0], shards=2, **shape)
    return made


@pytest.fixture(scope="module", params=LAYOUTS, ids=list(LAYOUTS))
def case(request: pytest.FixtureRequest, ray_address: str, checkpoints: dict[tuple[str, str], Path]) -> Iterator[Case]:
    """Each layout once a module."""
    layout = LAYOUTS[request.param]
    directory = checkpoints[str(layout["family"]), str(layout["shape"])]
    flags = layout["flags"]
    tensor = layout["tensor"]
    assert isinstance(flags, dict) and isinstance(tensor, int)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(directory, tensor=tensor, dtype="float64", ray_address=ray_address, **flags)
        )
        yield Case(request.param, cluster, Reference(directory))
