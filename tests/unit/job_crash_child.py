"""Run by test_job_store.py: a job from its submission to its last result, ended by os._exit at a labelled point.

Reads "path point times" lines and forks a process for each, so that the imports are paid once.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from coordinator.frontend import GenerateFields
from coordinator.jobs.runner import JobConfig
from coordinator.jobs.service import JobService
from coordinator.requests.nouns import Shown
from echelon.errors import InvalidRequestError
from echelon.types import Choice, Completion, FinishReason

CRASHED = 77
JSONL = b'{"custom_id": "a", "prompt": "x"}\n{"custom_id": "b", "prompt": "y"}\n' + (
    b'{"custom_id": "c", "prompt": "z"}\n{"custom_id": "d", "prompt": "bad"}\n'
)


class Generation:
    async def submit(self, fields: GenerateFields) -> AsyncIterator[Shown]:
        if fields.prompt == "bad":
            raise InvalidRequestError("bad")
        yield Completion(
            request_id=fields.request_id,
            model=fields.model,
            choices=(
                Choice(text=f"{fields.prompt} {fields.sampling.seed}", token_ids=(1,), finish_reason=FinishReason.STOP),
            ),
        )

    def cancel(self, request_ids: Sequence[str]) -> Sequence[str]:
        return ()

    def now(self) -> float:
        return time.time()


async def run_job(path: Path, crash_point: str, times: int) -> None:
    left = times

    def crash(point: str) -> None:
        nonlocal left
        left -= point == crash_point
        if left == 0:
            os._exit(CRASHED)

    service = await JobService.open(path, Generation(), JobConfig(window_items=2), crash)
    run = asyncio.create_task(service.run())
    await service.create("a", "m", JSONL)
    tell("created")
    async for result in service.results("a", 0, follow=True):
        tell(f"result:{result.cursor}:{result.custom_id}:{result.text or result.error}")
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    await service.close()


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    for line in sys.stdin:
        path, crash_point, times = line.split()
        process = os.fork()
        if process == 0:
            asyncio.run(run_job(Path(path), crash_point, int(times)))
            os._exit(0)
        tell(f"exit:{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}")


if __name__ == "__main__":
    main()
