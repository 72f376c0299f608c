"""What users import: the names of `echelon`, and how little comes with them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import echelon

NAMES = {
    "AsyncClient",
    "CancelledError",
    "ChatMessage",
    "Choice",
    "Client",
    "Completion",
    "ConfigError",
    "ConflictError",
    "DeadlineError",
    "EchelonError",
    "FinishReason",
    "InternalError",
    "InvalidRequestError",
    "NotFoundError",
    "OverloadedError",
    "ParsedCompletion",
    "QuarantinedError",
    "ResponseInvalidError",
    "RetryPolicy",
    "SamplingParams",
    "StreamEvent",
    "StreamTakenOverError",
    "ToolCall",
    "UnavailableError",
}
HEAVY = ("torch", "ray", "transformers", "tokenizers", "numpy", "pydantic", "rich", "typer", "yaml", "sqlalchemy")


def modules_after(statement: str) -> set[str]:
    """Top-level names of all modules loaded by a fresh interpreter that runs the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_exported_names_are_these() -> None:
    assert set(echelon.__all__) == NAMES
    assert all(hasattr(echelon, name) for name in NAMES)


@pytest.mark.parametrize("statement", ["from echelon import Client, AsyncClient, SamplingParams"])
def test_the_sdk_loads_nothing_heavy(statement: str) -> None:
    loaded = modules_after(statement)
    assert "grpc" in loaded
    assert not loaded & {*HEAVY, "coordinator", "worker", "models", "parallel"}


def test_the_package_loads_nothing_until_a_name_is_asked_for() -> None:
    code = "import sys, echelon\nprint(*(name for name in sys.modules if name.startswith('echelon.')))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
    assert set(dir(echelon)) == NAMES


def test_the_coordinator_loads_no_torch() -> None:
    loaded = modules_after("import coordinator.__main__")
    assert "coordinator" in loaded
    assert not loaded & {"torch", "safetensors"}


def test_the_command_and_its_planner_need_no_package_of_the_server() -> None:
    loaded = modules_after("import echelon.cli.app, echelon.cli.plan.command")
    assert {"coordinator", "typer"} <= loaded
    assert not loaded & ({*HEAVY, "safetensors", "structlog"} - {"rich", "typer"})


def test_heavy_modules_would_be_seen() -> None:
    assert "numpy" in modules_after("import numpy")
