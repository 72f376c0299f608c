"""`echelon serve` that cannot start: one clear error on stderr, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint

pytestmark = pytest.mark.cluster

TIMEOUT_S = 60.0
WRONG_USE, FAILED = 2, 1
ACTORS = (b"ray::RankActor", b"ray::AgentActor")


@dataclass(frozen=True, slots=True)
class Ended:
    """How `echelon serve` ended."""

    code: int
    stderr: str

    def error(self) -> str:
        """The one line that it must have said."""
        told = [line for line in self.stderr.splitlines() if line.startswith("echelon: ")]
        assert len(told) == 1 and told[0].startswith("echelon: error: "), self.stderr
        return told[0].removeprefix("echelon: error: ")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny")


def serve(*arguments: str, **environment: str) -> Ended:
    """Run it to its end; no process and no folder of it stays."""
    with tempfile.TemporaryDirectory(prefix="bad-", dir="/tmp") as folder:
        ended = subprocess.run(
            [sys.executable, "-m", "echelon", "serve", *arguments],
            env={**os.environ, "TMPDIR": folder, **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert ended.stdout == ""
        assert processes(lambda entry: folder.encode() in (entry / "environ").read_bytes()) == set()
        assert list(Path(folder).iterdir()) == []
    return Ended(ended.returncode, ended.stderr)


def processes(matches: Callable[[Path], bool]) -> set[int]:
    """Those of a kind that run now."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if matches(entry):
                    found.add(int(entry.name))
            except OSError:  # it has just ended
                continue
    return found


def actors(ray_address: str) -> set[int]:
    """Ranks and agents in the session of the Ray that listens there."""
    port = f"--gcs_server_port={ray_address.rpartition(':')[2]}".encode()
    (server,) = processes(lambda entry: port in (entry / "cmdline").read_bytes().split(b"\0"))
    named = processes(lambda entry: (entry / "cmdline").read_bytes().startswith(ACTORS))
    return {pid for pid in named if os.getsid(pid) == os.getsid(server)}


def test_what_is_wrong_with_the_command_or_a_file_is_wrong_use(model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text(f"model: {model}\nmax-contxt: 64\n")
    broken = make_checkpoint(tmp_path / "broken") / "model.safetensors"
    size = broken.stat().st_size
    os.truncate(broken, size - 1)
    other = make_checkpoint(tmp_path / "other") / "config.json"
    other.write_text(other.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    supported = "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    cases = {
        ("--model", "/nowhere"): "model directory /nowhere does not exist",
        ("--model", str(tmp_path)): f"{tmp_path}/config.json: no such file",
        ("--model", str(other.parent)): f"{other}: architecture 'MambaForCausalLM' is not supported; {supported}",
        ("--model", str(broken.parent)): f"{broken}: truncated, expected {size} bytes, found {size - 1}",
        ("--model", str(model), "--tensor", "3"): "tensor=3 does not divide num_attention_heads=4; tensor may be 1, 2",
        ("--model", str(model), "--max-context", "0"): "--max-context: must be greater than or equal to 1, got '0'",
        ("--model", str(model), "--lease-s", "nan"): "--lease-s: must be a finite number, got 'nan'",
        (
            "--config",
            str(settings),
        ): "the configuration file has an unknown key 'max-contxt'; did you mean 'max-con",
        ("--model", str(model), "--state-dir", "/proc/no"): "state-dir /proc/no cannot be made: No such file",
    }
    for arguments, message in cases.items():
        ended = serve(*arguments)
        assert ended.error().startswith(message)
        assert ended.code == WRONG_USE


@pytest.mark.parametrize("flag", ["--address", "--metrics-address"])
def test_a_port_in_use_is_named(model: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = serve("--model", str(model), "--address", "127.0.0.1:0", flag, f"127.0.0.1:{port}")
    assert ended.error().startswith(f"{flag}: port {port} of 127.0.0.1 is in use; choose another port, or 0")
    assert ended.code == FAILED


def test_a_ray_that_does_not_start_has_the_first_word(model: Path, tmp_path: Path) -> None:
    """Its own error on top of ours. A broken installation stands in its place on the import path."""
    script = tmp_path / "path" / "ray" / "scripts" / "scripts.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('RuntimeError: no file descriptors left')")
    for package in (script.parent, script.parent.parent):
        (package / "__init__.py").touch()
    ended = serve("--model", str(model), "--address", "127.0.0.1:0", PYTHONPATH=str(tmp_path / "path"))
    assert ended.error() == "Ray does not start:"
    assert ended.stderr.splitlines()[1] == "RuntimeError: no file descriptors left"
    assert "Ray ended with exit code 1 while starting" in ended.stderr
    assert ended.code == FAILED


def test_no_memory_for_the_kv_cache_is_told_with_the_arithmetic(model: Path, ray_address: str) -> None:
    flags = ("--address", "127.0.0.1:0", "--gpu-memory-fraction", "0.000001")
    before = actors(ray_address)
    ended = serve("--model", str(model), *flags, "--ray-address", ray_address)
    assert actors(ray_address) <= before
    assert ended.error().startswith("no memory for the KV cache on rank 0: ")
    assert "gpu-memory-fraction 1e-06" in ended.error() and "max-context 512 needs 32 blocks" in ended.error()
    assert ended.code == FAILED
