"""`echelon doctor`: each judgement on facts made up for it, what is gathered here, and what its bundle gives away."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from echelon import convert_cluster
from echelon.cli import doctor
from echelon.cli.app import app
from echelon.cli.diagnosis import gather, probes
from echelon.cli.diagnosis.bundle import MASK, masked, masked_environment, masked_settings
from echelon.cli.diagnosis.facts import (
    Clock,
    Facts,
    Folder,
    Gpu,
    Imported,
    LeftBehind,
    Memory,
    Required,
    Served,
    Torch,
)
from echelon.cli.diagnosis.finding import Finding, Level
from echelon.cli.diagnosis.probes import OURS, Probed, probe
from echelon.types import Cluster, ClusterEvent, Replica
from tests.unit.scripted import ScriptedServer

GIB = 2**30
CLUSTER = Cluster(
    version="0.1.0", term=2, coordinator_pid=7, queued=3, running=0, parked=0, models=(), ranks=(),
    replicas=(Replica(index=0, epoch=1, state="ready", kv_blocks_total=1, kv_blocks_referenced=0, step=0),),
)  # fmt: skip
ROOMY = Folder("/s", 900 * GIB, 500 * GIB, True, "ext4")
SOUND = Facts(
    version="0.1.0",
    platform="linux",
    python=(3, 12, 1),
    executable="/bin/python",
    root="/site",
    places=dict.fromkeys(OURS, "/site"),
    required=(Required("grpcio", "1.71", False), Required("torch", "2.11", True)),
    installed={"grpcio": "1.85.1", "torch": "2.11.0+cu130"},
    imported={"ray": Imported("2.60.0"), "llguidance": Imported("1.9")},
    torch=Torch(version="2.11.0", cuda_build="13.0", cuda_available=True, nccl="2.28.3"),
    gpu_nodes=2,
    gpus=(Gpu("H200", 141 * GIB, GIB, "580.1"),) * 2,
    memory=Memory(64 * GIB, 32 * GIB),
    shared_memory=Folder("/dev/shm", 8 * GIB, 8 * GIB),
    state=ROOMY,
    temporary=ROOMY,
    descriptors=(65536, 65536),
    clock=Clock(2e9, 1e9, True),
    served=Served(address="h:1", local=True, open=True, cluster=CLUSTER),
)


def sound_but(**changes: object) -> Facts:
    return dataclasses.replace(SOUND, **changes)  # type: ignore[arg-type]


def levels(facts: Facts) -> dict[str, Level]:
    return {finding.name: finding.level for finding in doctor.examine(facts)}


def test_a_sound_machine_has_nothing_to_put_right() -> None:
    findings = doctor.examine(SOUND)
    assert [finding for finding in findings if finding.level is not Level.OK or finding.remedy] == []
    assert len({finding.name for finding in findings}) == len(findings) == 17


CLIENT_ONLY = {"torch": None, "imported": {}, "installed": {"grpcio": "1.80"}, "gpu_nodes": 0, "gpus": ()}


def served(**changes: object) -> Served:
    return dataclasses.replace(Served(address="h:1", local=True), **changes)  # type: ignore[arg-type]


FREE = served()
CASES: list[tuple[dict[str, object], str, Level, str]] = [
    ({"python": (3, 10, 9)}, "python", Level.FAIL, "3.10.9 is too old"),
    ({"platform": "darwin"}, "python", Level.WARN, "servers need Linux"),
    ({"required": ()}, "packages", Level.WARN, "not installed"),
    ({"installed": {"torch": "2.11"}}, "packages", Level.FAIL, "missing: grpcio"),
    ({"installed": {"grpcio": "1.9.0", "torch": "2.11"}}, "packages", Level.FAIL, "grpcio 1.9.0 < 1.71"),
    ({"installed": {"grpcio": "1.71.0"}}, "packages", Level.WARN, "a client only: serving needs torch"),
    ({"imported": {"tokenizers": Imported(error="no GLIBC")}}, "packages", Level.FAIL, "tokenizers: no GLIBC"),
    ({"places": None}, "imports", Level.WARN, "cannot be told"),
    ({"places": dict.fromkeys(OURS, "/other")}, "imports", Level.FAIL, "from /other, this command is of /site"),
    ({"places": dict.fromkeys(OURS, "")}, "imports", Level.FAIL, "would not find echelon"),
    ({"shadows": ("/me/queue.py",)}, "imports", Level.WARN, "/me/queue.py"),
    ({"torch": None}, "torch", Level.WARN, "a client needs none"),
    ({"torch": Torch(why="ImportError: libcudart")}, "torch", Level.FAIL, "libcudart"),
    ({"torch": Torch(version="2.11")}, "cuda", Level.FAIL, "2 GPUs, but PyTorch 2.11 is a CPU build"),
    ({"torch": Torch(version="2.11", cuda_build="13", why="driver too old")}, "cuda", Level.FAIL, "driver too old"),
    ({"torch": None}, "cuda", Level.WARN, "2 GPUs, and no PyTorch"),
    ({"gpus": (Gpu("H200", 100 * GIB, 90 * GIB, "1"),)}, "cuda", Level.WARN, "H200 has 10.0 GiB free"),
    ({"gpu_nodes": 0, "gpus": ()}, "cuda", Level.OK, "--device cpu"),
    ({"torch": Torch(version="2", cuda_build="13", cuda_available=True)}, "nccl", Level.FAIL, "no NCCL"),
    ({"imported": {}}, "ray", Level.WARN, "not installed"),
    ({"imported": {"ray": Imported(error="ended by SIGSEGV")}}, "ray", Level.FAIL, "ended by SIGSEGV"),
    ({"imported": {}}, "llguidance", Level.WARN, "not installed"),
    ({"memory": Memory(8 * GIB, 2 * GIB)}, "memory", Level.WARN, "2.0 GiB of 8.0 GiB"),
    ({"memory": Memory(64 * GIB, 32 * GIB, 2**29)}, "memory", Level.FAIL, "512 MiB left to this container"),
    ({"shared_memory": Folder("/dev/shm", 2**26, 2**26)}, "shared memory", Level.WARN, "64 MiB free"),
    ({"shared_memory": None}, "shared memory", Level.WARN, "not there"),
    ({"state": Folder("/s", GIB, 50 * 2**20)}, "state directory", Level.FAIL, "50 MiB of 1.0 GiB free"),
    ({"state": Folder("/s", 9 * GIB, GIB)}, "state directory", Level.WARN, "1.0 GiB of 9.0 GiB free"),
    ({"state": Folder("/s", 9 * GIB, 9 * GIB, False)}, "state directory", Level.FAIL, "cannot be written"),
    ({"state": Folder("/s", 9 * GIB, 9 * GIB, True, "nfs4")}, "state directory", Level.WARN, "on nfs4: its locks"),
    ({"temporary": None}, "temporary folder", Level.WARN, "cannot be told"),
    (
        {"left_behind": (LeftBehind("/t/echelon-a", 9.0),)},
        "left behind",
        Level.WARN,
        "left 1 folders, which nothing uses",
    ),
    ({"descriptors": (512, 4096)}, "file descriptors", Level.FAIL, "512 for a process"),
    ({"descriptors": (1024, 4096)}, "file descriptors", Level.WARN, "1024 for a process"),
    ({"clock": Clock(1e9, 2e9, True)}, "clock", Level.FAIL, "earlier than when Echelon was installed"),
    ({"clock": Clock(2e9, 1e9, False)}, "clock", Level.WARN, "nothing keeps it right"),
    ({"clock": Clock(2e9, 1e9, None)}, "clock", Level.OK, "not told"),
    ({"served": FREE}, "port", Level.OK, "h:1 is free"),
    (
        {"served": dataclasses.replace(FREE, open=True, error="odd")},
        "port",
        Level.FAIL,
        "does not answer as Echelon: odd",
    ),
    (
        {"served": dataclasses.replace(FREE, bind_error="denied")},
        "port",
        Level.FAIL,
        "nothing can listen at h:1: denied",
    ),
    (
        {"served": dataclasses.replace(FREE, local=False, error="refused")},
        "port",
        Level.FAIL,
        "cannot be reached: refused",
    ),
    ({"served": None, "settings_error": "no profile 'x'"}, "port", Level.FAIL, "no profile 'x'"),
    ({"served": FREE}, "cluster", Level.OK, "none is running"),
    ({"version": "0.2.0"}, "cluster", Level.WARN, "it is Echelon 0.1.0, this is 0.2.0"),
    ({"served": served(cluster=dataclasses.replace(CLUSTER, replicas=()))}, "cluster", Level.WARN, "0 of 0 replicas"),
]


@pytest.mark.parametrize(("changes", "name", "level", "message"), CASES)
def test_each_trouble_is_found_and_told(changes: dict[str, object], name: str, level: Level, message: str) -> None:
    (finding,) = [finding for finding in doctor.examine(sound_but(**changes)) if finding.name == name]
    assert finding.level is level
    assert message in finding.message
    assert finding.remedy or level is not Level.FAIL, "what is wrong says what to do"


def test_a_client_without_the_servers_packages_is_in_order() -> None:
    found = levels(sound_but(**CLIENT_ONLY))
    assert Level.FAIL not in found.values()
    assert found["packages"] is found["ray"] is Level.WARN


def partial(kind: type) -> st.SearchStrategy[object]:
    """The sound facts with any of their fields left at what stands for nothing known."""
    empty = Facts()
    names = [field.name for field in dataclasses.fields(kind)]
    return st.sets(st.sampled_from(names)).map(lambda gone: sound_but(**{name: getattr(empty, name) for name in gone}))


@given(partial(Facts))
def test_no_check_fails_over_what_is_not_known(facts: Facts) -> None:
    findings = doctor.examine(facts)
    assert all(isinstance(finding, Finding) and finding.message for finding in findings)


def test_the_interpreter_is_asked_as_a_server_would_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the folder that the user is in, but by its import path."""
    (tmp_path / "worker.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probes, "IMPORTED", ("json", "no_such_module_here", "broken_module"))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "broken_module.py").write_text("raise RuntimeError('half installed')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(gather.ROOT), str(tmp_path / "path")]))
    probed = probe()
    assert probed.places == dict.fromkeys(OURS, str(gather.ROOT))
    assert probed.imported["broken_module"].error == "RuntimeError: half installed"
    assert "no_such_module_here" not in probed.imported
    assert probed.torch is not None and probed.torch.version


