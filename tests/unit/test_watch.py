"""`echelon status --watch`: rates between looks, lines in a pipe, JSON, a view on a terminal, a server that leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from echelon import convert_cluster
from echelon.cli.watch import ACCEPTED, DECODED, Look, line, tokens_per_s
from echelon.errors import UnavailableError
from echelon.types import Cluster, Model, Rank, Replica
from tests.unit.scripted import ScriptedServer, fail

WAIT_S = 30.0


def cluster(decoded: int = 0, epoch: int = 5, state: str = "ready", accepted: int = 0) -> Cluster:
    rank = Rank(
        replica=0, pipeline=0, data=0, tensor=0, expert=0, leader=True, pid=42, node_id="n", epoch=epoch, state=state
    )
    replica = Replica(
        index=0, epoch=epoch, state=state, kv_blocks_total=8, kv_blocks_referenced=2, step=7,
        counters={DECODED: decoded, ACCEPTED: accepted, "steps": 7},
    )  # fmt: skip
    model = Model(name="tiny", source="/m", state="active", dtype="float32", architecture="L", max_context=64)
    return Cluster(
        version="0.1.0", term=3, coordinator_pid=41, queued=1, running=2, parked=0,
        models=(model,), replicas=(replica,), ranks=(rank,),
    )  # fmt: skip


def test_the_rate_is_what_was_decoded_between_two_looks() -> None:
    earlier = Look(10.0, cluster(decoded=100))
    assert tokens_per_s(earlier, Look(12.0, cluster(decoded=150))) == {0: 25.0}
    assert tokens_per_s(earlier, Look(12.0, cluster(decoded=150, accepted=30))) == {0: 40.0}, (
        "drafts that came true too"
    )
    assert tokens_per_s(None, earlier) == {}


@pytest.mark.parametrize(
    "later",
    [
        Look(10.0, cluster(150)),
        Look(12.0, cluster(decoded=3, epoch=6)),
        Look(12.0, error=UnavailableError("gone")),
        Look(12.0, replace(cluster(), replicas=(replace(cluster().replicas[0], counters={}),))),
    ],
    ids=["no time", "counters of a new epoch", "no answer", "not counted"],
)
def test_there_is_no_rate_where_nothing_was_measured(later: Look) -> None:
    assert tokens_per_s(Look(10.0, cluster(decoded=100)), later) == {}


def test_a_look_is_a_line() -> None:
    assert line(Look(1.0, cluster()), {0: 12.345}) == (
        "replicas 1/1 ready, ranks 1/1 ready, 1 queued, 2 running, 0 parked, KV 2/8 blocks, 12.3 tokens/s"
    )
    full = replace(cluster(), journal="not durable: no space")
    assert line(Look(1.0, full), {}).endswith(", journal not durable: no space")
    loading, stepping = (replace(cluster().ranks[0], state=state) for state in ("loading", "stepping"))
    assert "ranks 1/2 ready" in line(Look(1.0, replace(cluster(), ranks=(loading, stepping))), {})
    assert line(Look(1.0, error=UnavailableError("cannot reach h:1")), {}) == "cannot reach h:1; looking again"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """One that decodes 10 tokens a look, is away at the third, and comes back in another epoch."""

    def away(request: Any, context: Any) -> Any:
        fail(context, UnavailableError("draining"))

    def answer(given: Cluster) -> Any:
        return lambda request, context: convert_cluster.cluster_to_proto(given)

    with ScriptedServer() as scripted:
        scripted.on("GetCluster", answer(cluster(10)), answer(cluster(20)), away)
        scripted.on("GetCluster", *[answer(cluster(3, epoch=6, state="loading"))] * 1000)
        yield scripted


HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


def command(server: ScriptedServer, *flags: str) -> list[str]:
    through = [sys.executable, "-S", "-c", HEED, sys.executable, "-u", "-m", "echelon"]
    return [*through, "status", "--watch", "--interval", "0.1", "--address", server.address, *flags]


def lines(server: ScriptedServer, count: int, *flags: str) -> list[str]:
    with subprocess.Popen(
        command(server, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = [process.stdout.readline() for _ in range(count)]
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT_S)
    assert (process.returncode, stderr) == (130, "")
    return found


def test_a_pipe_gets_a_line_a_look_until_ctrl_c(server: ScriptedServer) -> None:
    first, second, third, fourth = (text.partition(" ")[2].partition(" ")[2] for text in lines(server, 4))
    assert first.startswith("replicas 1/1 ready, ranks 1/1 ready, 1 queued") and "0.0 tokens/s" in first
    rate = re.search(r"([\d.]+) tokens/s", second)
    assert rate is not None and 0 < float(rate[1]) <= 100
    assert third == "draining; looking again\n"
    assert fourth.startswith("replicas 0/1 ready, ranks 0/1 ready") and "0.0 tokens/s" in fourth


def test_json_is_an_object_a_look(server: ScriptedServer) -> None:
    looks = [json.loads(text) for text in lines(server, 3, "--json")]
    assert [look["cluster"] and look["cluster"]["replicas"][0]["epoch"] for look in looks] == [5, 5, None]
    assert looks[1]["tokens_per_s"]["0"] > 0
    assert [look["error"] for look in looks] == [None, None, "draining"]


def test_a_terminal_gets_tables(server: ScriptedServer) -> None:
    master, slave = pty.openpty()
    with subprocess.Popen(command(server), stdout=slave, stderr=slave, start_new_session=True) as process:
        os.close(slave)
        seen = ""
        while "loading" not in seen:
            seen += os.read(master, 65536).decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
    os.close(master)
    for part in ("term 3", "KV blocks", "KV use", "25%", "tokens/s", DECODED, "0/p0-d0-t0 leader", "draining"):
        assert part in seen
