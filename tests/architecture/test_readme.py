"""What README.md says exists: the commands, the flags with their defaults, the files, the reasons of errors."""

from __future__ import annotations

import re

import pytest

import echelon.errors
from echelon.config import ServeConfig, flag_of
from tests.architecture.source import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def flag_rows() -> dict[str, str]:
    """Flag -> default, from the table."""
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]*) \|", README, re.MULTILINE)
    return {flag: default.strip(" `") for flags, default in rows for flag in re.findall(r"--([a-z0-9-]+)", flags)}


def test_the_first_screen_is_the_two_commands() -> None:
    assert README.splitlines()[2:6] == [
        "```",
        *(line for line in README.splitlines() if line.startswith(("make demo ", "make test "))),
        "```",
    ]


def test_the_table_of_flags_is_that_of_the_server() -> None:
    assert flag_rows().keys() == {flag_of(name) for name in ServeConfig.model_fields}


def test_the_defaults_are_those_of_the_server() -> None:
    rows = flag_rows()
    shown = {
        name: field.default
        for name, field in ServeConfig.model_fields.items()
        if isinstance(field.default, int | float)
    }
    assert shown
    assert {name: float(rows[flag_of(name)]) for name in shown} == shown


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_the_files_it_names_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)+[\w.-]*)`|`([\w-]+\.(?:md|txt|yaml))`", text))
    paths = {path or file for path, file in named} - {"echelon/v1", "echelon/internal/v1"}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert paths


def test_every_reason_has_a_remedy() -> None:
    """The errors' own table has them: name, code, reasons."""
    rows = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.MULTILINE))
    drawn = re.findall(r"\w+Error +[A-Z_]+ +(.*)", echelon.errors.__doc__ or "")
    reasons = {reason for line in drawn for reason in re.findall(r"[A-Z_]+", line)}
    unsent = (echelon.errors.ConfigError, echelon.errors.ResponseInvalidError)
    assert rows == reasons | {error.default_reason for error in unsent}
    assert reasons >= {error.default_reason for error in echelon.errors.WIRE_ERRORS}
