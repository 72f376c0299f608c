"""The session of one generation: every token of every choice handed on once, in order, over as many calls as it takes.

Sans-IO, part of the SDK, one of the machines that `session.py` tells about. After a break it resumes at the tokens
that it holds, so that the server goes on behind them, whatever became of the coordinator in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from echelon.errors import CancelledError, InternalError, UnavailableError
from echelon.retry import RetryPolicy
from echelon.session import CancelRemote, Effect, Finish, Raise, Session, Yield
from echelon.types import Admitted, Choice, Completion, StreamEvent

Message = Admitted | StreamEvent | Completion
Received = tuple[tuple[int, ...], ...]  # by choice index: the ids that are held
Effects = list[Effect[Received, StreamEvent, Completion]]


@dataclass(slots=True)
class _Held:
    """What of one choice was handed on."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class GenerationSession(Session[Received, Message, StreamEvent, Completion]):
    """A delta that repeats tokens is dropped. One that overlaps or leaves a gap breaks the call: the next one resumes.

    What the deltas left out (bytes of an unfinished character, say) comes from the final answer.
    """

    def __init__(self, request_id: str, timeout_s: float | None, policy: RetryPolicy) -> None:
        super().__init__(request_id, timeout_s, policy)
        self.request_id = request_id
        self.admitted: Admitted | None = None
        self._choices: dict[int, _Held] = {}

    def _resume(self) -> Received:
        """Empty while nothing is held."""
        count = max((index + 1 for index, held in self._choices.items() if held.token_ids), default=0)
        return tuple(tuple(self._held(index).token_ids) for index in range(count))

    def _held(self, index: int) -> _Held:
        return self._choices.setdefault(index, _Held())

    def _receive(self, now: float, message: Message) -> Effects:
        if isinstance(message, Admitted):
            self.admitted = message
            return []
        if isinstance(message, Completion):
            return self._final(message)
        held, count = len(self._held(message.index).token_ids), len(message.token_ids)
        if message.sequence + count <= held:
            return []
        if message.sequence != held:
            gap = f"tokens {message.sequence} to {message.sequence + count} came after {held}"
            return [self._retry(now, UnavailableError(f"the stream lost its place: {gap}", request_id=self.request_id))]
        self._progress()
        return [self._hand_on(message)]

    def _final(self, final: Completion) -> Effects:
        effects: Effects = []
        for choice in final.choices:
            held = self._held(choice.index)
            text, count = "".join(held.text), len(held.token_ids)
            if list(choice.token_ids[:count]) != held.token_ids or not choice.text.startswith(text):
                message = f"the final answer of {self.request_id} contradicts its {count} streamed tokens"
                return [Raise(InternalError(message, request_id=self.request_id))]
            rest = self._rest(choice, count, len(text))
            if rest.token_ids or rest.text:
                effects.append(self._hand_on(rest))
        return [*effects, Finish(final)]

    def _rest(self, choice: Choice, tokens: int, characters: int) -> StreamEvent:
        text, ids, logprobs = choice.text[characters:], choice.token_ids[tokens:], choice.logprobs[tokens:]
        return StreamEvent(self.request_id, choice.index, tokens, text, ids, logprobs)

    def _hand_on(self, event: StreamEvent) -> Yield[StreamEvent]:
        held = self._held(event.index)
        held.token_ids.extend(event.token_ids)
        held.text.append(event.text)
        return Yield(event)

    def _end(self, now: float) -> Effects:
        lost = UnavailableError("the stream ended before its final answer", request_id=self.request_id)
        return [self._retry(now, lost)]

    def _cancel(self) -> Effects:
        cancelled = CancelledError("cancelled by the caller", request_id=self.request_id)
        return [CancelRemote(self.request_id), Raise(cancelled)]
