"""Credits and assignment: which replica takes the next request, and what is on its way to each.

Part of the coordinator's core; pure. A replica grants slots and KV blocks with its hello; an assignment takes a slot a
choice and the blocks of what is known of it. How far requests have grown since, the replica's reports tell; when they
outgrow it, it preempts. Only Released, a new hello or the replica's end gives slots back. Knows requests by id and
size alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from echelon.errors import InvalidRequestError
from echelon.internal.link import Abandon, Assign, Command, Fence, ReplicaHello

Attempt = tuple[str, int]  # request id, attempt


@dataclass(frozen=True, slots=True)
class Size:
    """Of a request: its prompt, what each choice that goes on has generated, and the most that one may come to."""

    prompt_tokens: int
    generated_tokens: tuple[int, ...]
    longest_tokens: int

    @property
    def choices(self) -> int:
        return len(self.generated_tokens)

    @property
    def known_tokens(self) -> int:
        """What a replica has to prefill: the prompt once, and the ids of each choice."""
        return self.prompt_tokens + sum(self.generated_tokens)

    def blocks(self, block_tokens: int) -> int:
        """Of the prompt, which its choices share, and of each choice, with one to grow into."""
        own = sum(-(-generated // block_tokens) + 1 for generated in self.generated_tokens)
        return -(-self.prompt_tokens // block_tokens) + own


NOTHING = Size(0, (), 0)


@dataclass(slots=True)
class Link:
    """An open link to a leader: its credits, and the command that this step builds up for it."""

    fence: Fence
    hello: ReplicaHello
    acked_report: int = 0
    blocks_referenced: int = 0  # as last reported, and what was assigned and released since
    held: dict[Attempt, Size] = field(default_factory=dict)  # what was assigned, and not released
    _held_slots: int = 0
    _held_blocks: int = 0
    _ack_due: bool = False
    _assigns: list[Assign] = field(default_factory=list)
    _abandons: list[Abandon] = field(default_factory=list)

    @property
    def free_slots(self) -> int:
        return self.hello.slots - self._held_slots

    @property
    def free_blocks(self) -> int:
        return self.hello.kv_blocks - max(self._held_blocks, self.blocks_referenced)

    def fits(self, size: Size) -> bool:
        """Now; a request that has the replica to itself always does, if it ever can."""
        if self.free_slots < size.choices:
            return False
        return not self.held or size.blocks(self.hello.block_tokens) <= self.free_blocks

    def hold(self, request_id: str, attempt: int, size: Size) -> None:
        """The leader holds this attempt."""
        self.held[request_id, attempt] = size
        self._held_slots += size.choices
        self._held_blocks += size.blocks(self.hello.block_tokens)

    def release(self, request_id: str, attempt: int) -> None:
        size = self.held.pop((request_id, attempt), NOTHING)
        blocks = size.blocks(self.hello.block_tokens)
        self._held_slots -= size.choices
        self._held_blocks -= blocks
        self.blocks_referenced = max(self.blocks_referenced - blocks, 0)

    def assign(self, assign: Assign, size: Size) -> None:
        self.hold(assign.request, assign.attempt, size)
        self.blocks_referenced += size.blocks(self.hello.block_tokens)
        self._assigns.append(assign)

    def abandon(self, request_id: str, attempt: int, choice: int | None = None) -> None:
        """Ask for the release of the attempt or a choice of it; the credits stay taken until the whole is released."""
        if (request_id, attempt) in self.held:
            self._abandons.append(Abandon(request_id, attempt, choice))

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

    def abandon(self, replica: int, request_id: str, attempt: int, choice: int | None = None) -> None:
        """Have a leader let go of an attempt, or of one choice of it.

        While its link is closed nothing is sent: its next hello will tell.
        """
        if link := self.links.get(replica):
            link.abandon(request_id, attempt, choice)

    def take_commands(self) -> list[Command]:
        """What this step has for each leader."""
        commands = [link.take_command() for link in self.links.values()]
        return [command for command in commands if command]


def choose(links: Iterable[Link], size: Size) -> tuple[Link | None, str]:
    """The replica that takes a request of this size now, or why none does."""
    able = [link for link in links if link.fits(size)]
    if not able:
        return None, "no replica has free slots and enough free KV blocks"
    return max(able, key=lambda link: link.free_blocks), "most free KV blocks"


def too_large(links: Iterable[Link], size: Size) -> InvalidRequestError | None:
    """Why no replica that is up could ever hold a request of this size; None if one could, or none is up."""
    error: InvalidRequestError | None = None
    for link in links:
        hello = link.hello
        limit = min(hello.kv_blocks * hello.block_tokens, hello.max_context)
        if size.longest_tokens > limit:
            longest = f"prompt + max_tokens = {size.longest_tokens} tokens"
            error = InvalidRequestError(
                f"{longest}, over the {limit} that a replica can hold", reason="CONTEXT_TOO_LONG"
            )
        elif size.choices > hello.slots:
            many = f"n={size.choices} choices are over the {hello.slots} that a replica runs at once (max-running)"
            error = InvalidRequestError(f"{many}; ask for fewer, or send several requests")
        else:
            return None
    return error
