"""One rank process: attach, form an epoch, then run its plans until killed.

Two threads: the asyncio loop (control line, and on the leader the engine and its link) and the runner, which
takes plans from its socket in order. A rank decides nothing: it is told when to form an epoch, and a fault
inside a step is reported, not repaired. It never outlives its epoch; the node agent ends it.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from echelon.internal.link import PROTOCOL_VERSION, Fence
from echelon.internal.v1 import control_pb2
from models.config import read_model_config
from models.registry import build_model
from parallel import mesh
from worker.control import ControlLink
from worker.engine import EngineCore, EngineLimits
from worker.kv_cache import KVCache
from worker.leader import Leader
from worker.loader import load_weights
from worker.plan import decode
from worker.plan_socket import PlanReceiver, PlanServer
from worker.runner import Runner, RunnerLimits
from worker.spec import RankSpec

PROGRESS_INTERVAL_S = 0.1
FORM_TIMEOUT_S = 60.0

log = structlog.get_logger("rank")


def main(spec: RankSpec) -> None:
    """Run a rank in this thread until the coordinator refuses it or the process is killed."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    torch.set_num_threads(1 if spec.device == "cpu" else 4)
    torch.set_grad_enabled(False)
    asyncio.run(RankProcess(spec).run())


@dataclass(frozen=True, slots=True)
class Serving:
    """What a rank holds once it serves an epoch."""

    fence: Fence
    runner: Runner
    plans: Iterable[bytes]
    ready: control_pb2.RankReady


