"""The coordinator process: `python -m coordinator`, started and replaced by the supervisor.

Reads its configuration as one JSON line on stdin, for which a successor waits until it is needed. stdin stays open:
each further line is one to change to, its end means that the supervisor is gone. Tells the supervisor JSON lines on
stdout: waiting, beats, loading, ready, failed, and what becomes of a change. The only place that wires the parts.
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
from echelon.internal.logs import configure_logs

BEAT_S = 1.0

log = structlog.get_logger("coordinator")


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
    ended: asyncio.Future[bool] = loop.create_future()  # whether to drain

    coordinator = Coordinator(config, supervisor.tell)

    def end(drain: bool) -> None:
        if ended.done():
            coordinator.hurry()
        else:
            ended.set_result(drain)

    def watch_stdin() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(coordinator.reconfigure, CoordinatorConfig.model_validate_json(line))
        loop.call_soon_threadsafe(end, False)

    loop.add_signal_handler(signal.SIGTERM, end, True)
    loop.add_signal_handler(signal.SIGHUP, os._exit, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked by the supervisor until we can heed it
    threading.Thread(target=watch_stdin, name="stdin", daemon=True).start()
    beats = loop.create_task(supervisor.beat())
    serving = loop.create_task(coordinator.run())
    try:
        waits: list[asyncio.Future[None] | asyncio.Future[bool]] = [serving, ended]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done() and ended.result():
            await coordinator.drain()
        serving.cancel()
        await asyncio.wait([serving])
        if ended.done() or isinstance(serving.exception(), EchelonError):
            await coordinator.close()  # after a defect the ranks are left to a successor
        if not serving.cancelled():
            serving.result()
    finally:
        beats.cancel()


def main() -> int:
    """Exit codes: 0 ended as told, 1 failed."""
    configure_logs()
    supervisor = Supervisor()
    supervisor.tell(waiting=True)
    line = sys.stdin.readline()
    if not line:
        return 0  # a successor that nobody needed
    config = CoordinatorConfig.model_validate_json(line)
    try:
        asyncio.run(run(config, supervisor))
    except EchelonError as error:
        supervisor.tell(failed=error.message)
        return 1
    except Exception as error:
        log.critical("the coordinator broke", exc_info=error)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # as if killed: threads that still wait for Ray must keep nobody waiting