def test_what_crashes_is_told_by_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashes.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(probes, "IMPORTED", ("crashes",))
    monkeypatch.setattr(probes, "_TORCH", "import crashes")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(gather.ROOT), str(tmp_path)]))
    probed = probe()
    assert probed.imported["crashes"].error == "ended by SIGSEGV"
    assert probed.torch == Torch(why="ended by SIGSEGV")


NOTHING = Probed(places=None, torch=None, imported={})


def test_this_machine_is_gathered(tmp_path: Path) -> None:
    facts = gather.gather(NOTHING, {"ECHELON_STATE_DIR": str(tmp_path / "to" / "be" / "made")}, None, None, "")
    assert facts.memory is not None and 0 < facts.memory.available_bytes <= facts.memory.total_bytes
    assert facts.state is not None and facts.state.path == str(tmp_path / "to" / "be" / "made")
    assert facts.state.writable and facts.state.free_bytes > 0 and facts.state.kind
    assert facts.descriptors is not None and facts.clock is not None
    assert {required.name for required in facts.required} >= {"grpcio", "torch", "typer"}
    assert facts.installed["grpcio"]


def test_files_that_hide_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "mine.py").write_text("")
    environment = {"PYTHONPATH": os.pathsep.join([str(gather.ROOT), "", str(tmp_path)])}
    facts = gather.gather(NOTHING, environment, None, None, "")
    assert set(facts.shadows) == {str(tmp_path / "models" / "__init__.py"), str(tmp_path / "torch.py")}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder with that of a cluster that is gone, of one that runs, and of one that is being started."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    long_ago = time.time() - 2 * gather.IN_USE_S
    for name in ("echelon-gone", "echelon-runs", "echelon-fresh", "others"):
        (tmp_path / name).mkdir()
        if name != "echelon-fresh":
            os.utime(tmp_path / name, (long_ago, long_ago))
    return tmp_path


