"""Nodes: which of Ray's nodes have an agent that answers, and what is still owed on those that have none.

In the coordinator, beneath `coordinator/cluster.py`. Ray believes in a dead node for many seconds; that an agent does
not answer is heard of at once, and from then on its node is lost: nothing is placed there until one answers again and
has killed what it was told to kill meanwhile. Knows neither Ray nor ranks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

SEEK_S = 1.0  # between two attempts to find an agent
SETTLE_S = 10.0  # an agent's process starts in one to five

Agent = TypeVar("Agent")
Tell = Callable[[str, str, Mapping[str, object]], object]  # kind, subject, detail of an event


class Nodes(Generic[Agent]):
    """Used on one event loop. meet: a node's agent once it has answered and killed all of these prefixes, else None.

    silence_s: an agent that has not answered for so long has lost its node.
    """

    def __init__(
        self,
        meet: Callable[[str, frozenset[str]], Awaitable[Agent | None]],
        silence_s: float,
        tell: Tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meet = meet
        self._silence_s = silence_s
        self._tell = tell
        self._clock = clock
        self._addresses: dict[str, str] = {}
        self._meetings: dict[str, asyncio.Task[None]] = {}
        self._owed: dict[str, set[str]] = {}
        self._heard_s: dict[str, float] = {}
        self.agents: dict[str, Agent] = {}

    @property
    def lost(self) -> frozenset[str]:
        """Nodes that Ray lists and whose agent does not answer, or does not yet."""
        return frozenset(self._addresses.keys() - self.agents.keys())

    def listed(self, alive: Mapping[str, str]) -> None:
        """What Ray says: the address of every node that it believes to be alive, by id."""
        gone = self._addresses.keys() - alive.keys()
        for node in gone:
            self._drop(node, "Ray has given it up")
            if meeting := self._meetings.pop(node, None):
                meeting.cancel()
            self._heard_s.pop(node, None)
            self._owed.pop(node, None)  # what is left of it is not Ray's any more: the agent there ends it by its lease
            del self._addresses[node]
        self._addresses.update(alive)
        for node in alive:
            self._seek(node)

    def heard(self, node: str) -> None:
        """Its agent has answered."""
        self._heard_s[node] = self._clock()

    def silent(self, node: str) -> None:
        """Its agent has not answered in time; it may only be slow."""
        silent_s = self._clock() - self._heard_s.get(node, self._clock())
        if silent_s >= self._silence_s:
            self.lose(node, self.agents.get(node), f"its agent has not answered for {silent_s:.0f} s")

    def lose(self, node: str, agent: Agent | None, reason: str) -> None:
        """This agent of it cannot be reached. Another is sought as long as Ray lists the node.

        Nothing follows if another has come meanwhile: who waited long for the one says nothing of the other.
        """
        if self.agents.get(node) is not agent:
            return
        self._drop(node, reason)
        if node in self._addresses:
            self._seek(node)

    def owe(self, prefix: str, node: str | None = None) -> None:
        """What of this prefix runs on a node, or on all that are lost, must be killed before it is of use again."""
        for each in self.lost if node is None else {node} & self._addresses.keys():
            self._owed.setdefault(each, set()).add(prefix)

    async def agent(self, node: str) -> Agent:
        """The agent of a node that Ray lists, once there is one. Raises KeyError for a node that it does not list."""
        while node not in self.agents:
            meeting = self._meetings[node]
            await asyncio.wait([meeting])
            if not meeting.cancelled():
                meeting.result()  # what breaks it breaks us
        return self.agents[node]

    async def settle(self) -> None:
        """Wait until all agents answer, or for as long as one may take to start."""
        if self._meetings:
            await asyncio.wait(self._meetings.values(), timeout=SETTLE_S)

    def close(self) -> None:
        """Seek no more."""
        for meeting in self._meetings.values():
            meeting.cancel()
        self._meetings.clear()

    def _drop(self, node: str, reason: str) -> None:
        if node in self.agents:
            del self.agents[node]
            self._tell("node.lost", f"node/{node}", {"address": self._addresses.get(node, ""), "reason": reason})

    def _seek(self, node: str) -> None:
        if node not in self.agents and node not in self._meetings:
            self._meetings[node] = asyncio.get_running_loop().create_task(self._find(node))

    async def _find(self, node: str) -> None:
        while True:
            owed = frozenset(self._owed.get(node, ()))
            agent = await self._meet(node, owed)
            if agent is not None and self._owed.get(node, set()) <= owed:
                break
            await asyncio.sleep(SEEK_S)
        self._owed.pop(node, None)
        self.agents[node] = agent
        del self._meetings[node]
        self.heard(node)
        self._tell("node.joined", f"node/{node}", {"address": self._addresses[node]})
