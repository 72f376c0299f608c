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
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import structlog

from coordinator.slots import SLOT_TIMEOUT_S, create_agent, create_rank, discard_actors, take_slot
from echelon.errors import InternalError
from worker.actor import remove_slots
from worker.spec import RankSpec, parse_name, replica_prefix, spare_name, spares_prefix

NAMESPACE = "echelon"
JOIN_TIMEOUT_S = 25.0
CALL_TIMEOUT_S = 30.0
DEATH_POLL_S = 10.0

Result = TypeVar("Result")
Agent = Any  # Ray's actor handles have no static type
Actor = Any

log = structlog.get_logger("cluster")


@dataclass(frozen=True, slots=True)
class SpareProcess:
    """A process that waits in the slot of a rank."""

    replica: int
    rank: int
    name: str
    node_id: str
    actor: Actor


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
        living = [process for _, process in await self._living()]
        return frozenset(
            (rank, incarnation) for kind, of, rank, incarnation in living if (kind, of) == ("rank", replica)
        )

    async def end_surplus(self, replicas: int) -> None:
        """End what a predecessor left of replicas beyond so many, and give their slots back."""
        for replica in {index for _, (_, index, _, _) in await self._living() if index >= replicas}:
            await self.kill(replica)
            await self.end_all(spares_prefix(self._cluster, replica))
            await self._call(remove_slots, self._cluster, replica)

    async def spares(self) -> list[SpareProcess]:
        """The processes that a predecessor has left waiting in slots."""
        found = []
        for node_id, (kind, replica, rank, serial) in await self._living():
            if kind == "spare":
                name = spare_name(self._cluster, replica, rank, serial)
                with contextlib.suppress(ValueError):  # it went by itself meanwhile
                    actor = await self._call(ray.get_actor, name)
                    found.append(SpareProcess(replica, rank, name, node_id, actor))
        return found

    async def _living(self) -> list[tuple[str, tuple[str, int, int, str]]]:
        """Node, and (kind, replica, rank, incarnation or serial), of every process of ours whose agent answers."""
        nodes = list(self._agents)
        asked = (self._ask(self._agents[node].living) for node in nodes)
        found = await asyncio.gather(*asked, return_exceptions=True)
        parts = [(node, part) for node, part in zip(nodes, found, strict=True) if not isinstance(part, BaseException)]
        living = [(node, parse_name(name)) for node, part in parts for name in part]
        return [
            (node, (kind, replica, rank, last))
            for node, (kind, cluster, replica, rank, last) in living
            if cluster == self._cluster
        ]

    async def launch(self, spec: RankSpec) -> int:
        """Start a rank in its slot; its pid. Raises InternalError when Ray has no room or the process does not come."""
        node_id, actor = await self._create(spec.name, spec.replica, spec.rank, spec.device)
        return int(await self.ask(actor.start, spec.to_json(), self._agents[node_id]))

    async def launch_spare(self, name: str, replica: int, rank: int, device: str) -> SpareProcess:
        """Start a process that waits in a rank's slot and warms up there. Raises as `launch`."""
        node_id, actor = await self._create(name, replica, rank, device)
        await self.ask(actor.warm, name, device, self._agents[node_id])
        return SpareProcess(replica, rank, name, node_id, actor)

    async def start_spare(self, spare: SpareProcess, spec: RankSpec, timeout_s: float) -> None:
        """It is this rank from now on. Raises InternalError if it is not up to it; then it has been ended."""
        try:
            await self.ask(spare.actor.start, spec.to_json(), self._agents.get(spare.node_id), timeout_s=timeout_s)
        except InternalError:
            await self.end_all(spare.name)
            await self.end_all(spec.name)
            raise

    async def _create(self, name: str, replica: int, rank: int, device: str) -> tuple[str, Actor]:
        """A process in the slot of a rank, and its node, which has an agent."""
        try:
            async with asyncio.timeout(SLOT_TIMEOUT_S + CALL_TIMEOUT_S):
                slot = await self._call(take_slot, self._cluster, replica, rank, device)
                actor = await self._call(create_rank, name, slot, device)
                node_id = await _result(actor.node_id.remote())
                if node_id not in self._agents:
                    await self._find_agents()
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise _not_done(f"Ray did not start {name}", error) from error
        return node_id, actor

    async def ask(self, method: Any, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """An actor's answer. Raises InternalError when it is gone or does not answer in time."""
        try:
            return await self._ask(method, *arguments, timeout_s=timeout_s)
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise _not_done("a process did not do as it was told", error) from error

    async def kill(self, replica: int, suspect: int | None = None) -> None:
        """End every process of a replica, of whatever incarnation, and return once that is confirmed.

        Of a node that is gone there is no confirmation; should its processes live on unseen, the fences stop them
        from doing harm and the agent's lease ends them.
        """
        prefix = replica_prefix(self._cluster, replica)
        first = "" if suspect is None else f"{prefix}{suspect}/"
        await self.end_all(prefix, first)
        # Ray knows a rank that was a spare by its first name, and must end it where the agent has died.
        waiting = {spare.name for spare in await self.spares()}
        await self._call(discard_actors, spares_prefix(self._cluster, replica), waiting)

    async def end_all(self, prefix: str, first: str = "") -> None:
        """End every process whose name begins so, those that begin with `first` ahead of the others."""
        await asyncio.gather(*(self._kill_on(node, agent, prefix, first) for node, agent in self._agents.items()))
        await self._call(discard_actors, prefix)

    async def deaths(self) -> AsyncGenerator[tuple[str, int, int, str], None]:
        """(rank or spare, replica, rank, incarnation or serial) of each process that ended unordered, without end."""
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
                        kind, _, replica, rank, last = parse_name(name)
                        yield kind, replica, rank, last
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
                self._agents[node_id] = await self._call(create_agent, self._cluster, node_id, self._lease_s)
        await self._renew_known()

    async def _renew_known(self) -> None:
        lease = [self._ask(agent.renew, self._lease_s, timeout_s=self._lease_s / 6) for agent in self._agents.values()]
        await asyncio.gather(*lease, return_exceptions=True)

    async def remove(self) -> None:
        """End all ranks, spares and agents, a predecessor's too, give the slots back, and leave Ray."""
        try:
            await self.connect()
        except InternalError as error:
            log.warning("nothing is ended", error=error.message)
            return
        for node, agent in list(self._agents.items()):
            await self._kill_on(node, agent, "", "")
        with contextlib.suppress(ray.exceptions.RayError):
            for kind in ("rank", "spare", "agent"):
                await self._call(discard_actors, f"{kind}/{self._cluster}/")
            await self._call(remove_slots, self._cluster)
        await self.disconnect()

    async def disconnect(self) -> None:
        """Leave Ray; all processes and slots stay for a successor."""
        await self._call(ray.shutdown)
        self._threads.shutdown(wait=False)

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


def _not_done(what: str, error: Exception) -> InternalError:
    reason = str(error).strip().splitlines()[-1:] or ["no answer in time"]
    return InternalError(f"{what}: {reason[0]}")


def _result(reference: Any) -> asyncio.Future[Any]:
    """Awaitable without a thread."""
    return asyncio.wrap_future(reference.future())
