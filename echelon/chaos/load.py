"""The streams that run while something is struck: every kind of answer, from any model.

Readers are threads over one client; what they heard, and when, is kept. Prompts are short texts, but for a late one
of many token ids, which is sent so that a prompt is being prefilled at the strike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from echelon.client import Client
from echelon.errors import EchelonError
from echelon.sampling import SamplingParams
from echelon.types import Completion, StreamEvent

PROMPT = "Geese fly so; the one ahead breaks the air for those behind"
LATE = "late"  # name of the stream that comes last
LATE_TOKENS = 8
FIRST_ID, IDS = 10, 200  # ids that every vocabulary has
MOST_LATE_IDS = 4000
STOP_CHARACTERS = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. Either text or token_ids is its prompt."""

    name: str
    sampling: SamplingParams
    text: str | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """Some tokens of one choice, and when the client had them."""

    unix_s: float
    event: StreamEvent


@dataclass(frozen=True, slots=True)
class Heard:
    """All that a client heard of one request. error: why there is no completion."""

    name: str
    arrivals: tuple[Arrival, ...]
    completion: Completion | None = None
    error: str = ""


def mixed(streams: int, tokens: int) -> list[Asked]:
    """So many requests of every kind in turn: greedy, sampled, several choices, penalties, to be stopped, a schema."""
    free = SamplingParams(max_tokens=tokens, temperature=0.9, ignore_eos=True, logprobs=0)
    texts = {"type": "string", "minLength": 12, "maxLength": 20}
    form = {"type": "array", "items": texts, "minItems": max(tokens // 12, 1), "maxItems": tokens}
    kinds = {
        "greedy": replace(free, temperature=0.0, logprobs=2),
        "sampled": replace(free, top_p=0.95, top_k=50),
        "choices": replace(free, n=3, min_p=0.02),
        "penalties": replace(free, presence_penalty=0.9, frequency_penalty=0.5, repetition_penalty=1.15, logprobs=1),
        "stop": free,
        "schema": replace(free, json_schema=form, ignore_eos=False),
    }
    names = list(kinds)
    return [
        Asked(f"{names[number % len(names)]}-{number}", replace(kinds[names[number % len(names)]], seed=number), PROMPT)
        for number in range(streams)
    ]


def late(max_context: int, number: int) -> Asked:
    """A long prompt and a short answer. No two numbers' prompts begin alike, so that none is found in a cache."""
    count = min(max_context - LATE_TOKENS, MOST_LATE_IDS) * 3 // 4
    ids = tuple(FIRST_ID + (number + place * (7 + number)) % IDS for place in range(count))
    sampling = SamplingParams(max_tokens=LATE_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    return Asked(LATE, sampling, token_ids=ids)


def stopped(asked: Sequence[Asked], answers: Mapping[str, str]) -> list[Asked]:
    """The same, those to be stopped with a text that their answer has late."""
    return [
        replace(each, sampling=replace(each.sampling, stop=stops))
        if each.name.startswith("stop") and (stops := late_texts(answers[each.name]))
        else each
        for each in asked
    ]


def late_texts(text: str) -> tuple[str, ...]:
    """A short text that first comes in the last third of another; none if there is no such."""
    for place in range(len(text) * 2 // 3, len(text) - STOP_CHARACTERS + 1):
        part = text[place : place + STOP_CHARACTERS]
        if text.find(part) == place and "\ufffd" not in part:
            return (part,)
    return ()


class Reader:
    """Reads one stream in a thread."""

    def __init__(self, client: Client, asked: Asked, moved: threading.Condition, timeout_s: float) -> None:
        self.name = asked.name
        self._choices = asked.sampling.n or 1
        self._moved = moved
        self._arrivals: list[Arrival] = []
        self._tokens = [0] * self._choices
        self._completion: Completion | None = None
        self._error = ""
        self._thread = threading.Thread(target=self._read, args=(client, asked, timeout_s), daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return self._completion is not None or bool(self._error)

    @property
    def fewest_tokens(self) -> int:
        """Of the choice that has the fewest so far."""
        return min(self._tokens)

    def result(self) -> Heard:
        """Waits for the end; the request's deadline bounds it."""
        self._thread.join()
        return Heard(self.name, tuple(self._arrivals), self._completion, self._error)

    def _read(self, client: Client, asked: Asked, timeout_s: float) -> None:
        try:
            if asked.text is None:
                stream = client.stream(token_ids=list(asked.token_ids), sampling=asked.sampling, timeout_s=timeout_s)
            else:
                stream = client.stream(asked.text, sampling=asked.sampling, timeout_s=timeout_s)
            for event in stream:
                with self._moved:
                    self._arrivals.append(Arrival(time.time(), event))
                    self._tokens[event.index] += len(event.token_ids)
                    self._moved.notify_all()
            self._completion = stream.completion
        except EchelonError as error:
            self._error = f"{error.reason}: {error}"
        with self._moved:
            self._moved.notify_all()


@dataclass
class Streams:
    """Readers that run side by side."""

    client: Client
    timeout_s: float
    readers: list[Reader] = field(default_factory=list)
    moved: threading.Condition = field(default_factory=threading.Condition)

    def start(self, asked: Sequence[Asked]) -> None:
        """Begin to read more."""
        self.readers += [Reader(self.client, each, self.moved, self.timeout_s) for each in asked]

    def wait_tokens(self, tokens: int) -> bool:
        """Until every choice of every stream has so many or has ended; whether all still run."""
        with self.moved:
            self.moved.wait_for(
                lambda: all(reader.ended or reader.fewest_tokens >= tokens for reader in self.readers), self.timeout_s
            )
            return not any(reader.ended for reader in self.readers)

    def results(self) -> dict[str, Heard]:
        """By name, once all have ended."""
        return {reader.name: reader.result() for reader in self.readers}
