"""The judge itself: what it expects after a disk has lost what it was told of as written."""

from __future__ import annotations

import pytest

from coordinator.journal.state import Forgotten, JournalState, Opened, Record
from coordinator.requests.nouns import Request
from echelon.internal.link import Sampling
from tests.simulation.checker import Checker, Violation


def opened(request_id: str, unix_s: float = 0.0) -> Opened:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=1, seed=0)
    return Opened(Request(request_id, request_id.encode(), "m", (1, 2), sampling, unix_s + 9.0, unix_s))


def restarted(told: list[Record], kept: list[Record]) -> Checker:
    """Of these records, told of as written, a power cut left some."""
    checker, state = Checker(), JournalState()
    checker.written(told)
    state.apply_all(kept)
    checker.restarted(state, lost=True)
    return checker


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param([Forgotten("second")], id="that one was forgotten"),
        pytest.param([Forgotten("first"), opened("first", 1.0)], id="that one was forgotten, and asked for again"),
    ],
)
def test_turns_are_in_the_order_of_the_journal_that_is_left(lost: list[Record]) -> None:
    kept: list[Record] = [opened("first"), opened("second")]
    checker = restarted([*kept, *lost], kept)
    checker.assigned(["first"], ["second"])
    with pytest.raises(Violation, match="second was assigned before"):
        checker.assigned(["second"], ["first"])


def test_who_comes_after_a_loss_comes_last() -> None:
    checker = restarted([opened("first"), opened("second"), opened("third")], [opened("first")])
    checker.written([opened("fourth")])
    checker.assigned(["first"], ["fourth"])
    with pytest.raises(Violation, match="fourth was assigned before"):
        checker.assigned(["fourth"], ["first"])
