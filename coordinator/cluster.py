"""Ray, as the coordinator uses it: slots, rank processes and node agents. The only `import ray` of the coordinator.

Ray places processes and starts them; killing goes through the node agents, by pidfd and with confirmation. Ranks,
agents and slots are detached, so they outlive a coordinator and a successor finds them by name. A slot is one
placement group of one bundle per device, kept through all epochs. Every blocking call of Ray runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
import structlog
from ray.util import scheduling_strategies
from ray.util.placement_group import PlacementGroup

from echelon.errors import InternalError
from worker.actor import AgentActor, RankActor, remove_slots, slot_name
from worker.spec import RankSpec, parse_rank_name, replica_prefix

NAMESPACE = "echelon"
JOIN_TIMEOUT_S = 25.0
SLOT_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 30.0
DEATH_POLL_S = 10.0

Result = TypeVar("Result")
Agent = Any  # Ray's actor handles have no static type

log = structlog.get_logger("cluster")


class Cluster:
    """One per coordinator, connected from `connect` to `remove` or `disconnect`. address: of the Ray to join."""

    def __init__(self, cluster: str, address: str, lease_s: float) -> None:
        self._cluster = cluster
        self._address = address
        self._lease_s = lease_s
        self._joining: asyncio.Task[None] | None = None
        self._agents: dict[str, Agent] = {}
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="ray")

    async def connect(self) -> None:
        """Join Ray as a driver, and have an agent on every node. Raises InternalError. Whoever is first does it."""
        if self._joining is None:
            self._joining = asyncio.create_task(self._join())
        await asyncio.shield(self._joining)

    async def _join(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):  # its own attempts go on for minutes
                await self._call(
                    ray.init,
                    address=self._address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    configure_logging=False,
                )
            await self._find_agents()
        except TimeoutError:
            raise InternalError(f"Ray at {self._address} does not answer within {JOIN_TIMEOUT_S:g} s") from None
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise InternalError(f"Ray at {self._address} cannot be used: {error}") from error

    async def survivors(self, replica: int) -> frozenset[tuple[int, str]]:
        """(rank, incarnation) of a replica's processes that live and have a master: an agent that answers."""
        living = await self._living()
        return frozenset((rank, incarnation) for index, rank, incarnation in living if index == replica)

    async def end_surplus(self, replicas: int) -> None:
        """End what a predecessor left of replicas beyond so many, and give their slots back."""
        for replica in {index for index, _, _ in await self._living() if index >= replicas}:
            await self.kill(replica)
            await self._call(remove_slots, self._cluster, replica)

    async def _living(self) -> list[tuple[int, int, str]]:
        """(replica, rank, incarnation) of every process of this cluster whose agent answers."""
        asked = (self._ask(agent.living) for agent in self._agents.values())
        found = await asyncio.gather(*asked, return_exceptions=True)
        living = [parse_rank_name(name) for part in found if not isinstance(part, BaseException) for name in part]
        return [(replica, rank, incarnation) for of, replica, rank, incarnation in living if of == self._cluster]

    async def launch(self, spec: RankSpec) -> int:
        """Start a rank in its slot; its pid. Raises InternalError when Ray has no room or the process does not come."""
        try:
            async with asyncio.timeout(SLOT_TIMEOUT_S + CALL_TIMEOUT_S):
                slot = await self._call(self._slot, spec)
                actor = await self._call(self._create_rank, spec, slot)
                node_id = await _result(actor.node_id.remote())
                if node_id not in self._agents:
                    await self._find_agents()
                pid = await _result(actor.start.remote(spec.to_json(), self._agents[node_id]))
        except (TimeoutError, ray.exceptions.RayError) as error:
            reason = str(error).strip().splitlines()[-1:] or [f"no answer within {CALL_TIMEOUT_S:g} s"]
            raise InternalError(f"Ray did not start {spec.name}: {reason[0]}") from error
        return int(pid)

    async def kill(self, replica: int, suspect: int | None = None) -> None:
        """End every process of a replica, of whatever incarnation, and return once that is confirmed.

        Of a node that is gone there is no confirmation; should its processes live on unseen, the fences stop them
        from doing harm and the agent's lease ends them.
        """
        prefix = replica_prefix(self._cluster, replica)
        first = "" if suspect is None else f"{prefix}{suspect}/"
        await asyncio.gather(*(self._kill_on(node, agent, prefix, first) for node, agent in self._agents.items()))
        await self._call(self._discard_actors, prefix)

    async def deaths(self) -> AsyncGenerator[tuple[int, int, str], None]:
        """(replica, rank, incarnation) of each process that ended unordered, as the agents see them, without end."""
        polls: dict[asyncio.Future[list[str]], str] = {}
        try:
            while True:
                for node, agent in self._agents.items():
                    if node not in polls.values():
                        polls[_result(agent.deaths.remote(DEATH_POLL_S))] = node
                if not polls:  # every agent is gone, until the next renewal finds new ones
                    await asyncio.sleep(1.0)
                    continue
                done, _ = await asyncio.wait(polls, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for poll in done:
                    node = polls.pop(poll)
                    if isinstance(poll.exception(), ray.exceptions.RayError):
                        # What lived there says so itself: its streams end.
                        log.warning("an agent is gone", node=node)
                        self._agents.pop(node, None)
                        continue
                    for name in poll.result():
                        yield parse_rank_name(name)[1:]
        finally:
            for poll in polls:
                poll.cancel()

    async def renew(self) -> None:
        """Extend the lease on every node; a node that is new or has lost its agent gets one.

        Waits for no answer longer than the lease can spare: one agent that is stuck must not cost the others theirs.
        """
        try:
            async with asyncio.timeout(self._lease_s / 3):
                await self._find_agents()
        except (TimeoutError, ray.exceptions.RayError) as error:
            log.warning("Ray does not tell its nodes", error=str(error))
            await self._renew_known()

    async def _find_agents(self) -> None:
        nodes = await self._call(ray.nodes)
        for node_id in [node["NodeID"] for node in nodes if node["Alive"]]:
            if node_id not in self._agents:
                self._agents[node_id] = await self._call(self._create_agent, node_id)
        await self._renew_known()

    async def _renew_known(self) -> None:
        lease = [self._ask(agent.renew, self._lease_s, timeout_s=self._lease_s / 6) for agent in self._agents.values()]
        await asyncio.gather(*lease, return_exceptions=True)

    async def remove(self) -> None:
        """End all ranks and agents, a predecessor's too, give the slots back, and leave Ray."""
        try:
            await self.connect()
        except InternalError as error:
            log.warning("nothing is ended", error=error.message)
            return
        for node, agent in list(self._agents.items()):
            await self._kill_on(node, agent, "rank/", "")
        with contextlib.suppress(ray.exceptions.RayError):
            await self._call(self._discard_actors, f"rank/{self._cluster}/")
            await self._call(self._discard_actors, f"agent/{self._cluster}/")
            await self._call(remove_slots, self._cluster)
        await self.disconnect()

    async def disconnect(self) -> None:
        """Leave Ray; ranks, agents and slots stay for a successor."""
        await self._call(ray.shutdown)
        self._threads.shutdown(wait=False)

    # Blocking, each in a thread.

    def _slot(self, spec: RankSpec) -> PlacementGroup:
        name = slot_name(self._cluster, spec.replica, spec.rank)
        slot: PlacementGroup
        try:
            slot = ray.util.get_placement_group(name)
        except ValueError:
            resource = "GPU" if spec.device == "cuda" else "CPU"
            slot = ray.util.placement_group([{resource: 1}], name=name, lifetime="detached")
        if not slot.wait(timeout_seconds=SLOT_TIMEOUT_S):
            free = ", ".join(f"{name} {count:g}" for name, count in sorted(_free().items()))
            raise InternalError(
                f"Ray has no room for {spec.name} within {SLOT_TIMEOUT_S:g} s: it needs 1 "
                f"{'GPU' if spec.device == 'cuda' else 'CPU'}, free are {free or 'none'}"
            )
        return slot

    def _create_rank(self, spec: RankSpec, slot: PlacementGroup) -> Any:
        return (
            ray.remote(RankActor)
            .options(
                name=spec.name,
                lifetime="detached",
                max_restarts=0,
                num_cpus=0 if spec.device == "cuda" else 1,
                num_gpus=1 if spec.device == "cuda" else 0,
                scheduling_strategy=scheduling_strategies.PlacementGroupSchedulingStrategy(slot, 0),
            )
            .remote()
        )

    def _create_agent(self, node_id: str) -> Agent:
        return (
            ray.remote(AgentActor)
            .options(
                name=f"agent/{self._cluster}/{node_id}",
                lifetime="detached",
                get_if_exists=True,
                max_restarts=0,
                num_cpus=0,
                max_concurrency=16,
                scheduling_strategy=scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(self._cluster, self._lease_s)
        )

    def _discard_actors(self, prefix: str) -> None:
        """Let Ray forget actors whose processes are gone, and ones that it was still starting."""
        for name in ray.util.list_named_actors():
            if name.startswith(prefix):
                with contextlib.suppress(ValueError):  # it went by itself meanwhile
                    ray.kill(ray.get_actor(name))

    async def _kill_on(self, node: str, agent: Agent, prefix: str, first: str) -> None:
        while True:
            try:
                left = await self._ask(agent.kill, prefix, first)
            except ray.exceptions.RayActorError:
                self._agents.pop(node, None)
                return
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("an agent does not answer; its lease must end first", node=node, error=str(error))
                await asyncio.sleep(self._lease_s)
                return
            if not left:
                return
            log.warning("processes do not end; trying again", node=node, left=left)

    async def _ask(self, method: Any, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        async with asyncio.timeout(timeout_s):
            return await _result(method.remote(*arguments))

    async def _call(self, function: Callable[..., Result], *positional: object, **named: object) -> Result:
        call = functools.partial(function, *positional, **named)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _free() -> dict[str, float]:
    resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return {name: count for name, count in resources.items() if name in ("CPU", "GPU")}


def _result(reference: Any) -> asyncio.Future[Any]:
    """Awaitable without a thread."""
    return asyncio.wrap_future(reference.future())
