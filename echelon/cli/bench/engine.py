"""Cases through the engine alone: ranks as real processes over torch.distributed, and no coordinator.

In the user's terminal. Settles, places and tells ranks what a coordinator would, then asks the leader for cases. What
a rank says comes on its stdout, what it logs goes to a file, whose end is shown when it fails.
"""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from coordinator.epoch_settings import epoch_settings
from coordinator.placement import RankMemory, plan_replica
from coordinator.supervisor.preparation import prepare, temporary_folder
from echelon.bench.cases import Case
from echelon.bench.experts import distinct
from echelon.bench.offline import Outcome
from echelon.cli.bench.setting import Experts, Setting
from echelon.config import CoordinatorConfig, ServeConfig
from echelon.errors import ConfigError, UnavailableError

MARK = "echelon-bench: "  # as worker/bench.py has it
START_TIMEOUT_S, CASE_TIMEOUT_S, END_S = 600.0, 600.0, 10.0
SHOWN_LINES = 15
NOBODY_LISTENS = {"address": "127.0.0.1:0", "metrics_address": None}  # a cluster that serves may have its ports
COUNTED = "counted by the engine in a run that was not timed"


class Rank:
    """One process, asked a line at a time."""

    def __init__(self, number: int, device: str, log_path: Path) -> None:
        self.number = number
        self._log_path = log_path
        visible = ["env", f"CUDA_VISIBLE_DEVICES={number}"] if device == "cuda" else []
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*visible, sys.executable, "-m", "worker.bench"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"rank-{number}", daemon=True).start()
        self.ask(rank=number, device=device)

    def ask(self, **values: object) -> None:
        """One line; a rank that has ended is found out by its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()

    def answer(self, wait_s: float) -> dict[str, Any] | None:
        """None if it says nothing for so long. Raises UnavailableError with its log's end where it has ended."""
        try:
            said = self._said.get(timeout=wait_s)
        except queue.Empty:
            return None
        if said is None:
            raise self._ended()
        return said

    def end(self) -> None:
        """Let it close its groups; kill it where it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Raises UnavailableError with its log's end where it has ended."""
        if self._process.poll() is not None:
            raise self._ended()

    def kill(self) -> None:
        """It holds a device that others want."""
        self._process.kill()

    def _read(self) -> None:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        with stdout:
            for line in stdout:
                if line.startswith(MARK):
                    self._said.put(json.loads(line.removeprefix(MARK)))
        self._said.put(None)

    def _ended(self) -> UnavailableError:
        tail = "\n".join(self._log_path.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        return UnavailableError(f"rank {self.number} has ended:\n{tail}")


class EngineRanks:
    """A replica's ranks that serve nobody but us."""

    def __init__(self, setting: Setting, ranks: Sequence[Rank], start_s: float) -> None:
        self.setting = setting
        self.start_s: float | None = start_s
        self._ranks = ranks

    def run(self, case: Case, vocabulary: int, seeds: Sequence[int]) -> tuple[list[Outcome], int]:
        """One run a seed, and how many prompt tokens the prefix cache had in all of them."""
        told = [self._leader(do="run", case=str(case), vocabulary=vocabulary, seed=seed) for seed in seeds]
        runs = [Outcome(run["begun_s"], run["total_s"], run["first_s"]) for run in told]
        return runs, sum(run["cached_tokens"] for run in told)

    def distinct_experts(self, case: Case, vocabulary: int, seed: int) -> Experts | None:
        """On average over a run that is not timed; None if nobody counts them."""
        ask_all(self._ranks, CASE_TIMEOUT_S, do="count")
        self._leader(do="run", case=str(case), vocabulary=vocabulary, seed=seed)
        steps = case.output_tokens - 1  # all but the first id of each
        told = ask_all(self._ranks, CASE_TIMEOUT_S, do="counted", steps=steps) if steps else []
        found = distinct(answer["chosen"] for answer in told)
        return None if found is None else Experts(found, COUNTED)

    def _leader(self, **values: object) -> dict[str, Any]:
        """Its answer, while all others live."""
        leader, *others = self._ranks
        leader.ask(**values)
        return wait_for(leader, others, CASE_TIMEOUT_S)


@contextlib.contextmanager
def engine_ranks(setting: Setting) -> Iterator[EngineRanks]:
    """Started and formed on entry, ended on exit. Raises EchelonError."""
    _check_is_one_machine_s(setting.config)
    began_s = time.perf_counter()
    with temporary_folder() as folder, tempfile.TemporaryDirectory() as logs:
        config, _ = prepare(setting.config.model_copy(update=NOBODY_LISTENS), folder)
        setting = setting.stored(config.float8)
        numbers = range(setting.degrees.replica_ranks)
        ranks = [Rank(number, config.device, Path(logs) / f"rank-{number}.log") for number in numbers]
        try:
            form(ranks, setting, config)
            yield EngineRanks(setting, ranks, round(time.perf_counter() - began_s, 2))
        except BaseException:
            for rank in ranks:
                rank.kill()
            raise
        finally:
            for rank in ranks:
                rank.end()


def _check_is_one_machine_s(config: ServeConfig) -> None:
    """Raises ConfigError for what a coordinator would do."""
    if config.replicas > 1:
        raise ConfigError(
            f"replicas={config.replicas}: the engine of one replica is measured; add --grpc", field="replicas"
        )
    if config.ray_address is not None:
        raise ConfigError(
            f"ray-address={config.ray_address}: the engine's ranks are processes of this machine; add --grpc",
            field="ray_address",
        )


def form(ranks: Sequence[Rank], setting: Setting, config: CoordinatorConfig) -> None:
    """The epoch, of so many blocks as their memory allows."""
    hellos = [wait_for(rank, ranks, START_TIMEOUT_S) for rank in ranks]
    plan = plan_replica(config, setting.model)
    settings = epoch_settings(config, plan)
    settings.store_address = hellos[0]["store"]
    settings.kv_blocks = plan.kv_blocks([RankMemory("here", hello["memory_bytes"]) for hello in hellos])
    ask_all(ranks, START_TIMEOUT_S, form=base64.b64encode(settings.SerializeToString()).decode())


def ask_all(ranks: Sequence[Rank], timeout_s: float, **values: object) -> list[dict[str, Any]]:
    """The answers of all."""
    for rank in ranks:
        rank.ask(**values)
    return [wait_for(rank, ranks, timeout_s) for rank in ranks]


def wait_for(rank: Rank, others: Sequence[Rank], timeout_s: float) -> dict[str, Any]:
    """A rank's answer. Raises UnavailableError where one has ended, or nothing comes."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if (said := rank.answer(0.1)) is not None:
            return said
        for other in others:
            other.check()
    raise UnavailableError(f"rank {rank.number} has not answered within {timeout_s:g} s")
