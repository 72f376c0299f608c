"""Carries a plan out: starts the streams, waits for each moment, strikes, and gathers what clients and cluster saw.

Speaks to the cluster as any client does, and signals processes of this machine. Streams are compared with an
undisturbed run on the same cluster, made first. Between two rounds it waits until the cluster has settled, so that one
round's failures are not held against the next.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from echelon.chaos import load, moments, victims
from echelon.chaos.compare import Verdict, compare
from echelon.chaos.load import Asked, Heard, Streams
from echelon.chaos.outcome import SERVES, Strike, Trial
from echelon.chaos.plan import Injection, Round
from echelon.client import Client
from echelon.errors import ConfigError, EchelonError
from echelon.internal.processes import alive
from echelon.types import Cluster, ClusterEvent

LOOK_TIMEOUT_S = 5.0
MOMENT_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 120.0
AWAKE_S = 2.0  # how much longer than the lease a partition lasts
FIRST_TOKENS = 8  # of every stream, before anything is struck


@dataclass(frozen=True, slots=True)
class Settings:
    """tokens: of an answer. tolerance: of log-probabilities. settled_s: of serving, before the next round."""

    streams: int = 16
    tokens: int = 320
    tolerance: float = 1e-9
    lease_s: float = 30.0
    timeout_s: float = 180.0
    settled_s: float = 12.0
    seed: int = 0


class Runner:
    """One cluster under fire. Raises ConfigError unless its processes are this machine's."""

    def __init__(self, address: str | None, settings: Settings) -> None:
        self._settings = settings
        self._client = Client(address, timeout_s=settings.timeout_s)
        self._watcher = self._client.with_options(timeout_s=LOOK_TIMEOUT_S, max_retries=0)
        self._source = random.Random(settings.seed)
        self._undisturbed: dict[str, Heard] = {}
        self._asked: list[Asked] = []
        self._stopped: list[int] = []
        self._rounds = 0
        try:
            victims.check_local(self._client.address, self.look())
        except EchelonError:
            self._client.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays stopped."""
        self._wake()
        self._client.close()

    def look(self) -> Cluster:
        """The cluster now."""
        return self._watcher.cluster()

    def undisturbed(self) -> None:
        """What every stream says when nothing is struck. Raises ConfigError if the cluster cannot answer them."""
        asked = load.mixed(self._settings.streams, self._settings.tokens)
        texts = {
            name: heard.completion.text
            for name, heard in self._hear([each for each in asked if each.name.startswith("stop")]).items()
            if heard.completion
        }
        self._asked = load.stopped(asked, texts)
        self._undisturbed = self._hear(self._asked)

    def trial(self, injections: Round) -> Trial:
        """One round, from a settled cluster to a settled cluster. Raises TimeoutError if a moment does not come."""
        assert self._undisturbed, "there is nothing to compare with"
        self._rounds += 1
        before = self._settle(())
        streams = Streams(self._client, self._settings.timeout_s)
        with self._events() as events:
            streams.start(self._asked)
            streams.wait_tokens(self._source.randrange(FIRST_TOKENS, max(self._settings.tokens // 5, FIRST_TOKENS + 1)))
            strikes: list[Strike] = []
            for injection in injections:
                strikes.append(self._strike(injection, streams, strikes[-1].look if strikes else self.look()))
            heard = streams.results()
            survivors = tuple(pid for strike in strikes for pid in strike.target.pids if alive(pid))
            self._wake()
            after = self._settle(events, before)
            verdicts = self._judge(heard)
        return Trial(
            strikes=tuple(strikes),
            heard=heard,
            verdicts=verdicts,
            events=tuple(events),
            before=before,
            after=after,
            survivors=survivors,
        )

    def _hear(self, asked: Sequence[Asked]) -> dict[str, Heard]:
        streams = Streams(self._client, self._settings.timeout_s)
        streams.start(asked)
        heard = streams.results()
        for each in heard.values():
            if each.completion is None:
                raise ConfigError(f"the undisturbed stream {each.name} failed: {each.error}")
        return heard

    def _judge(self, heard: dict[str, Heard]) -> dict[str, Verdict]:
        """The late prompt's undisturbed run comes last: before, it would have left the prompt in the cache."""
        expected = self._undisturbed
        if load.LATE in heard:
            expected = expected | self._hear([self._late()])
        return {name: compare(expected[name], each, self._settings.tolerance) for name, each in heard.items()}

    def _late(self) -> Asked:
        return load.late(self.look().models[0].max_context, self._rounds)

    def _strike(self, injection: Injection, streams: Streams, before: Cluster) -> Strike:
        """Wait for the moment, and hit who the victim is then."""
        late = injection.when == "prefill"
        if late:
            before = self.look()
            streams.start([load.late(before.models[0].max_context, self._rounds)])
        if injection.when == "journal":
            moments.wait_journal(before.coordinator_pid, MOMENT_TIMEOUT_S)
            look = before
        else:
            look = moments.wait_for(injection.when, self.look, before, MOMENT_TIMEOUT_S)
        target = victims.find(injection.victim, look, self._source)
        waited = late and not streams.readers[-1].fewest_tokens
        struck_unix_s = time.time()
        for pid in target.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if injection.fault == "kill" else signal.SIGSTOP)
        if injection.fault != "kill":
            self._stopped.extend(target.pids)
        if injection.fault == "partition":
            time.sleep(self._settings.lease_s + AWAKE_S)
            self._wake()
        return Strike(injection=injection, target=target, unix_s=struck_unix_s, look=look, late_waited=waited)

    def _wake(self) -> None:
        """SIGCONT to all that was stopped and lives."""
        for pid in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()

    def _settle(self, events: Sequence[ClusterEvent], like: Cluster | None = None) -> Cluster:
        """Until everything serves, as of its last event for long enough, and nothing runs.

        like: with as many warm spares as it had. Raises TimeoutError.
        """
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(EchelonError):
                serving_unix_s = max((event.unix_s for event in tuple(events) if event.kind in SERVES), default=0.0)
                if _is_settled(now := self.look(), like) and time.time() - serving_unix_s >= self._settings.settled_s:
                    return now
            time.sleep(0.1)
        raise TimeoutError(f"the cluster had not settled after {SETTLE_TIMEOUT_S:g} s")

    @contextlib.contextmanager
    def _events(self) -> Iterator[list[ClusterEvent]]:
        """Grows by every event from now on, through any coordinator's end; one's log ends with it."""
        seen: list[ClusterEvent] = []
        latest = max((event.sequence for event in self._watcher.events(follow=False)), default=0)
        with Client(self._client.address) as follower:

            def follow() -> None:
                with contextlib.suppress(EchelonError):  # closed, when the round is over
                    for event in follower.events(after=latest):
                        seen.append(event)

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            yield seen
        thread.join()


def _is_settled(now: Cluster, like: Cluster | None) -> bool:
    spares = [sum(spare.state == "warm" for spare in cluster.spares) for cluster in (now, like or now)]
    serving = all(replica.state == "ready" and not replica.kv_blocks_referenced for replica in now.replicas)
    return serving and not now.queued and not now.running and spares[0] >= spares[1]
