"""Random JSON Schemas whose texts are short: everything is bounded but numbers' decimals and the layout."""

from __future__ import annotations

from random import Random
from typing import Any

Schema = dict[str, Any]


def random_schema(random: Random, depth: int = 3) -> Schema:
    """An object at the top, as most users ask for; below it anything."""
    return _object(random, depth)


def _any(random: Random, depth: int) -> Schema:
    leaves = (_integer, _number, _string, _literal, _flag)
    nodes = (_object, _array, _tuple, _union)
    return random.choice(leaves + nodes if depth else leaves)(random, depth - 1)


def _object(random: Random, depth: int) -> Schema:
    names = random.sample(["a", "name", "größe", 'quo"ted', "x y", "0"], random.randint(0, 3))
    return {
        "type": "object",
        "properties": {name: _any(random, depth) for name in names},
        "required": [name for name in names if random.random() < 0.7],
        "additionalProperties": False,
    }


def _array(random: Random, depth: int) -> Schema:
    few = random.randint(0, 2)
    return {"type": "array", "items": _any(random, depth), "minItems": few, "maxItems": few + random.randint(0, 2)}


def _tuple(random: Random, depth: int) -> Schema:
    items = [_any(random, depth) for _ in range(random.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _union(random: Random, depth: int) -> Schema:
    return {"anyOf": [_any(random, depth) for _ in range(random.randint(1, 3))]}


def _integer(random: Random, depth: int) -> Schema:
    low = random.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + random.choice([0, 5, 10**6])}


def _number(random: Random, depth: int) -> Schema:
    low = random.randint(-9, 9)
    return {"type": "number", random.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 3}


def _string(random: Random, depth: int) -> Schema:
    return random.choice(
        [
            {"type": "string", "maxLength": random.randint(0, 6)},
            {"type": "string", "minLength": 2, "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"},
            {"type": "string", "format": random.choice(["date", "uuid", "ipv4"])},
        ]
    )


def _literal(random: Random, depth: int) -> Schema:
    return random.choice(
        [{"enum": ["red", "grün", 7, None, True, 'a"b\\']}, {"const": random.choice(["é", -3.5, [1]])}]
    )


def _flag(random: Random, depth: int) -> Schema:
    return {"type": random.choice(["boolean", "null", ["boolean", "null"]])}
