"""What is known about a machine and its cluster when the doctor judges: plain values, gathered by `gather.py`.

Everything may be missing: None stands for what this machine does not tell. The checks beside this file get these
facts alone, so each of them can be tried on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from echelon.types import Cluster, ClusterEvent


@dataclass(frozen=True, slots=True)
class Required:
    """A package that Echelon asks for: at least this version, and whether the SDK does well without it."""

    name: str
    minimum: str
    for_serving: bool


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of importing a module in a fresh interpreter: its version, or the error's last line."""

    version: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Torch:
    """PyTorch as it says itself. cuda_build: the CUDA it was built for, "" for a CPU build; why: its CUDA error."""

    version: str = ""
    cuda_build: str = ""
    cuda_available: bool = False
    why: str = ""
    nccl: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as nvidia-smi lists it."""

    name: str
    total_bytes: int
    used_bytes: int
    driver: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the machine, and what a control group allows of it (None: all)."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Folder:
    """A place on a disk. kind: the file system's, as mounts name it."""

    path: str
    total_bytes: int
    free_bytes: int
    writable: bool = True
    kind: str = ""


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """A temporary folder of a cluster whose processes are gone."""

    path: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Clock:
    """The wall clock; newest_unix_s: when the newest file of Echelon was made. synchronized: as the kernel says."""

    unix_s: float
    newest_unix_s: float
    synchronized: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What the address answers. open: something listens; bind_error: why a server could not listen there."""

    address: str
    local: bool
    open: bool = False
    bind_error: str = ""
    cluster: Cluster | None = None
    events: tuple[ClusterEvent, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All of it. places: where the interpreter of a server process finds each of our packages; root: where we are.

    settings_error: why no address could be taken from arguments, environment and profile.
    """

    version: str = ""
    platform: str = ""
    python: tuple[int, int, int] = (0, 0, 0)
    executable: str = ""
    root: str = ""
    places: Mapping[str, str] | None = None
    shadows: tuple[str, ...] = ()
    required: tuple[Required, ...] = ()
    installed: Mapping[str, str] = field(default_factory=dict)
    imported: Mapping[str, Imported] = field(default_factory=dict)
    torch: Torch | None = None
    gpu_nodes: int = 0
    gpus: tuple[Gpu, ...] = ()
    memory: Memory | None = None
    shared_memory: Folder | None = None
    state: Folder | None = None
    temporary: Folder | None = None
    left_behind: tuple[LeftBehind, ...] = ()
    descriptors: tuple[int, int] | None = None
    clock: Clock | None = None
    settings_error: str = ""
    served: Served | None = None
