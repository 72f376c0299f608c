"""What a spare does while it waits: the steps of a rank, from the model's layers to the sampler."""

from __future__ import annotations

import pytest
import torch

from worker import warm
from worker.plan import PlanTables, StepResult
from worker.runner import Runner


def test_a_spare_has_run_steps_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[PlanTables, StepResult]] = []
    run = Runner.run

    def watched(self: Runner, tables: PlanTables) -> StepResult:
        ran.append((tables, run(self, tables)))
        return ran[-1][1]

    monkeypatch.setattr(Runner, "run", watched)
    threads = torch.get_num_threads()
    try:
        warm.warm("cpu")
    finally:
        torch.set_num_threads(threads)
    whole, chunk = (tuple(tables.rows[-1][1:3]) for tables, _ in ran)
    assert whole == (0, warm.CONTEXT - 1), "a prompt that starts and ends in one step"
    assert chunk[0] > 0 and chunk[1] > 1, "a part of a prompt, behind another"
    assert all(len(tables.rows) == warm.RUNNING for tables, _ in ran), "other rows decode meanwhile"
    assert all(min(result.ids) >= 0 for _, result in ran), "all of them were drawn"
