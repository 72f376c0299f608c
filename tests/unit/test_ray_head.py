"""RayHead: its failures carry the output of what failed, and nothing of it is left; names of processes read back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.supervisor import ray_head
from coordinator.supervisor.ray_head import STARTED_MARK, RayHead, RayHeadConfig
from echelon.errors import InternalError
from echelon.internal.processes import session_members
from worker.spec import RankSpec, parse_name, spare_name


@dataclass(frozen=True, slots=True)
class Scripted(RayHeadConfig):
    """Runs Python code in Ray's place."""

    code: str = ""

    def command(self, generation: int = 0) -> list[str]:
        return [sys.executable, "-c", self.code, str(generation)]


def scripted(folder: Path, code: str) -> RayHead:
    return RayHead(Scripted("127.0.0.1", 1, 2, 2, folder, code))


def wait_up(head: RayHead) -> None:
    while not head.is_up():
        time.sleep(0.05)


def test_what_ends_while_starting_is_told_with_its_output_on_top(tmp_path: Path) -> None:
    head = scripted(tmp_path, "print('ports are taken'); raise SystemExit(3)")
    head.start(dict(os.environ))
    with pytest.raises(InternalError) as caught:
        wait_up(head)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["Ray does not start:", "ports are taken"] and "exit code 3" in lines[2]
    head.stop()


def test_what_does_not_come_up_in_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = scripted(tmp_path, "import time; print('still trying', flush=True); time.sleep(60)")
    head.start(dict(os.environ))
    try:
        while not any("still" in log.read_text() for log in tmp_path.glob("*.log")):
            assert not head.is_up()
        monkeypatch.setattr(ray_head, "START_TIMEOUT_S", 0.0)
        with pytest.raises(InternalError, match=r"(?s)still trying.*not up within 0 s"):
            wait_up(head)
    finally:
        head.stop()


def test_stopping_leaves_nothing_of_the_session_even_what_ignores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_head, "STOP_TIMEOUT_S", 0.2)
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork() or os.setpgid(0, 0);"
        f"print({STARTED_MARK!r}, flush=True); time.sleep(600)"
    )
    head = scripted(tmp_path, code)
    head.start(dict(os.environ))
    wait_up(head)
    session = head.pid
    assert len(session_members(session)) == 2
    head.stop()
    head.stop()
    assert session_members(session) == []


def test_an_end_is_noticed(tmp_path: Path) -> None:
    head = scripted(tmp_path, f"print({STARTED_MARK!r}, flush=True)")
    assert not head.ended()
    head.start(dict(os.environ))
    while not head.ended():
        time.sleep(0.05)
    assert head.ended() == "Ray has ended"
    head.stop()


PARTS = f"""
import os, time
renamed, tell = os.pipe()
for name in ("raylet", "gcs_server", "agent"):
    if not os.fork():
        with open("/proc/self/comm", "w") as comm:
            comm.write(name)
        os.write(tell, b"x")
        time.sleep(600)
for _ in range(3):
    os.read(renamed, 1)
print({STARTED_MARK!r}, flush=True)
time.sleep(600)
"""


def test_the_end_of_a_part_that_it_cannot_do_without_is_noticed_while_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = scripted(tmp_path, PARTS)
    head.start(dict(os.environ))
    try:
        wait_up(head)
        named = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in session_members(head.pid)}
        os.kill(named["agent"], signal.SIGKILL)
        assert head.ended() == ""
        os.kill(named["gcs_server"], signal.SIGKILL)
        while not head.ended():
            time.sleep(0.01)
        assert head.ended() == "Ray's gcs_server has ended"
        session, told = head.pid, list[str]()
        monkeypatch.setattr(subprocess.Popen, "terminate", lambda process: told.append("SIGTERM"))
        head.stop()
        assert session_members(session) == []
        assert told == [], "nothing is waited for that cannot end by itself"
    finally:
        head.stop()
    assert head.ended() == ""


def test_a_ray_that_is_started_again_takes_no_earlier_one_for_itself() -> None:
    config = RayHeadConfig("127.0.0.1", 1, 2, 3, Path("e"))
    folders = [next(word for word in config.command(n) if word.startswith("--temp-dir=")) for n in range(3)]
    assert folders == ["--temp-dir=e/ray", "--temp-dir=e/ray1", "--temp-dir=e/ray2"]


def test_rank_names_read_back() -> None:
    spec = RankSpec(
        coordinator_address="a:1", cluster="c", replica=1, rank=2, incarnation="7", device="cpu", heartbeat_s=1, term=3
    )
    assert parse_name(spec.name) == ("rank", "c", 1, 2, "7")
    assert parse_name(spare_name("c", 1, 2, "3-1")) == ("spare", "c", 1, 2, "3-1")
    assert RankSpec.from_json(spec.to_json()) == spec
