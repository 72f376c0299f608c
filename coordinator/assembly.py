"""How the parts of a coordinator are made from its configuration: service, rank processes, and what ranks are told.

In the coordinator process, by `coordinator/process.py` and `reconfiguration.py`. Nothing here runs or decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.answer_text import AnswerText, Stops
from coordinator.clock import ClockOrigin, SteadyClock
from coordinator.cluster import Cluster
from coordinator.detokenizer import Detokenizer
from coordinator.epoch_settings import epoch_settings
from coordinator.events import EventLog
from coordinator.fences import Fences
from coordinator.grammars import Grammars
from coordinator.id_tokenizer import IdTokenizer
from coordinator.journal.file import JournalFile
from coordinator.journal.memory import NoJournal
from coordinator.metrics import Metrics
from coordinator.model_facts import ModelFacts
from coordinator.placement import ReplicaPlan, plan_replica
from coordinator.requests.config import CANARY_IDLE_S, CoreConfig
from coordinator.requests.core import CoordinatorCore
from coordinator.service import Parts, Service
from coordinator.settle import Served
from coordinator.spares import Spares
from coordinator.tokenizer import Tokenizer
from echelon.config import CoordinatorConfig
from echelon.errors import ConfigError
from echelon.internal.v1 import control_pb2
from models.config import ModelConfig, read_model_config, with_prediction
from worker.checkpoint.manifest import ShardAddress
from worker.spec import RankSpec


class RankLauncher:
    """RankProcesses over Ray: what every rank of this coordinator is told, filled in."""

    def __init__(self, cluster: Cluster, spares: Spares, config: CoordinatorConfig, fences: Fences) -> None:
        self._cluster = cluster
        self._spares = spares
        self._config = config
        self._fences = fences

    async def launch(
        self, replica: int, rank: int, incarnation: str, no_room: Callable[[str], None] | None = None
    ) -> None:
        spec = RankSpec(
            coordinator_address=self._config.internal_address,
            cluster=self._fences.cluster,
            replica=replica,
            rank=rank,
            incarnation=incarnation,
            device=self._config.device,
            heartbeat_s=self._config.heartbeat_s,
            term=self._fences.term,
        )
        await self._cluster.connect()
        if await self._spares.start_rank(spec):
            return
        slot = await self._cluster.place(spec, no_room)
        if not await self._spares.start_rank(spec):  # one that waits on the spare device that the rank has moved to
            await self._cluster.launch(spec, slot)

    async def replace(self, replica: int, rank: int) -> bool:
        return await self._cluster.reserve.replace(replica, rank)

    async def kill(self, replica: int, suspect: int | None) -> None:
        await self._cluster.connect()  # nothing would be asked of anybody before
        await self._cluster.kill(replica, suspect)


@dataclass(frozen=True, slots=True)
class Layout:
    """A configuration and all that follows from it. settings: what ranks are told, settings.layout its digest."""

    config: CoordinatorConfig
    model: ModelConfig
    plan: ReplicaPlan
    settings: control_pb2.FormEpoch
    served: Served

    def shard_for_device(self, rank: int) -> str:
        """The folder of a rank's shard on its node; empty where there is none, or no device to fetch from it.

        rank: may be one that only a larger layout had.
        """
        config, degrees = self.config, self.plan.degrees
        if config.checkpoint_dir is None or config.device != "cuda" or rank >= degrees.replica_ranks:
            return ""
        place = degrees.place(rank)
        return str(ShardAddress(config.checkpoint_dir, config.model_digest, place, config.dtype).folder)


def read_layout(config: CoordinatorConfig) -> Layout:
    """Reads the model's files, the weights excepted. Raises ConfigError."""
    model = read_model_config(config.model, keep_float8=config.keeps_float8)
    if config.speculation == "mtp":
        model = with_prediction(model)
    plan = plan_replica(config, model)
    facts = ModelFacts.of(config.served_model_name, config.max_context, model)
    served = Served(facts, _tokenizer(config, model), Grammars(config.model, facts))
    return Layout(config, model, plan, epoch_settings(config, plan), served)


def _tokenizer(config: CoordinatorConfig, model: ModelConfig) -> Tokenizer:
    """Where no file of weights is asked for, none of a tokenizer is."""
    if config.load_format == "random" and not (config.model / "tokenizer.json").exists():
        return IdTokenizer(config.model, model.vocab_size)
    return Tokenizer.from_directory(config.model)


def build_service(layout: Layout, fences: Fences) -> Service:
    """The service over the state directory's journal."""
    config, clock = layout.config, SteadyClock()
    journal = _open_journal(config, fences, clock.origin)

    def new_text(stops: Stops) -> AnswerText:
        return AnswerText(Detokenizer(service.served.tokenizer.decode), stops)

    limits = config.resume_window_s, config.max_queue_tokens
    core_config = CoreConfig(fences.term, *limits, config.replicas, canary_idle_s=CANARY_IDLE_S)
    parts = Parts(
        core=CoordinatorCore(core_config, new_text, journal.state),
        journal=journal,
        events=EventLog(fences.term),
        metrics=Metrics.create(),
        served=layout.served,
        clock=clock,
    )
    service = Service(parts)
    return service


def _open_journal(config: CoordinatorConfig, fences: Fences, origin: ClockOrigin) -> JournalFile | NoJournal:
    if config.journal == "off":
        return NoJournal()
    folder = config.state_dir / "journal"
    try:
        return JournalFile(folder, fences.term, fsync=config.journal == "fsync", origin=origin, check_term=fences.check)
    except OSError as error:
        raise ConfigError(f"the journal in {folder} cannot be used: {error}", field="state_dir") from None
