"""`client.map`: many calls at once, their answers in the order of their inputs.

`in_order` is the whole decision, written once for both clients: it starts calls and says which to wait for next. The
synchronous client runs them on `Workers`, the asynchronous one as tasks. Knows no call and no transport.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import TypeVar

from echelon.errors import EchelonError, InvalidRequestError

DEFAULT_CONCURRENCY = 64  # a whole batch of a replica, as --max-running is by default
READ_AHEAD = 4  # calls begun or waiting, for each that may run: one slow answer must not idle the others


T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F")


def check(concurrency: int, options: Mapping[str, object]) -> None:
    """Before anything starts. Raises InvalidRequestError naming the argument."""
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
        raise InvalidRequestError(f"concurrency must be an integer >= 1, got {concurrency!r}", field="concurrency")
    if "request_id" in options:
        raise InvalidRequestError("one request_id cannot be that of many requests", field="request_id")


def in_order(inputs: Iterable[T], start: Callable[[T], F], concurrency: int) -> Iterator[F]:
    """Every input's call, to be waited for one by one. Inputs are taken as there is room, so they may be endless."""
    source, started = iter(inputs), deque[F]()
    while True:
        room = READ_AHEAD * concurrency - len(started)
        started.extend(start(item) for item in itertools.islice(source, room))
        if not started:
            return
        yield started.popleft()


def outcome(answer: R | EchelonError, return_exceptions: bool) -> R | EchelonError:
    """What the user is handed for one input; raises the error that is not to be returned."""
    if isinstance(answer, EchelonError) and not return_exceptions:
        raise answer
    return answer


class Workers:
    """Threads that run calls, as many as there are calls up to a count.

    Daemons: a process that leaves its map behind ends, where ThreadPoolExecutor would wait for every answer.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads: list[threading.Thread] = []
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Run it on a thread, soon."""
        future: Future[R] = Future()
        self._tasks.put(lambda: _run(call, future))
        if len(self._threads) < self._count:
            self._threads.append(threading.Thread(target=self._work, name="echelon-map", daemon=True))
            self._threads[-1].start()
        return future

    def close(self, timeout_s: float) -> None:
        """Take no more, and wait for the threads to run what was submitted."""
        deadline = time.monotonic() + timeout_s
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def _run(call: Callable[[], R], future: Future[R]) -> None:
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
        future.set_exception(error)
    else:
        future.set_result(result)
