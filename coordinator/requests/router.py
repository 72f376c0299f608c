"""Credits and assignment: which replica takes the next request, and what is on its way to each.

Part of the coordinator's core; pure. A replica grants slots and KV blocks with its hello; an assignment takes them,
and only Released, a new hello or the replica's end gives them back. Knows requests by id and size alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from echelon.internal.link import Abandon, Assign, Command, Fence, ReplicaHello

Attempt = tuple[str, int]  # request id, attempt


@dataclass(slots=True)
class Link:
    """An open link to a leader: its credits, and the command that this step builds up for it."""

    fence: Fence
    hello: ReplicaHello
    acked_report: int = 0
    held: dict[Attempt, int] = field(default_factory=dict)  # blocks reserved for each attempt the leader holds
    _free_blocks: int = 0
    _ack_due: bool = False
    _assigns: list[Assign] = field(default_factory=list)
    _abandons: list[Abandon] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_blocks = self.hello.kv_blocks

    @property
    def free_slots(self) -> int:
        return self.hello.slots - len(self.held)

    @property
    def free_blocks(self) -> int:
        return self._free_blocks

    def blocks_needed(self, tokens: int) -> int:
        return -(-tokens // self.hello.block_tokens)

    def hold(self, request_id: str, attempt: int, tokens: int) -> None:
        """The leader holds this attempt: prompt and everything it may generate."""
        blocks = self.blocks_needed(tokens)
        self.held[request_id, attempt] = blocks
        self._free_blocks -= blocks

    def release(self, request_id: str, attempt: int) -> None:
        self._free_blocks += self.held.pop((request_id, attempt), 0)

    def assign(self, assign: Assign) -> None:
        self.hold(assign.request, assign.attempt, len(assign.prompt) + assign.sampling.max_tokens)
        self._assigns.append(assign)

    def abandon(self, request_id: str, attempt: int) -> None:
        """Ask for the attempt's release; its credits stay taken until that is told."""
        if (request_id, attempt) in self.held:
            self._abandons.append(Abandon(request_id, attempt))

    def acknowledge(self, report_seq: int) -> None:
        self.acked_report = max(self.acked_report, report_seq)
        self._ack_due = True

    def take_command(self) -> Command | None:
        """What is to be sent, once."""
        if not (self._ack_due or self._assigns or self._abandons):
            return None
        command = Command(self.fence, self.acked_report, tuple(self._assigns), tuple(self._abandons))
        self._ack_due = False
        self._assigns, self._abandons = [], []
        return command


class Router:
    """The open links, by replica, and the epochs that are over."""

    def __init__(self) -> None:
        self.links: dict[int, Link] = {}
        self._ended: dict[int, int] = {}  # by replica, the last epoch that was fenced

    def open(self, link: Link) -> bool:
        """False for an epoch that is over: nothing of it is heard."""
        replica, epoch = link.fence.replica, link.fence.epoch
        known = self.links.get(replica)
        if epoch <= self._ended.get(replica, 0) or (known and known.fence.epoch > epoch):
            return False
        self.links[replica] = link
        return True

    def close(self, fence: Fence) -> None:
        if (link := self.links.get(fence.replica)) and link.fence == fence:
            del self.links[fence.replica]

    def end(self, replica: int, epoch: int) -> None:
        self._ended[replica] = max(epoch, self._ended.get(replica, 0))
        if (link := self.links.get(replica)) and link.fence.epoch <= epoch:
            del self.links[replica]

    def heard(self, fence: Fence) -> Link | None:
        """The link that a report came on, if it is open and the report carries its fence."""
        link = self.links.get(fence.replica)
        return link if link and link.fence == fence else None

    def abandon(self, replica: int, request_id: str, attempt: int) -> None:
        """Have a leader let go of an attempt. While its link is closed nothing is sent: its next hello will tell."""
        if link := self.links.get(replica):
            link.abandon(request_id, attempt)

    def take_commands(self) -> list[Command]:
        """What this step has for each leader."""
        commands = [link.take_command() for link in self.links.values()]
        return [command for command in commands if command]


def choose(links: Iterable[Link], tokens: int) -> tuple[Link | None, str]:
    """The replica that takes a request of this size now, or why none does."""
    able = [link for link in links if link.free_slots > 0 and link.blocks_needed(tokens) <= link.free_blocks]
    if not able:
        return None, "no replica has a free slot and enough free KV blocks"
    return max(able, key=lambda link: link.free_blocks), "most free KV blocks"


def too_large(links: Iterable[Link], tokens: int) -> str:
    """Why no replica that is up could ever hold a request of this size; empty if one could, or none is up."""
    reason = ""
    for link in links:
        capacity = link.hello.kv_blocks * link.hello.block_tokens
        limit = min(capacity, link.hello.max_context)
        if link.blocks_needed(tokens) <= link.hello.kv_blocks and tokens <= link.hello.max_context:
            return ""
        reason = f"prompt + max_tokens = {tokens} tokens, over the {limit} that replica {link.fence.replica} can hold"
    return reason
