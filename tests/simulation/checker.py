"""What must hold at every moment, whatever breaks: the judge of the simulation.

It keeps its own copy of what reached the disk and compares everything that anyone is told with it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.journal.state import Finished, JournalState, Opened, Record, Tokens
from coordinator.requests.nouns import Outcome, Shown
from echelon.types import Completion, StreamEvent
from tests.simulation.device import STOP_IDS, decode, ends, follows


class Violation(AssertionError):
    """A promise is broken."""


def require(holds: bool, message: str, *values: object) -> None:
    """The message is formatted only when it is needed: values are long, and this is called often."""
    if not holds:
        raise Violation(message.format(*values))


@dataclass(slots=True)
class StreamHistory:
    """What one stream of the coordinator was shown."""

    request_id: str
    position: int
    ended: bool = False


@dataclass(slots=True)
class Checker:
    """Told of every write, every delivery and every end."""

    disk: JournalState = field(default_factory=JournalState)
    streams: dict[int, StreamHistory] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)  # events by kind
    tokens: int = 0

    def written(self, records: list[Record]) -> None:
        """These records reached the disk."""
        for record in records:
            match record:
                case Opened(request):
                    require(request.request_id not in self.disk.entries, "{} was opened twice", request.request_id)
                case Tokens():
                    self._tokens_written(record)
                case Finished(request_id):
                    entry = self.disk.entries[request_id]
                    require(entry.finished is None, "{} finished twice", request_id)
                    if record.finish:
                        self._whole(request_id, tuple(entry.ids))
            self.disk.apply(record)

    def restarted(self, state: JournalState) -> None:
        """A coordinator has read the disk."""
        require(state.entries == self.disk.entries, "replay differs from what was written")

    def submitted(self, stream: int, request_id: str, received: int) -> None:
        self.streams[stream] = StreamHistory(request_id, received)

    def delivered(self, stream: int, event: Shown) -> None:
        """A stream is shown this, and its client may have seen it from now on."""
        history = self.streams[stream]
        require(not history.ended, "stream {} of {} goes on after its end: {}", stream, history.request_id, event)
        history.ended = isinstance(event, Outcome)
        entry = self.disk.entries.get(history.request_id)
        if isinstance(event, StreamEvent):
            assert entry is not None
            self.tokens += len(event.token_ids)
            end = history.position + len(event.token_ids)
            require(
                event.sequence == history.position,
                "{}: {} after {} tokens",
                history.request_id,
                event,
                history.position,
            )
            require(
                tuple(entry.ids[history.position : end]) == event.token_ids, "{} is not what the journal holds", event
            )
            history.position = end
        elif isinstance(event, Completion):
            require(entry is not None and entry.finished is not None, "{} is not in the journal", event)
            assert entry is not None
            require(event.token_ids == tuple(entry.ids), "{} is not what the journal holds", event)
            require(history.position == len(entry.ids), "{} ended before its last delta", history.request_id)
            require(event.text == decode(event.token_ids), "{} is not the ids' text", event.text)

    def _tokens_written(self, record: Tokens) -> None:
        entry = self.disk.entries[record.request_id]
        request = entry.request
        require(record.first_token == len(entry.ids), "{} is written behind {} tokens", record, len(entry.ids))
        require(entry.finished is None, "{} is written after the end", record)
        context = [*request.prompt, *entry.ids]
        for token_id in record.ids:
            require(follows(context, token_id), "{}: {} does not follow {}", request.request_id, token_id, context)
            require(len(context) == len(request.prompt) or context[-1] not in STOP_IDS, "a token after an end token")
            context.append(token_id)
        require(len(context) <= len(request.prompt) + request.sampling.max_tokens, "more than max_tokens")

    def _whole(self, request_id: str, ids: tuple[int, ...]) -> None:
        limit = self.disk.entries[request_id].request.sampling.max_tokens
        require(ends(ids, limit), "{} ended after {}", request_id, ids)
