"""Configuration: precedence of its sources, and one clear error for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from echelon.config import CoordinatorConfig, ServeConfig, join_address, resolve_config, split_address
from echelon.errors import ConfigError


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default() -> None:
    text = "model: /file\ntensor: 2\nmax-running: 3\njournal: fsync\n"
    environment = {"ECHELON_TENSOR": "4", "ECHELON_MAX_RUNNING": "5", "ECHELON_JOURNAL": "", "HOME": "/"}
    config = resolve_config({"tensor": "8", "address": None}, environment, text)
    assert config == ServeConfig(model=Path("/file"), tensor=8, max_running=5, journal="fsync")
    assert config.address == "127.0.0.1:50051"


def test_the_environment_is_read_only_when_given() -> None:
    assert resolve_config({"model": "m"}).tensor == 1


@pytest.mark.parametrize(
    ("flags", "text", "expected"),
    [
        ({}, "", "no model given"),
        ({"model": "m", "tensor": "0"}, "", "--tensor: .*greater than or equal to 1.*'0'"),
        ({"model": "m", "tensor": "two"}, "", "--tensor: .*'two'"),
        ({"model": "m", "pipeline_depth": "2"}, "", "pipeline-depth=2 with pipeline=1: one stage has one micro-batch"),
        ({"model": "m", "speculation": "eagle"}, "", "--speculation: .*'off', 'ngram' or 'mtp'.*'eagle'"),
        ({"model": "m", "speculation_tokens": "0"}, "", "--speculation-tokens: .*greater than or equal to 1.*'0'"),
        ({"model": "m", "speculation_tokens": "33"}, "", "--speculation-tokens: .*less than or equal to 32.*'33'"),
        ({"model": "m", "heartbeat_s": "nan"}, "", "--heartbeat-s: "),
        ({"model": "m", "lease_s": "inf"}, "", "--lease-s: "),
        ({"model": "m", "dtype": "int8"}, "", "--dtype: .*float64"),
        ({"model": "m", "device": "cuda", "dtype": "float64"}, "", "float64 is for device=cpu only"),
        ({"model": "m", "address": "localhost"}, "", "--address: must be host:port"),
        ({"model": "m", "metrics_address": "h:99999"}, "", "--metrics-address: must be host:port"),
        ({"model": "m", "heartbeat_s": "5", "lease_s": "6"}, "", "heartbeat-s=5 must be at most a third of lease-s=6"),
        ({"model": "m"}, "tensr: 2", "unknown key 'tensr'; did you mean 'tensor'"),
        ({"model": "m"}, "- a", "must hold keys and values"),
        (
            {"model": "m"},
            "a: 1\nb: [",
            "not YAML at line 2, column 5: expected the node content",
        ),
    ],
)
def test_a_mistake_gets_one_error_that_names_it(flags: dict[str, str | None], text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_config(flags, {}, text)


def test_the_coordinators_configuration_travels_as_one_json_line() -> None:
    config = CoordinatorConfig(
        model=Path("/m"), served_model_name="m", device="cpu", dtype="float32", max_context=64, state_dir=Path("/s"),
        ray_address="127.0.0.1:6379", internal_address="127.0.0.1:1234",
    )  # fmt: skip
    line = config.model_dump_json()
    assert "\n" not in line
    assert CoordinatorConfig.model_validate_json(line) == config


def test_addresses_split_at_the_last_colon() -> None:
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("localhost:0") == ("localhost", 0)
    assert all(join_address(*split_address(address)) == address for address in ("[::1]:80", "h:1"))
