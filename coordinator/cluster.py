"""Ray, as the coordinator uses it: rank processes and spares in slots, and node agents.

Ray places processes and starts them; killing goes through the node agents, by pidfd and with confirmation. Ranks,
agents and slots are detached, so they outlive a coordinator and a successor finds them by name. A slot is one
placement group of one bundle per device, kept through all epochs, unless its node is lost. Every blocking call of Ray
runs in a thread.
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
from ray.util.placement_group import PlacementGroup

from coordinator import slots
from coordinator.agents import CALL_TIMEOUT_S, Agents, ask, last_line, result, unheard
from coordinator.devices import NONE_MOVED, Devices, Slot, who
from coordinator.fences import SupersededError
from coordinator.nodes import Tell
from coordinator.places import Places
from coordinator.ray_port import reach_ray
from coordinator.reserve import Reserve
from echelon.errors import InternalError
from worker.actor import remove_slots
from worker.spec import RankSpec, parse_name, replica_prefix, spare_name, spares_prefix

NAMESPACE = "echelon"
JOIN_TIMEOUT_S = 60.0  # five seconds on an idle machine
LOST_POLL_S = 0.5

Result = TypeVar("Result")
Actor = Any  # Ray's handles have no static type

log = structlog.get_logger("cluster")


@dataclass(frozen=True, slots=True)
class SpareProcess:
    """A process that waits in a slot: of a rank, or of a spare device."""

    slot: Slot
    name: str
    node_id: str
    actor: Actor


class Cluster:
    """One per coordinator, connected from `connect` to `remove` or `disconnect`. address: of the Ray to join.

    identity: the cluster, and the coordinator's term; what ends processes raises SupersededError where an agent has
    heard of a later one. tell takes events: of nodes that join and are lost, and of devices. persist: what Reserve has.
    """

    def __init__(
        self,
        identity: tuple[str, int],
        address: str,
        lease_s: float,
        tell: Tell = lambda *event: None,
        devices: Devices = NONE_MOVED,
        persist: Callable[[Devices], None] = lambda devices: None,
    ) -> None:
        self._cluster, _ = identity
        self._address = address
        self._joining: asyncio.Task[None] | None = None
        self._initialising: asyncio.Future[Any] | None = None
        self._agents = Agents(identity, lease_s, self._call, tell)
        self._nodes = self._agents.nodes
        self.reserve = Reserve(self._cluster, self._nodes, self._call, tell, devices, persist)
        self._places = Places(self._cluster, self._agents, self._call, self.reserve)
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="ray")

    async def connect(self) -> None:
        """Join Ray as a driver, and have an agent on every node. Raises InternalError, and can be tried again then."""
        if self._joining is None or (self._joining.done() and self._joining.exception()):
            self._joining = asyncio.create_task(self._join())
        await asyncio.shield(self._joining)

    async def _join(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            await self._call(reach_ray, self._address)
            await self._initialise()
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                await self._agents.list_nodes()
            await self._nodes.settle()
        except TimeoutError:
            raise InternalError(f"Ray at {self._address} does not answer within {JOIN_TIMEOUT_S:g} s") from None
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            await self._call(ray.shutdown)
            raise InternalError(f"Ray at {self._address} cannot be used: {error}") from error

    async def _initialise(self) -> None:
        """Join as a driver. Raises TimeoutError, and what Ray does.

        Its own attempts go on for minutes and cannot be called off: the next try waits for them, and begins no others.
        """
        settings = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
        if ray.is_initialized():  # and then did not tell its nodes
            return
        call = functools.partial(self._call, ray.init, address=self._address, **settings)
        attempt = self._initialising = self._initialising or asyncio.ensure_future(call())
        await asyncio.wait([attempt], timeout=JOIN_TIMEOUT_S)
        if not attempt.done():
            raise TimeoutError
        self._initialising = None
        attempt.result()

    async def survivors(self, replica: int) -> frozenset[tuple[int, str]]:
        """(rank, incarnation) of a replica's processes that live and have a master: an agent that answers."""
        living = [process for _, process in await self._living()]
        return frozenset(
            (rank, incarnation) for kind, of, rank, incarnation in living if (kind, of) == ("rank", replica)
        )

    async def end_surplus(self, replicas: int) -> None:
        """End what a predecessor left of replicas beyond so many, and give their slots back."""
        living = {index for _, (_, index, _, _) in await self._living()} | {of for of, _ in self.reserve.devices.moved}
        for replica in {index for index in living if index >= replicas}:
            await self.kill(replica)
            await self.end_all(spares_prefix(self._cluster, replica))
            self.reserve.forget(replica)
            await self.reserve.give_back(replica)

    async def spares(self) -> list[SpareProcess]:
        """The processes that a predecessor has left waiting in slots. Raises InternalError when Ray does not answer."""
        found = []
        for node_id, (kind, replica, rank, serial) in await self._living():
            if kind == "spare":
                name = spare_name(self._cluster, replica, rank, serial)
                with contextlib.suppress(ValueError):  # it went by itself meanwhile
                    actor = await self._order(f"Ray does not find {name}", ray.get_actor, name)
                    found.append(SpareProcess((replica, rank), name, node_id, actor))
        return found

    async def _living(self) -> list[tuple[str, tuple[str, int, int, str]]]:
        """Node, and (kind, replica, rank, incarnation or serial), of every process of ours whose agent answers."""
        nodes = dict(self._nodes.agents)
        asked = (ask(agent.living) for agent in nodes.values())
        found = await asyncio.gather(*asked, return_exceptions=True)
        parts = [(node, part) for node, part in zip(nodes, found, strict=True) if not isinstance(part, BaseException)]
        living = [(node, parse_name(name)) for node, part in parts for name in part]
        return [
            (node, (kind, replica, rank, last))
            for node, (kind, cluster, replica, rank, last) in living
            if cluster == self._cluster
        ]

    async def place(self, spec: RankSpec, no_room: Callable[[str], None] | None = None) -> PlacementGroup:
        """The slot of a rank, which may have moved to a spare device.

        no_room is told why there is no slot, every few seconds while one is waited for; without it InternalError is
        raised soon.
        """
        return await self._places.take(spec.replica, spec.rank, spec.device, no_room)

    async def launch(self, spec: RankSpec, slot: PlacementGroup) -> int:
        """Start a rank there; its pid. Raises InternalError when the process does not come.

        Cancelled, it starts all the same: a process that is being started must get its master.
        """
        return await asyncio.shield(unheard(asyncio.ensure_future(self._start(spec, slot))))

    async def _start(self, spec: RankSpec, slot: PlacementGroup) -> int:
        node_id, actor = await self._create(spec.name, slot, spec.device)
        return int(await self.ask(actor.start, spec.to_json(), self._nodes.agents.get(node_id)))

    async def launch_spare(self, name: str, replica: int, rank: int, device: str) -> SpareProcess:
        """Start a process that waits in that slot and warms up there. Raises InternalError; it moves no slot."""
        slot, node = await self._call(slots.find_slot, self._cluster, replica, rank)
        if slot is None or node in {"", *self._nodes.lost}:
            raise InternalError(f"the slot of {who((replica, rank))} is on no node that answers")
        node_id, actor = await self._create(name, slot, device)
        await self.ask(actor.warm, name, device, self._nodes.agents.get(node_id))
        return SpareProcess((replica, rank), name, node_id, actor)

    async def start_spare(self, spare: SpareProcess, spec: RankSpec, timeout_s: float) -> None:
        """It is this rank from now on. Raises InternalError if it is not up to it; then it has been ended."""
        try:
            agent = self._nodes.agents.get(spare.node_id)
            await self.ask(spare.actor.start, spec.to_json(), agent, timeout_s=timeout_s)
        except InternalError:
            await self.end_all(spare.name)
            await self.end_all(spec.name)
            raise

    async def _create(self, name: str, slot: PlacementGroup, device: str) -> tuple[str, Actor]:
        """A process in a slot, and its node, which has an agent."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                actor = await self._call(slots.create_rank, name, slot, device)
                answer = unheard(result(actor.node_id.remote()))
                node_id = await self._unless_lost(answer, await self._call(slots.node_of, slot))
                await self._agents.of(node_id)
        except (TimeoutError, KeyError, ray.exceptions.RayError) as error:
            raise _not_done(f"Ray did not start {name}", error) from error
        return node_id, actor

    async def _unless_lost(self, answer: asyncio.Future[Any], node: str) -> Any:
        """The first answer of an actor. Ray may wait for long for one on a lost node. Raises KeyError for it."""
        while not answer.done():
            await asyncio.wait([answer], timeout=LOST_POLL_S)
            if node in self._nodes.lost:
                raise KeyError(f"node {node} is lost")
        return answer.result()

    async def ask(self, method: Any, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """An actor's answer. Raises InternalError when it is gone or does not answer in time."""
        try:
            return await ask(method, *arguments, timeout_s=timeout_s)
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise _not_done("a process did not do as it was told", error) from error

    async def kill(self, replica: int, suspect: int | None = None) -> None:
        """End every process of a replica, of whatever incarnation, and return once that is confirmed.

        Of a node that is lost there is no confirmation; should its processes live on unseen, the fences stop them
        from doing harm, the agent's lease ends them, and nothing is placed there before they are gone.
        """
        prefix = replica_prefix(self._cluster, replica)
        first = "" if suspect is None else f"{prefix}{suspect}/"
        await self.end_all(prefix, first)
        # Ray knows a rank that was a spare by its first name, and must end it where the agent has died.
        waiting = {spare.name for spare in await self.spares()}
        moved = [spare_name(self._cluster, *slot, "") for slot in self.reserve.moved_of(replica)]
        for begins in (spares_prefix(self._cluster, replica), *moved):
            await self._order("Ray forgets no spare", slots.discard_actors, begins, waiting)

    async def end_all(self, prefix: str, first: str = "") -> None:
        """End every process whose name begins so, those that begin with `first` ahead of the others.

        Raises InternalError when Ray does not answer.
        """
        await self._agents.kill(prefix, first)
        await self._order("Ray forgets no actor", slots.discard_actors, prefix)

    async def deaths(self) -> AsyncGenerator[tuple[str, int, int, str], None]:
        """(rank or spare, replica, rank, incarnation or serial) of each process that ended unordered, without end."""
        async with contextlib.aclosing(self._agents.deaths()) as names:
            async for name in names:
                kind, _, replica, rank, last = parse_name(name)
                yield kind, replica, rank, last

    async def renew(self) -> float:
        """Extend the lease on every node; a node that is new or has lost its agent gets one.

        Waits for no answer longer than the lease can spare: one agent that is stuck must not cost the others theirs.
        Returns for how many seconds Ray has not answered, though asked each time.
        """
        await self._agents.renew()
        return self._agents.ray_silent_s

    async def remove(self) -> None:
        """End all ranks, spares and agents, a predecessor's too, give the slots back, and leave Ray."""
        try:
            await (self._joining or self.connect())
        except InternalError as error:
            log.warning("nothing is ended", error=error.message)
            return
        try:
            await self._agents.kill("")
            for kind in ("rank", "spare", "agent"):
                await self._call(slots.discard_actors, f"{kind}/{self._cluster}/")
            await self._call(remove_slots, self._cluster)
        except ray.exceptions.RayError as error:
            log.warning("not all is ended", error=last_line(error))
        except SupersededError as error:
            log.warning("nothing is ended", error=str(error))
        await self.disconnect()

    async def disconnect(self) -> None:
        """Leave Ray; all processes and slots stay for a successor."""
        self._nodes.close()
        await self._call(ray.shutdown)
        self._threads.shutdown(wait=False)

    async def _order(self, undone: str, function: Callable[..., Result], *positional: object) -> Result:
        """Raises InternalError, which begins with what was not done, when Ray does not answer."""
        try:
            return await self._call(function, *positional)
        except ray.exceptions.RayError as error:
            raise _not_done(undone, error) from error

    async def _call(self, function: Callable[..., Result], *positional: object, **named: object) -> Result:
        call = functools.partial(function, *positional, **named)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _not_done(what: str, error: Exception) -> InternalError:
    return InternalError(f"{what}: {last_line(error) or 'no answer in time'}")
