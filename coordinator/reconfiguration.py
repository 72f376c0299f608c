"""Another configuration while the coordinator serves: another layout, other limits, another model.

On the coordinator's loop. It checks what can be checked, has the service and every replica change over in one go, and
goes back to what served before when the new layout cannot be started. What replicas do about it they decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from coordinator.assembly import Layout, read_layout
from coordinator.jobs.service import MAX_PAGE, JobService
from coordinator.replica.events import Relayout
from coordinator.replica.service import ReplicaService
from coordinator.service import Service
from echelon.config import CoordinatorConfig, flag_of
from echelon.errors import ConfigError, EchelonError

MODEL = ("model", "model_digest", "served_model_name")
LIMITS = ("max_context", "max_running", "kv_cache_tokens")  # that an open request was admitted under

log = structlog.get_logger("coordinator")


class Reconfiguration:
    """What is served now, and the change of it that is under way, if one is. tell: to the supervisor."""

    def __init__(
        self,
        layout: Layout,
        service: Service,
        replicas: Mapping[int, ReplicaService],
        tell: Callable[..., None],
    ) -> None:
        self.layout = layout
        self._service = service
        self._replicas = replicas
        self._tell = tell
        self._earlier: Layout | None = None

    async def change(self, config: CoordinatorConfig, jobs: JobService | None) -> None:
        """Begin to serve it; or tell why not, with nothing changed."""
        try:
            if self._earlier is not None or jobs is None:
                raise ConfigError("the cluster is still starting or changing; try again when it is ready")
            layout = await asyncio.to_thread(read_layout, config)
            check_change(self.layout.config, config, self._open_requests(), unfinished_jobs(jobs))
        except EchelonError as error:
            self._tell(not_reconfigured=error.message)
            return
        self._tell(reconfiguring=True)
        self._earlier = self.layout
        self._change_over(layout)

    def serving(self) -> None:
        """A replica has begun to serve; with the last of them the change is done."""
        if self._earlier is not None and all(replica.serving for replica in self._replicas.values()):
            self._earlier = None
            self._tell(reconfigured=True)

    def take_back(self, error: Exception) -> bool:
        """Go back to the earlier layout because a replica cannot serve this one. False: that is not the reason."""
        if self._earlier is None or not isinstance(error, EchelonError):
            return False
        log.warning("the earlier configuration is taken up again", error=error.message)
        earlier, self._earlier = self._earlier, None
        self._change_over(earlier)
        self._tell(not_reconfigured=error.message)
        return True

    def _open_requests(self) -> int:
        counts = self._service.core.counts
        return counts.queued + counts.running + counts.parked

    def _change_over(self, layout: Layout) -> None:
        """Requests first: what is told of a model that goes must not be asked of the one that comes."""
        other = serves_other_model(self.layout.config, layout.config)
        self.layout = layout
        self._service.serve(layout.served, other)
        for replica in self._replicas.values():
            replica.post(Relayout(layout.plan, layout.settings.layout))


def serves_other_model(serving: CoordinatorConfig, wanted: CoordinatorConfig) -> bool:
    """Whether a request for the one cannot be continued by the other."""
    return any(getattr(serving, name) != getattr(wanted, name) for name in MODEL)


def check_change(serving: CoordinatorConfig, wanted: CoordinatorConfig, requests: int, jobs: int) -> None:
    """Raises ConfigError for a change that open requests and jobs would not survive."""
    if not requests and not jobs:
        return
    lowered = [name for name in LIMITS if _limit(wanted, name) < _limit(serving, name)]
    if serves_other_model(serving, wanted):
        field, what = "model", f"another model than {serving.served_model_name} cannot be served"
    elif lowered:
        field, what = lowered[0], f"{flag_of(lowered[0])} cannot be lowered"
    else:
        return
    still = f"while {requests} requests and {jobs} jobs are open"
    raise ConfigError(f"{what} {still}; let them end, or cancel them, and try again", field=field)


def _limit(config: CoordinatorConfig, name: str) -> float:
    value = getattr(config, name)
    return float("inf") if value is None else float(value)


def unfinished_jobs(jobs: JobService) -> int:
    """Jobs whose items would go on under the other model."""
    count, token = 0, ""
    while True:
        page, token = jobs.list_jobs(MAX_PAGE, token)
        count += sum(not status.state.ended for status in page)
        if not token:
            return count
