"""What a row of figures is of: versions of what it ran on, and the commit.

In the user's terminal. Asks the installed packages for their versions, and imports none of them.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("echelon", "torch", "triton", "ray", "grpcio", "nvidia-nccl-cu13", "nvidia-nccl-cu12")


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """Of the code that runs, if git knows."""
    folder = Path(__file__).resolve().parent
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return told.stdout.strip() or "unknown"


def today() -> str:
    """As 2026-11-23."""
    return time.strftime("%Y-%m-%d")
