"""Preparation: what is settled before anything starts, and what is refused then."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import coordinator.supervisor.float8
from coordinator.placement import plan_replica
from coordinator.supervisor import preparation
from coordinator.supervisor.preparation import prepare, prepare_change, temporary_folder
from echelon.config import ServeConfig, split_address
from echelon.errors import ConfigError, UnavailableError
from examples.quantize_fp8 import quantise_checkpoint
from models.config import read_model_config
from tests.tiny import make_checkpoint, write_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def config(directory: Path, **values: object) -> ServeConfig:
    return ServeConfig.model_validate({"model": directory, "device": "cpu", "address": "127.0.0.1:0"} | values)


def test_everything_open_is_settled(model: Path, tmp_path: Path) -> None:
    settled, head = prepare(config(model, tensor=2), tmp_path)
    assert (settled.served_model_name, settled.dtype, settled.device) == ("tiny", "float32", "cpu")
    assert settled.max_context > 0 and settled.state_dir == tmp_path / "state"
    ports = {split_address(a)[1] for a in (settled.address, settled.internal_address, settled.ray_address)}
    assert len(ports) == 3 and 0 not in ports
    assert head is not None


def test_what_is_given_is_kept(model: Path, tmp_path: Path) -> None:
    here = {"state_dir": tmp_path / "s", "trace_dir": os.path.relpath(tmp_path / "t")}
    given = config(model, served_model_name="x", dtype="float64", max_context=32, **here)
    settled, _ = prepare(given, tmp_path)
    assert (settled.served_model_name, settled.dtype, settled.max_context) == ("x", "float64", 32)
    assert (settled.state_dir, settled.trace_dir) == (tmp_path / "s", tmp_path / "t")


def test_with_a_store_the_model_s_files_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself is each node's own business, and need not be there."""
    monkeypatch.chdir(tmp_path)
    given = config(make_checkpoint(tmp_path / "model"), checkpoint_dir="store")
    settled, _ = prepare(given, tmp_path)
    assert settled.checkpoint_dir == tmp_path / "store" and not (tmp_path / "store").exists()
    assert len(settled.model_digest) == 16
    assert prepare_change(given, given, settled) == settled
    write_weights(tmp_path / "model", seed=1)
    changed = prepare_change(given, given, settled)
    assert changed == settled.model_copy(update={"model_digest": changed.model_digest}) != settled
    without, _ = prepare(config(tmp_path / "model"), tmp_path)
    assert (without.checkpoint_dir, without.model_digest) == (None, "")


def test_matrices_may_stay_8_bit_floats_where_a_checkpoint_has_them(model: Path, tmp_path: Path) -> None:
    """Shards of them lie apart; and it may change while a cluster serves."""
    quantise_checkpoint(model, tmp_path / "float8", (16, 16))
    plain, kept = (
        config(tmp_path / "float8", checkpoint_dir=tmp_path, float8=float8) for float8 in ("dequantised", "kept")
    )
    settled, _ = prepare(plain, tmp_path)
    changed = prepare_change(kept, plain, settled)
    assert (settled.float8, changed.float8) == ("dequantised", "kept")
    assert changed.model_digest != settled.model_digest == prepare_change(plain, plain, changed).model_digest
    with pytest.raises(ConfigError, match=r"no quantization_config: .* leave --float8 kept out"):
        prepare(config(model, float8="kept"), tmp_path)


def test_random_matrices_cannot_stay_8_bit_floats(model: Path, tmp_path: Path) -> None:
    """By themselves they do not, whatever the checkpoint has."""
    quantise_checkpoint(model, tmp_path / "float8", (16, 16))
    asked = config(tmp_path / "float8", load_format="random", checkpoint_dir=tmp_path / "store")
    settled, _ = prepare(asked, tmp_path)
    assert (settled.float8, settled.checkpoint_dir, settled.model_digest) == ("dequantised", None, "")
    with pytest.raises(ConfigError, match=r"float8=kept is for .* load-format=random makes none; leave one") as refused:
        prepare(asked.model_copy(update={"float8": "kept"}), tmp_path)
    assert refused.value.field == "float8"


