"""The host's note of each slot's rules, and from it the tensors by which a step's rows are judged.

In each rank's runner thread. Most rows have no rules and leave nothing here. What a rule needs besides the history is
known to the host, so the device is never asked. Rows that take one sampling path are dealt with in pieces, to bound
the kernels' memory. It must not know plans' rows or the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from worker.logit_rules import BadWords, Banned, Biased, Lookback, Penalties, Rule
from worker.plan import Records
from worker.plan_rules import Rules
from worker.sampler import ConstrainedRow, Path, RuledRows
from worker.upload import upload

Int64Array = npt.NDArray[np.int64]

_NO_PENALTIES = (1.0, 0.0, 0.0)
_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class SlotRules:
    """What a slot asks beyond temperature, top_k and top_p; defaults ask nothing.

    heads [words, longest] and last_ids [words]: bad words, as `BadWords` takes them.
    """

    prompt_tokens: int
    min_tokens: int
    min_p: float
    penalties: tuple[float, float, float]  # repetition, frequency, presence
    stop_ids: Int64Array
    biased_ids: Int64Array
    biases: npt.NDArray[np.float64]
    heads: Int64Array
    last_ids: Int64Array
    constrained: bool

    @property
    def penalised(self) -> bool:
        return self.penalties != _NO_PENALTIES

    @property
    def always(self) -> bool:
        """Whether rules change every id of the slot."""
        return bool(self.min_p > 0 or self.penalised or len(self.biased_ids) or len(self.last_ids) or self.constrained)

    def keeps_stop_ids(self, position: int) -> bool:
        """Whether the answer is too short yet for one of its stop ids at this position."""
        return len(self.stop_ids) > 0 and position - self.prompt_tokens < self.min_tokens


@dataclass(frozen=True, slots=True)
class RuledRow:
    """A sampled row with rules: its place in the rank's share, its slot, and the position of the id to draw."""

    index: int
    slot: int
    position: int
    rules: SlotRules


def admitted(admits: Records, rules: Sequence[Rules]) -> dict[int, SlotRules]:
    """By slot, the rules of a plan's admits that have any."""
    varied = {entry.slot: entry for entry in rules}
    asking = (
        (admits["min_p"] > 0)
        | (admits["repetition_penalty"] != 1)
        | (admits["frequency_penalty"] != 0)
        | (admits["presence_penalty"] != 0)
        | np.isin(admits["slot"], list(varied))
    )
    found = {}
    for admit in admits[asking]:
        slot = int(admit["slot"])
        found[slot] = _slot_rules(admit, varied.get(slot, Rules(slot)))
    return found


def _slot_rules(admit: np.void, varied: Rules) -> SlotRules:
    words = varied.bad_words
    longest = max((len(word) for word in words), default=1) - 1
    return SlotRules(
        prompt_tokens=int(admit["prompt_tokens"]),
        min_tokens=int(admit["min_tokens"]),
        min_p=float(admit["min_p"]) if admit["temperature"] > 0 else 0.0,  # greedy draws the likeliest anyway
        penalties=(
            float(admit["repetition_penalty"]),
            float(admit["frequency_penalty"]),
            float(admit["presence_penalty"]),
        ),
        stop_ids=np.array(varied.stop_ids, dtype=np.int64),
        biased_ids=np.array([token for token, _ in varied.logit_bias], dtype=np.int64),
        biases=np.array([bias for _, bias in varied.logit_bias], dtype=np.float64),
        heads=np.array([(-1,) * (longest + 1 - len(word)) + word[:-1] for word in words], dtype=np.int64),
        last_ids=np.array([word[-1] for word in words], dtype=np.int64),
        constrained=bool(varied.grammar),
    )


def ruled_rows(rules: Mapping[int, SlotRules], slots: Int64Array, positions: Int64Array) -> list[RuledRow]:
    """Of a rank's share, slots and positions [rows], the rows that a rule changes now."""
    if not rules:
        return []
    return [
        RuledRow(index, slot, position, found)
        for index, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True))
        if (found := rules.get(slot)) is not None and (found.always or found.keeps_stop_ids(position))
    ]


def build(rows: Sequence[RuledRow], paths: Sequence[Path], history: Tensor, piece_rows: int) -> tuple[RuledRows, ...]:
    """The rows as the sampler takes them, at most piece_rows together. paths: of each row."""
    pieces = []
    for path in Path:
        alike = [row for row, taken in zip(rows, paths, strict=True) if taken == path]
        for begin in range(0, len(alike), piece_rows):
            pieces.append(_piece(alike[begin : begin + piece_rows], path, history))
    return tuple(pieces)


def _piece(rows: Sequence[RuledRow], path: Path, history: Tensor) -> RuledRows:
    table = np.array([(row.index, row.slot, row.position, row.rules.prompt_tokens) for row in rows])
    min_p = np.array([row.rules.min_p for row in rows])
    columns, min_p_ = upload((table.T, min_p), history.device)
    indices, slots, positions, prompt_tokens = columns
    lookback = Lookback(history, slots, positions, prompt_tokens)
    return RuledRows(
        rows=indices,
        path=path,
        rules=tuple(_rules(rows, lookback)),
        min_p=min_p_ if min_p.any() else None,
        constrained=tuple(
            ConstrainedRow(place, row.index, row.slot) for place, row in enumerate(rows) if row.rules.constrained
        ),
    )


def _rules(rows: Sequence[RuledRow], lookback: Lookback) -> Iterator[Rule]:
    """The rules that any of these rows has, in order; a constraint's mask comes before them, when it is known."""
    device = lookback.history.device
    rules = [row.rules for row in rows]
    if any(len(entry.last_ids) for entry in rules):
        heads = _stacked([entry.heads for entry in rules])
        last_ids = [entry.last_ids for entry in rules]
        places, heads_, last_ids_ = upload((_places(last_ids), heads, np.concatenate(last_ids)), device)
        yield BadWords(places, heads_, last_ids_, lookback)
    kept = [row.rules.stop_ids if row.rules.keeps_stop_ids(row.position) else _NONE for row in rows]
    if any(map(len, kept)):
        yield Banned(*upload((_places(kept), np.concatenate(kept)), device))
    biased = [entry.biased_ids for entry in rules]
    if any(map(len, biased)):
        biases = np.concatenate([entry.biases for entry in rules])
        yield Biased(*upload((_places(biased), np.concatenate(biased), biases), device))
    penalised = [place for place, entry in enumerate(rules) if entry.penalised]
    if penalised:
        penalties = np.array([rules[place].penalties for place in penalised], dtype=np.float64)
        places, (repetition, frequency, presence) = upload((np.array(penalised), penalties.T), device)
        longest = max(rows[place].position for place in penalised)
        yield Penalties(places, repetition, frequency, presence, longest, lookback)


def _places(of_rows: Sequence[Int64Array]) -> Int64Array:
    """The row that each element belongs to."""
    return np.arange(len(of_rows)).repeat([len(elements) for elements in of_rows])


def _stacked(heads: Sequence[Int64Array]) -> Int64Array:
    """One above another, [all words, longest of all], each padded with -1 in front."""
    longest = max(part.shape[-1] for part in heads if len(part))
    return np.concatenate(
        [np.pad(part, ((0, 0), (longest - part.shape[1], 0)), constant_values=-1) for part in heads if len(part)]
    )
