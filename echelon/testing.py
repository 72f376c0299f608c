"""LocalCluster: a whole cluster on this machine for a test, with a hand on every process of it.

Runs `echelon serve` as a user would, in a process of its own, and speaks to it through the SDK. Faults are real
signals to real processes. What the cluster logs is kept, and its end is shown when something fails.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from echelon.chaos import victims
from echelon.chaos.moments import Moment, wait_for, wait_journal
from echelon.client import Client
from echelon.errors import ConfigError, EchelonError
from echelon.internal.configuring import told_change, write_config
from echelon.internal.local_nodes import LocalNodes, Node, cpus_of, with_cpus
from echelon.types import Cluster, ClusterEvent, Rank, Spare

READY_PREFIX = "echelon: ready "
POLL_S = 0.05
SHOWN_LINES = 40
STOP_TIMEOUT_S = 90.0
STATUS_TIMEOUT_S = 5.0
MOMENT_TIMEOUT_S = 60.0

Victim = Rank | Spare | Node | int | Literal["coordinator", "leader", "spare", "node", "gcs"]


class LocalCluster:
    """Ready when the constructor returns. Any flag of `echelon serve` may be given: max_running=4.

    They go into a --config file, so that `reconfigure` can change them; variables ECHELON_* go before it.

    A victim is a Rank, a Spare, a rank's number in replica 0 (stage by stage, there data rank by data rank, tensor
    ranks being neighbours), a Node, "leader", "coordinator", "spare", "node" or "gcs"; `echelon/chaos/moments.py` has
    the moments. Use as a context manager, or close.

    nodes: Ray nodes on this machine, as if each were one of its own; a sequence says how many CPUs, places for ranks,
    each has, Ray's head first. A number gives each as many as there are ranks.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        tensor: int = 1,
        device: str = "cpu",
        dtype: str = "float32",
        state_dir: str | os.PathLike[str] | None = None,
        ray_address: str | None = None,
        start_timeout_s: float = 120.0,
        nodes: int | Sequence[int] = 1,
        **flags: object,
    ) -> None:
        given: dict[str, object] = {"model": Path(model), "tensor": tensor, "device": device, "dtype": dtype}
        given |= {"state_dir": state_dir, "ray_address": ray_address, "address": "127.0.0.1:0"} | flags
        self._flags = given
        self._folder = tempfile.TemporaryDirectory(prefix="echelon-test-")
        self.log_path = Path(self._folder.name) / "serve.log"
        self._config_path = Path(self._folder.name) / "serve.yaml"
        write_config(self._config_path, given)
        self._client: Client | None = None
        self._watcher: Client | None = None
        cpus = cpus_of(nodes, given)
        command = [sys.executable, "-m", "echelon", "serve", "--config", str(self._config_path)]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                with_cpus(cpus[0], command) if cpus[1:] and ray_address is None else command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._nodes = LocalNodes(self._process.pid, ray_address, Path(self._folder.name), cpus[1:])
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read_stdout, name="serve-stdout", daemon=True)
        self._reader.start()
        try:
            self.target = self._wait_ready(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"the cluster's log ends with:\n{self.log_tail()}")
        self.close()

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self._process.pid

    def client(self) -> Client:
        """The same one each time; closed with the cluster."""
        if self._client is None:
            self._client = Client(self.target)
        return self._client

    def status(self) -> Cluster:
        """Everything that serves now."""
        if self._watcher is None:
            self._watcher = Client(self.target, timeout_s=STATUS_TIMEOUT_S)  # must not outwait what waits for it
        return self._watcher.cluster()

    def ranks(self) -> tuple[Rank, ...]:
        """The processes of all replicas."""
        return self.status().ranks

    def spares(self) -> tuple[Spare, ...]:
        """The processes that wait to become ranks, as --spares says how many."""
        return self.status().spares

    def wait_spares(self, count: int, timeout_s: float = 60.0) -> tuple[Spare, ...]:
        """Until so many spares are warm."""

        def warm(cluster: Cluster) -> bool:
            return sum(spare.state == "warm" for spare in cluster.spares) >= count

        return self.wait(warm, f"{count} warm spares", timeout_s).spares

    def nodes(self) -> tuple[Node, ...]:
        """Ray's nodes on this machine, the head first, dead ones too."""
        return self._nodes.nodes()

    def add_node(self, cpus: int = 1) -> None:
        """Another node, which joins in a few seconds."""
        self._nodes.add(cpus)

    @property
    def coordinator_pid(self) -> int:
        return self.status().coordinator_pid

    def events(self) -> list[ClusterEvent]:
        """Of the coordinator that serves now, so far."""
        return list(self.client().events(follow=False))

    def kill(self, victim: Victim, when: Moment | None = None) -> int:
        """SIGKILL, at once or as soon as a moment has come; the pid it hit, of a node that of its daemon."""
        return self._signal(victim, when, signal.SIGKILL)

    def stop(self, victim: Victim, when: Moment | None = None) -> int:
        """SIGSTOP: the process lives and answers nothing; the pid."""
        return self._signal(victim, when, signal.SIGSTOP)

    def resume(self, pid: int) -> None:
        """SIGCONT to what `stop` returned; no matter if it has been ended meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def wait_epoch(self, replica: int, epoch: int, timeout_s: float = 60.0) -> Cluster:
        """Until a replica serves this epoch or a later one. Raises TimeoutError with the log's end."""

        def serves(cluster: Cluster) -> bool:
            return any(r.index == replica and r.epoch >= epoch and r.state == "ready" for r in cluster.replicas)

        return self.wait(serves, f"replica {replica} to serve epoch {epoch}", timeout_s)

    def wait(self, condition: Callable[[Cluster], bool], what: str, timeout_s: float = 60.0) -> Cluster:
        """Until the status fulfils a condition, across a coordinator's replacement."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            with contextlib.suppress(EchelonError):
                if condition(cluster := self.status()):
                    return cluster
            if self._process.poll() is not None:
                raise RuntimeError(f"the cluster ended while waiting for {what}:\n{self.log_tail()}")
            time.sleep(POLL_S)
        raise TimeoutError(f"waited {timeout_s:g} s for {what}:\n{self.log_tail()}")

    def hand_over(self) -> None:
        """SIGHUP: a new coordinator takes over the ranks."""
        self._process.send_signal(signal.SIGHUP)

    def reconfigure(self, **flags: object) -> Cluster:
        """Serve with these flags changed, None for a flag's default: another model, layout or limit, by the same
        processes. Returns once replica 0 serves so; running requests go on, unless the model is another.

        Raises ConfigError with the server's reason if it refuses; then everything is as it was.
        """
        wanted = self._flags | flags
        if wanted == self._flags:
            return self.status()
        epoch, heard = self.status().replicas[0].epoch, self.log_path.stat().st_size
        write_config(self._config_path, wanted)
        self._process.send_signal(signal.SIGHUP)
        self.wait(lambda now: told_change(self.log_path, heard) is not None, "the change of configuration")
        reason = told_change(self.log_path, heard)
        if reason:
            write_config(self._config_path, self._flags)
            raise ConfigError(reason)
        self._flags = wanted
        return self.wait_epoch(0, epoch + 1)

    def close(self) -> int:
        """SIGTERM and wait until nothing is left; the exit code of `echelon serve`."""
        for client in filter(None, (self._client, self._watcher)):
            client.close()
        self._client = self._watcher = None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._nodes.close()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()
        return self._process.returncode

    def log_tail(self) -> str:
        """The last lines that the cluster's processes have logged."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-SHOWN_LINES:])

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)

    def _wait_ready(self, timeout_s: float) -> str:
        deadline_s = time.monotonic() + timeout_s
        while True:
            for line in self._lines:
                if line.startswith(READY_PREFIX):
                    return line.removeprefix(READY_PREFIX).strip()
            if self._process.poll() is not None:
                raise RuntimeError(f"echelon serve ended with exit code {self._process.returncode}:\n{self.log_tail()}")
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"echelon serve was not ready within {timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(POLL_S)

    def _signal(self, victim: Victim, when: Moment | None, number: int) -> int:
        if not isinstance(victim, Rank | Spare | Node):
            first, *under = self._pids_of(victim, self._look(when))
        else:
            if when is not None:
                self._look(when)
            if isinstance(victim, Node) and number == signal.SIGKILL:
                self._nodes.kill(victim)
                return victim.raylet_pid
            first, under = victim.raylet_pid if isinstance(victim, Node) else victim.pid, []
        os.kill(first, number)
        for pid in under:
            with contextlib.suppress(ProcessLookupError):  # it has ended with the first
                os.kill(pid, number)
        return first

    def _look(self, when: Moment | None) -> Cluster:
        """The status, as soon as a moment has come: a recovery has other processes."""
        look = self.status()
        if when == "journal":
            wait_journal(look.coordinator_pid, MOMENT_TIMEOUT_S)
        elif when is not None:
            look = wait_for(when, self.status, look, MOMENT_TIMEOUT_S)
        return look

    def _pids_of(self, victim: int | str, look: Cluster) -> tuple[int, ...]:
        if isinstance(victim, int):
            return (rank_of(look.ranks, victim).pid,)
        return victims.find(victim, look, random.Random(0)).pids


def rank_of(ranks: Iterable[Rank], number: int, replica: int = 0) -> Rank:
    """A rank by its number in its replica, as the mesh counts. Raises IndexError where there is none."""
    own = [rank for rank in ranks if rank.replica == replica]
    if not 0 <= number < len(own):
        raise IndexError(f"replica {replica} has no rank {number}: its ranks are 0 to {len(own) - 1}")
    return sorted(own, key=lambda rank: (rank.pipeline, rank.data, rank.tensor))[number]