def test_folders_of_killed_clusters_are_found_and_those_in_use_are_not(temporary: Path) -> None:
    code = "print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=temporary / "echelon-runs", **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        found = gather.gather(NOTHING, {}, None, None, "").left_behind
        process.communicate(b"\n")
    mine = [folder.path for folder in found if folder.path.startswith(str(temporary))]
    assert mine == [str(temporary / "echelon-gone")]
    after = gather.gather(NOTHING, {}, None, None, "").left_behind
    assert str(temporary / "echelon-runs") in {folder.path for folder in after}


SECRETS = {
    "ECHELON_API_KEY": "k-1",
    "HF_TOKEN": "hf_abcdefghijkl",
    "RAY_REDIS_PASSWORD": "pw-1",
    "HTTPS_PROXY": "http://me:pw-2@proxy:1",
    "ECHELON_ADDRESS": "h:1",
    "RAY_AUTH_MODE": "token",
    "HOME_ADDRESS": "private",
}


def test_the_environment_is_masked() -> None:
    assert masked_environment(SECRETS) == {
        "ECHELON_API_KEY": MASK,
        "HF_TOKEN": MASK,
        "RAY_REDIS_PASSWORD": MASK,
        "HTTPS_PROXY": f"http://{MASK}@proxy:1",
        "ECHELON_ADDRESS": "h:1",
        "RAY_AUTH_MODE": "token",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token = 'abc'\naddress = 'h:1'\n", f"token = {MASK}\naddress = 'h:1'\n"),
        ('  "api_key": "abc",\n', f'  "api_key": {MASK}\n'),
        ("password: abc", f"password: {MASK}"),
        ("max-step-tokens: 5\ntokenizers==0.22\n", "max-step-tokens: 5\ntokenizers==0.22\n"),
    ],
)
def test_settings_are_masked_by_their_names(text: str, expected: str) -> None:
    assert masked_settings(text) == expected


