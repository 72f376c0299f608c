"""One Ray for all cluster tests, and the clusters that several tests share."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.supervisor.ray_head import RayHead, RayHeadConfig
from echelon.errors import ConfigError, EchelonError, InternalError
from echelon.testing import LocalCluster
from tests.cluster.layouts import CHUNKED, COVER, LAYOUTS, PRODUCT, Layout
from tests.cluster.reference import Reference
from tests.tiny import make_checkpoint

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


class Checkpoints(Mapping[str, Path]):
    """Tiny checkpoints by `Layout.checkpoint`, each made when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._layouts = {layout.checkpoint: layout for layout in (*LAYOUTS.values(), *COVER, *PRODUCT)}
        self._made: dict[str, Path] = {}

    def __getitem__(self, key: str) -> Path:
        if key not in self._made:
            layout = self._layouts[key]
            folder = self._factory.mktemp(layout.family) / "model"
            self._made[key] = make_checkpoint(folder, layout.family, shards=2, **layout.shape)
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory)


@pytest.fixture(scope="session")
def reference_of() -> Callable[[Path], Reference]:
    """What transformers answers on a checkpoint, loaded once."""
    return functools.cache(Reference)


class Walker:
    """One cluster that walks over models and layouts; a new one after a test that broke it."""

    def __init__(self, ray_address: str, folder: Path) -> None:
        self._ray_address = ray_address
        self._folder = folder
        self._started = 0
        self._cluster: LocalCluster | None = None
        self._unused: dict[str, None] = {}  # flags of earlier layouts, which go back to their defaults

    @property
    def trace_dir(self) -> Path:
        """Where the ranks of the cluster that serves log their operations, by epoch."""
        return self._folder / str(self._started)

    def serve(self, model: Path, layout: Layout, **more: object) -> LocalCluster:
        """The cluster, serving so. more: flags beside the layout's. Raises ConfigError if that is refused."""
        flags = layout.all_flags | more
        wanted: dict[str, Any] = self._unused | {"model": model} | flags
        self._unused |= dict.fromkeys(flags)
        if self._cluster is not None:
            try:
                self._cluster.reconfigure(**wanted)
            except (EchelonError, RuntimeError, TimeoutError) as error:
                if isinstance(error, ConfigError) and "are open" not in error.message:  # left by a test that failed
                    raise
                self.close()
        if self._cluster is None:
            self._started += 1
            wanted |= {"ray_address": self._ray_address, "trace_dir": self.trace_dir}
            self._cluster = LocalCluster(dtype="float64", **wanted)
        return self._cluster

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
        self._cluster = None


@pytest.fixture(scope="session")
def walker(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walker]:
    made = Walker(ray_address, tmp_path_factory.mktemp("traces"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module", params=PARAMETERS)
def case(
    request: pytest.FixtureRequest,
    walker: Walker,
    checkpoints: Checkpoints,
    reference_of: Callable[[Path], Reference],
) -> Case:
    """Each layout once a module."""
    layout = LAYOUTS[request.param]
    directory = checkpoints[layout.checkpoint]
    return Case(request.param, walker.serve(directory, layout), reference_of(directory))


@pytest.fixture(scope="session")
def pair(ray_address: str, checkpoints: Checkpoints) -> Iterator[Case]:
    """Two tensor ranks with room for everything, made to be killed."""
    directory = checkpoints[LAYOUTS["llama-2"].checkpoint]
    with LocalCluster(directory, tensor=2, dtype="float64", ray_address=ray_address, lease_s=30) as cluster:
        yield Case("pair", cluster, Reference(directory))


@pytest.fixture(scope="session")
def tight(ray_address: str, checkpoints: Checkpoints) -> Iterator[Case]:
    """One rank with steps of seven tokens, and a cache that one request of max-context fills."""
    directory = checkpoints[LAYOUTS["llama-1"].checkpoint]
    flags: dict[str, Any] = CHUNKED | {"max_context": 384, "kv_cache_tokens": 384}
    with LocalCluster(directory, dtype="float64", ray_address=ray_address, **flags) as cluster:
        yield Case("tight", cluster, Reference(directory))
