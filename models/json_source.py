"""JsonSource: a JSON file of a model directory, its values read by key and each checked.

In the coordinator and in every rank, before anything is loaded. Every refusal is a ConfigError that names the file
and the key. It knows no torch and no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, TypeGuard

from echelon.errors import ConfigError


class JsonSource:
    """An object of a JSON file, or one nested in it; null counts as absent."""

    def __init__(self, path: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path, required: bool = True) -> JsonSource:
        """The object that a file holds; an empty one if the file may be missing and is."""
        return cls(path, read_json_object(path) if required or path.exists() else {})

    def refuse(self, problem: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {problem}")

    def name(self, key: str) -> str:
        """A key of this object as it is told, with those of the objects around it."""
        return self._prefix + key

    def get(self, key: str, default: object = None) -> object:
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str, default: object = None) -> object:
        value = self.get(key, default)
        if value is None:
            self.refuse(f"the key '{self._prefix}{key}' is missing")
        return value

    def over(self, defaults: Mapping[str, object]) -> JsonSource:
        """The same, with values for keys that are missing; a null that is there stays."""
        return JsonSource(self.path, {**defaults, **self.values}, self._prefix)

    def count(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.require(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.refuse(f"{self._prefix}{key} must be an integer >= {minimum}, found {value!r}")
        return value

    def number(self, key: str, default: float | None = None, maximum: float = math.inf) -> float:
        value = self.require(key, default)
        if not _is_positive(value) or value > maximum:
            limit = "" if maximum == math.inf else f" and <= {maximum:g}"
            self.refuse(f"{self._prefix}{key} must be a number > 0{limit}, found {value!r}")
        return float(value)

    def optional_number(self, key: str, maximum: float = math.inf) -> float | None:
        return None if self.get(key) is None else self.number(key, maximum=maximum)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.require(key)
        if not isinstance(value, list) or not all(_is_positive(number) for number in value):
            self.refuse(f"{self._prefix}{key} must be a list of numbers > 0, found {value!r}")
        return tuple(float(number) for number in value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.refuse(f"{self._prefix}{key} must be true or false, found {value!r}")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            self.refuse(f"{self._prefix}{key} must be a token id or a list of them, found {value!r}")
        return tuple(ids)

    def table(self, key: str) -> JsonSource:
        value = self.get(key, {})
        if not isinstance(value, dict):
            self.refuse(f"{self._prefix}{key} must be an object, found {value!r}")
        return JsonSource(self.path, value, f"{self._prefix}{key}.")


def _is_positive(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def read_json_object(path: Path) -> dict[str, object]:
    """The object that a JSON file holds, or ConfigError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model directory in Hugging Face format has one") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content