def test_tokens_are_masked_wherever_they_stand() -> None:
    text = "asked https://u:p@host with Bearer abc.def and hf_ABCDEFGHIJ, tokens: 5"
    assert masked(text) == f"asked https://{MASK}@host with Bearer {MASK} and {MASK}, tokens: 5"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that importing everything takes."""
    monkeypatch.setattr(doctor, "probe", lambda: NOTHING)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def test_the_command_tells_of_a_cluster_and_writes_a_bundle(
    quick: None, server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echelon").mkdir()
    (tmp_path / "echelon" / "config.toml").write_text(f"[p]\naddress = '{server.address}'\n# token = x\n")
    for name, value in {**SECRETS, "XDG_CONFIG_HOME": str(tmp_path), "ECHELON_ADDRESS": ""}.items():
        monkeypatch.setenv(name, value)
    events = [ClusterEvent(s, 1.5, "rank.died", "rank/1", {"signal": 9}) for s in range(60)]
    server.on("GetCluster", *[lambda request, context: convert_cluster.cluster_to_proto(CLUSTER)] * 2)
    server.on("WatchClusterEvents", *[lambda r, c: map(convert_cluster.event_to_proto, events)] * 2)
    bundle = tmp_path / "doctor.tar.gz"
    result = CliRunner().invoke(app, ["doctor", "--profile", "p", "--json", "--bundle", str(bundle)])
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["port"]["level"] == "ok" and server.address in findings["port"]["message"]
    assert result.exit_code == int(any(finding["level"] == "fail" for finding in findings.values()))
    with tarfile.open(bundle) as archive:
        files = {name: archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    names = ("findings.json", "facts.json", "versions.txt", "system.txt", "environment.json", "events.jsonl")
    assert files.keys() == {f"echelon-doctor/{name}" for name in (*names, "config/config.toml")}
    assert [json.loads(line)["sequence"] for line in files["echelon-doctor/events.jsonl"].splitlines()] == list(
        range(10, 60)
    )
    assert "grpcio==" in files["echelon-doctor/versions.txt"]
    everything = "".join(files.values())
    assert not [secret for secret in ("k-1", "hf_abcdefghijkl", "pw-1", "pw-2") if secret in everything]


def test_the_command_exits_1_over_what_is_wrong_and_says_what_to_do(quick: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        result = CliRunner().invoke(app, ["doctor", "--address", address])
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("fail  port")]
    assert f"what listens at {address} does not answer as Echelon" in line
    assert "-> `ss -ltnp" in result.stdout


def test_a_wrong_profile_is_a_finding_too(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor", "--profile", "nowhere"])
    assert (result.exit_code, result.stderr) == (1, "")
    assert "no profile 'nowhere'" in result.stdout


def test_a_bundle_that_cannot_be_written_is_wrong_use(quick: None) -> None:
    result = CliRunner().invoke(app, ["doctor", "--bundle", "/no/such/folder/x.tar.gz", "--address", "localhost:1"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--bundle /no/such/folder/x.tar.gz cannot be written: No such file" in result.stderr


def test_the_doctor_needs_no_server_package() -> None:
    """In an interpreter where none of them can be imported."""
    code = (
        "import sys\n"
        "hidden = ('torch', 'ray', 'transformers', 'tokenizers', 'numpy', 'yaml', 'llguidance')\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in hidden: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import echelon.cli.doctor as doctor\n"
        "from echelon.cli.diagnosis.probes import Probed\n"
        "doctor.probe = lambda: Probed(places=None, torch=None, imported={})\n"
        "sys.argv[1:] = ['doctor', '--json', '--address', 'localhost:1']\n"
        "from echelon.cli import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    assert {finding["name"] for finding in json.loads(ended.stdout)["findings"]} == set(levels(SOUND))
