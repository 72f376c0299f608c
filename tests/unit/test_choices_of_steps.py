"""What each step has added to the counters of experts, however far the thread that launches steps is behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from models.expert_load import ExpertLoads
from worker.choices import Choices


class Loads:
    """Of one layer of four experts."""

    def __init__(self) -> None:
        self.rows = torch.zeros(1, 4, dtype=torch.int64)

    def snapshot(self) -> Tensor:
        return self.rows.clone()


def test_the_last_step_counts_though_its_launcher_lags() -> None:
    """Two steps before counting, three after: the last two are asked for, while the launcher still is in the last."""
    loads, given, launched = Loads(), threading.Semaphore(0), threading.Semaphore(0)

    def plans() -> Iterator[bytes]:
        for _ in range(5):
            given.acquire()
            yield b"plan"

    choices = Choices(cast(ExpertLoads, loads), plans())

    def launch() -> None:
        for step, _ in enumerate(choices):
            loads.rows[0, step % 4] += 1
            launched.release()
            time.sleep(0.05)

    thread = threading.Thread(target=launch)
    thread.start()
    for step in range(5):
        if step == 2:
            choices.begin()
        given.release()
        launched.acquire()
    assert choices.end(2) == [[0b1000], [0b0001]]
    thread.join()
    assert choices.end(2) == []
