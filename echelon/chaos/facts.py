"""What a run was made on, for the head of its report: date, machine, versions, commit, and what was served.

Reads this machine, on which the cluster runs too. Whatever cannot be told is left out.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import echelon
from echelon.types import Cluster

PACKAGES = ("torch", "ray", "grpcio")
GIT_TIMEOUT_S = 5.0


def facts_of(cluster: Cluster) -> Mapping[str, str]:
    """Name and fact, in the order to be shown."""
    versions = [
        f"Echelon {cluster.version}",
        f"Python {platform.python_version()}",
        *filter(None, map(_version, PACKAGES)),
    ]
    facts = {
        "date": datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": _hardware(),
        "versions": ", ".join(versions),
        "commit": _commit(),
        "model": ", ".join(f"{model.architecture} in {model.dtype}" for model in cluster.models),
        "layout": layout_of(cluster),
    }
    return {name: fact for name, fact in facts.items() if fact}


def layout_of(cluster: Cluster) -> str:
    """Degrees above 1, and how many ranks that makes."""
    ranks = cluster.ranks
    names = ("replica", "pipeline", "data", "tensor", "expert")
    degrees = {name: 1 + max((getattr(rank, name) for rank in ranks), default=0) for name in names}
    told = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    devices = " and ".join(sorted({rank.device.partition(":")[0] for rank in ranks}))
    return f"{' x '.join(told) or 'one rank'}, {len(ranks)} processes on {devices}"


def _hardware() -> str:
    cores = len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{_cpu()}, {cores} cores, {memory_bytes / 2**30:.0f} GiB"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the source that this was imported from; empty for an installed package."""
    root = Path(echelon.__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
