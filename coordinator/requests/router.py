"""Credits and assignment: which replica takes the next request, and what is on its way to each.

Part of the coordinator's core; pure. A replica grants slots and KV blocks with its hello; an assignment takes a slot a
choice and the blocks of what is known of it. How far requests have grown since, the replica's reports tell; when they
outgrow it, it preempts. Only Released, a new hello or the replica's end gives slots back. Knows requests by id and
size alone.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.requests.affinity import MAX_BLOCKS, Prefixes
from echelon.errors import InvalidRequestError
from echelon.internal.link import Abandon, Assign, Command, Fence, ReplicaHello

Attempt = tuple[str, int]  # request id, attempt

# A choice that runs lengthens each step of those that come to it, by what some 6 prompt tokens take (an 8B model on one
# H200: 0.13 ms, at 43,000 prompt tokens/s; benchmarks/results), over the some 40 tokens of a short answer.
RUNNING_TOKENS = 256


class Reason(enum.StrEnum):
    """Why a replica was chosen: its beginning is known there as nowhere else; there is least to do; or both apart."""

    PREFIX = "prefix"
    LEAST_LOADED = "least loaded"
    PREFIX_LOADED = "where its prefix is known is too much to do"


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
    prefixes: Prefixes = field(default_factory=Prefixes)
    reserved: bool = False  # for a request that has to be alone
    token_s: float | None = None  # when it last drew one
    asked_s: float | None = None  # when it was last asked for one that nobody needs
    proven: bool = False  # what it draws is heard
    uncomputed_tokens: int = 0  # of what was assigned and is not computed yet, beyond what is cached
    _held_slots: int = 0
    _held_blocks: int = 0
    _ack_due: bool = False
    _uncomputed: dict[Attempt, int] = field(default_factory=dict)
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
        if self.reserved or self.free_slots < size.choices:
            return False
        return not self.held or size.blocks(self.hello.block_tokens) <= self.free_blocks

    def cached_tokens(self, size: Size, prefix: Sequence[bytes]) -> int:
        """Of a prompt with these blocks, by all that is known here. Its last token is always computed."""
        return min(self.prefixes.match(prefix) * self.hello.block_tokens, size.prompt_tokens - 1)

    def load_tokens(self) -> int:
        """What there is to do before and beside one more request, in prompt tokens."""
        return self.uncomputed_tokens + RUNNING_TOKENS * self._held_slots

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
        self.computed(request_id, attempt)

    def computed(self, request_id: str, attempt: int) -> None:
        """The attempt's prompt has been computed, or will not be."""
        self.uncomputed_tokens -= self._uncomputed.pop((request_id, attempt), 0)

    def assign(self, assign: Assign, size: Size, prefix: Sequence[bytes] = ()) -> None:
        """prefix: hashes of the prompt's full blocks, so many as are looked at."""
        uncomputed = size.known_tokens - self.cached_tokens(size, prefix)
        self._uncomputed[assign.request, assign.attempt] = uncomputed
        self.uncomputed_tokens += uncomputed
        self.prefixes.use(prefix)
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
        self._prefixes: dict[int, tuple[int, Prefixes]] = {}  # by replica: its epoch, and what that has computed

    def open(self, link: Link) -> bool:
        """False for an epoch that is over: nothing of it is heard."""
        replica, epoch = link.fence.replica, link.fence.epoch
        known = self.links.get(replica)
        if epoch <= self._ended.get(replica, 0) or (known and known.fence.epoch > epoch):
            return False
        self.links[replica] = link
        if self._prefixes.get(replica, (0,))[0] != epoch:
            self._prefixes[replica] = epoch, Prefixes(min(link.hello.kv_blocks, MAX_BLOCKS))
        link.prefixes = self._prefixes[replica][1]
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

    def able(self, size: Size) -> list[Link]:
        """Those with credits for a request of this size."""
        return [link for link in self.links.values() if link.fits(size)]

    def affinity_hits(self, replica: int) -> int:
        """Requests that came to a replica for their prefix, since its epoch began or this coordinator did."""
        return self._prefixes[replica][1].hits if replica in self._prefixes else 0

    def take_commands(self) -> list[Command]:
        """What this step has for each leader."""
        commands = [link.take_command() for link in self.links.values()]
        return [command for command in commands if command]


def choose(able: Sequence[Link], size: Size, prefix: Sequence[bytes] = ()) -> tuple[Link, Reason]:
    """Which of the replicas that have credits for it takes a request; prefix: the hashes of its prompt's blocks.

    The one with the least to do, counted in prompt tokens: those of the request that are not cached there, those that
    wait there to be computed, and RUNNING_TOKENS for each choice that it holds. So a request goes where its beginning
    is known until waiting there costs more than computing it anew elsewhere. SGLang's cache-aware router weighs the
    same two, by thresholds (the longest match, unless one replica has 64 requests and half as many again more than
    another), llm-d by a sum of scores (prefix 3, queue 2, KV use 2); tokens need no weights that fit one load only.
    Of equals the one with the most free blocks, or the first. None is waited for while another has credits.
    """
    cached = {link.fence.replica: link.cached_tokens(size, prefix) for link in able}

    def cost(link: Link) -> tuple[int, int, int]:
        return link.load_tokens() - cached[link.fence.replica], -link.free_blocks, link.fence.replica

    chosen, longest = min(able, key=cost), max(cached.values())
    if not longest:
        return chosen, Reason.LEAST_LOADED
    return chosen, Reason.PREFIX if cached[chosen.fence.replica] == longest else Reason.PREFIX_LOADED


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
