"""What fresh interpreters say of the installed packages: each is imported in a process of its own, all at once.

So the doctor itself needs none of them, and one that crashes or hangs costs no more than its finding. The processes
run as a server's do: in an empty folder, which is not on the import path.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from echelon.cli.diagnosis.facts import Imported, Torch

TIMEOUT_S = 120.0  # a first import of PyTorch from a cold network disk
OURS = ("echelon", "coordinator", "worker", "parallel", "models")
IMPORTED = ("ray", "llguidance", "transformers", "tokenizers", "safetensors", "pydantic")

_VERSION = "import json, {0}; print(json.dumps({{'version': str(getattr({0}, '__version__', ''))}}))"
_PLACES = f"""
import importlib.util, json, os
places = {{}}
for name in {OURS!r}:
    spec = importlib.util.find_spec(name)
    file = spec and (spec.origin or next(iter(spec.submodule_search_locations or []), None))
    places[name] = os.path.dirname(os.path.dirname(file) if spec.origin else file) if file else ""
print(json.dumps(places))
"""
_TORCH = """
import json, torch
facts = {"version": torch.__version__, "cuda_build": torch.version.cuda or "", "why": "", "nccl": ""}
facts["cuda_available"] = torch.cuda.is_available()
if torch.version.cuda and not facts["cuda_available"]:
    try:
        torch.cuda.init()
    except Exception as error:
        facts["why"] = str(error).strip().splitlines()[0]
if torch.distributed.is_available() and torch.distributed.is_nccl_available():
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(facts))
"""


@dataclass(frozen=True, slots=True)
class Said:
    """What a process printed as JSON, or why it did not."""

    value: Mapping[str, object] | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Probed:
    """What all of them said; torch is None where it is not installed."""

    places: Mapping[str, str] | None
    torch: Torch | None
    imported: Mapping[str, Imported]


def probe(python: str = sys.executable) -> Probed:
    """Ask a Python for all of it. Takes as long as importing PyTorch does."""
    code = {"places": _PLACES, "torch": _TORCH} | {name: _VERSION.format(name) for name in IMPORTED}
    with _started(python, code) as processes:
        said = {name: _said(process) for name, process in processes.items()}
    places, torch = said.pop("places").value, said.pop("torch")
    return Probed(
        places={name: str(place) for name, place in places.items()} if places else None,
        torch=None if _is_missing("torch", torch) else _torch(torch),
        imported={
            name: Imported(str(one.value["version"])) if one.value else Imported(error=one.error)
            for name, one in said.items()
            if not _is_missing(name, one)
        },
    )


@contextlib.contextmanager
def _started(python: str, code: Mapping[str, str]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    with tempfile.TemporaryDirectory(prefix="echelon-doctor-") as empty, contextlib.ExitStack() as stack:
        processes: dict[str, subprocess.Popen[str]] = {}
        for name, text in code.items():
            process = subprocess.Popen(
                [python, "-P", "-c", text], cwd=empty, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes[name] = process
        yield processes


def _said(process: subprocess.Popen[str]) -> Said:
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Said(error=f"no answer within {TIMEOUT_S:g} s")
    try:
        return Said(json.loads(stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        last = stderr.strip().splitlines()[-1:] or [_end_of(process.returncode)]
        return Said(error=last[0])


def _end_of(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, and said nothing"


def _is_missing(name: str, said: Said) -> bool:
    return said.error == f"ModuleNotFoundError: No module named '{name}'"


def _torch(said: Said) -> Torch:
    if said.value is None:
        return Torch(why=said.error)
    told = {name: str(said.value[name]) for name in ("version", "cuda_build", "why", "nccl")}
    return Torch(**told, cuda_available=bool(said.value["cuda_available"]))
