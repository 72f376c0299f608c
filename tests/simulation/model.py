"""A model without arithmetic, and what it answers, in the plainest way.

The next token hashes the request's seed, its choice and all earlier tokens, so one token at a wrong place shows in
every later one. `Reference` judges an answer token by token from these pure functions alone; it shares no code with
what it judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from coordinator.requests.nouns import Request
from echelon.internal.link import Finish, Logprob, Sampling
from echelon.types import FinishReason, TokenLogprob

BASES = 1024
VARIANTS = 4
VOCABULARY = BASES * VARIANTS
STOP_BASES = range(20)
STOP_IDS = tuple(base * VARIANTS + variant for base in STOP_BASES for variant in range(VARIANTS))
FINISHES = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH}

# Fragments of UTF-8, characters cut apart among them.
_PIECES = (
    b"a",
    b" the",
    b"\xc3",
    b"\xa9",
    b"\xe2\x82",
    b"\xac",
    b"\xf0\x9f",
    b"\x8e\x89",
    b"\xff",
    b"z ",
    b"\xe2",
    b"\n",
)
# Most run over the borders of two tokens or three; some begin as others do, or within one another.
STOPS = ("é", "€", "🎉", "aa", "a the", " thea", "hea", "z a", "ez", " the\n", "\n\n", "he the the", "éa", "z ", "tha")
_REPLACEMENT = "\ufffd"
# Constraints that allow every token: one holds, one breaks where the answer would have its token BREAKS_AT.
HOLDS, BREAKS = "holds", "breaks"
BREAKS_AT = 5
ROOT_KEY = 0  # before the first token


def next_key(key: int, token_id: int) -> int:
    """What a cache keeps of a token: it tells all tokens up to this one apart from all others. key: the one before."""
    return hash((key, token_id))


def keys_of(ids: Sequence[int]) -> list[int]:
    keys, key = [], ROOT_KEY
    for token_id in ids:
        keys.append(key := next_key(key, token_id))
    return keys


def base_of(keys: Sequence[int], ids: Sequence[int], prompt_tokens: int, seed: int, choice: int) -> int:
    """What the next token is but for its variant. keys are read from the cache; ids are what penalties look at."""
    return hash((seed, choice, prompt_tokens, tuple(keys), tuple(ids))) % BASES


def logprob_of(keys: Sequence[int], token_id: int, alternatives: int) -> Logprob:
    """Of this token after those; in eighths, which every wire form holds exactly."""
    drawn = hash((tuple(keys), token_id))
    top = range(alternatives)
    return Logprob(-(drawn % 64) / 8, tuple((drawn + i) % VOCABULARY for i in top), tuple(-i / 8 for i in top))


def told_logprob(token_id: int, logprob: Logprob) -> TokenLogprob:
    return TokenLogprob(token_id, logprob.logprob, tuple(zip(logprob.top_ids, logprob.top_logprobs, strict=True)))


def prompt_logprobs(request: Request) -> tuple[TokenLogprob, ...]:
    """Of every token of the prompt but the first, if they were asked for."""
    alternatives = request.sampling.prompt_logprobs
    if alternatives is None:
        return ()
    prompt, keys = request.prompt, keys_of(request.prompt)
    places = range(1, len(prompt))
    return tuple(told_logprob(prompt[at], logprob_of(keys[:at], prompt[at], alternatives)) for at in places)


def decode(ids: Sequence[int]) -> str:
    return b"".join(_PIECES[token_id % len(_PIECES)] for token_id in ids).decode("utf-8", "replace")


def draw_sampling(random: Random, seed: int, max_choices: int) -> Sampling:
    """What somebody may ask for."""
    max_tokens = random.choice((1, 8, 24))
    return Sampling(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=STOP_IDS,
        logprobs=random.choice((None, None, 0, 2)),
        min_tokens=min(random.choice((0, 0, 2, 12)), max_tokens),
        stop=tuple(random.sample(STOPS, random.choice((0, 0, 2, 5)))),
        include_stop=random.random() < 0.5,
        n=min(random.choice((1, 1, 2, 3)), max_choices),
        prompt_logprobs=random.choice((None, None, None, 0, 2)),
        grammar=random.choice(("",) * 10 + (HOLDS, BREAKS)),
    )


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended, and its whole text."""

    finish: Finish
    text: str
    matched: str = ""