SQUARE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(
    ("block", "asked", "capabilities", "float8"),
    [
        (128, {}, ["9.0", "9.0"], "kept"),
        (128, {"tensor": 2}, ["9.0", "9.0"], "dequantised"),  # a rank would begin within a block
        (64, {}, ["9.0", "9.0"], "dequantised"),
        (None, {}, ["9.0", "9.0"], "dequantised"),
        (128, {"dtype": "float16"}, ["9.0", "9.0"], "dequantised"),
        (128, {}, ["9.0", "10.0"], "dequantised"),
        (128, {}, [], "dequantised"),
        (128, {"float8": "dequantised"}, ["9.0"], "dequantised"),
        (64, {"float8": "kept"}, [], "kept"),
        (128, {"device": "cpu"}, ["9.0"], "dequantised"),
    ],
)
def test_matrices_stay_8_bit_floats_by_themselves_where_that_is_faster(
    block: int | None,
    asked: dict[str, object],
    capabilities: list[str],
    float8: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a start, and when it changes; what is refused when asked for is left alone otherwise."""
    monkeypatch.setattr(preparation, "_gpus", lambda: 2)
    monkeypatch.setattr(coordinator.supervisor.float8, "compute_capabilities", lambda: capabilities)
    model = make_checkpoint(tmp_path / "model", **SQUARE)
    if block is not None:
        quantise_checkpoint(model, tmp_path / "float8", (block, block))
        model = tmp_path / "float8"
    given = config(model, **({"device": "cuda", "dtype": "bfloat16"} | asked))
    settled, _ = prepare(given, tmp_path)
    assert settled.float8 == float8
    assert prepare_change(given, given, settled) == settled


def test_the_cache_holds_what_was_asked_for_or_a_full_batch_of_full_contexts(model: Path, tmp_path: Path) -> None:
    settled, _ = prepare(config(model, max_context=33, max_running=4), tmp_path)
    limits = [
        plan_replica(settled.model_copy(update=values), read_model_config(model)).kv_blocks_limit
        for values in ({}, {"kv_cache_tokens": 33}, {"kv_cache_tokens": 1600}, {"device": "cuda"})
    ]
    assert limits == [4 * 3, 3, 100, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tensor": 3}, "tensor=3 does not divide"),
        (
            {"pipeline": 3},
            "pipeline=3 stages for num_hidden_layers=2: each stage needs a layer; pipeline may be 1 to 2",
        ),
        ({"data": 2, "expert": 2}, "expert=2: LlamaForCausalLM has no experts; expert may be 1"),
        ({"max_context": 10**9}, "max-context=1000000000 is more than the model's max_position_embeddings"),
        ({"kv_cache_tokens": 511}, "kv-cache-tokens=511 is less than one request of max-context=512 "),
        ({"state_dir": "/proc/nope"}, "state-dir /proc/nope cannot be made"),
        ({"state_dir": "/sys/kernel"}, "state-dir /sys/kernel cannot be written: "),
        ({"trace_dir": "/proc/nope"}, "trace-dir /proc/nope cannot be made"),
        ({"model": "/nowhere"}, "model directory /nowhere does not exist"),
        ({"model": "/proc/self/status"}, "is not a directory"),
        ({"address": "127.0.0.1:9", "metrics_address": "127.0.0.1:9"}, "address and metrics-address are both"),
    ],
)
def test_bad_settings_are_refused(model: Path, tmp_path: Path, values: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        prepare(config(model, **values), tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"tensor": 2, "spare_devices": 2},
            r"spare-devices=2 beside .*: 2 \+ 2 = 4 GPUs, and this machine has 3; lower ",
        ),
        ({"tensor": 2, "spare_devices": 2}, r"spare-devices to 1 or less"),
        ({"tensor": 2, "replicas": 2, "spare_devices": 1}, "need as many GPUs, this machine has 3; lower a degree"),
    ],
)
def test_a_machine_has_too_few_devices(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], expected: str
) -> None:
    monkeypatch.setattr(preparation, "_gpus", lambda: 3)
    with pytest.raises(ConfigError, match=expected):
        prepare(config(model, device="cuda", **values), tmp_path)
    prepare(config(model, device="cuda", tensor=2, spare_devices=1), tmp_path)
    prepare(config(model, **values), tmp_path)


def test_our_own_ray_has_places_for_ranks_and_spare_devices(model: Path, tmp_path: Path) -> None:
    _, head = prepare(config(model, replicas=100, spare_devices=20), tmp_path)
    assert head is not None and head._config.num_cpus == 120


def test_a_change_is_settled_as_a_start_is_and_keeps_what_stays(model: Path, tmp_path: Path) -> None:
    started = config(model)
    serving, _ = prepare(started, tmp_path)
    assert prepare_change(started, started, serving) == serving
    other = make_checkpoint(tmp_path / "other", "qwen3")
    wanted = config(other, tensor=2, max_context=64, dtype="float64")
    changed = prepare_change(wanted, started, serving)
    assert changed == serving.model_copy(
        update={"model": other, "served_model_name": "other", "tensor": 2, "max_context": 64, "dtype": "float64"}
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tensor": 3}, "tensor=3 does not divide"),
        ({"kv_cache_tokens": 511}, "kv-cache-tokens=511 is less than"),
        ({"lease_s": 60}, "lease-s is 30.0 while the cluster serves and cannot become 60.0; only model, "),
        ({"replicas": 2}, "replicas is 1 while the cluster serves"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_change_that_cannot_be_served_is_refused(
    model: Path, tmp_path: Path, values: dict[str, object], expected: str
) -> None:
    started = config(model)
    serving, _ = prepare(started, tmp_path)
    with pytest.raises(ConfigError) as refused:
        prepare_change(config(**{"directory": values.get("model", model), **values}), started, serving)  # type: ignore[arg-type]
    assert expected in refused.value.message


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    (directory / "tokenizer_config.json").write_text("no JSON")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        prepare(config(directory), tmp_path)
    (directory / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        prepare(config(directory), tmp_path)


def test_a_port_in_use_is_refused(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("address", "metrics_address"):
            with pytest.raises(UnavailableError, match=f"port {port} of 127.0.0.1 is in use"):
                prepare(config(model, **{flag: f"127.0.0.1:{port}"}), tmp_path)


def test_a_ray_to_join_must_be_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.ray_port.CONNECT_TIMEOUT_S", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"no Ray answers at --ray-address {address}: Connection refused"):
            prepare(config(model, ray_address=address), tmp_path)
        listener.listen()  # and says nothing
        with pytest.raises(UnavailableError, match=f"no Ray answers at --ray-address {address}: timed out"):
            prepare(config(model, ray_address=address), tmp_path)


def test_what_is_joined_must_speak_rays_protocol_and_none_of_ours_is_made_then(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(answer_http, listener)
            with pytest.raises(UnavailableError, match="what listens there is no Ray"):
                prepare(config(model, ray_address=address), tmp_path)
            answered.result()
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        settled, head = prepare(config(model, ray_address=address), tmp_path)
    finally:
        server.stop(None).wait()
    assert head is None and settled.ray_address == address


def answer_http(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_the_temporary_folder_is_short_and_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 60)))
    with temporary_folder() as folder:
        (folder / "file").write_text("")
        assert len(str(folder)) < 40
    assert not folder.exists()
