"""A replica of several stages in one process: each rank a thread with a model and cache of its own, over gloo.

The scheduler and the engine's rule for plans ahead are the real ones; `executed` holds what each rank has done.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from echelon.internal.link import Assign, Command
from models.decoder import DecoderModel
from parallel import mesh
from parallel.degrees import Degrees
from parallel.schedule import Op
from tests.unit.again import Again
from tests.unit.plans import CPU, FENCE, new_runner
from worker.cuda_capture import Capture
from worker.engine import Commanded, Completed, Drain, Effect, EngineCore, LinkOpened, RunPlan, SendReport
from worker.later_graphs import Later
from worker.limits import EngineLimits
from worker.pending import Queued
from worker.plan import DRAIN, StepPlan, StepResult, decode, encode
from worker.runner import RunnerLimits
from worker.sequence import Outcome
from worker.stage import Stage

TIMEOUT_S = 60.0


@dataclass
class Rank:
    """What one rank is told, and what it has done."""

    inbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    executed: list[tuple[Op, Queued]] = field(default_factory=list)
    model: DecoderModel | None = None
    captured: list[Later] = field(default_factory=list)


class Pipeline:
    """Use as a context manager. slow(op) is called in a rank's thread after each of its operations. graphs: numbers of
    rows that every rank captures; those of the limits' captures it does when plans say so, as `capture` does for it."""

    def __init__(
        self,
        checkpoint: Path,
        degrees: Degrees,
        limits: EngineLimits,
        slow: Callable[[Op], None] = lambda op: None,
        graphs: Sequence[int] = (),
        capture: Callable[[int], Capture] = lambda rank: Again,
    ) -> None:
        self._graphs, self._capture = graphs, capture
        self.core = EngineCore(FENCE, limits)
        self.outcome = Outcome()
        self.plans: list[StepPlan | None] = []  # of the first data rank, as they were sent; None: a drain
        self.completed = 0
        self.ranks = [Rank() for _ in range(degrees.replica_ranks)]
        self._checkpoint, self._degrees, self._limits, self._slow = checkpoint, degrees, limits, slow
        self._results: queue.SimpleQueue[StepResult | Exception] = queue.SimpleQueue()
        self._seq = 0

    def __enter__(self) -> Self:
        self._store, self._address = mesh.open_store("127.0.0.1")
        self._pool = ThreadPoolExecutor(len(self.ranks))
        self._running: list[Future[None]] = [self._pool.submit(self._run, rank) for rank in range(len(self.ranks))]
        self._execute(self.core.step(0.0, LinkOpened(FENCE.term)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for rank in self.ranks:
            rank.inbox.put(None)
        for running in self._running:
            running.result(TIMEOUT_S)
        self._pool.shutdown()

    def answer(self, assigns: Iterable[Assign]) -> Outcome:
        """All of them, until nothing is held any more."""
        self.command(Command(FENCE, self._seq, tuple(assigns)))
        while self.completed < sum(plan is not None for plan in self.plans):
            self.complete()
        self.core.check_integrity()
        return self.outcome

    def command(self, command: Command) -> None:
        self._execute(self.core.step(0.0, Commanded(command)))

    def complete(self) -> None:
        """Wait for a step, and let the engine plan the next."""
        result = self._results.get(timeout=TIMEOUT_S)
        if isinstance(result, Exception):
            raise result
        self.completed += 1
        self._execute(self.core.step(0.0, Completed(result)))

    def _execute(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case RunPlan(plans):
                    self.plans.append(plans[0])
                    self._send([encode(plan) for plan in plans])
                case Drain():
                    self.plans.append(None)
                    self._send([DRAIN])
                case SendReport(report):
                    self._seq = max(self._seq, report.report_seq)
                    self.outcome.runs += report.runs
                    self.outcome.prompted += report.prompted
                    self.outcome.released += report.released

    def _send(self, payloads: Sequence[bytes]) -> None:
        for number, rank in enumerate(self.ranks):
            rank.inbox.put(payloads[self._degrees.place(number).data_rank % len(payloads)])

    def _run(self, number: int) -> None:
        torch.set_num_threads(1)
        limits, place, rank = self._limits, self._degrees.place(number), self.ranks[number]
        context = mesh.form_context(
            self._address, "test", FENCE.epoch, place, CPU, torch.float64, TIMEOUT_S, limits.depth, come_s=TIMEOUT_S
        )
        try:
            runner_limits = RunnerLimits(limits.max_running, limits.max_context, limits.block_tokens)
            runner = new_runner(
                self._checkpoint,
                context,
                runner_limits,
                limits.kv_blocks,
                self._graphs,
                limits.predicts,
                padded=bool(limits.captures),
            )
            if limits.captures:
                runner.capture_later(self._capture(number), limits.captures, rank.captured.append)
            stage, rank.model = Stage(runner, place, limits.depth), runner.model
            while (payload := rank.inbox.get()) is not None:
                for op, queued in stage.take(None if payload == DRAIN else decode(payload)):
                    self._slow(op)
                    rank.executed.append((op, queued))
                    if number == 0 and queued.pending is not None:
                        result = queued.pending.result()
                        stage.runner.tell_non_finite(queued.pending, result)
                        self._results.put(result)
            context.replica.barrier()
        except Exception as error:
            self._results.put(error)
            raise
        finally:
            mesh.close(context)
