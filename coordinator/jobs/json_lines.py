"""JSON lines whose every complaint names the line and the whole path: what batch files are read with.

Pure, in the coordinator, off its event loop. Knows JSON and no field of a request.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from coordinator.jobs.strict_json import StrictJsonError, parse_json
from echelon.errors import InvalidRequestError
from echelon.sampling import shown

MAX_LINE_BYTES = 16 * 2**20  # as of a request


def lines(jsonl: bytes) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. Raises InvalidRequestError for what is no text."""
    # only \n ends a line: splitlines() of str would also cut at U+2028, which JSON allows inside strings
    for number, raw in enumerate(jsonl.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        if len(raw) > MAX_LINE_BYTES:
            refuse(number, "", f"has {len(raw)} bytes, over the limit of {MAX_LINE_BYTES}")
        try:
            yield number, raw.decode().strip()
        except UnicodeDecodeError as error:
            refuse(number, "", f"is not UTF-8 at byte {error.start}")


def read_object(line: str, number: int) -> JsonObject:
    """The JSON object of a line. Raises InvalidRequestError."""
    try:
        value = parse_json(line)
    except StrictJsonError as error:
        refuse(number, error.key, error.rule)
    return JsonObject(value, number, "")


def refuse(number: int, path: str, rule: str) -> NoReturn:
    """Raise the error of this line, at this path of it."""
    raise InvalidRequestError(
        f"line {number}: {path} {rule}" if path else f"line {number} {rule}",
        field=f"source.jsonl[{number}].{path}" if path else f"source.jsonl[{number}]",
    )


class JsonObject:
    """A JSON object that knows where it stands, to be read field by field; null is as good as absent."""

    def __init__(self, value: object, number: int, path: str) -> None:
        if not isinstance(value, dict):
            refuse(number, path, f"must be a JSON object, got {shown(value)}")
        self._value, self._number, self._path = dict(value), number, path

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def __getitem__(self, key: str) -> Any:
        return self._value[key]

    def __setitem__(self, key: str, value: object) -> None:
        self._value[key] = value

    def get(self, key: str) -> Any:
        return self._value.get(key)

    def pop(self, key: str) -> Any:
        return self._value.pop(key, None)

    def plain(self) -> Mapping[str, object]:
        """The object as it was read."""
        return dict(self._value)

    def refuse(self, key: str, rule: str) -> NoReturn:
        """Raise the error of this field, or of the object itself where the key is empty."""
        refuse(self._number, ".".join(part for part in (self._path, key) if part), rule)

    def told(self, error: InvalidRequestError) -> NoReturn:
        """Raise this error as one of the object: its message begins with the path of the field."""
        path, _, rule = error.message.partition(" ")
        self.refuse(path, rule)

    def only(self, known: Sequence[str]) -> None:
        """Refuse the first key that is none of these."""
        for key in self._value:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
                hint = f"did you mean {near[0]}? " if near else ""
                self.refuse(key, f"is unknown; {hint}known here are {', '.join(known)}")

    def child(self, key: str, value: object) -> JsonObject:
        """The object at this place below."""
        return JsonObject(value, self._number, f"{self._path}.{key}" if self._path else key)

    def object(self, key: str, required: bool = False) -> JsonObject:
        if required and self.get(key) is None:
            self.refuse(key, "is missing")
        return self.child(key, {} if self.get(key) is None else self[key])

    def items(self, key: str) -> list[Any]:
        """A list, empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            self.refuse(key, f"must be a list, got {shown(value)}")
        return value or []

    def string(self, key: str, required: bool = False) -> str:
        value = self.get(key)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            self.refuse(key, f"must be a string, got {shown(value)}" if key in self else "is missing")
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(key, f"must be an integer from {low} to {high}, got {shown(value)}")
        return value