@dataclass(slots=True)
class Reference:
    """One choice's answer as far as it goes. shown[k]: the text that k of its tokens settle, where they end nothing."""

    request: Request
    choice: int
    ids: list[int] = field(default_factory=list)
    shown: list[str] = field(default_factory=lambda: [""])
    ending: Ending | None = None
    held_back: bool = False  # some of its text waited for the tokens behind it, as a stop string's beginning
    _context: list[int] = field(default_factory=list)
    _keys: list[int] = field(default_factory=list)
    _settled: int = 0  # characters that no later token can change
    _beginnings: list[str] = field(default_factory=list)  # of stop strings

    def __post_init__(self) -> None:
        self._beginnings = [stop[:end] for stop in self.request.sampling.stop for end in range(1, len(stop))]
        self._context = list(self.request.prompt)
        self._keys = keys_of(self._context)

    def push(self, token_id: int, logprob: Logprob | None) -> str:
        """Take the answer's next token. Why it cannot be; empty if it can."""
        sampling = self.request.sampling
        if self.ending:
            return f"{token_id} after the end"
        if sampling.grammar == BREAKS and len(self.ids) >= BREAKS_AT:
            return f"{token_id} where no constraint allows any"
        base = base_of(self._keys, self._context, len(self.request.prompt), sampling.seed, self.choice)
        if token_id // VARIANTS != base:
            return f"{token_id} does not follow {self._context}"
        if logprob and logprob != self.logprob(len(self.ids), token_id):
            return f"{logprob} of {token_id} after {self._context}"
        self.ids.append(token_id)
        self._context.append(token_id)
        self._keys.append(next_key(self._keys[-1], token_id))
        self._judge()
        return ""

    def logprob(self, place: int, token_id: int) -> Logprob | None:
        """Of the answer's token at this place, if it was asked for."""
        alternatives = self.request.sampling.logprobs
        if alternatives is None:
            return None
        return logprob_of(self._keys[: len(self.request.prompt) + place], token_id, alternatives)

    def delta(self, start: int, end: int) -> str:
        """The text that the tokens from `start` to `end` add."""
        return self.shown[end][len(self.shown[start]) :]

    def _judge(self) -> None:
        """Whether the last token ends the answer: by a stop string that it completes, by itself, by being the last."""
        sampling, count = self.request.sampling, len(self.ids)
        text, before = decode(self.ids), self._settled
        unfinished = min(len(text) - len(text.rstrip(_REPLACEMENT)), 3)
        self._settled = max(before, len(text) - unfinished)
        settled = text[: self._settled]
        kept = self._beginning(settled)
        self.held_back |= kept > 0
        self.shown.append(settled[: len(settled) - kept])
        if count > sampling.min_tokens and (found := self._completed(settled, before)):
            start, stop = found
            text = settled[: start + len(stop)] if sampling.include_stop else settled[:start]
            self.ending = Ending(Finish.STOP, text, stop)
            self.shown[-1] = text
        elif count > sampling.min_tokens and self.ids[-1] in sampling.stop_token_ids:
            self.ending = Ending(Finish.STOP, text)
        elif count == sampling.max_tokens:
            self.ending = Ending(Finish.LENGTH, text)

    def _completed(self, settled: str, before: int) -> tuple[int, str] | None:
        """The stop string that ends behind `before`: the one that begins first, of those the longest."""
        found: list[tuple[int, int, str]] = []
        for stop in self.request.sampling.stop:
            if (start := settled.find(stop, max(before - len(stop) + 1, 0))) >= 0:
                found.append((start, -len(stop), stop))
        return (min(found)[0], min(found)[2]) if found else None

    def _beginning(self, settled: str) -> int:
        """Characters at the end that a stop string may begin with."""
        return max((len(each) for each in self._beginnings if settled.endswith(each)), default=0)
