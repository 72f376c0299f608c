"""Gathers the doctor's facts: /proc, disks, limits, packages, and what an address answers.

Runs in the user's terminal. Whatever cannot be read is left out, so that a strange machine is judged by the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import echelon
from echelon.aio import AsyncClient
from echelon.cli.diagnosis.facts import Clock, Facts, Folder, Gpu, LeftBehind, Memory, Required, Served
from echelon.cli.diagnosis.probes import IMPORTED, OURS, Probed
from echelon.errors import EchelonError
from echelon.types import ClusterEvent

ROOT = Path(echelon.__file__).parents[1]
SHADOWED = (
    *OURS[1:],
    *IMPORTED,
    "torch",
    "numpy",
    "grpc",
    "google",
    "yaml",
    "typer",
    "rich",
    "queue",
    "types",
    "logging",
)
CONNECT_TIMEOUT_S = 2.0
TOOL_TIMEOUT_S = 10.0
SHOWN_EVENTS = 50
IN_USE_S = 300.0  # a cluster that is being started has a folder, and nothing in it yet
TIME_ERROR = 5  # adjtimex: the clock is not synchronized
_REQUIREMENT = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)(?:\s*;\s*extra == [\"'](\w+)[\"'])?")


def gather(
    probed: Probed, environment: Mapping[str, str], state_dir: Path | None, served: Served | None, settings_error: str
) -> Facts:
    """The facts of this machine, with what was found out before."""
    required = tuple(_required())
    temporary = Path(tempfile.gettempdir())
    return Facts(
        version=own_version(),
        platform=sys.platform,
        python=sys.version_info[:3],
        executable=sys.executable,
        root=str(ROOT),
        places=probed.places,
        shadows=tuple(_shadows(environment)),
        required=required,
        installed=dict(_installed(required)),
        imported=probed.imported,
        torch=probed.torch,
        gpu_nodes=sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in Path("/dev").glob("nvidia*")),
        gpus=tuple(_gpus()),
        memory=_memory(),
        shared_memory=_folder(Path("/dev/shm")),
        state=_folder(state_dir or Path(environment.get("ECHELON_STATE_DIR") or temporary)),
        temporary=_folder(temporary),
        left_behind=tuple(_left_behind({temporary, Path("/tmp")})),
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE),
        clock=_clock(),
        settings_error=settings_error,
        served=served,
    )


def own_version() -> str:
    try:
        return importlib.metadata.version("echelon")
    except importlib.metadata.PackageNotFoundError:
        return ""


async def look_at(client: AsyncClient) -> Served:
    """What the client's address answers: the cluster and its last events, or what is in the way."""
    host, _, port = client.address.rpartition(":")
    is_socket = host == "unix"
    local = is_socket or not _bind_error(host, 0)
    is_open = not is_socket and _listens(host, int(port))
    async with client:
        try:
            cluster = await client.cluster()
            events = [event async for event in client.events(follow=False)]
        except EchelonError as error:
            bind_error = _bind_error(host, int(port)) if local and not is_open and not is_socket else ""
            return Served(address=client.address, local=local, open=is_open, bind_error=bind_error, error=error.message)
    last: tuple[ClusterEvent, ...] = tuple(events[-SHOWN_EVENTS:])
    return Served(address=client.address, local=local, open=True, cluster=cluster, events=last)


def _required() -> Iterator[Required]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("echelon") or ():
            found = _REQUIREMENT.fullmatch(line)
            if found and found[3] in (None, "cli", "server"):
                yield Required(found[1], found[2], for_serving=found[3] == "server")


def _installed(required: tuple[Required, ...]) -> Iterator[tuple[str, str]]:
    for package in required:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package.name, importlib.metadata.version(package.name)


def _shadows(environment: Mapping[str, str]) -> Iterator[str]:
    """Files on the import path, other than ours, that hide a package or a module of Python's."""
    here = [Path.cwd()] if sys.path[:1] in ([""], [str(Path.cwd())]) else []
    for folder in [*here, *map(Path, filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))]:
        if folder.resolve() == ROOT:
            continue
        for name in SHADOWED:
            for place in (folder / f"{name}.py", folder / name / "__init__.py"):
                if place.is_file():
                    yield str(place)


def _gpus() -> Iterator[Gpu]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for line in told.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[1].isdecimal() and fields[2].isdecimal():
            yield Gpu(fields[0], int(fields[1]) * 2**20, int(fields[2]) * 2**20, fields[3])


def _memory() -> Memory | None:
    told = dict(re.findall(r"(\w+): +(\d+) kB", _text("/proc/meminfo")))
    if "MemTotal" not in told or "MemAvailable" not in told:
        return None
    return Memory(int(told["MemTotal"]) * 1024, int(told["MemAvailable"]) * 1024, _group_limit())


def _group_limit() -> int | None:
    """Bytes that the control group (version 2) still allows; files that it caches can go."""
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if not limit.isdecimal() or not used.isdecimal():
        return None
    cached = re.search(r"^inactive_file (\d+)", _text("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
    return max(int(limit) - int(used) + (int(cached[1]) if cached else 0), 0)


def _folder(path: Path) -> Folder | None:
    """A folder, or the nearest one above it that is there already."""
    there = next((place for place in (path, *path.absolute().parents) if place.is_dir()), None)
    if there is None:
        return None
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return None
    return Folder(str(path), usage.total, usage.free, os.access(there, os.W_OK | os.X_OK), _kind_of(there.resolve()))


def _kind_of(path: Path) -> str:
    mounts = [line.split()[1:3] for line in _text("/proc/mounts").splitlines() if len(line.split()) > 2]
    above = [(len(place), kind) for place, kind in mounts if path.is_relative_to(place)]
    return max(above)[1] if above else ""


def _left_behind(folders: set[Path]) -> Iterator[LeftBehind]:
    """Our own users' folders of clusters that no process has anything to do with."""
    now_s = time.time()
    found: dict[str, float] = {}
    for folder in folders:
        for path in folder.glob("echelon-*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.is_dir() and status.st_uid == os.geteuid() and now_s - status.st_mtime > IN_USE_S:
                    found[str(path)] = now_s - status.st_mtime
    if not found:
        return
    in_use = "\0".join(_in_use())
    for name, age_s in sorted(found.items()):
        if name not in in_use:
            yield LeftBehind(name, age_s)


def _in_use() -> Iterator[str]:
    """Command lines, working folders and open files of every process that we may look at."""
    for process in Path("/proc").glob("[0-9]*"):
        yield _text(process / "cmdline")
        for link in (process / "cwd", *_entries(process / "fd")):
            with contextlib.suppress(OSError):
                yield str(link.readlink())


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _clock() -> Clock:
    newest_s = max(file.stat().st_mtime for file in (ROOT / "echelon").glob("*.py"))
    return Clock(time.time(), newest_s, _is_synchronized() if platform.system() == "Linux" else None)


def _is_synchronized() -> bool | None:
    """As adjtimex(2) says, asked to change nothing; None where it may not be asked."""
    request = ctypes.create_string_buffer(512)  # a struct timex and room to spare; all zero is a question
    try:
        state = ctypes.CDLL(None).adjtimex(request)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != TIME_ERROR


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _bind_error(host: str, port: int) -> str:
    """Why a server could not listen there; empty if it could."""
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind((host.strip("[]"), port))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
