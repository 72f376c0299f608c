"""cluster.yaml is what Ray's launcher accepts, and speaks of flags that `echelon serve` has."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from echelon.config import ServeConfig, flag_of, resolve_config
from tests.architecture.source import ROOT


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def ray_schema() -> dict[str, Any]:
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    content = json.loads((Path(ray.origin).parent / "autoscaler/ray-schema.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def commands(cluster: dict[str, Any], program: str) -> list[str]:
    keys = ("head_start_ray_commands", "worker_start_ray_commands")
    return [command for key in keys for command in cluster[key] if f"/{program} " in command]


def test_ray_accepts_it(cluster: dict[str, Any], ray_schema: dict[str, Any]) -> None:
    jsonschema.validate(cluster, ray_schema)


def test_the_schema_refuses_what_ray_does_not_know(cluster: dict[str, Any], ray_schema: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "head_commands": []}, ray_schema)


def test_the_local_provider_accepts_it(cluster: dict[str, Any]) -> None:
    """It refuses node types, and wants both kinds of address."""
    assert cluster["provider"].keys() == {"type", "head_ip", "worker_ips"}
    assert not cluster.keys() & {"head_node", "worker_nodes", "available_node_types", "head_node_type"}


def test_every_start_sets_the_authentication_mode(cluster: dict[str, Any]) -> None:
    starts = commands(cluster, "ray start") + commands(cluster, "echelon serve")
    assert len(starts) == 3
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert all("RAY_worker_niceness=0" in command for command in commands(cluster, "ray start"))


def test_serve_is_started_with_flags_it_has(cluster: dict[str, Any]) -> None:
    (command,) = commands(cluster, "echelon serve")
    flags = dict(re.findall(r"--([a-z-]+) (\S+)", command))
    fields = {flag_of(field): field for field in ServeConfig.model_fields}
    assert flags.keys() <= fields.keys()
    config = resolve_config({fields[flag]: value for flag, value in flags.items()})
    assert config.ray_address == f"{cluster['provider']['head_ip']}:6379", "ranks on other machines dial that host"
