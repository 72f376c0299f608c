"""A coordinator's parts and a real rank in one process, over their real streams: what a broken step comes to.

No Ray and no process of its own for the rank: to kill it is to cancel it, and its threads end with their epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import pytest
from torch import Tensor

from coordinator.assembly import build_service, read_layout
from coordinator.expert_loads import ExpertLoads
from coordinator.fences import Fences
from coordinator.frontend import GenerateFields
from coordinator.internal_server import RankControlServicer, ReplicaLinkServicer
from coordinator.replica.config import ReplicaConfig
from coordinator.replica.core import ReplicaCore
from coordinator.replica.service import Callbacks, ReplicaService
from coordinator.replicas import Edges, Replicas
from coordinator.requests.nouns import Outcome, Shown
from coordinator.serving import Serving
from echelon.config import CoordinatorConfig
from echelon.errors import InvalidRequestError, QuarantinedError
from echelon.internal.v1 import control_pb2_grpc, link_pb2_grpc
from echelon.sampling import SamplingParams
from echelon.types import Completion
from tests.tiny import POISON, make_poisoned_checkpoint
from tests.unit.again import Again, Recorder
from worker import epoch
from worker.decode_graphs import graph_sizes
from worker.plan import PlanTables
from worker.rank import RankProcess
from worker.runner import Runner
from worker.spec import RankSpec

BREAKS = 77  # the token whose step breaks


class Site:
    """The coordinator's parts around one replica of one rank."""

    def __init__(self, folder: Path, port: int, family: str) -> None:
        self.address = f"127.0.0.1:{port}"
        config = CoordinatorConfig.model_validate(
            {
                "model": make_poisoned_checkpoint(folder / "model", family), "served_model_name": "tiny",
                "device": "cpu", "dtype": "float64", "max_context": 64, "state_dir": folder / "state",
                "ray_address": "h:1", "internal_address": self.address, "max_running": 4,
            }
        )  # fmt: skip
        self.told: list[object] = []
        self.expert_loads = ExpertLoads()
        self.serves = asyncio.Event()
        self.fences = Fences.open(config.state_dir)
        self.layout = read_layout(config)
        self.service = build_service(self.layout, self.fences)
        self.serving = Serving(lambda: self.replicas.services, self._tell, lambda: self.told.append("ready"))
        self.service.on_proven(self.serving.proven)
        edges = Edges(
            persist_epoch=self.fences.persist_epoch,
            loading=lambda loaded, total: None,
            serving=lambda count: self.serving.look(),
            ready=self.serving.started,
            fail=self.told.append,
        )
        self.replicas = Replicas(1, self._make, self.service, edges)
        self._running: dict[RankProcess, asyncio.Task[None]] = {}

    def _tell(self, serves: bool) -> None:
        self.told.append(serves)
        (self.serves.set if serves else self.serves.clear)()

    def _make(self, replica: int, callbacks: Callbacks) -> ReplicaService:
        plan, layout = self.layout.plan, self.layout.settings.layout
        core = ReplicaCore(ReplicaConfig(replica=replica, term=self.fences.term, epoch=0, plan=plan, layout=layout))
        return ReplicaService(replica, core, self, self.service, callbacks)

    async def launch(
        self, replica: int, rank: int, incarnation: str, no_room: Callable[[str], None] | None = None
    ) -> None:
        spec = RankSpec(
            coordinator_address=self.address, cluster="c", replica=replica, rank=rank, incarnation=incarnation,
            device="cpu", heartbeat_s=0.1, term=1,
        )  # fmt: skip
        process = RankProcess(spec)
        self._running[process] = asyncio.create_task(process.run())

    async def replace(self, replica: int, rank: int) -> bool:
        return False

    async def kill(self, replica: int, suspect: int | None) -> None:
        killed, self._running = self._running, {}
        for task in killed.values():
            task.cancel()
        await asyncio.gather(*killed.values(), return_exceptions=True)
        for process in killed:
            if process._epoch is not None:
                await asyncio.to_thread(process._epoch.resources.close)

    async def ask(self, *prompt: int, max_tokens: int = 6) -> Outcome:
        """The end of a request's stream."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logit_bias={POISON: -100.0})
        shown: list[Shown] = [
            event async for event in self.service.submit(GenerateFields(prompt=prompt, sampling=sampling))
        ]
        assert isinstance(shown[-1], Outcome)
        return shown[-1]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.service.events._events]

    async def run(self, test: Callable[[Site], Coroutine[Any, Any, None]], server: grpc.aio.Server) -> None:
        settings = self.layout.settings
        services = self.replicas.services
        control_pb2_grpc.add_RankControlServicer_to_server(
            RankControlServicer(services, lambda: settings, self.expert_loads), server
        )
        link_pb2_grpc.add_ReplicaLinkServicer_to_server(ReplicaLinkServicer(services, self.service), server)
        await server.start()
        works = [asyncio.create_task(work) for work in (self.replicas.run(), self.service.tick())]
        try:
            self.replicas.joined([frozenset()])
            await asyncio.wait_for(self.serves.wait(), 60)
            await asyncio.wait_for(test(self), 60)
        finally:
            self.serving.close()
            self.replicas.close()
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            await self.kill(0, None)
            await server.stop(0)
            self.service.close()
            self.fences.close()


class Run(Protocol):
    def __call__(self, test: Callable[[Site], Coroutine[Any, Any, None]], family: str = "llama") -> None: ...


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def within(test: Callable[[Site], Coroutine[Any, Any, None]], family: str = "llama") -> None:
        async def work() -> None:
            server = grpc.aio.server()
            site = Site(tmp_path, server.add_insecure_port("127.0.0.1:0"), family)
            await site.run(test, server)

        asyncio.run(work())

    return within


def test_it_serves_by_a_token_that_nobody_asked_for_and_a_poisonous_request_disturbs_nobody(run: Run) -> None:
    async def test(site: Site) -> None:
        assert site.told == [True, "ready"]
        assert "replica.proven" in site.kinds()
        assert site.service.core.remembered == 0
        alone = await site.ask(5, 6, 7)
        both = await asyncio.gather(site.ask(5, 6, 7), site.ask(5, 6, POISON))
        assert isinstance(alone, Completion) and isinstance(both[0], Completion)
        assert both[0].token_ids == alone.token_ids
        assert isinstance(both[1], InvalidRequestError) and both[1].reason == "NON_FINITE"
        assert site.replicas.services[0].core.fence.epoch == 1, "no epoch ends for it"

    run(test)


def test_a_request_that_breaks_its_step_is_quarantined_and_the_other_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Runner.forward

    def breaks(self: Runner, tables: PlanTables) -> Any:
        if BREAKS in tables.token_ids.tolist():
            raise IndexError("a token that no kernel takes")
        return forward(self, tables)

    monkeypatch.setattr(Runner, "forward", breaks)

    async def test(site: Site) -> None:
        alone = await site.ask(5, 6, 7, max_tokens=40)
        both = await asyncio.gather(site.ask(5, 6, 7, max_tokens=40), site.ask(5, BREAKS))
        assert isinstance(alone, Completion) and isinstance(both[0], Completion)
        assert both[0].token_ids == alone.token_ids
        assert isinstance(both[1], QuarantinedError)
        assert "IndexError: a token that no kernel takes" in both[1].message
        kinds = site.kinds()
        assert kinds.count("request.quarantined") == 1
        assert 2 <= kinds.count("rank.lost") <= 3, "twice at most with the other one, then alone"
        assert "device.quarantined" not in kinds
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(site.serves.wait(), 20)
        assert site.serves.is_set()

    run(test)


def test_the_coordinator_hears_how_often_experts_are_chosen(run: Run) -> None:
    """Two of four for each token, in both layers; seven tokens at least are computed for an answer of six."""

    async def test(site: Site) -> None:
        async def choices(least: int) -> list[int]:
            while True:
                loads = site.expert_loads.describe({0: 1})
                found = [sum(load.rows) for load in loads]
                if len(set(found)) == 1 and found[0] >= least:
                    assert [(load.replica, load.layer, len(load.rows)) for load in loads] == [(0, 0, 4), (0, 1, 4)]
                    return found
                await asyncio.sleep(0.1)

        (before, _) = await choices(1)  # of the token that nobody asked for
        assert isinstance(await site.ask(5, 6), Completion)
        (after, _) = await choices(before + 2 * 7)
        assert (after - before) % 2 == 0
        assert site.expert_loads.describe({0: 2}) == []

    run(test, "mixtral")


@pytest.mark.long
def test_a_replica_whose_rank_died_serves_before_it_has_its_graphs_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start they are captured first; what is asked for meanwhile gets the same ids."""
    captured: list[tuple[int, bool]] = []

    class Capture(Recorder):
        def __init__(self, device: object) -> None:
            super().__init__()

        def __call__(self, work: Callable[[], Tensor]) -> Again:
            captured.append((len(self.made), threading.current_thread().name == "_launch"))
            return super().__call__(work)

    monkeypatch.setattr(epoch, "CudaCapture", Capture)
    monkeypatch.setattr(epoch, "refusal", lambda *asked: "")

    async def test(site: Site) -> None:
        sizes = graph_sizes(4)
        assert captured == [(number, False) for number in range(len(sizes))], "before it serves"
        expected = await asyncio.gather(site.ask(5, 6, 7, max_tokens=30), site.ask(8, 9, max_tokens=30))
        captured.clear()
        asked = [asyncio.create_task(site.ask(*prompt, max_tokens=30)) for prompt in ((5, 6, 7), (8, 9))]
        await asyncio.sleep(0.05)
        await site.kill(0, None)
        found = await asyncio.gather(*asked)
        assert [_ids(each) for each in found] == [_ids(each) for each in expected]
        async with asyncio.timeout(30):
            while "graphs.captured" not in site.kinds():
                await asyncio.sleep(0.01)
        assert captured == [(number, True) for number in range(len(sizes))], "between its steps"
        (told,) = [event.detail for event in site.service.events._events if event.kind == "graphs.captured"]
        assert (told["epoch"], told["count"]) == (2, len(sizes))
        assert _ids(await site.ask(5, 6, 7, max_tokens=30)) == _ids(expected[0])

    run(test)


def _ids(outcome: Outcome) -> tuple[int, ...]:
    assert isinstance(outcome, Completion)
    return outcome.token_ids
