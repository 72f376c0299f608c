"""What Prometheus reads of guesses: by replica, and one token a step where nothing is guessed."""

from __future__ import annotations

from coordinator.metrics import Metrics


def test_guesses_are_told_by_replica() -> None:
    metrics = Metrics.create()
    metrics.speculated(0, {})
    metrics.speculated(1, {"decode_rows": 40, "drafted_tokens": 100, "accepted_tokens": 60})

    def value(name: str, replica: str) -> float | None:
        return metrics.registry.get_sample_value(f"echelon_{name}", {"replica": replica})

    names = ("drafted_tokens", "accepted_tokens", "tokens_per_step")
    assert [value(name, "0") for name in names] == [0, 0, 1]
    assert [value(name, "1") for name in names] == [100, 60, 2.5]
