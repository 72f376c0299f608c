"""A device without arithmetic, for tests of scheduler and engine: it sees nothing but what plans tell it.

Keys and values of a position are its id and a hash of all ids before it, kept in paged memory; the next id hashes what
the block table leads to. So a block that is shared wrongly, reused too early or not written yet, and a token that is
lost, doubled or of another choice show in every later id. Rows of one plan do not see the writes of other slots' rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from echelon.internal.link import Assign, Logprob, Progress, Sampling
from worker.plan import Row, StepPlan, StepResult

VOCABULARY = 16
STOP_ID = 0

Content = tuple[int, int]  # an id, and the hash of it and all ids before it


def contents_of(ids: Sequence[int]) -> list[Content]:
    """What memory holds of these ids."""
    contents: list[Content] = []
    for token_id in ids:
        contents.append((token_id, hash((contents[-1][1] if contents else 0, token_id))))
    return contents


def draw(sampling: Sampling, choice: int, contents: Sequence[Content], generated: int) -> int:
    """The next id after these contents; one in 16 is the end token, but not before min_tokens."""
    masked = set(sampling.stop_token_ids) if generated < sampling.min_tokens else set()
    allowed = [token_id for token_id in range(VOCABULARY) if token_id not in masked]
    return allowed[hash((sampling.seed, choice, *contents)) % len(allowed)]


def score(content: Content, wanted: int) -> Logprob:
    """The log-probability of an id after those before it."""
    return Logprob(-float(content[1] % 997), tuple(range(wanted)), (-1.0,) * wanted)


def answer(assign: Assign, choice: int = 0) -> list[int]:
    """All ids of a choice in an undisturbed run."""
    sampling, ids = assign.sampling, list(assign.prompt)
    while (generated := len(ids) - len(assign.prompt)) < sampling.max_tokens:
        ids.append(draw(sampling, choice, contents_of(ids), generated))
        if ids[-1] in sampling.stop_token_ids:
            break
    return ids[len(assign.prompt) :]


def prompt_scores(assign: Assign) -> tuple[Logprob, ...]:
    """The log-probabilities of a prompt's ids but the first."""
    wanted = assign.sampling.prompt_logprobs
    return () if wanted is None else tuple(score(content, wanted) for content in contents_of(assign.prompt)[1:])


def request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    attempt: int = 1,
    choices: Sequence[Progress] = (Progress(0),),
    priority: int = 0,
    salt: str = "",
    **sampling: object,
) -> Assign:
    """An assignment; its seed depends on its name."""
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": sum(name.encode()), **sampling}
    settled = Sampling(max_tokens=max_tokens, **values)  # type: ignore[arg-type]
    return Assign(name, attempt, tuple(prompt), tuple(choices), settled, priority, salt)


@dataclass(slots=True)
class Slot:
    """A choice's state as ranks keep it."""

    sampling: Sampling
    choice: int
    prompt_tokens: int
    table: dict[int, int] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)

    def write(self, first: int, ids: Sequence[int]) -> None:
        """Ids from a position on, over what may stand there."""
        assert first <= len(self.history), "ranks miss an id"
        self.history[first : first + len(ids)] = ids


class PagedDevice:
    """Runs plans in order. With check, what it reads must be what it was told; otherwise it shows in the ids alone."""

    def __init__(self, block_tokens: int, *, check: bool = True) -> None:
        self.memory: dict[tuple[int, int], Content] = {}
        self._block_tokens = block_tokens
        self._check = check
        self._slots: dict[int, Slot] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """The plan's outcome."""
        admitted = {admit.slot for admit in plan.admits}
        assert len(admitted) == len(plan.admits), "a slot is admitted twice in one plan"
        for admit in plan.admits:
            self._slots[admit.slot] = Slot(admit.sampling, admit.choice, admit.prompt_tokens)
        for number, index, block in plan.blocks:
            self._slots[number].table[index] = block
        for told in plan.told:
            assert (told.first == 0) == (told.slot in admitted)
            self._slots[told.slot].write(told.first, told.ids)
        ids: list[int] = []
        logprobs: list[Logprob | None] = []
        scores: list[tuple[Logprob, ...]] = []
        writes: list[tuple[tuple[int, int], Content]] = []
        drawn: list[tuple[Slot, int, int]] = []
        written: dict[int, dict[tuple[int, int], Content]] = {row.slot: {} for row in plan.rows}  # by slot
        for row in plan.rows:
            slot, contents = self._slots[row.slot], self._compute(row, written[row.slot])
            own = [(self._place(slot, position), contents[position]) for position in range(row.first, len(contents))]
            writes += own
            written[row.slot].update(own)
            if row.scored is not None:
                known = slot.history[: len(contents)]
                follows = contents if row.next_id is None else contents_of([*known, row.next_id])
                scores.append(tuple(score(content, row.scored) for content in follows[row.first + 1 :]))
            if row.sampled:
                ids.append(draw(slot.sampling, slot.choice, contents, len(contents) - slot.prompt_tokens))
                logprobs.append(None if row.logprobs is None else Logprob(-float(ids[-1])))
                drawn.append((slot, len(contents), ids[-1]))
        for slot, position, token_id in drawn:
            slot.write(position, [token_id])
        places = [place for place, _ in writes]
        assert len(set(places)) == len(places), "two rows write to one place"
        self.memory.update(writes)
        return StepResult(plan.step, tuple(ids), tuple(logprobs), tuple(scores))

    def _compute(self, row: Row, written: dict[tuple[int, int], Content]) -> list[Content]:
        """What memory holds of the slot before the row, and what the row adds. written: by rows before it."""
        slot = self._slots[row.slot]
        places = [self._place(slot, position) for position in range(row.first)]
        contents = [written[place] if place in written else self.memory[place] for place in places]
        if row.given is not None:
            slot.write(row.first, row.given)
        end = row.first + row.tokens
        given = slot.history[row.first : end]
        assert len(given) == row.tokens, "ranks miss an id"
        for token_id in given:
            contents.append((token_id, hash((contents[-1][1] if contents else 0, token_id))))
        if self._check:
            assert contents == contents_of(slot.history[:end]), "memory holds something else than was computed"
        return contents

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        return slot.table[position // self._block_tokens], position % self._block_tokens
