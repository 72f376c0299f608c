"""What a client is made with: its address, time limit and retries, from arguments, environment, a profile, defaults.

Read once, where a client is constructed: the environment, and the configuration file if a profile is named. The
choice itself is `resolve_settings`, pure. Each of address, timeout_s and max_retries is looked for in this order:
    argument > section [NAME] of echelon/config.toml, for profile=NAME > ECHELON_ADDRESS, ... > that of ECHELON_PROFILE
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from echelon.errors import ConfigError
from echelon.retry import RetryPolicy

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_TIMEOUT_S = 600.0
KEYS = ("address", "timeout_s", "max_retries")
VARIABLE_OF = {key: f"ECHELON_{key.upper()}" for key in KEYS}
PROFILE_VARIABLE = "ECHELON_PROFILE"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a client was made with."""

    address: str
    timeout_s: float
    retry: RetryPolicy

    def changed(self, timeout_s: float | None, max_retries: int | None) -> Settings:
        """The same but for what is not None. Raises ConfigError naming the argument."""
        retry = self.retry if max_retries is None else replace(self.retry, max_retries=_count(max_retries))
        return Settings(self.address, self.timeout_s if timeout_s is None else _seconds(timeout_s), retry)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """The arguments of a client's constructor. A retry without max_retries leaves nothing of it to look up."""

    address: str | None = None
    profile: str | None = None
    timeout_s: float | None = None
    max_retries: int | None = None
    retry: RetryPolicy | None = None


def client_settings(given: Given) -> Settings:
    """The settings of a new client: the one place where the SDK reads the environment and a file."""
    return resolve_settings(given, dict(os.environ), _read)


def resolve_settings(given: Given, environment: Mapping[str, str], read: Callable[[Path], str]) -> Settings:
    """The settings by the order above. read gives a file's text, and is called for a profile alone.

    Raises ConfigError naming what is wrong and where it stands.
    """
    name = environment.get(PROFILE_VARIABLE) or None if given.profile is None else given.profile
    path = config_path(environment)
    section = {} if name is None else _section(read(path), name, path)

    def in_profile(key: str) -> str:
        return f"{key} of profile {name!r} in {path}"

    def look_up(key: str, default: object) -> tuple[object, str]:
        if (argument := getattr(given, key)) is not None:
            return argument, key
        if given.profile is not None and key in section:
            return section[key], in_profile(key)
        if text := environment.get(VARIABLE_OF[key]):
            return text if key == "address" else _number(text, VARIABLE_OF[key]), VARIABLE_OF[key]
        return section.get(key, default), in_profile(key)

    retry = given.retry or RetryPolicy()
    if given.retry is None or given.max_retries is not None:
        value, source = look_up("max_retries", None)
        retry = replace(retry, max_retries=None if value is None else _count(value, source))
    address, timeout_s = look_up("address", DEFAULT_ADDRESS), look_up("timeout_s", DEFAULT_TIMEOUT_S)
    return Settings(_address(*address), _seconds(*timeout_s), retry)


def config_path(environment: Mapping[str, str]) -> Path:
    """Where profiles are kept, by the XDG base directory rules."""
    base = Path(environment.get("XDG_CONFIG_HOME", ""))
    home = Path(environment.get("HOME") or "~").expanduser()
    return (base if base.is_absolute() else home / ".config") / "echelon" / "config.toml"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="profile") from None


def _section(text: str, name: str, path: Path) -> dict[str, object]:
    """The named table of the file; its keys are ours, its values not checked yet."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", field="profile") from None
    profiles = [key for key, value in content.items() if isinstance(value, dict)]
    if name not in profiles:
        remedy = f"it has {', '.join(profiles)}" if profiles else f"write [{name}] and address = 'HOST:PORT' into it"
        raise ConfigError(f"no profile {name!r} in {path}; {remedy}", field="profile")
    section: dict[str, object] = content[name]
    for key in section:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(KEYS)}"
            raise ConfigError(f"profile {name!r} in {path} has an unknown key {key!r}; {hint}", field="profile")
    return section


def _address(value: object, source: str) -> str:
    """HOST:PORT, or unix:PATH; without its port gRPC would dial 443."""
    text = value if isinstance(value, str) else ""
    port = text.rpartition(":")[2]
    if not text.startswith("unix:") and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"{source} must be HOST:PORT, got {value!r}", field="address")
    return text


def _seconds(value: object, source: str = "timeout_s") -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{source} must be a finite number of seconds > 0, got {value!r}", field="timeout_s")
    return float(value)


def _count(value: object, source: str = "max_retries") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{source} must be an integer >= 0, got {value!r}", field="max_retries")
    return value


def _number(text: str, variable: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"{variable} must be a number, got {text!r}", field=variable)
