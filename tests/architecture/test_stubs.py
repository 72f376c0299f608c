"""The committed protobuf stubs are what protos/generate.py writes, all of them and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.architecture.source import GENERATED, ROOT


def stubs(root: Path) -> dict[str, bytes]:
    found = (path for folder in GENERATED for path in (root / folder).glob("*_pb2*.py*"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "protos/generate.py", tmp_path], check=True)
    written, committed = stubs(tmp_path), stubs(ROOT)
    assert written.keys() == committed.keys()
    assert [name for name, content in written.items() if committed[name] != content] == [], "run make proto"
    assert len(written) >= 3 * len(list((ROOT / "protos").rglob("*.proto"))) - 2
