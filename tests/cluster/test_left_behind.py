"""What a cluster leaves behind when it is closed or cannot start, on its own Ray and on one that stays: nothing."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path

import pytest

from echelon.testing import LocalCluster
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.long]

MARK = "ECHELON_TEST_MARK"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("left-behind") / "model")


def marked(mark: str) -> set[int]:
    """Every process that inherited the mark, wherever it has gone since."""
    return {pid for pid in processes() if f"{MARK}={mark}".encode() in read(pid, "environ").split(b"\0")}


def actors() -> set[int]:
    """Ranks and agents; Ray names its workers after their actor."""
    return {pid for pid in processes() if read(pid, "cmdline").startswith((b"ray::RankActor", b"ray::AgentActor"))}


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""


def folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("echelon-*")}


@pytest.mark.parametrize("fault", ["none", "coordinator killed", "rank stopped"])
def test_close_leaves_nothing_behind(model: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """With a Ray of its own, even in the middle of a recovery."""
    mark, before = uuid.uuid4().hex, folders()
    monkeypatch.setenv(MARK, mark)
    with LocalCluster(model, tensor=2, dtype="float64") as cluster:
        assert b"raylet" in b"".join(read(pid, "cmdline") for pid in marked(mark))
        if fault == "coordinator killed":
            cluster.kill("coordinator")
        elif fault == "rank stopped":
            cluster.stop(1)
        assert cluster.close() == 0
    assert marked(mark) == set()
    assert folders() == before


def test_close_leaves_nothing_on_a_ray_that_stays(model: Path, ray_address: str) -> None:
    """Nor when the coordinator has just been killed, so that its successor has to end what it never knew."""
    before = actors()
    with LocalCluster(model, tensor=2, dtype="float64", ray_address=ray_address) as cluster:
        assert len(actors() - before) == 3
        cluster.kill("coordinator")
        time.sleep(0.5)  # its successor imports, and cannot heed a signal yet
        assert cluster.close() == 0
    assert actors() == before


def test_a_start_that_fails_leaves_nothing_on_a_ray_that_stays(model: Path, ray_address: str) -> None:
    before = actors()
    with pytest.raises(RuntimeError, match="no memory for the KV cache"):
        LocalCluster(model, tensor=2, dtype="float64", ray_address=ray_address, gpu_memory_fraction=1e-9)
    assert actors() == before
