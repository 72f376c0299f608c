"""One simulated life of a cluster, drawn from a seed: load, faults, peace, and what must be true then."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from coordinator.jobs.runner import JobConfig, item_request_id, item_seed
from coordinator.requests.nouns import Request
from echelon.internal.link import Sampling
from parallel.degrees import Degrees
from tests.simulation.checker import SEEN, Checker, require
from tests.simulation.client import Order, User, answered
from tests.simulation.coordinator import Settings
from tests.simulation.faults import AIMED, FAULTS, STRIKES_S, Faults
from tests.simulation.jobs import Item, JobOrder, JobUser
from tests.simulation.model import VOCABULARY, draw_sampling
from tests.simulation.network import Clock
from tests.simulation.ranks import Site
from tests.simulation.supervisor import Supervisor
from tests.simulation.world import World
from worker.engine import EngineLimits

BLOCK_TOKENS = 4
LOAD_S = 8.0  # requests arrive, and faults strike at random
PATIENCE_S = 400.0  # of users that do not press: the slowest device comes to an end in it
LIMIT_S = 500.0  # of peace: more than the longest deadline
MAX_PREFIX, MAX_PROMPT = 10, 16
AIMS = 7  # faults of a life that are aimed; the seeds take their cells in turn

LAYOUTS = (  # of a replica; most are of one rank
    *[Degrees()] * 3,
    Degrees(tensor=2),
    Degrees(tensor=3),
    Degrees(pipeline=2),
    Degrees(pipeline=3),
    Degrees(data=2),
    Degrees(pipeline=2, data=2),
)

ENGINE = ("preemptions", "cache_hits", "shared_prefix_tokens", "chunked_prompts", "replayed_requests")
MUST_HAPPEN = (
    "write of an old term refused",
    "written again after the disk lost it",
    "replica.adopted",
    "replica.relayout",
    "request.replayed",
    "request.parked",
    "affinity hits",
    "several steps in flight",
    "data ranks",
    "graphs captured while serving",
    "jobs.interrupted items",
    "jobs.results",
    "answers",
    *(f"engine.{name}" for name in ENGINE),
    *SEEN,
)


class Simulation:
    """Build from a seed, then `run`."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.world = World(Clock(), random, Checker(), random.choice((0.001, 0.03, 0.2)))
        self.limits = EngineLimits(
            max_running=random.randint(1, 4),
            kv_blocks=random.choice((12, 13, 17, 32)),
            block_tokens=BLOCK_TOKENS,
            max_step_tokens=random.choice((3, 8, 64)),
            max_context=12 * BLOCK_TOKENS,
            max_unacked_reports=random.choice((2, 64)),
        )
        self.prefixes = [self._ids(MAX_PREFIX) for _ in range(2)]
        self.sites = [self._site(index) for index in range(random.choice((1, 1, 2, 3)))]
        jobs = JobConfig(random.choice((1, 3, 64)), first_backoff_s=0.1, max_backoff_s=2.0)
        self.settings = Settings(random.choice((2.0, 10.0)), random.choice((20, 1000)), jobs)
        self.supervisor = Supervisor(self.world, self.settings, self.sites)
        self.users: list[User] = []
        self.jobs: list[JobUser] = []
        self.faults = Faults(self.world, self.supervisor, self.sites, self.users, self._relayout)
        self._aims = [AIMED[(seed * AIMS + aim) % len(AIMED)] for aim in range(AIMS)]

    def run(self) -> None:
        """Raises Violation when a promise is broken."""
        clock, random = self.world.clock, self.random
        for number in range(random.randint(1, 4)):
            order = self._order(f"r{number}")
            clock.after(order.starts_s, self._start, order)
        for number in range(random.choice((0, 1, 1, 2))):
            job = self._job_order(f"j{number}")
            clock.after(job.starts_s, self._start_job, job)
        for fault, phase in self._aims:
            clock.after(random.uniform(0.1, LOAD_S / 2), self.faults.aim, fault, phase)
        for _ in range(random.choice((0, 0, 1))):
            clock.after(random.uniform(0.1, LOAD_S), self.faults.strike, random.choice(FAULTS))
        self.supervisor.crashes.rate = random.choice((0.0, 0.0, 0.0, 0.005, 0.02))
        clock.run(clock.now + STRIKES_S)
        self.faults.end()
        clock.run(clock.now + LIMIT_S, self._settled)
        # The last lost requests are parked, then forgotten.
        entries = self.world.checker.disk.entries
        clock.run(clock.now + self.settings.resume_window_s + 15.0, lambda: not entries)
        clock.run(clock.now + 5.0)  # and their leaders hear of it
        self._check_peace()

    def coverage(self) -> Counter[str]:
        """What happened in this life: faults, decisions, and what its answers were like."""
        checker, core = self.world.checker, self.supervisor.coordinator.core
        happened = checker.told + checker.seen
        happened["answers"] += answered(self.users)
        happened["requests"] += len(self.users)
        happened["tokens"] += checker.tokens
        happened["epochs"] += sum(site.epoch for site in self.sites)
        happened["affinity hits"] += sum(core.affinity_hits(site.index) for site in self.sites)
        rows = self.supervisor.disk.jobs.rows.values()
        happened["jobs.interrupted items"] += sum(len(row.interrupted) for row in rows)
        happened["jobs.results"] += sum(len(row.results) for row in rows)
        for leader in (leader for site in self.sites for leader in site.leaders):
            happened["several steps in flight"] += leader.pipeline.most_out > 1
            happened["graphs captured while serving"] += leader.captured
            happened["data ranks"] += len(leader.core._lanes.schedulers) > 1
            for name in ENGINE:
                happened[f"engine.{name}"] += leader.core.stats().counters.get(name, 0)
        return happened

    def _everyone(self) -> list[User | JobUser]:
        return [*self.users, *self.jobs]

    def _settled(self) -> bool:
        return all(user.ended for user in self._everyone()) and all(site.as_wanted for site in self.sites)

    def _check_peace(self) -> None:
        for user in self._everyone():
            user.check()
        require(not self.world.checker.disk.entries, "never forgotten: {}", list(self.world.checker.disk.entries))
        counts = self.supervisor.coordinator.core.counts
        require((counts.queued, counts.running, counts.parked) == (0, 0, 0), "nothing to do, but {}", counts)
        for site in self.sites:
            self._check_empty(site)
        # No credit was lost either: each replica still takes a request that needs all of its slots.
        sizes = sorted((site.degrees.data * self.limits.max_running for site in self.sites), reverse=True)
        probes = [self._probe(number, size) for number, size in enumerate(sizes)]
        self.world.clock.run(self.world.clock.now + 60.0, lambda: all(probe.ended for probe in probes))
        require(all(probe.completion for probe in probes), "{} at the end", [probe.error for probe in probes])

    def _check_empty(self, site: Site) -> None:
        leader = site.leader
        require(leader is not None and site.as_wanted, "replica {} does not serve as {}", site.index, site.degrees)
        assert leader is not None
        leader.core.check_integrity()
        require(leader.core.stats().blocks_referenced == 0, "blocks are held: {}", leader.core.stats())

    def _probe(self, number: int, choices: int) -> User:
        sampling = Sampling(1.0, 1.0, 0, max_tokens=2, seed=number, n=choices)
        return User(self.world, self.supervisor, Order(f"probe{number}", (1, 2, 3), sampling, 60.0, 0.0))

    def _site(self, index: int) -> Site:
        random = self.random
        return Site(self.world, index, random.choice(LAYOUTS), self.limits, noisy=random.random() < 0.5)

    def _sometimes(self, chance: float) -> float | None:
        return self.random.uniform(0.0, 3.0) if self.random.random() < chance else None

    def _prompt(self) -> tuple[int, ...]:
        """Some begin alike, over several blocks or a part of one; some begin as others go on."""
        random = self.random
        prefix = self.prefixes[random.randrange(len(self.prefixes))]
        common = prefix[random.choice((0, 0, BLOCK_TOKENS)) : random.choice((0, 6, MAX_PREFIX))]
        return common + self._ids(random.randint(1, MAX_PROMPT - len(common)))

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(VOCABULARY) for _ in range(count))

    def _salt(self) -> str:
        return self.random.choice(("", "", "a", "b"))

    def _order(self, request_id: str) -> Order:
        random = self.random
        return Order(
            request_id,
            prompt=self._prompt(),
            sampling=draw_sampling(random, random.getrandbits(60), self.limits.max_running),
            timeout_s=random.choice((2.0, PATIENCE_S, PATIENCE_S)),
            starts_s=random.uniform(0.0, LOAD_S),
            cancels_s=self._sometimes(0.1),
            vanishes_s=self._sometimes(0.1),
            twin_s=self._sometimes(0.1),
            nap_s=random.choice((0.0, 0.0, 5.0)),
            priority=random.choice((0, 0, -1, 1)),
            cache_salt=self._salt(),
        )

    def _job_order(self, job_id: str) -> JobOrder:
        items = [self._item(job_id, index) for index in range(self.random.randint(1, 4))]
        return JobOrder(job_id, tuple(items), self.random.uniform(0.0, LOAD_S / 2), self._sometimes(0.2))

    def _item(self, job_id: str, index: int) -> Item:
        random, limits, prompt = self.random, self.limits, self._prompt()
        request_id = item_request_id(job_id, index)
        sampling = draw_sampling(random, item_seed(job_id, index), max_choices=2)
        if random.random() < 0.1:
            sampling = replace(sampling, max_tokens=limits.max_context)
        request = Request(
            request_id=request_id,
            digest=request_id.encode(),
            model="m",
            prompt=prompt,
            sampling=sampling,
            deadline_unix_s=0.0,
            opened_unix_s=0.0,
            priority=random.choice((0, 0, 1)),
            cache_salt=self._salt(),
        )
        fits = len(prompt) + sampling.max_tokens <= limits.max_context and sampling.n <= limits.max_running
        return Item(request, fits)

    def _start(self, order: Order) -> None:
        clock = self.world.clock
        user = User(self.world, self.supervisor, order)
        self.users.append(user)
        if order.cancels_s is not None:
            clock.after(order.cancels_s, user.cancel)
        if order.vanishes_s is not None:
            clock.after(order.vanishes_s, user.vanish)
        if order.twin_s is not None:
            clock.after(order.twin_s, lambda: self.users.append(User(self.world, self.supervisor, order)))

    def _start_job(self, order: JobOrder) -> None:
        self.jobs.append(JobUser(self.world, self.supervisor, order))

    def _relayout(self, site: Site) -> None:
        site.degrees = self.random.choice(LAYOUTS)
        self.supervisor.call(lambda coordinator: coordinator.replicas[site.index].relayout())
