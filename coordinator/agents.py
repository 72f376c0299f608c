"""Agents: the node agents of a cluster, found or started on every node of Ray, renewed, told to kill, asked for deaths.

On the coordinator's loop, for `coordinator/cluster.py`; which nodes are lost is `coordinator/nodes.py`'s to say. An
agent is a detached actor, so that it outlives a coordinator and a successor finds it by its node's name. It takes
orders of the latest term that it has heard of: whoever is told so has been superseded.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import ray
import structlog

from coordinator.fences import SupersededError
from coordinator.nodes import Nodes, Tell
from coordinator.slots import create_agent

CALL_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 15.0  # an agent itself gives up after ten
DEATH_POLL_S = 10.0
LOOK_S = 1.0  # how soon an agent that is new is asked, and one that is lost no more

Result = TypeVar("Result")
Agent = Any  # Ray's actor handles have no static type

log = structlog.get_logger("agents")


class InThread(Protocol):
    """Runs what blocks on Ray."""

    def __call__(self, function: Callable[..., Result], *positional: object) -> Awaitable[Result]: ...


class Agents:
    """identity: the cluster, and the coordinator's term. tell takes the events of nodes that join and are lost.

    Whatever gives orders raises SupersededError once an agent has heard of a later term.
    """

    def __init__(
        self,
        identity: tuple[str, int],
        lease_s: float,
        in_thread: InThread,
        tell: Tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._term = identity
        self._superseded = False
        self._lease_s = lease_s
        self._in_thread = in_thread
        self._clock = clock
        self._heard_s = clock()
        self._listing: asyncio.Future[None] | None = None  # the last question for all nodes
        self.nodes: Nodes[Agent] = Nodes(self._meet, lease_s / 2, tell, clock)

    @property
    def ray_silent_s(self) -> float:
        """How long Ray has not told its nodes, though asked again and again."""
        return self._clock() - self._heard_s

    async def list_nodes(self) -> None:
        """Ask Ray for its nodes; one that is new gets an agent, in a while."""
        nodes = await self._in_thread(ray.nodes)
        self._heard_s = self._clock()
        self.nodes.listed({node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]})

    async def of(self, node: str) -> Agent:
        """The agent of a node. Raises KeyError where there is no such node."""
        if node not in self.nodes.agents:
            await self.list_nodes()
        return await self.nodes.agent(node)

    async def renew(self) -> None:
        """Extend the lease on every node; a node that is new or has lost its agent gets one.

        Waits for no answer longer than the lease can spare: one agent that is stuck must not cost the others theirs.
        """
        await asyncio.gather(self._list_nodes_soon(), *(self._renew(*each) for each in self.nodes.agents.items()))

    async def kill(self, prefix: str, first: str = "") -> None:
        """End what runs under a prefix, `first` ahead of the rest; returns once each node has confirmed or is lost."""
        self._obeyed(not self._superseded)  # it may have no agent left that would say so
        self.nodes.owe(prefix)
        await asyncio.gather(*(self._kill(*each, prefix, first) for each in self.nodes.agents.items()))

    async def deaths(self) -> AsyncGenerator[str, None]:
        """The name of each process that ended unordered, without end."""
        polls: dict[asyncio.Future[list[str]], tuple[str, Agent]] = {}
        try:
            while True:
                for poll, (node, agent) in list(polls.items()):
                    if self.nodes.agents.get(node) is not agent:  # lost; one that comes after it is asked anew
                        poll.cancel()
                        del polls[poll]
                for node in self.nodes.agents.keys() - {node for node, _ in polls.values()}:
                    agent = self.nodes.agents[node]
                    polls[result(agent.deaths.remote(DEATH_POLL_S))] = node, agent
                if not polls:  # every agent is gone, until the next renewal finds new ones
                    await asyncio.sleep(LOOK_S)
                    continue
                done, _ = await asyncio.wait(polls, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for poll in done:
                    node, agent = polls.pop(poll)
                    if isinstance(poll.exception(), ray.exceptions.RayError):
                        # What lived there says so itself: its streams end.
                        self.nodes.lose(node, agent, f"its agent is gone: {last_line(poll.exception())}")
                        continue
                    for name in poll.result():
                        yield name
        finally:
            for poll in polls:
                poll.cancel()

    async def _list_nodes_soon(self) -> None:
        """A question that Ray does not answer blocks its thread: the next renewal waits for it, and asks no other."""
        if self._listing is None or self._listing.done():
            self._listing = unheard(asyncio.create_task(self.list_nodes()))
        try:
            async with asyncio.timeout(self._lease_s / 3):
                await asyncio.shield(self._listing)
        except (TimeoutError, ray.exceptions.RayError) as error:
            log.warning("Ray does not tell its nodes", error=str(error))

    async def _renew(self, node: str, agent: Agent) -> None:
        try:
            self._obeyed(await ask(agent.renew, self._term, self._lease_s, timeout_s=self._lease_s / 6))
        except TimeoutError:
            self.nodes.silent(node)
        except ray.exceptions.RayError as error:
            self.nodes.lose(node, agent, f"its agent is gone: {last_line(error)}")
        else:
            self.nodes.heard(node)

    async def _kill(self, node: str, agent: Agent, prefix: str, first: str) -> None:
        while True:
            try:
                left = await self._order(agent, prefix, first)
            except (TimeoutError, ray.exceptions.RayError) as error:
                self.nodes.lose(node, agent, f"its agent does not kill: {last_line(error) or 'no answer'}")
                if node not in self.nodes.agents:
                    self.nodes.owe(prefix, node)
                    return
                agent = self.nodes.agents[node]  # another has come meanwhile
                continue
            if not left:
                return
            log.warning("processes do not end; trying again", node=node, left=left)

    async def _meet(self, node: str, owed: frozenset[str]) -> Agent | None:
        """The agent of a node, if it answers and nothing is left of what it owes."""
        try:
            agent = await self._in_thread(create_agent, self._cluster, node, self._lease_s)
        except Exception as error:  # noqa: BLE001 - whatever Ray says, it is tried again while the node is listed
            log.warning("no agent", node=node, error=last_line(error))
            return None
        try:
            self._obeyed(await ask(agent.renew, self._term, self._lease_s))  # its process may be starting
            left = [await self._order(agent, prefix) for prefix in sorted(owed)]
        except TimeoutError:
            with contextlib.suppress(ray.exceptions.RayError):
                await self._in_thread(ray.kill, agent)  # it is stuck: Ray ends it, and the next one can begin
            return None
        except ray.exceptions.RayError:
            return None
        return None if any(left) else agent

    async def _order(self, agent: Agent, prefix: str, first: str = "") -> list[str]:
        """What is left of the processes that it was told to kill."""
        left: list[str] | None = await ask(agent.kill, self._term, prefix, first, timeout_s=KILL_TIMEOUT_S)
        self._obeyed(left is not None)
        return left or []

    def _obeyed(self, obeyed: bool) -> None:
        if not obeyed:
            self._superseded = True
            raise SupersededError(errno.ESTALE, f"agents obey a later coordinator than this one, of term {self._term}")


async def ask(method: Any, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """Call a method of an actor. Raises TimeoutError and Ray's errors."""
    async with asyncio.timeout(timeout_s):
        return await result(method.remote(*arguments))


def result(reference: Any) -> asyncio.Future[Any]:
    """Awaitable without a thread."""
    return asyncio.wrap_future(reference.future())


def unheard(answer: asyncio.Future[Result]) -> asyncio.Future[Result]:
    """The same, which may end in an error when nobody waits for it any more."""
    answer.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return answer


def last_line(error: BaseException | None) -> str:
    """What an error says last; Ray's begin with a trace."""
    return next(reversed(str(error).strip().splitlines()), "")
