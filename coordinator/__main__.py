"""The coordinator process: `python -m coordinator`, started and replaced by the supervisor.

Reads its configuration as one JSON line on stdin, which stays open: its end means that the supervisor is gone.
Tells the supervisor JSON lines on stdout: beats, loading, ready, failed. The only place that wires the parts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading

import structlog

from coordinator.process import Coordinator
from echelon.config import CoordinatorConfig
from echelon.errors import EchelonError

BEAT_S = 1.0


class Supervisor:
    """The supervisor's ear: one JSON object a line on our stdout."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Ray tells of every worker that dies on stdout. Our events tell it better, and the pipe is for our lines alone.
        self._pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

    def tell(self, **message: object) -> None:
        """Tell it now. A supervisor that has gone hears nothing; stdin's end says so too."""
        with self._lock:
            try:
                self._pipe.write(json.dumps(message) + "\n")
                self._pipe.flush()
            except BrokenPipeError:
                pass

    async def beat(self) -> None:
        """Once a second, from the loop itself: a loop that stands still is not heard."""
        count = 0
        while True:
            self.tell(beat=count)
            count += 1
            await asyncio.sleep(BEAT_S)


async def run(config: CoordinatorConfig, supervisor: Supervisor) -> None:
    """Serve until SIGTERM (drain, end the ranks), SIGHUP (leave at once, ranks stay) or the supervisor's end."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[str] = loop.create_future()

    coordinator = Coordinator(config, supervisor.tell)

    def end(reason: str) -> None:
        if ended.done():
            coordinator.hurry()
        else:
            ended.set_result(reason)

    def watch_stdin() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(end, "the supervisor is gone")

    loop.add_signal_handler(signal.SIGTERM, end, "SIGTERM")
    loop.add_signal_handler(signal.SIGHUP, os._exit, 0)
    threading.Thread(target=watch_stdin, name="stdin", daemon=True).start()
    beats = loop.create_task(supervisor.beat())
    serving = loop.create_task(coordinator.run())
    try:
        waits: list[asyncio.Future[None] | asyncio.Future[str]] = [serving, ended]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        await coordinator.close(drain=ended.done() and ended.result() == "SIGTERM")
    finally:
        serving.cancel()
        beats.cancel()


def main() -> int:
    """Exit codes: 0 ended as told, 1 failed."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    supervisor = Supervisor()
    config = CoordinatorConfig.model_validate_json(sys.stdin.readline())
    try:
        asyncio.run(run(config, supervisor))
    except EchelonError as error:
        supervisor.tell(failed=error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
