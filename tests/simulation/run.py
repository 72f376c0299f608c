"""One simulated life of a cluster, drawn from a seed: load, faults, peace, and what must be true then."""

from __future__ import annotations

from collections import Counter
from random import Random

from coordinator.jobs.runner import JobConfig
from tests.simulation.checker import Checker, require
from tests.simulation.client import Order, User
from tests.simulation.coordinator import Coordinator, Settings
from tests.simulation.jobs import Item, JobOrder, JobUser
from tests.simulation.network import Clock
from tests.simulation.ranks import Site
from tests.simulation.world import World
from worker.engine import EngineLimits

BLOCK_TOKENS = 4
LOAD_S = 6.0  # requests arrive and faults strike within this time
LIMIT_S = 150.0  # of peace: more than the longest deadline
FAULTS = {  # how often
    "coordinator": (0, 0, 1, 2),
    "death": (0, 0, 1, 2),
    "hang": (0, 0, 0, 1),
    "rank": (0, 1, 4),
    "link": (0, 1, 3),
    "stream": (0, 3, 9),
}


class Simulation:
    """Build from a seed, then `run`."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.world = World(Clock(), random, Checker(), random.choice((0.001, 0.03, 0.2)))
        self.limits = EngineLimits(
            max_running=random.randint(1, 4),
            kv_blocks=random.randint(12, 40),
            block_tokens=BLOCK_TOKENS,
            max_step_tokens=random.choice((3, 8, 64)),
            max_context=12 * BLOCK_TOKENS,
            max_unacked_reports=random.choice((2, 64)),
        )
        self.sites = [self._site(index) for index in range(random.choice((1, 1, 2)))]
        jobs = JobConfig(random.choice((1, 3, 64)), first_backoff_s=0.1, max_backoff_s=2.0)
        self.settings = Settings(random.choice((2.0, 20.0)), random.choice((20, 1000)), jobs)
        self.coordinator = Coordinator(self.world, self.settings, self.sites)
        self.users: list[User] = []
        self.jobs: list[JobUser] = []
        self.happened: Counter[str] = Counter()

    def run(self) -> None:
        """Raises Violation when a promise is broken."""
        clock, random = self.world.clock, self.random
        for number in range(random.randint(1, 5)):
            order = self._order(f"r{number}")
            clock.after(order.starts_s, self._start, order)
        for number in range(random.choice((0, 1, 1, 2))):
            job = self._job_order(f"j{number}")
            clock.after(job.starts_s, self._start_job, job)
        for fault, often in FAULTS.items():
            for _ in range(random.choice(often)):
                clock.after(random.uniform(0.1, LOAD_S), self._strike, fault)
        self.coordinator.crash_rate = random.choice((0.0, 0.0, 0.005, 0.02))
        clock.run(clock.now + LOAD_S)
        self.coordinator.crash_rate = 0.0
        clock.run(clock.now + LIMIT_S, self._settled)
        # The last lost requests are parked, then forgotten.
        clock.run(clock.now + self.settings.resume_window_s + 15.0)
        self._check_peace()

    def _everyone(self) -> list[User | JobUser]:
        return [*self.users, *self.jobs]

    def _settled(self) -> bool:
        return all(user.ended for user in self._everyone()) and all(site.leader for site in self.sites)

    def _check_peace(self) -> None:
        for user in self._everyone():
            user.check()
        require(not self.world.checker.disk.entries, "never forgotten: {}", list(self.world.checker.disk.entries))
        counts = self.coordinator.core.counts
        require((counts.queued, counts.running, counts.parked) == (0, 0, 0), "nothing to do, but {}", counts)
        for site in self.sites:
            self._check_empty(site)
        # No credit was lost either: each replica still takes a request that needs all of its blocks.
        probes = [self._probe(number) for number in range(len(self.sites))]
        self.world.clock.run(self.world.clock.now + 60.0, lambda: all(probe.ended for probe in probes))
        require(all(probe.completion for probe in probes), "{} at the end", [probe.error for probe in probes])

    def _check_empty(self, site: Site) -> None:
        leader = site.leader
        require(leader is not None, "replica {} does not serve", site.index)
        assert leader is not None
        leader.core.check_integrity()
        require(leader.core.stats().blocks_referenced == 0, "blocks are held: {}", leader.core.stats())

    def _probe(self, number: int) -> User:
        prompt = tuple(range(9))
        room = min(self.limits.max_context, self.limits.kv_blocks * BLOCK_TOKENS)
        return User(self.world, self.coordinator, Order(f"probe{number}", prompt, room - len(prompt), 60.0, 0.0))

    def _site(self, index: int) -> Site:
        random = self.random
        return Site(self.world, index, random.choice((1, 2)), self.limits, noisy=random.random() < 0.5)

    def _sometimes(self, chance: float) -> float | None:
        return self.random.uniform(0.0, 3.0) if self.random.random() < chance else None

    def _prompt(self) -> tuple[int, ...]:
        return tuple(self.random.randrange(4096) for _ in range(self.random.randint(1, 14)))

    def _order(self, request_id: str) -> Order:
        random = self.random
        return Order(
            request_id,
            prompt=self._prompt(),
            max_tokens=random.choice((1, 8, 30)),
            timeout_s=random.choice((2.0, 90.0, 90.0)),
            starts_s=random.uniform(0.0, LOAD_S / 2),
            cancels_s=self._sometimes(0.1),
            vanishes_s=self._sometimes(0.1),
            twin_s=self._sometimes(0.1),
            nap_s=random.choice((0.0, 0.0, 5.0)),
        )

    def _job_order(self, job_id: str) -> JobOrder:
        items = [self._item() for _ in range(self.random.randint(1, 5))]
        return JobOrder(job_id, tuple(items), self.random.uniform(0.0, LOAD_S / 2), self._sometimes(0.2))

    def _item(self) -> Item:
        prompt, max_tokens = self._prompt(), self.random.choice((1, 8, 20, 48))
        return Item(prompt, max_tokens, fits=len(prompt) + max_tokens <= self.limits.max_context)

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

    def _start_job(self, order: JobOrder) -> None:
        self.jobs.append(JobUser(self.world, self.coordinator, order))

    def _strike(self, fault: str) -> None:
        random = self.random
        processes = [process for site in self.sites for process in site.processes]
        leaders = [process.leader for process in processes if process.leader]
        match fault:
            case "coordinator" if self.coordinator.up:
                self.coordinator.crash()
            case "death" if processes:
                random.choice(processes).die()
            case "hang" if processes:
                random.choice(processes).hang()
            case "rank" if processes:
                random.choice(processes).cut()
            case "link" if leaders:
                random.choice(leaders).cut()
            case "stream" if reading := [user for user in self.users if not user.ended]:
                random.choice(reading).break_stream()
            case _:
                return
        self.happened[fault] += 1
