"""Models by their Hub id: what is fetched, what the cache spares, and one clear error for what cannot be had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.supervisor.hub import HubModel, hub_model, model_directory, served_name
from coordinator.supervisor.preparation import prepare
from echelon.config import resolve_config
from echelon.errors import ConfigError, UnavailableError
from tests.tiny import make_checkpoint
from tests.unit.hub_server import COMMIT, HubServer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")
    (directory / "README.md").write_text("a card")
    (directory / "pytorch_model.bin").write_text("the same weights")
    (directory / "consolidated.safetensors").write_text("the same weights")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.safetensors").write_text("the same weights")
    return directory


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the model org/tiny, and an empty cache."""
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        server.models["org/tiny"] = checkpoint
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/name", HubModel("org/name", "main")),
        ("org/Name-1.5_b@v1", HubModel("org/Name-1.5_b", "v1")),
        ("org/name@refs/pr/3", HubModel("org/name", "refs/pr/3")),
        *((path, None) for path in ("name", "./org/name", "/org/name", "~/org/name", "a/b/c", "org/name/", "../name")),
    ],
)
def test_an_id_has_two_names_and_everything_else_is_a_path(
    given: str, expected: HubModel | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_model(resolve_config({"model": given}).model) == expected


def test_a_directory_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_model("org/name") is None
    assert model_directory("org/name") == Path("org/name")
    assert served_name("org/name", tmp_path / "org" / "name") == "name"


def test_the_model_is_fetched_once_and_settled_as_a_directory(
    hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = resolve_config({"model": "org/tiny", "device": "cpu", "address": "127.0.0.1:0"})
    settled, _ = prepare(config, tmp_path)
    assert isinstance(settled.model, Path) and settled.model.name == COMMIT
    assert settled.served_model_name == "org/tiny"
    fetched = hub.files_fetched()
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= fetched
    assert not fetched & {"README.md", "pytorch_model.bin", "consolidated.safetensors"}
    assert not any("onnx" in request for request in hub.requests)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("echelon")]  # gRPC tells of forks
    assert len(told) == 1 and told[0].startswith(f"echelon: org/tiny@main is fetched from {hub.endpoint}")
    hub.requests.clear()
    assert model_directory("org/tiny@v1") == settled.model
    assert hub.files_fetched() == set()


def test_the_cache_is_enough_without_a_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model_directory("org/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert model_directory("org/tiny") == directory
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert model_directory("org/tiny") == directory
    assert hub.requests == []


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        ("org/missing", ConfigError, r"org/missing is neither a directory here nor a model on http.*HF_TOKEN"),
        ("org/secret", ConfigError, r"org/secret is gated.*accept its terms at http.*/org/secret.*HF_TOKEN"),
        ("org/tiny@nowhere", ConfigError, r"org/tiny on http.* has no revision 'nowhere'; leave @revision out"),
    ],
)
def test_what_cannot_be_had_is_one_clear_error(
    hub: HubServer, model: str, kind: type[Exception], expected: str
) -> None:
    hub.gated.add("org/secret")
    with pytest.raises(kind, match=expected) as caught:
        model_directory(model)
    assert "\n" not in str(caught.value)


def test_offline_without_the_model_says_how_to_get_it(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError, match=r"HF_HUB_OFFLINE forbids.*unset it, or run `hf download org/tiny --local-dir"
    ):
        model_directory("org/tiny")
    assert hub.requests == []


def test_no_network_says_how_to_go_on(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"http://127.0.0.1:9 cannot be reached for org/tiny.*hf download"):
        model_directory("org/tiny")


def test_ctrl_c_ends_a_download_at_once(hub: HubServer) -> None:
    hub.slow.add("model.safetensors")
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-S", "-c", heed, sys.executable, "-m", "echelon", "serve", "--model", "org/tiny"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert hub.waiting.wait(60)
            os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in stderr