class RankProcess:
    """The handler of the control line, and the owner of everything the epoch needs."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec
        self._control = ControlLink(spec, self)
        self._device = torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")  # Ray shows us one GPU
        self._phase = "waiting"
        self._step = 0
        self._serving: Serving | None = None
        self._leader: Leader | None = None
        self._store: object | None = None  # kept alive: the rendezvous lives in this process
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Stay attached until refused."""
        self._loop = asyncio.get_running_loop()
        await self._control.run()

    # What the coordinator can make a rank do (worker.control.RankHandler).

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
            ready=self._serving.ready if self._serving else None,
        )

    def beat(self) -> control_pb2.Heartbeat:
        return control_pb2.Heartbeat(phase=self._phase, step=self._step)

    def accepted(self, term: int) -> None:
        log.info("accepted", rank=self._spec.rank, term=term)

    async def open_store(self) -> str:
        self._phase = "store"
        self._store, address = mesh.open_store(private_host(self._spec.coordinator_address))
        return address

    def form(self, epoch: int, command: control_pb2.FormEpoch) -> None:
        self._phase = "loading"
        fence = Fence(self._control.term, self._spec.replica, epoch)
        task = asyncio.get_running_loop().create_task(self._form(fence, command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Forming an epoch.

    async def _form(self, fence: Fence, command: control_pb2.FormEpoch) -> None:
        try:
            self._serving = await asyncio.to_thread(self._build, fence, command)
        except Exception as error:  # noqa: BLE001 - whatever stops a rank from forming is told, never swallowed
            self._tell_fault("loading", error)
            return
        self._phase = "ready"
        self._control.send(ready=self._serving.ready)
        if self._leader is not None:
            task = asyncio.get_running_loop().create_task(self._leader.run())
            self._tasks.add(task)
        threading.Thread(target=self._run_plans, args=(self._serving,), name="runner", daemon=True).start()

    def _build(self, fence: Fence, command: control_pb2.FormEpoch) -> Serving:
        """In a thread: groups, model, weights, cache and plan sockets, in this order on every rank."""
        config = read_model_config(Path(command.model_path))
        context = mesh.form_context(
            store_address=command.store_address,
            prefix=f"replica-{fence.replica}",
            epoch=fence.epoch,
            rank=self._spec.rank,
            tensor=command.tensor,
            device=self._device,
            dtype=getattr(torch, command.dtype),
            timeout_s=FORM_TIMEOUT_S,
        )
        model = build_model(config, context)
        load_weights(model, config, Path(command.model_path), context, self._tell_progress())
        kv_cache = KVCache(config, context, command.kv_blocks, command.block_tokens)
        limits = RunnerLimits(command.max_running, command.max_context, command.block_tokens)
        runner = Runner(model, kv_cache, context, limits)
        plans = self._lead(fence, command) if self._spec.rank == 0 else self._follow(fence, command)
        ready = control_pb2.RankReady(parameter_bytes=model.resident_bytes, kv_bytes=kv_cache.resident_bytes)
        return Serving(fence, runner, plans, ready)

    def _lead(self, fence: Fence, command: control_pb2.FormEpoch) -> Iterable[bytes]:
        """Rank 0: listen for the other ranks, make the engine; its own plans come through a queue."""
        others = frozenset(range(1, command.tensor))
        server = PlanServer(fence, others, host=private_host(self._spec.coordinator_address))
        mesh.publish(command.store_address, plan_key(fence), server.address)
        server.accept(FORM_TIMEOUT_S)
        plans: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def send(payload: bytes) -> None:
            try:
                server.send(payload)
            except OSError as error:
                self._tell_fault("step", error)
            plans.put(payload)

        limits = EngineLimits(
            max_running=command.max_running,
            kv_blocks=command.kv_blocks,
            block_tokens=command.block_tokens,
            max_step_tokens=command.max_step_tokens,
            max_context=command.max_context,
        )
        core = EngineCore(fence, limits)
        self._leader = Leader(core, self._spec.coordinator_address, send, lambda: self._control.term)
        return iter(plans.get, b"")

    def _follow(self, fence: Fence, command: control_pb2.FormEpoch) -> Iterable[bytes]:
        """Every other rank: plans from the leader's socket."""
        address = mesh.lookup(command.store_address, plan_key(fence), FORM_TIMEOUT_S)
        return PlanReceiver(address, self._spec.rank, fence, FORM_TIMEOUT_S)

    def _tell_progress(self) -> Callable[[int, int], None]:
        """A loader's progress callback, thinned to what a progress bar can show."""
        last_s = 0.0

        def tell(loaded_bytes: int, total_bytes: int) -> None:
            nonlocal last_s
            if loaded_bytes < total_bytes and time.monotonic() - last_s < PROGRESS_INTERVAL_S:
                return
            last_s = time.monotonic()
            self._send(progress=control_pb2.LoadProgress(loaded_bytes=loaded_bytes, total_bytes=total_bytes))

        return tell

    # In the runner thread.

    def _run_plans(self, serving: Serving) -> None:
        """Plans in order, until the socket or a step breaks."""
        assert self._loop is not None
        try:
            for payload in serving.plans:
                tables = decode(payload)
                result = serving.runner.run(tables)
                self._step = tables.step
                if self._leader is not None:
                    self._loop.call_soon_threadsafe(self._leader.completed, result)
        except Exception as error:  # noqa: BLE001 - a broken step ends the epoch; the coordinator decides what follows
            self._tell_fault("step", error)

    def _tell_fault(self, phase: str, error: Exception) -> None:
        log.error("fault", phase=phase, step=self._step, exc_info=error)
        self._send(fault=control_pb2.RankFault(phase=phase, error=f"{type(error).__name__}: {error}"))

    def _send(self, **body: object) -> None:
        """Queue a message on the control line, from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: self._control.send(**body))


def plan_key(fence: Fence) -> str:
    """Where in the epoch's store the leader says which address its plans come from."""
    return f"replica-{fence.replica}/epoch-{fence.epoch}/plans"


def private_host(coordinator_address: str) -> str:
    """The address of this host on the interface that faces the coordinator."""
    host, _, port = coordinator_address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # a datagram socket sends nothing on connect
        return str(probe.getsockname()[0])


def free_memory_bytes(device: torch.device) -> int:
    """What weights and cache may take: free device memory, or available host memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")
