"""Rules: what has no fixed size of a choice that takes a slot, in a plan and on the wire.

The same in the engine, the simulator and the runner; immutable and torch-free. Numbers of fixed size lie in the plan's
tables (`plan.py`); what the rules do to scores is `logit_rules.py`'s business.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from echelon.internal.link import Sampling
from echelon.internal.v1 import link_pb2, plan_pb2


class Rules(NamedTuple):
    """Of an admit. stop_ids: only where min_tokens keeps them back for a while."""

    slot: int
    stop_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""

    @classmethod
    def of(cls, slot: int, sampling: Sampling) -> Self | None:
        """Those of a sampling, if it has any."""
        stop_ids = sampling.stop_token_ids if sampling.min_tokens else ()
        rules = cls(slot, stop_ids, sampling.logit_bias, sampling.bad_words, sampling.grammar)
        return rules if any(rules[1:]) else None

    @classmethod
    def read(cls, message: plan_pb2.Rules) -> Self:
        """From the wire."""
        return cls(
            slot=message.slot,
            stop_ids=tuple(message.stop_ids),
            logit_bias=tuple(zip(message.biased_ids, message.biases, strict=True)),
            bad_words=tuple(tuple(word.ids) for word in message.bad_words),
            grammar=message.grammar,
        )

    def message(self) -> plan_pb2.Rules:
        """The wire form."""
        return plan_pb2.Rules(
            slot=self.slot,
            stop_ids=self.stop_ids,
            biased_ids=[token for token, _ in self.logit_bias],
            biases=[bias for _, bias in self.logit_bias],
            bad_words=[link_pb2.Ids(ids=word) for word in self.bad_words],
            grammar=self.grammar,
        )
