"""The demo behind `make demo`: a batch job on a cluster of two CPU ranks, one of which is killed in the middle.

Serves the tiny trained model that lies beside this file, `--tensor 2 --expert 2 --speculation mtp`; submits beginnings
of held-out code as a batch job, sends SIGKILL to a rank, and waits until every item has its answer. Then it shows what
the model has learnt. Job, answers and heat map are kept in .demo. `--json` prints two lines for programs: what serves,
then what happened. Ends with 0 only if nothing was lost and all is exact; leaves no process behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from echelon import EchelonError
from echelon.testing import LocalCluster
from echelon.types import ItemResult, JobState, JobStatus, Rank
from examples.tiny.measuring import HEARTBEAT_S
from examples.tiny.show import show, show_text
from examples.tiny.texts import MODEL, code_prompts, job

FOLDER = Path(__file__).resolve().parents[1] / ".demo"
KILL_AT = 0.25  # of the items finished
JOB_TIMEOUT_S = 180.0
POLL_S = 0.05
# In float64 no batch's shape changes an answer, so that tokens can be compared.
FLAGS: Mapping[str, Any] = {
    "tensor": 2,
    "expert": 2,
    "speculation": "mtp",
    "dtype": "float64",
    "served_model_name": "tiny",
    "heartbeat_s": HEARTBEAT_S,
    "drain_timeout_s": 1,
}
ITEMS, PROMPT_LINES = 212, 5  # beside the readable ones


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What happened, as --json prints it."""

    items: int
    succeeded: int
    failed: int
    interrupted: int
    completion_tokens: int
    recomputed_tokens: int
    seconds: float
    tokens_per_s: float
    epoch_before: int
    epoch_after: int
    victim_pid: int
    victim_gone: bool

    def problems(self) -> list[str]:
        """What a cluster that survives faults must not show."""
        checks = {
            f"{self.items - self.succeeded} of {self.items} items did not succeed": self.succeeded == self.items,
            "no item was interrupted, so the kill proved nothing": self.interrupted > 0,
            f"the epoch stayed at {self.epoch_after}": self.epoch_after > self.epoch_before,
            f"process {self.victim_pid} is still there": self.victim_gone,
        }
        return [problem for problem, fine in checks.items() if not fine]


def main() -> int:
    """Runs the demo; the exit code of the process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print two JSON lines, and the words on stderr")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the model and the results")
    options = parser.parse_args()
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        batch = options.folder / "job.jsonl"
        batch.write_text(job(code_prompts(ITEMS, PROMPT_LINES)), encoding="utf-8")
        console.print("Starting Ray, a coordinator and two ranks of a small trained model ...")
        with LocalCluster(model=MODEL, **FLAGS) as cluster:
            pids = [rank.pid for rank in cluster.ranks()]
            serving = {"target": cluster.target, "coordinator_pid": cluster.coordinator_pid, "rank_pids": pids}
            console.print("  serving: " + ", ".join(f"{name} {value}" for name, value in serving.items()))
            if options.json:
                print(json.dumps(serving), flush=True)
            summary, results = run_job(console, cluster, batch)
            write_results(options.folder / "results.jsonl", results)
            print_summary(console, summary)
            show_text(console, results)
            shown = show(console, cluster, options.folder)
        console.print("Stopped the cluster.")
    except KeyboardInterrupt:
        console.print("Interrupted; everything is stopped.")
        return 130
    except (EchelonError, RuntimeError, TimeoutError) as error:
        console.print(f"[red]The demo failed:[/] {escape(str(error))}")
        return 1
    problems = [*summary.problems(), *shown.problems()]
    for problem in problems:
        console.print(f"[red]Not as it should be:[/] {escape(problem)}")
    if options.json:
        print(json.dumps(dataclasses.asdict(summary) | dataclasses.asdict(shown)), flush=True)
    return 1 if problems else 0


def run_job(console: Console, cluster: LocalCluster, batch: Path) -> tuple[Summary, Sequence[ItemResult]]:
    """Submits the job, kills a rank in its middle, and waits for its end; its results in the order of its items."""
    epoch_before = cluster.status().replicas[0].epoch
    victim = next(rank for rank in cluster.ranks() if not rank.leader)
    start = time.monotonic()
    submitted = cluster.client().jobs.submit(batch)
    killed = False
    with progress_bar(console) as progress:
        task = progress.add_task("job", total=None)
        while not (status := submitted.status()).state.ended:
            done = status.counts.succeeded + status.counts.failed
            progress.update(task, completed=done, total=status.counts.total or None)
            if not killed and done >= KILL_AT * status.counts.total > 0:
                cluster.kill(victim)
                killed = True
                progress.console.print(f"  killed rank {victim.tensor} (process {victim.pid}) with {done} items done")
            if time.monotonic() - start > JOB_TIMEOUT_S:
                raise TimeoutError(f"the job did not end within {JOB_TIMEOUT_S:.0f} s: {status.counts}")
            time.sleep(POLL_S)
        progress.update(task, completed=status.counts.total, total=status.counts.total)
    seconds = time.monotonic() - start
    if status.state is not JobState.SUCCEEDED:
        raise TimeoutError(f"the job ended as {status.state.value}: {status.counts}")
    epoch_after = cluster.status().replicas[0].epoch
    results = sorted(submitted.results(), key=lambda item: item.index)
    return summarise(status, seconds, (epoch_before, epoch_after), victim), results


def summarise(status: JobStatus, seconds: float, epochs: tuple[int, int], victim: Rank) -> Summary:
    """The figures of an ended job."""
    return Summary(
        items=status.counts.total,
        succeeded=status.counts.succeeded,
        failed=status.counts.failed,
        interrupted=status.counts.interrupted,
        completion_tokens=status.usage.completion_tokens,
        recomputed_tokens=status.usage.recomputed_tokens,
        seconds=round(seconds, 2),
        tokens_per_s=round(status.usage.completion_tokens / seconds, 1),
        epoch_before=epochs[0],
        epoch_after=epochs[1],
        victim_pid=victim.pid,
        victim_gone=not Path(f"/proc/{victim.pid}").exists(),
    )


def progress_bar(console: Console) -> Progress:
    """Items done of all, and the time taken."""
    return Progress(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def write_results(path: Path, results: Sequence[ItemResult]) -> None:
    """One line per item."""
    lines = (json.dumps(as_record(item), ensure_ascii=False) for item in results)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def as_record(item: ItemResult) -> Mapping[str, object]:
    """A result as results.jsonl holds it."""
    ids = item.completion.token_ids if item.completion else ()
    return {
        "custom_id": item.custom_id,
        "text": item.text,
        "token_ids": ids,
        "error": None if item.error is None else str(item.error),
    }


def print_summary(console: Console, summary: Summary) -> None:
    """The figures of the job."""
    console.print(
        f"\n{summary.succeeded} of {summary.items} items succeeded, {summary.failed} failed; {summary.interrupted} were"
        f" interrupted by the kill and taken up again\n{summary.completion_tokens} tokens in {summary.seconds:.1f} s,"
        f" recovery included: {summary.tokens_per_s:.0f} tokens/s; {summary.recomputed_tokens} tokens were prefilled"
        f" again\nepoch {summary.epoch_before} -> {summary.epoch_after}; process {summary.victim_pid} is"
        f" {'gone' if summary.victim_gone else 'STILL THERE'}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
