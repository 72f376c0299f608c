"""JSON as a batch file may hold it: no key twice, no NaN, no half of a surrogate pair, no bottomless nesting.

Pure, in the coordinator. Python's own reader lets all of these pass, and what is made of them breaks later: they have
no place in a message, a database or a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NoReturn

MAX_DEPTH = 64  # schemas and template arguments are walked by recursion later


class StrictJsonError(ValueError):
    """What is wrong; key names the one that is given twice."""

    def __init__(self, rule: str, key: str = "") -> None:
        super().__init__(rule)
        self.rule, self.key = rule, key


def parse_json(line: str) -> object:
    """The value. Raises StrictJsonError."""
    try:
        value: object = json.loads(line, object_pairs_hook=_unique, parse_constant=_constant)
        if "\\ud" in line.lower():  # half of a surrogate pair is no character: no file and no message can carry it
            json.dumps(value, ensure_ascii=False).encode()
    except StrictJsonError:
        raise
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise StrictJsonError(f"is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeEncodeError:
        raise StrictJsonError("holds half of a surrogate pair (\\udXXX)") from None
    except ValueError as error:  # an integer of thousands of digits
        raise StrictJsonError(f"is not JSON we can read: {error}") from None
    if _is_deep(value):
        raise StrictJsonError(f"is nested deeper than {MAX_DEPTH} levels")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise StrictJsonError("is given twice", key)
        found[key] = value
    return found


def _constant(name: str) -> NoReturn:
    raise StrictJsonError(f"holds {name}, which is not JSON")


def _is_deep(value: object) -> bool:
    """Layer by layer, as recursion is what it guards."""
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [inner for outer in layer for inner in _inside(outer)]
    return any(isinstance(value, (dict, list)) for value in layer)


def _inside(value: object) -> Iterable[object]:
    match value:
        case dict():
            return value.values()
        case list():
            return value
    return ()
