"""The text of the repository is for whoever reads it later: no paths of one machine, no numbers of one tracker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, ROOT, SUPPORT

FOLDERS = (*PACKAGES, *SUPPORT, "docs")
SUFFIXES = {".py", ".proto", ".md", ".yaml", ".cfg", ".toml", ".txt", ".json", ""}
LOCAL = re.compile(r"/(?:root|work|home)/|(?<![\w/])/tmp/|\bissues? #?\d|\bwork" r"place\b", re.IGNORECASE)


def text_files() -> list[Path]:
    nested = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    found = (path for path in (*ROOT.iterdir(), *nested) if path.is_file() and path.suffix in SUFFIXES)
    skipped = ("__pycache__", "LICENSE", Path(__file__).name)
    return sorted(path.relative_to(ROOT) for path in found if not set(path.parts) & set(skipped))


@pytest.mark.parametrize("path", text_files(), ids=str)
def test_text_names_nothing_local(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if LOCAL.search(line)] == []


@pytest.mark.parametrize("text", ["see issue 12", "cd /root/x", "open('/tmp/x')", "issue #3"])
def test_local_text_is_seen(text: str) -> None:
    assert LOCAL.search(text)
    assert not LOCAL.search("https://example.org/home, an issue with 3 parts, $TMP/tmp")
