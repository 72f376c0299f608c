"""One rank of a replica that is measured by itself: `python -m worker.bench`, started by `echelon bench offline`.

As a rank process, but for the coordinator: no gRPC, no journal, no heartbeats. It is told what to do by JSON lines on
stdin and answers on stdout, in lines that begin with MARK. The leader drives its engine as worker/leader.py does, and
reads the clock: from the submit to the last id. Any fault ends the process.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import queue
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from echelon.bench.cases import Case, prompts
from echelon.internal.link import Assign, Command, Fence, Progress, Report, Sampling
from echelon.internal.logs import configure_logs
from echelon.internal.v1 import control_pb2
from parallel import mesh
from worker.choices import Choices
from worker.engine import Broken, Commanded, Completed, Drain, Event, LinkOpened, RunPlan, SendReport
from worker.epoch import Lead, form_epoch
from worker.memory import free_memory_bytes
from worker.plan import DRAIN, StepResult, encode
from worker.rank import THREADS_BESIDE_CUDA, THREADS_ON_CPU
from worker.spec import RankSpec
from worker.steps import Steps, end_epoch

MARK = "echelon-bench: "
FENCE = Fence(term=1, replica=0, epoch=1)
HERE = "127.0.0.1"
STEP_TIMEOUT_S = 120.0


class Engine:
    """The leader's engine and its results: one case at a time."""

    def __init__(self, lead: Lead) -> None:
        self._lead = lead
        self._results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self._attempts = 0
        self._acknowledged = 0
        self._left: dict[str, int] = {}
        self._first_s: dict[str, float] = {}
        self._post(LinkOpened(FENCE.term))

    def take(self, result: StepResult) -> None:
        """From the thread that finishes steps."""
        self._results.put(result)

    def run(self, case: Case, vocabulary: int, seed: int) -> dict[str, object]:
        """Seconds to the last id, and of each request to its first. Raises queue.Empty where no step ends any more."""
        assigns = tuple(self._assign(case, prompt) for prompt in prompts(case, vocabulary, seed))
        before = self._cached_tokens()
        self._first_s = {}
        begun_unix_s, begun_s = time.time(), time.perf_counter()
        self._post(Commanded(Command(FENCE, self._acknowledged, assigns=assigns)))
        while self._left:
            self._post(Completed(self._results.get(timeout=STEP_TIMEOUT_S)))
            self._post(Commanded(Command(FENCE, self._acknowledged)))  # as a coordinator acknowledges
        total_s = time.perf_counter() - begun_s
        firsts = [at_s - begun_s for at_s in self._first_s.values()]
        cached_tokens = self._cached_tokens() - before
        return {"begun_s": begun_unix_s, "total_s": total_s, "first_s": firsts, "cached_tokens": cached_tokens}

    def _assign(self, case: Case, prompt: list[int]) -> Assign:
        """Greedy, and no id ends it."""
        self._attempts += 1
        request = f"request-{self._attempts}"
        self._left[request] = case.output_tokens
        sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=case.output_tokens, seed=0)
        return Assign(request, self._attempts, tuple(prompt), (Progress(0),), sampling)

    def _post(self, event: Event) -> None:
        for effect in self._lead.core.step(time.monotonic(), event):
            match effect:
                case RunPlan(plans):
                    self._lead.send_plans([encode(plan) for plan in plans])
                case Drain():
                    self._lead.send_plans([DRAIN])
                case SendReport(report):
                    self._take_report(report)
                case Broken(_, reason, _):
                    raise RuntimeError(reason)

    def _take_report(self, report: Report) -> None:
        self._acknowledged = report.report_seq
        now_s = time.perf_counter()
        for run in report.runs:
            self._first_s.setdefault(run.request, now_s)
            self._left[run.request] -= len(run.ids)
            if run.finish is not None:
                left = self._left.pop(run.request)
                assert left == 0, f"{run.request} ended {left} ids too early"
        for released in report.released:
            if released.request in self._left:
                raise RuntimeError(f"{released.request} was refused: {released.reason}")

    def _cached_tokens(self) -> int:
        return self._lead.core.stats().counters["cached_tokens"]


def say(**values: object) -> None:
    """To whoever has started this process."""
    sys.stdout.write(f"{MARK}{json.dumps(values)}\n")
    sys.stdout.flush()


def hear() -> dict[str, Any] | None:
    """The next line; None where there are no more."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def main() -> None:
    """Until stdin ends."""
    configure_logs()
    told = hear()
    assert told is not None, "nobody says which rank this is"
    rank, device_type = int(told["rank"]), str(told["device"])
    torch.set_num_threads(THREADS_ON_CPU if device_type == "cpu" else THREADS_BESIDE_CUDA)
    torch.set_grad_enabled(False)
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    store = mesh.open_store(HERE) if rank == 0 else None
    say(memory_bytes=free_memory_bytes(device), store=store[1] if store else "")
    told = hear()
    if told is None:
        return
    command = control_pb2.FormEpoch.FromString(base64.b64decode(told["form"]))
    spec = RankSpec(
        coordinator_address=f"{HERE}:1",
        cluster="bench",
        replica=0,
        rank=rank,
        incarnation="1",
        device=device_type,
        heartbeat_s=1.0,
        term=1,
        pid=os.getpid(),
    )
    serve(spec, command, device)


def serve(spec: RankSpec, command: control_pb2.FormEpoch, device: torch.device) -> None:
    """Form the epoch, then do what is asked until nobody asks."""
    epoch = form_epoch(spec, FENCE, command, device, lambda *_: None, contextlib.nullcontext, lambda _: None)
    choices = None
    if command.pipeline == 1:
        choices = Choices(epoch.expert_loads.loads, epoch.plans)
        epoch = dataclasses.replace(epoch, plans=choices)
    engine = None if epoch.lead is None else Engine(epoch.lead)
    steps = Steps(epoch, _ignore if engine is None else engine.take, _end)
    steps.start()
    say(
        ready=True,
        took_s=dict(epoch.took_s),
        parameter_bytes=epoch.ready.parameter_bytes,
        kv_bytes=epoch.ready.kv_bytes,
    )
    while (told := hear()) is not None:
        say(**_done(told, engine, choices))
    end_epoch(epoch, steps)


def _done(told: Mapping[str, Any], engine: Engine | None, choices: Choices | None) -> dict[str, object]:
    match told["do"]:
        case "run":
            assert engine is not None, "the leader runs cases"
            return engine.run(Case.parse(told["case"]), int(told["vocabulary"]), int(told["seed"]))
        case "count":
            if choices is not None:
                choices.begin()
            return {}
        case "counted":
            return {"chosen": [] if choices is None else choices.end(int(told["steps"]))}
    raise AssertionError(f"asked for {told}")


def _ignore(result: StepResult) -> None:
    """The leader's are told to its engine, and are the same."""


def _end(error: Exception) -> None:
    """From a thread that runs steps."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
