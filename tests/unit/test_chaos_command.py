"""`echelon chaos` before it strikes: what it refuses, with one line and its exit code, and what its plan may be."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from echelon import convert_cluster
from echelon.cli.app import app
from echelon.types import Cluster
from tests.unit.chaos_trial import cluster
from tests.unit.scripted import ScriptedServer


def chaos(*arguments: str, address: str = "localhost:1") -> Result:
    return CliRunner().invoke(app, ("chaos", *arguments, "--target", address))


def serves(server: ScriptedServer, shown: Cluster) -> None:
    server.on("GetCluster", lambda request, context: convert_cluster.cluster_to_proto(shown))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--faults", "burn"), "faults: 'burn' is none of kill, stop, partition"),
        (("--victims", "client"), "victim must be rank, rank:N, leader"),
        (("--moments", "noon"), "moments: 'noon' is none of prefill, decode"),
        (("--victims", "rank", "--moments", "journal"), "no injection is possible"),
        (("--plan", "no-such-plan.yaml"), "the plan no-such-plan.yaml cannot be read"),
        (("--injections", "0"), "greater than or equal to 1"),
    ],
)
def test_wrong_use_is_exit_2_before_anything_is_asked(arguments: tuple[str, ...], told: str) -> None:
    result = chaos(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- {fault: kill, victim: rank:1, when: load}", "load is a moment of a recovery"),
        ("- fault: [", "is not YAML"),
        ("kill everything", "must be a list"),
    ],
)
def test_a_bad_plan_is_wrong_use(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    result = chaos("--plan", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr


def test_nothing_that_listens_is_an_error() -> None:
    result = chaos()
    assert result.exit_code == 1
    assert result.stderr.startswith("echelon: error: cannot reach localhost:1")


def test_a_cluster_of_another_machine_is_refused() -> None:
    """Its coordinator's number is that of a process here, which has another port."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        with ScriptedServer() as server:
            serves(server, replace(cluster(), coordinator_pid=process.pid))
            result = chaos(address=server.address)
        assert result.exit_code == 2
        assert f"a coordinator with pid {process.pid}, and no such process listens there" in result.stderr
        assert process.poll() is None, "nobody was struck"
    finally:
        process.kill()
        process.wait()
