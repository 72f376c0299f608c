"""Who a name means, and that a cluster of another machine is refused: with real processes and sockets of this one."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from echelon.chaos import victims
from echelon.chaos.moments import wait_journal
from echelon.chaos.victims import check_local, find
from echelon.errors import ConfigError
from echelon.internal.processes import Process, alive, descendants, listens, parent_of, written_bytes
from tests.unit.chaos_trial import COORDINATOR, cluster, rank

RANKS = [rank(number, replica=replica) for replica in (1, 0) for number in (1, 0)]  # in no order
SHOWN = cluster(RANKS)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_ranks_are_counted_as_the_mesh_does() -> None:
    found = [find(f"rank:{number}", SHOWN, random.Random(0)) for number in range(4)]
    assert [target.pids for target in found] == [(100,), (101,), (110,), (111,)]
    assert [target.role for target in found] == ["leader", "rank", "leader", "rank"]
    assert found[3].name == "rank 1/0/0/1"


def test_what_has_no_number_is_drawn() -> None:
    leaders = {find("leader", SHOWN, random.Random(seed)).pids for seed in range(20)}
    ranks = {find("rank", SHOWN, random.Random(seed)).pids for seed in range(50)}
    assert leaders == {(100,), (110,)}
    assert ranks == {(100,), (101,), (110,), (111,)}


def test_the_coordinator_is_the_one_that_serves() -> None:
    assert find("coordinator", SHOWN, random.Random(0)).pids == (COORDINATOR,)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rank:4", "there is no rank 4 to strike; there are 4"),
        ("node:2", "there is no node 2 to strike; there are 2"),
        ("spare", "there is no spare to strike"),
        ("node:0", "node node-0: its raylet is not a process of this machine"),
        ("gcs", "joined a Ray that it did not start"),
    ],
)
def test_what_is_not_there_cannot_be_struck(name: str, told: str, sleeper: subprocess.Popen[bytes]) -> None:
    """The test is the supervisor, and has started no Ray; whoever started the test may have."""
    with pytest.raises(ConfigError, match=told):
        find(name, replace(SHOWN, coordinator_pid=sleeper.pid), random.Random(0))


def named(tmp_path: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process under a name of its own, which is its program's."""
    program = tmp_path / name
    if not program.exists():
        program.symlink_to("/bin/sleep" if not arguments else sys.executable)
    return subprocess.Popen([str(program), *(arguments or ("60",))])


def test_gcs_and_node_are_found_below_the_supervisor(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """The test is the supervisor here, and the sleeper its coordinator."""
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    gcs, raylet = named(tmp_path, "gcs_server"), named(tmp_path, "raylet", "-c", code, "--node_id=node-1")
    try:
        shown = replace(SHOWN, coordinator_pid=sleeper.pid)
        while not (workers := [process.pid for process in descendants(raylet.pid)]):
            time.sleep(0.01)
        assert find("gcs", shown, random.Random(0)).pids == (gcs.pid,)
        assert find("node:1", shown, random.Random(0)).pids == (raylet.pid, *workers)
        assert find("supervisor", shown, random.Random(0)).pids == (os.getpid(), sleeper.pid)
    finally:
        for pid in (gcs.pid, *(process.pid for process in descendants(raylet.pid)), raylet.pid):
            os.kill(pid, signal.SIGKILL)
        gcs.wait()
        raylet.wait()


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


OWN = replace(cluster([]), coordinator_pid=os.getpid())


def test_a_cluster_of_this_machine_is_taken(listening: int) -> None:
    check_local(f"127.0.0.1:{listening}", OWN)
    check_local(f"localhost:{listening}", OWN)


def test_a_coordinator_that_does_not_listen_there_is_a_stranger(
    listening: int, sleeper: subprocess.Popen[bytes]
) -> None:
    """Its number names some process here, which must not be struck for it."""
    for pid in (sleeper.pid, 2**22 + 1):
        with pytest.raises(ConfigError, match=f"pid {pid}, and no such process listens there"):
            check_local(f"127.0.0.1:{listening}", replace(OWN, coordinator_pid=pid))


def test_another_machine_s_address_is_refused(listening: int) -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77 is another machine"):
        check_local(f"192.0.2.77:{listening}", OWN)


def test_a_rank_of_another_machine_is_refused(listening: int, sleeper: subprocess.Popen[bytes]) -> None:
    elsewhere = replace(OWN, ranks=(replace(rank(1), pid=sleeper.pid),))
    with pytest.raises(ConfigError, match=f"its rank with pid {sleeper.pid} is on another machine"):
        check_local(f"127.0.0.1:{listening}", elsewhere)


# What /proc tells.


def test_a_process_lives_until_it_has_ended(sleeper: subprocess.Popen[bytes]) -> None:
    assert alive(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert alive(sleeper.pid), "a stopped one lives"
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(sleeper.pid), "a zombie does not"
    sleeper.wait()
    assert not alive(sleeper.pid)
    assert parent_of(sleeper.pid) == 0


@pytest.mark.parametrize("name", ["supervisor", "gcs"])
def test_a_coordinator_that_has_ended_has_no_supervisor_and_nobody_is_struck_for_it(
    name: str, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number 0 would be all of our own group, and what it started everything that runs here."""
    monkeypatch.setattr(victims, "descendants", lambda pid: [Process(1, pid, 1, "gcs_server")])
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(ConfigError, match=f"coordinator with pid {sleeper.pid} has ended"):
        find(name, replace(SHOWN, coordinator_pid=sleeper.pid), random.Random(0))


def test_a_connection_from_a_port_is_nobody_who_listens_there(listening: int) -> None:
    assert listens(os.getpid(), listening)
    with socket.create_connection(("127.0.0.1", listening)) as connection:
        assert not listens(os.getpid(), connection.getsockname()[1])


def test_the_journal_s_moment_is_its_next_write(tmp_path: Path) -> None:
    """Writes of other files are none."""
    folder = tmp_path / "journal"
    folder.mkdir()
    code = (
        "import pathlib, sys, time\n"
        "journal, other = [pathlib.Path(path).open('ab', buffering=0) for path in sys.argv[1:]]\n"
        "other.write(b'x' * 100)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "other.write(b'x')\n"
        "pathlib.Path(sys.argv[1]).unlink()\n"
        "journal.write(b'y')\n"
        "time.sleep(60)\n"
    )
    paths = [str(folder / "000001.log"), str(tmp_path / "other.log")]
    writer = subprocess.Popen(
        [sys.executable, "-c", code, *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdin and writer.stdout
    try:
        writer.stdout.readline()
        with pytest.raises(TimeoutError, match="wrote nothing"):
            wait_journal(writer.pid, timeout_s=0.05)
        assert written_bytes(writer.pid, "journal") == 0
        writer.stdin.write("go\n")
        writer.stdin.flush()
        while written_bytes(writer.pid, "journal") == 0:
            time.sleep(0.001)
        assert written_bytes(writer.pid, "journal") == 1
    finally:
        writer.kill()
        writer.communicate()
