"""Where a client's settings come from: the order of the sources, and one clear error for each mistake."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from echelon import AsyncClient, Client
from echelon.errors import ConfigError
from echelon.profiles import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Given, Settings, config_path, resolve_settings
from echelon.retry import RetryPolicy

FILE = """
[prod]
address = "prod:1"
timeout_s = 5
max_retries = 1

[slow]
timeout_s = 9.5
"""
HOME = {"HOME": "/home-of-nobody"}


def reads(text: str) -> Callable[[Path], str]:
    return lambda path: text


def unread(path: Path) -> str:
    raise AssertionError(f"{path} is read, though no profile is named")


def test_nothing_said_is_the_defaults_and_reads_no_file() -> None:
    assert resolve_settings(Given(), HOME, unread) == Settings(DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, RetryPolicy())


SOURCES = ("argument", "environment", "profile")
VALUES: dict[str, dict[str, object]] = {
    "argument": {"address": "argument:1", "timeout_s": 1.0, "max_retries": 11},
    "environment": {"address": "environment:1", "timeout_s": 2.0, "max_retries": 12},
    "profile": {"address": "prod:1", "timeout_s": 5.0, "max_retries": 1},
}
DEFAULTS: dict[str, object] = {"address": DEFAULT_ADDRESS, "timeout_s": DEFAULT_TIMEOUT_S, "max_retries": None}


@pytest.mark.parametrize("present", [set(p) for n in range(4) for p in itertools.combinations(SOURCES, n)], ids=str)
@pytest.mark.parametrize("key", DEFAULTS)
def test_each_key_is_taken_from_the_first_source_that_has_it(key: str, present: set[str]) -> None:
    environment = dict(HOME)
    if "profile" in present:
        environment["ECHELON_PROFILE"] = "prod"
    if "environment" in present:
        environment[f"ECHELON_{key.upper()}"] = str(VALUES["environment"][key])
    given = Given(**{key: VALUES["argument"][key]}) if "argument" in present else Given()  # type: ignore[arg-type]
    settings = resolve_settings(given, environment, reads(FILE) if "profile" in present else unread)
    found = {"address": settings.address, "timeout_s": settings.timeout_s, "max_retries": settings.retry.max_retries}
    first = next((source for source in SOURCES if source in present), None)
    assert found[key] == (VALUES[first] if first else DEFAULTS)[key]


def test_a_profile_that_was_named_beats_the_environment_and_one_of_the_environment_does_not() -> None:
    environment = HOME | {"ECHELON_ADDRESS": "environment:1"}
    assert resolve_settings(Given(profile="prod"), environment, reads(FILE)).address == "prod:1"
    environment |= {"ECHELON_PROFILE": "prod"}
    assert resolve_settings(Given(), environment, reads(FILE)).address == "environment:1"


def test_a_named_profile_beats_that_of_the_environment() -> None:
    environment = HOME | {"ECHELON_PROFILE": "missing"}
    assert resolve_settings(Given(profile="slow"), environment, reads(FILE)).timeout_s == 9.5


def test_a_retry_policy_is_an_argument_whole() -> None:
    environment = HOME | {"ECHELON_MAX_RETRIES": "3"}
    unlimited = RetryPolicy(initial_s=0.5)
    assert resolve_settings(Given(retry=unlimited), environment, unread).retry == unlimited
    limited = resolve_settings(Given(retry=unlimited, max_retries=0), environment, unread).retry
    assert limited == RetryPolicy(initial_s=0.5, max_retries=0)


def test_empty_variables_are_not_there() -> None:
    environment = HOME | {"ECHELON_ADDRESS": "", "ECHELON_PROFILE": "", "ECHELON_TIMEOUT_S": ""}
    assert resolve_settings(Given(), environment, unread).address == DEFAULT_ADDRESS


@pytest.mark.parametrize(
    ("given", "environment", "text", "expected"),
    [
        (Given(address="nowhere"), {}, "", "^address must be HOST:PORT, got 'nowhere'"),
        (Given(address=""), {}, "", "^address must be HOST:PORT, got ''"),
        (Given(address="h:0"), {}, "", "^address must be HOST:PORT"),
        (Given(timeout_s=0.0), {}, "", "^timeout_s must be a finite number of seconds > 0, got 0.0"),
        (Given(timeout_s=float("inf")), {}, "", "^timeout_s must be a finite number"),
        (Given(max_retries=-1), {}, "", "^max_retries must be an integer >= 0, got -1"),
        (Given(), {"ECHELON_ADDRESS": "h"}, "", "^ECHELON_ADDRESS must be HOST:PORT, got 'h'"),
        (Given(), {"ECHELON_TIMEOUT_S": "soon"}, "", "^ECHELON_TIMEOUT_S must be a number, got 'soon'"),
        (Given(), {"ECHELON_MAX_RETRIES": "1.5"}, "", "^ECHELON_MAX_RETRIES must be an integer >= 0, got 1.5"),
        (Given(profile="p"), {}, "", r"^no profile 'p' in /home-of-nobody/.config/echelon/config.toml; write \[p\]"),
        (Given(profile="prdo"), {}, FILE, "^no profile 'prdo' in .*; it has prod, slow"),
        (Given(), {"ECHELON_PROFILE": "p"}, "", "^no profile 'p'"),
        (Given(profile="p"), {}, "[p]\nadress = 'h:1'", "'p' in .* unknown key 'adress'; did you mean 'address'"),
        (Given(profile="p"), {}, "[p]\nzzz = 1", "unknown key 'zzz'; known keys: address, timeout_s, max_retries"),
        (Given(profile="p"), {}, "[p]\naddress = 5", "^address of profile 'p' in .* must be HOST:PORT, got 5"),
        (Given(profile="p"), {}, "[p]\ntimeout_s = '5'", "^timeout_s of profile 'p' in .*, got '5'"),
        (Given(profile="p"), {}, "[p]\nmax_retries = true", "^max_retries of profile 'p' in .*, got True"),
        (Given(profile="p"), {}, "p", "config.toml is not TOML"),
    ],
)
def test_a_mistake_gets_one_error_that_names_its_source(
    given: Given, environment: dict[str, str], text: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_settings(given, HOME | environment, reads(text))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/h"}, "/h/.config/echelon/config.toml"),
        ({"HOME": "/h", "XDG_CONFIG_HOME": "/x"}, "/x/echelon/config.toml"),
        ({"HOME": "/h", "XDG_CONFIG_HOME": ""}, "/h/.config/echelon/config.toml"),
        ({"HOME": "/h", "XDG_CONFIG_HOME": "not/absolute"}, "/h/.config/echelon/config.toml"),
    ],
)
def test_the_file_is_where_xdg_says(environment: dict[str, str], expected: str) -> None:
    assert config_path(environment) == Path(expected)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_both_clients_read_environment_and_file_when_made(
    kind: type[Client] | type[AsyncClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echelon").mkdir()
    (tmp_path / "echelon" / "config.toml").write_text(FILE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("ECHELON_ADDRESS", raising=False)
    client = kind(profile="prod")
    monkeypatch.setenv("ECHELON_ADDRESS", "later:1")
    assert client.address == "prod:1"
    assert kind(profile="prod").address == "prod:1"
    assert kind().address == "later:1"
    assert kind("mine:1", profile="prod").address == "mine:1"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no profile 'prod'"):
        kind(profile="prod")
    assert kind().address == "later:1"
