"""`echelon chaos` from end to end, on a cluster that is played: real processes to strike, real streams over gRPC.

The played coordinator is this process. Its one rank is a process that sleeps; when it is dead, all streams stand still,
another takes its place, and they go on, as they were or, told so, otherwise. Streams that are to be disturbed do not
end before they are, however long that takes.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner, Result

from echelon import convert, convert_cluster
from echelon.cli.app import app
from echelon.internal.processes import parent_of
from echelon.types import Admitted, Choice, Cluster, ClusterEvent, Completion, FinishReason, StreamEvent, Usage
from tests.unit.chaos_trial import cluster, rank
from tests.unit.scripted import ScriptedServer

PROMPT_TOKENS, STEP_S, TOKENS = 3, 0.004, 60
DELIVERED_S = 0.5  # within which all has come that was on its way
Fault = Literal["none", "another token", "too much recomputed"]


class PlayedCluster(ScriptedServer):
    """fault: what goes wrong in a recovery."""

    def __init__(self, folder: Path, fault: Fault = "none") -> None:
        self._program = folder / "ray::Rank"
        self._program.symlink_to("/bin/sleep")
        self._fault = fault
        self._lock = threading.Lock()
        self._events: list[ClusterEvent] = []
        self._running: dict[str, int] = {}  # tokens that were delivered, by request
        self._recomputed: dict[str, int] = {}
        self._steps = 0
        self._watched = False  # events are asked for, so that a strike is to come
        self.epoch = 1
        self.struck: list[int] = []
        self.rank = self._start()
        super().__init__()

    def stop(self) -> None:
        self.rank.kill()
        self.rank.wait()
        super().stop()

    def take(self, method: str, request: Any, context: Any) -> Any:
        if method == "GetCluster":
            with self._lock:
                return convert_cluster.cluster_to_proto(self._shown())
        return self._generate(request) if method == "StreamGenerate" else self._tell(request, context)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([str(self._program), "60"])

    def _shown(self) -> Cluster:
        own = replace(rank(0, epoch=self.epoch), pid=self.rank.pid)
        shown = cluster([own], epoch=self.epoch, decode_rows=self._steps)
        return replace(shown, coordinator_pid=parent_of(self.rank.pid))

    def _emit(self, kind: str, subject: str, **detail: object) -> None:
        self._events.append(ClusterEvent(len(self._events) + 1, time.time(), kind, subject, detail))

    def _step(self, request_id: str, tokens: int) -> int:
        """These tokens will be delivered, as soon as there is a rank; the epoch that they are of."""
        with self._lock:
            if self.rank.poll() is not None:
                self._recover()
            self._steps += 1
            self._running[request_id] += tokens
            return self.epoch

    def _recover(self) -> None:
        self.struck.append(self.rank.pid)
        self._emit("rank.lost", "rank/0/0", reason="its process has died in phase stepping")
        self.rank, self.epoch, self._steps = self._start(), self.epoch + 1, 0
        for request_id, delivered in self._running.items():
            known = PROMPT_TOKENS + delivered + (self._fault == "too much recomputed")
            self._recomputed[request_id] = self._recomputed.get(request_id, 0) + known
            self._emit("request.replayed", request_id, recomputed_tokens=known)
        time.sleep(DELIVERED_S)
        self._emit("replica.ready", "replica/0")

    def _generate(self, request: Any) -> Iterator[Any]:
        request_id, choices = request.request_id, max(request.sampling.n, 1)
        answers: list[list[int]] = [[] for _ in range(choices)]
        yield convert.stream_to_proto(Admitted(request_id, PROMPT_TOKENS, 1))
        self._running[request_id] = 0
        for place in range(TOKENS):
            time.sleep(STEP_S)
            while place == TOKENS // 2 and self._awaits_strike():
                time.sleep(STEP_S)
            epoch = self._step(request_id, choices)
            for index, answer in enumerate(answers):
                answer.append(30 + (7 * place + request.sampling.seed + index) % 90)
                if epoch > 1 and self._fault == "another token" and request.sampling.seed == 2:
                    answer[-1] = 29
                event = StreamEvent(request_id, index, place, chr(answer[-1]), (answer[-1],))
                yield convert.stream_to_proto(event)
        del self._running[request_id]
        usage = Usage(PROMPT_TOKENS, TOKENS * choices, self._recomputed.get(request_id, 0))
        done = tuple(
            Choice(index=i, text="".join(map(chr, ids)), token_ids=tuple(ids), finish_reason=FinishReason.LENGTH)
            for i, ids in enumerate(answers)
        )
        final = Completion(request_id=request_id, model="m", choices=done, usage=usage)
        yield convert.stream_to_proto(final)

    def _awaits_strike(self) -> bool:
        """Steps are counted on."""
        with self._lock:
            self._steps += 1
            return self._watched and not self.struck and self.rank.poll() is None and not stopped(self.rank.pid)

    def _tell(self, request: Any, context: Any) -> Iterator[Any]:
        self._watched, told = True, request.after_sequence
        while context.is_active():
            for event in self._events[told:]:
                yield convert_cluster.event_to_proto(event)
                told += 1
            if not request.follow:
                return
            time.sleep(0.005)


def stopped(pid: int) -> bool:
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def chaos(played: PlayedCluster, *arguments: str) -> Result:
    flags = ("--streams", "4", "--tokens", str(TOKENS), "--settle-s", "0", "--target", played.address)
    return CliRunner().invoke(app, ("chaos", *flags, *arguments))


def test_streams_that_are_the_same_make_a_matrix_and_exit_0(tmp_path: Path) -> None:
    report = tmp_path / "matrix.md"
    with PlayedCluster(tmp_path) as played:
        first = played.rank.pid
        result = chaos(
            played,
            "--victims",
            "leader",
            "--moments",
            "decode",
            "--faults",
            "kill",
            "--injections",
            "1",
            "-o",
            str(report),
        )
        assert result.exit_code == 0, result.output
        assert (played.struck, played.epoch) == ([first], 2)
    assert result.stdout == report.read_text()
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("| kill")]
    fault, phase, injections, detected, first_ms, last_ms, recomputed, lost, doubled = row.strip("| ").split(" | ")
    assert (fault, phase, injections, lost, doubled) == ("kill leader", "decode", "1", "0", "0")
    assert int(first_ms) >= 1000 * DELIVERED_S and int(last_ms) >= int(first_ms) > int(detected)
    assert int(recomputed) >= 4 * (PROMPT_TOKENS + 8), "of each stream the prompt and its first tokens"
    assert "all 4 streams went on" in result.stderr


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("another token", r"kill leader in decode (rank 0/0/0/0): choices-2: choice 0: ids differ from token"),
        ("too much recomputed", "greedy-0: recomputed"),
    ],
)
def test_a_stream_that_differs_is_told_and_exit_1(tmp_path: Path, fault: Fault, told: str) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("- {fault: kill, victim: leader}\n")
    with PlayedCluster(tmp_path, fault) as played:
        result = chaos(played, "--plan", str(plan), "--json")
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert any(told in difference for difference in json.loads(line)["differences"]), result.output


def test_a_stopped_process_is_woken_at_the_end(tmp_path: Path) -> None:
    """Nobody misses this one, so nobody has ended it."""
    with PlayedCluster(tmp_path) as played:
        result = chaos(played, "--victims", "leader", "--moments", "decode", "--faults", "stop", "--injections", "1")
        assert result.exit_code == 0, result.output
        assert played.struck == []
        assert played.rank.poll() is None and not stopped(played.rank.pid)
    assert "| stop leader | decode | 1 | - |" in result.stdout
