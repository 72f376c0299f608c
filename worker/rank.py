"""One rank process: attach, form an epoch, run its plans until killed, or until told to retire and wait for another.

The asyncio loop has the control line, and on the leader the engine and its link; steps run in threads beside it. A
rank decides nothing: it is told when to form an epoch and when to end one, and a fault inside a step is reported, not
repaired: the node agent ends a rank that has had one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import structlog
import torch

from echelon.errors import ConfigError
from echelon.internal.link import PROTOCOL_VERSION, Fence
from echelon.internal.logs import configure_logs
from echelon.internal.v1 import control_pb2
from parallel import mesh
from parallel.comm import of_peer
from worker.checkpoint.held import HeldShard
from worker.checkpoint.write import Written
from worker.control import ControlLink
from worker.engine import Broken
from worker.epoch import Epoch, SendPlans, form_epoch, private_host
from worker.later_graphs import Later
from worker.leader import Leader
from worker.memory import free_memory_bytes
from worker.plan import StepResult
from worker.spec import RankSpec
from worker.steps import Steps, end_epoch

PROGRESS_INTERVAL_S = 0.1
TELL_S = 1.0  # for a heartbeat to be on its way, where it has to be
THREADS_ON_CPU, THREADS_BESIDE_CUDA = 1, 4

log = structlog.get_logger("rank")


def main(spec: RankSpec, held: HeldShard | None = None) -> None:
    """Run a rank in this thread until the coordinator refuses it or the process is killed.

    held: what it has made ready as a spare.
    """
    configure_logs()
    torch.set_num_threads(THREADS_ON_CPU if spec.device == "cpu" else THREADS_BESIDE_CUDA)
    torch.set_grad_enabled(False)
    asyncio.run(RankProcess(spec, held).run())


class RankProcess:
    """The handler of the control line (worker.control.RankHandler), and the owner of what the epoch needs."""

    def __init__(self, spec: RankSpec, held: HeldShard | None = None) -> None:
        self._spec = spec
        self._held = held
        self._control = ControlLink(spec, self)
        self._device = torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")  # Ray shows us one GPU
        self._phase = "waiting"
        self._epoch: Epoch | None = None
        self._steps: Steps | None = None
        self._compiling = False
        self._leader: Leader | None = None
        self._leading: asyncio.Task[None] | None = None
        self._store: tuple[object, str] | None = None  # kept alive: the rendezvous of all epochs lives in this process
        self._fault: control_pb2.RankFault | None = None
        self._unformed: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Stay attached until refused."""
        self._loop = asyncio.get_running_loop()
        await self._control.run()

    def hello(self) -> control_pb2.RankHello:
        return control_pb2.RankHello(
            protocol_version=PROTOCOL_VERSION,
            rank=self._spec.rank,
            incarnation=self._spec.incarnation,
            pid=self._spec.pid,
            node_id=self._spec.node_id,
            phase=self._phase,
            device=self._spec.device,
            memory_bytes=free_memory_bytes(self._device),
            ready=self._resident(),
            layout="" if self._epoch is None else self._epoch.layout,
        )

    def beat(self) -> control_pb2.Heartbeat:
        phase = "compiling" if self._compiling else self._phase
        if self._steps is None:
            return control_pb2.Heartbeat(phase=phase)
        kind, slowest_s = self._steps.times.current()
        if self._steps.stepping and not self._compiling:
            phase = "stepping"
        return control_pb2.Heartbeat(phase=phase, step=self._steps.step, kind=kind, slowest_s=slowest_s)

    def expert_loads(self) -> control_pb2.ExpertLoads | None:
        return None if self._epoch is None else self._epoch.expert_loads.news()

    def accepted(self, term: int) -> None:
        log.info("accepted", rank=self._spec.rank, term=term)
        if self._epoch is not None:
            self._epoch.expert_loads.forget_told()
        if self._fault is not None:
            self._control.send(fault=self._fault)

    async def open_store(self) -> str:
        self._phase = "store"
        if self._store is None:
            self._store = mesh.open_store(private_host(self._spec.coordinator_address))
        return self._store[1]

    def form(self, epoch: int, command: control_pb2.FormEpoch) -> None:
        assert self._phase in ("waiting", "store"), f"told to form an epoch in phase {self._phase}"
        self._phase = "loading"
        self._spawn(self._form(Fence(self._control.term, self._spec.replica, epoch), command))

    async def _form(self, fence: Fence, command: control_pb2.FormEpoch) -> None:
        try:
            told = self._tell_progress(), self._tell_compiling, self._tell_captured
            epoch = await asyncio.to_thread(form_epoch, self._spec, fence, command, self._device, *told, self._held)
        except Exception as error:  # noqa: BLE001 - whatever stops a rank from forming is told, never swallowed
            self._tell_fault(error)
            self._unformed = error  # its frames hold the groups: their end would be a fault of all others
            return
        self._epoch, self._phase = epoch, "ready"
        loaded = epoch.loaded
        self._control.send(loaded=loaded.told())
        self._control.send(formed=control_pb2.EpochFormed(took_s=epoch.took_s))
        self._control.send(ready=self._resident())
        if epoch.lead is not None:
            address, lead = self._spec.coordinator_address, epoch.lead
            send, term = self._guarded(lead.send_plans), lambda: self._control.term
            self._leader = Leader(lead.core, address, send, term, self._tell_broken)
            self._leading = self._spawn(self._leader.run())
        self._steps = Steps(epoch, self._result_taker(), lambda error: self._on_loop(lambda: self._broke(epoch, error)))
        self._steps.start()
        if loaded.writer is not None:
            loaded.writer.start(self._tell_written)
        if self._held is not None:
            held, self._held = self._held, None
            await asyncio.to_thread(held.release)

    def blame(self, first_step: int, last_step: int) -> list[str]:
        if self._epoch is None or self._epoch.lead is None or first_step > last_step:
            return []
        return list(self._epoch.lead.core.in_steps(first_step, last_step))

    def retire(self) -> None:
        if self._phase == "waiting":
            self._tell_retired()
        elif self._phase != "retiring":
            assert self._epoch is not None and self._steps is not None, f"told to retire in phase {self._phase}"
            self._phase = "retiring"
            self._spawn(self._retire(self._epoch, self._steps))

    async def _retire(self, epoch: Epoch, steps: Steps) -> None:
        """First the engine, then what runs, then what it ran in; what fails meanwhile is no fault any more."""
        self._epoch = self._leader = None
        if self._leading is not None:
            self._leading.cancel()
            await asyncio.wait([self._leading])
        await asyncio.to_thread(end_epoch, epoch, steps)
        self._steps = self._leading = self._fault = None
        del epoch, steps
        self._tell_retired()

    def _tell_retired(self) -> None:
        gc.collect()  # models and their caches are cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._phase = "waiting"
        self._control.send(retired=control_pb2.RankRetired(memory_bytes=free_memory_bytes(self._device)))
        self._control.leave()

    def _resident(self) -> control_pb2.RankReady | None:
        return None if self._epoch is None else self._epoch.ready

    def _guarded(self, send_plans: SendPlans) -> SendPlans:
        """A rank that takes no more plans ends the epoch; the engine need not know."""

        def send(payloads: Sequence[bytes]) -> None:
            try:
                send_plans(payloads)
            except OSError as error:
                if self._epoch is not None:
                    self._tell_fault(error)

        return send

    # Called from threads.

    def _result_taker(self) -> Callable[[StepResult], None]:
        leader = self._leader

        def take(result: StepResult) -> None:
            if leader is not None:
                self._on_loop(lambda: leader.completed(result) if leader is self._leader else None)

        return take

    def _tell_progress(self) -> Callable[[int, int], None]:
        """A loader's progress callback, thinned to what a progress bar can show."""
        last_s = 0.0

        def tell(loaded_bytes: int, total_bytes: int) -> None:
            nonlocal last_s
            if loaded_bytes == total_bytes or time.monotonic() - last_s >= PROGRESS_INTERVAL_S:
                last_s = time.monotonic()
                progress = control_pb2.LoadProgress(loaded_bytes=loaded_bytes, total_bytes=total_bytes)
                self._on_loop(lambda: self._control.send(progress=progress))

        return tell

    @contextlib.contextmanager
    def _tell_compiling(self) -> Iterator[None]:
        """No heartbeat comes while the interpreter is held, so the coordinator must have heard why before it is."""
        assert self._loop is not None
        self._compiling = True
        told = asyncio.run_coroutine_threadsafe(self._beat_now(), self._loop)
        with contextlib.suppress(TimeoutError):
            told.result(TELL_S)
        try:
            yield
        finally:
            self._compiling = False

    async def _beat_now(self) -> None:
        self._control.send(heartbeat=self.beat())
        await self._control.flush()

    def _tell_captured(self, later: Later) -> None:
        told = control_pb2.GraphsCaptured(count=later.captured, took_s=later.took_s, reason=later.reason)
        self._on_loop(lambda: self._control.send(graphs=told))

    def _tell_written(self, written: Written) -> None:
        """What becomes of its shard concerns nobody who waits for an answer."""
        told = control_pb2.ShardWritten(bytes=written.bytes, took_s=written.took_s, reason=written.reason)
        if written.reason:
            log.warning("no shard was written", rank=self._spec.rank, reason=written.reason)
        self._on_loop(lambda: self._control.send(written=told))

    def _on_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call)

    # On the loop.

    def _broke(self, epoch: Epoch, error: Exception) -> None:
        """An error in the threads that run steps; one with a remedy for who serves is no fault of their requests."""
        if epoch is self._epoch and self._steps is not None:
            self._tell_fault(error, (0, -1) if isinstance(error, ConfigError) else self._steps.running)

    def _tell_broken(self, broken: Broken) -> None:
        """What a step has brought cannot be believed."""
        log.error("fault", phase=self._phase, reason=broken.reason)
        step, requests = broken.step, broken.requests
        self._send_fault(error=broken.reason, first_step=step, last_step=step, requests=requests)

    def _tell_fault(self, error: Exception, steps: tuple[int, int] = (0, -1)) -> None:
        log.error("fault", phase=self._phase, exc_info=error)
        told = f"{type(error).__name__}: {error}"
        if of_peer(error) or (isinstance(error, OSError) and self._phase != "loading"):
            self._send_fault(error=told, of_peer=True)
        elif steps[0] > steps[1]:
            self._send_fault(error=told)
        else:
            self._send_fault(error=told, first_step=steps[0], last_step=steps[1], requests=self.blame(*steps))

    def _send_fault(self, **said: Any) -> None:
        self._fault = control_pb2.RankFault(phase=self._phase, **said)
        self._control.send(fault=self._fault)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that broke is a fault like any other."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._tell_fault(error if isinstance(error, Exception) else RuntimeError(str(error)))
