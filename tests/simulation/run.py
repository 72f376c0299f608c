"""One simulated life of a cluster, drawn from a seed: load, faults, peace, and what must be true then."""

from __future__ import annotations

from collections import Counter
from random import Random

from echelon.internal.link import Fence
from tests.simulation.checker import Checker, require
from tests.simulation.client import Order, User
from tests.simulation.cluster import Coordinator, Leader, Replica, World
from tests.simulation.network import Clock
from worker.engine import EngineLimits

BLOCK_TOKENS = 4
LOAD_S = 6.0  # requests arrive and faults strike within this time
LIMIT_S = 150.0  # of peace: more than the longest deadline
FAULTS = {"coordinator": (0, 0, 1, 2), "epoch": (0, 0, 1, 2), "link": (0, 1, 3), "stream": (0, 3, 9)}  # how often


class Simulation:
    """Build from a seed, then `run`."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.world = World(Clock(), self.random, Checker(), self.random.choice((0.001, 0.03, 0.2)))
        self.resume_window_s = self.random.choice((2.0, 20.0))
        self.coordinator = Coordinator(self.world, self.resume_window_s, self.random.choice((20, 1000)))
        self.users: list[User] = []
        self.happened: Counter[str] = Counter()
        self.limits = EngineLimits(
            max_running=self.random.randint(1, 4),
            kv_blocks=self.random.randint(12, 40),
            block_tokens=BLOCK_TOKENS,
            max_step_tokens=self.random.choice((3, 8, 64)),
            max_context=12 * BLOCK_TOKENS,
            max_unacked_reports=self.random.choice((2, 64)),
        )
        self.leaders: list[Leader] = []
        self.replicas = [self._replica(index) for index in range(self.random.choice((1, 1, 2)))]

    def run(self) -> None:
        """Raises Violation when a promise is broken."""
        clock, random = self.world.clock, self.random
        for number in range(random.randint(2, 6)):
            order = self._order(f"r{number}")
            clock.after(order.starts_s, self._start, order)
        for fault, often in FAULTS.items():
            for _ in range(random.choice(often)):
                clock.after(random.uniform(0.1, LOAD_S), self._strike, fault)
        self.coordinator.crash_rate = random.choice((0.0, 0.0, 0.005, 0.02))
        clock.run(clock.now + LOAD_S)
        self.coordinator.crash_rate = 0.0
        clock.run(clock.now + LIMIT_S, lambda: all(user.ended for user in self.users))
        clock.run(clock.now + self.resume_window_s + 15.0)  # the last lost requests are parked, then forgotten
        self._check_peace()

    def _check_peace(self) -> None:
        for user in self.users:
            user.check()
        require(not self.world.checker.disk.entries, "never forgotten: {}", list(self.world.checker.disk.entries))
        counts = self.coordinator.core.counts
        require((counts.queued, counts.running, counts.parked) == (0, 0, 0), "nothing to do, but {}", counts)
        for replica in self.replicas:
            self._check_empty(replica.leader)
        # No credit was lost either: each replica still takes a request that needs all of its blocks.
        probes = [self._probe(number) for number in range(len(self.replicas))]
        self.world.clock.run(self.world.clock.now + 60.0, lambda: all(probe.ended for probe in probes))
        require(all(probe.completion for probe in probes), "{} at the end", [probe.error for probe in probes])

    def _check_empty(self, leader: Leader) -> None:
        leader.core.check_integrity()
        require(leader.core.stats().blocks_referenced == 0, "blocks are held: {}", leader.core.stats())

    def _probe(self, number: int) -> User:
        prompt = tuple(range(9))
        room = min(self.limits.max_context, self.limits.kv_blocks * BLOCK_TOKENS)
        return User(self.world, self.coordinator, Order(f"probe{number}", prompt, room - len(prompt), 60.0, 0.0))

    def _replica(self, index: int) -> Replica:
        noisy = self.random.random() < 0.5
        return Replica(self.world, self.coordinator, self.limits, lambda fence: self._leader(fence, noisy), index)

    def _leader(self, fence: Fence, noisy: bool) -> Leader:
        leader = Leader(self.world, self.coordinator, fence, self.limits, noisy)
        self.leaders.append(leader)
        return leader

    def _order(self, request_id: str) -> Order:
        random = self.random

        def sometimes(chance: float) -> float | None:
            return random.uniform(0.0, 3.0) if random.random() < chance else None

        return Order(
            request_id,
            prompt=tuple(random.randrange(4096) for _ in range(random.randint(1, 14))),
            max_tokens=random.choice((1, 8, 30)),
            timeout_s=random.choice((2.0, 90.0, 90.0)),
            starts_s=random.uniform(0.0, LOAD_S / 2),
            cancels_s=sometimes(0.1),
            vanishes_s=sometimes(0.1),
            twin_s=sometimes(0.1),
            nap_s=random.choice((0.0, 0.0, 5.0)),
        )

    def _start(self, order: Order) -> None:
        clock = self.world.clock
        user = User(self.world, self.coordinator, order)
        self.users.append(user)
        if order.cancels_s is not None:
            clock.after(order.cancels_s, user.cancel)
        if order.vanishes_s is not None:
            clock.after(order.vanishes_s, user.vanish)
        if order.twin_s is not None:
            clock.after(order.twin_s, lambda: self.users.append(User(self.world, self.coordinator, order)))

    def _strike(self, fault: str) -> None:
        self.happened[fault] += 1
        match fault:
            case "coordinator" if self.coordinator.up:
                self.coordinator.crash()
            case "epoch":
                self.random.choice(self.replicas).end_epoch()
            case "link":
                self.random.choice(self.replicas).leader.cut()
            case "stream" if reading := [user for user in self.users if not user.ended]:
                self.random.choice(reading).break_stream()
