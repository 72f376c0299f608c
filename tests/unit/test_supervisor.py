"""Supervisor: the shell around real processes, with a coordinator that follows a script instead of serving."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from coordinator.supervisor.events import Exit
from coordinator.supervisor.process import Supervisor
from echelon.config import CoordinatorConfig

# Read like the real one: configuration on stdin, messages on stdout. {script} runs with `tell`, `line` and `folder`.
STAND_IN = """
import json, os, pathlib, signal, sys, time
waits = pathlib.Path(__file__).parent / "waits"
waits.mkdir(exist_ok=True)
(waits / str(os.getpid())).touch()
line = sys.stdin.readline()
folder = pathlib.Path(json.loads(line)["state_dir"])
def tell(**message):
    print(json.dumps(message), flush=True)
def leave(number, frame):
    (folder / "left").write_text(str(number)); os._exit(0)
signal.signal(signal.SIGTERM, leave)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
count = len(list(folder.glob("start*")))
(folder / f"start{count}").write_text(line + os.getcwd())
tell(beat=0)
"""


class Recorder:
    """A display that remembers, and signals the supervisor once it is ready."""

    def __init__(self, then: int = signal.SIGTERM) -> None:
        self.told: list[str] = []
        self.then = then

    def loading(self, loaded_bytes: int, total_bytes: int) -> None:
        self.told.append(f"loading {loaded_bytes}/{total_bytes}")

    def ready(self, address: str, took_s: Mapping[str, float]) -> None:
        self.told.append(f"ready {address}")
        os.kill(os.getpid(), self.then)

    def warn(self, message: str) -> None:
        self.told.append(message)


def supervise(tmp_path: Path, script: str, display: Recorder) -> Exit:
    package = tmp_path / "stand-in" / "coordinator"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN + script)
    state = tmp_path / "state"
    state.mkdir()
    config = CoordinatorConfig(
        model=tmp_path, served_model_name="m", device="cpu", dtype="float32", max_context=64, state_dir=state,
        ray_address="127.0.0.1:1", internal_address="127.0.0.1:2", drain_timeout_s=5.0,
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stand-in")}
    return Supervisor(config, None, tmp_path / "folder", environment, display).run()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_coordinator_by_sigterm(tmp_path: Path, number: int, code: int) -> None:
    display = Recorder(number)
    script = "tell(loading=dict(loaded_bytes=1, total_bytes=2)); print('noise'); tell(ready='h:1'); time.sleep(60)"
    assert supervise(tmp_path, script, display) == Exit(code)
    assert display.told == ["loading 1/2", "ready h:1"]
    assert (tmp_path / "state" / "left").read_text() == str(int(signal.SIGTERM))


def test_a_dead_coordinator_gets_a_successor_with_the_same_configuration_in_an_empty_folder(tmp_path: Path) -> None:
    display = Recorder()
    script = "os.kill(os.getpid(), signal.SIGKILL) if count == 0 else (tell(ready='h:1'), time.sleep(60))"
    assert supervise(tmp_path, script, display) == Exit(0)
    assert display.told == ["the coordinator is replaced: it ended with signal SIGKILL", "ready h:1"]
    first, second = ((tmp_path / "state" / name).read_text() for name in ("start0", "start1"))
    assert first == second
    assert first.endswith(str(tmp_path / "folder" / "empty"))
    assert list((tmp_path / "folder" / "empty").iterdir()) == []


class Patient(Recorder):
    """Signals nobody."""

    def ready(self, address: str, took_s: Mapping[str, float]) -> None:
        self.told.append(f"ready {address}")


def test_a_successor_waits_to_take_over_and_goes_with_the_rest(tmp_path: Path) -> None:
    script = """
(folder / f"pid{count}").write_text(str(os.getpid()))
tell(ready='h:1')
while count == 0:
    time.sleep(0.01)
    if len(waiting := [each.name for each in waits.iterdir()]) == 2:
        (folder / "waiting").write_text(" ".join(waiting))
        os.kill(os.getpid(), signal.SIGKILL)
tell(failed='over')
"""
    display = Patient()
    assert supervise(tmp_path, script, display) == Exit(1, "over")
    assert display.told == ["ready h:1", "the coordinator is replaced: it ended with signal SIGKILL"]
    state = tmp_path / "state"
    assert (state / "pid1").read_text() in (state / "waiting").read_text().split(), "it was there before it was needed"
    started = [each.name for each in (tmp_path / "stand-in" / "coordinator" / "waits").iterdir()]
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_failure_ends_it_with_the_message(tmp_path: Path) -> None:
    script = "tell(failed='no memory for the KV cache'); sys.exit(1)"
    assert supervise(tmp_path, script, Recorder()) == Exit(1, "no memory for the KV cache")


def test_last_words_are_heard_although_the_process_has_ended(tmp_path: Path) -> None:
    script = "[tell(loading=dict(loaded_bytes=n, total_bytes=9)) for n in range(3)]; tell(failed='over'); os._exit(3)"
    display = Recorder()
    assert supervise(tmp_path, script, display) == Exit(1, "over")
    assert display.told == ["loading 0/9", "loading 1/9", "loading 2/9"]


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    supervise(tmp_path, "tell(failed='x'); sys.exit(1)", Recorder())
    assert signal.getsignal(signal.SIGINT) is before
