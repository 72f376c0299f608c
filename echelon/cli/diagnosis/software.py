"""The doctor's checks of what is installed: Python, packages, where they are imported from, PyTorch, CUDA, NCCL, Ray.

Pure functions of the facts. A machine without the server's packages is a client, and as such in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from echelon.cli.diagnosis.facts import Facts, Required
from echelon.cli.diagnosis.finding import Finding, fail, ok, size, warn

OLDEST_PYTHON = (3, 11)
TO_SERVE = "to serve, pip install 'echelon[server]'"


def check_python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python < OLDEST_PYTHON:
        return fail("python", f"Python {version} is too old", "use Python 3.11 or later")
    if not facts.platform.startswith("linux"):
        return warn("python", f"Python {version} on {facts.platform}: clients run here, servers need Linux")
    return ok("python", f"Python {version} at {facts.executable}")


def check_packages(facts: Facts) -> Finding:
    if not facts.required:
        return warn(
            "packages", "Echelon is not installed, only importable", "run pip install '.[server]' in its folder"
        )
    old = [f"{r.name} {facts.installed[r.name]} < {r.minimum}" for r in facts.required if _is_old(facts, r)]
    missing = [r for r in facts.required if r.name not in facts.installed]
    if lacks := [r.name for r in missing if not r.for_serving]:
        return fail("packages", f"missing: {', '.join(lacks)}", "run pip install echelon")
    if old:
        return fail("packages", f"too old: {', '.join(old)}", "run pip install --upgrade 'echelon[server]'")
    if missing:
        names = ", ".join(r.name for r in missing)
        return warn("packages", f"a client only: serving needs {names}", TO_SERVE)
    broken = [f"{name}: {module.error}" for name, module in facts.imported.items() if module.error]
    if broken:
        return fail("packages", f"cannot be imported: {'; '.join(broken)}", "reinstall what is named")
    return ok("packages", f"all {len(facts.required)} are there")


def check_imports(facts: Facts) -> Finding:
    """Whether processes that serve will load what this command is part of, and nothing instead of it."""
    if facts.places is None:
        return warn("imports", "where servers import from cannot be told")
    others = [f"{name} from {place}" for name, place in facts.places.items() if place and place != facts.root]
    absent = [name for name, place in facts.places.items() if not place]
    if others:
        found = f"server processes would import {', '.join(others)}, this command is of {facts.root}"
        return fail("imports", found, "install this Echelon into the environment, or correct PYTHONPATH")
    if absent:
        found = f"server processes would not find {', '.join(absent)}, which lie in {facts.root}"
        return fail("imports", found, f"run pip install -e {facts.root}")
    if facts.shadows:
        remedy = "rename what is yours, or work in another folder"
        return warn("imports", f"hidden behind your own files: {', '.join(facts.shadows)}", remedy)
    return ok("imports", f"all from {facts.root}")


def check_torch(facts: Facts) -> Finding:
    torch = facts.torch
    if torch is None:
        return warn("torch", "PyTorch is not installed: a client needs none", TO_SERVE)
    if not torch.version:
        return fail("torch", f"PyTorch cannot be imported: {torch.why}", "reinstall torch")
    build = f"CUDA {torch.cuda_build}" if torch.cuda_build else "CPU"
    return ok("torch", f"PyTorch {torch.version}, built for {build}")


def check_cuda(facts: Facts) -> Finding:
    torch = facts.torch
    if facts.gpu_nodes == 0:
        return ok("cuda", "no GPU here: --device cpu")
    if torch is None or not torch.version:
        return warn("cuda", f"{facts.gpu_nodes} GPUs, and no PyTorch to use them", "install torch")
    if not torch.cuda_build:
        remedy = "install a CUDA build of torch, or serve with --device cpu"
        return fail("cuda", f"{facts.gpu_nodes} GPUs, but PyTorch {torch.version} is a CPU build", remedy)
    if not torch.cuda_available:
        remedy = f"a driver for CUDA {torch.cuda_build} is needed; nvidia-smi shows which is there"
        return fail("cuda", f"PyTorch cannot use the GPUs: {torch.why or 'no reason given'}", remedy)
    busy = [
        f"{g.name} has {size(g.total_bytes - g.used_bytes)} free"
        for g in facts.gpus
        if 2 * g.used_bytes > g.total_bytes
    ]
    if busy:
        remedy = "nvidia-smi names who uses it; --gpu-memory-fraction is of what is free"
        return warn("cuda", f"GPU memory is taken: {', '.join(busy)}", remedy)
    listed = ", ".join(f"{g.name} ({size(g.total_bytes)})" for g in facts.gpus) or f"{facts.gpu_nodes} GPUs"
    return ok("cuda", f"{listed}{f', driver {facts.gpus[0].driver}' if facts.gpus else ''}")


def check_nccl(facts: Facts) -> Finding:
    if facts.gpu_nodes == 0 or facts.torch is None or not facts.torch.cuda_available:
        return ok("nccl", "not used without GPUs")
    if not facts.torch.nccl:
        level = fail if facts.gpu_nodes > 1 else warn
        return level("nccl", "this PyTorch has no NCCL: ranks on GPUs cannot talk", "install a CUDA build of torch")
    return ok("nccl", f"NCCL {facts.torch.nccl}")


def check_ray(facts: Facts) -> Finding:
    return _server_package(facts, "ray", "Ray")


def check_llguidance(facts: Facts) -> Finding:
    return _server_package(facts, "llguidance", "llguidance (JSON schemas, grammars)")


def _server_package(facts: Facts, module: str, name: str) -> Finding:
    """A package that is used only where a model is served."""
    found = facts.imported.get(module)
    if found is None:
        return warn(module, f"{name} is not installed: a client needs none", TO_SERVE)
    if found.error:
        return fail(module, f"{name} cannot be imported: {found.error}", f"reinstall {module}")
    return ok(module, f"{name} {found.version}")


def _is_old(facts: Facts, required: Required) -> bool:
    installed = facts.installed.get(required.name)
    return installed is not None and _numbers(installed) < _numbers(required.minimum)


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, without what is said of its build."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


SOFTWARE: tuple[Callable[[Facts], Finding], ...] = (
    check_python,
    check_packages,
    check_imports,
    check_torch,
    check_cuda,
    check_nccl,
    check_ray,
    check_llguidance,
)
