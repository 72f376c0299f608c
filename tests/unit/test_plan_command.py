"""`echelon plan`: what it prints, what a stranger's flags get, and that docs/plan.md shows what it does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from echelon.cli.app import app
from echelon.cli.plan.units import byte_count, flop_rate
from models.config import read_model_config
from models.tables import parameter_bytes
from parallel.degrees import Degrees
from tests.published import PUBLISHED, QWEN3_8B, write_config, write_published

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published configs in the working directory, by the names that the documentation uses."""
    for name in PUBLISHED:
        write_published(tmp_path, name)
    monkeypatch.chdir(tmp_path)


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def planned(*arguments: str) -> Any:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = plan(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_directory_with_a_config_is_enough(name: str) -> None:
    result = plan("--model", name, "--gpus", "16", "--gpu-memory", "141GB", "--auto")
    assert result.exit_code == 0, result.output
    for part in ("parameters", "KV cache", "decoding", "prefill", "what limits it", "why this layout"):
        assert part in result.stdout


def write_few_layers() -> None:
    published = json.loads(Path("deepseek-r1/config.json").read_text())
    write_config(Path("few-layers"), published | {"num_hidden_layers": 5, "n_routed_experts": 32})


def test_matrices_that_stay_8_bit_floats_are_planned_as_they_are_held() -> None:
    write_few_layers()
    asked = ("--model", "few-layers", "--gpus", "16", "--gpu", "h200", "--tensor", "8", "--pipeline", "2")
    plain, kept = (planned(*asked, "--dtype", "bfloat16", "--float8", how) for how in ("dequantised", "kept"))
    assert kept["parameters"] == plain["parameters"] and kept["weight_bytes"] < 0.7 * plain["weight_bytes"]
    config, places = read_model_config(Path("few-layers"), keep_float8=True), Degrees(pipeline=2, tensor=8)
    held = [parameter_bytes(config, places.place(rank), 2) for rank in (0, 8)]
    assert [stage["weight_bytes"] for stage in kept["stages"]] == held
    assert "leave --float8 kept out" in refused("--model", "qwen3-8b", "--gpus", "1", "--float8", "kept")


def test_json_has_every_stage_and_the_ranking() -> None:
    found = planned("--model", "qwen3-8b", "--gpus", "8", "--gpu", "h200", "--pipeline", "3", "--tensor", "2")
    assert found["degrees"] == {"replicas": 1, "pipeline": 3, "data": 1, "tensor": 2, "expert": 1}
    layers = [stage["layers"] for stage in found["stages"]]
    assert [first for first, _ in layers] == [0, *(end for _, end in layers[:-1])] and layers[-1][1] == 36
    assert all(stage["weight_bytes"] + stage["step_bytes"] < stage["usable_bytes"] for stage in found["stages"])
    assert found["ranking"] == [] == found["why"]
    ranked = planned("--model", "qwen3-8b", "--gpus", "8", "--gpu", "h200", "--auto")
    assert ranked["degrees"] == ranked["ranking"][0]["degrees"]
    assert len(ranked["ranking"]) > 1


def test_a_goal_is_chosen_for() -> None:
    fast = planned("--model", "qwen3-8b", "--gpus", "8", "--gpu", "h200", "--for", "latency")
    productive = planned("--model", "qwen3-8b", "--gpus", "8", "--gpu", "h200", "--for", "throughput")
    assert fast["degrees"]["tensor"] == 8 and fast["forecast"]["case"]["requests"] == 1
    assert productive["degrees"]["replicas"] > 1 and productive["forecast"]["case"]["requests"] == 8 * 64
    assert fast["why"] and productive["why"]


def test_numbers_of_a_device_can_be_given() -> None:
    known = planned("--model", "qwen3-8b", "--gpus", "1", "--gpu", "h200")
    given = planned(
        "--model", "qwen3-8b", "--gpus", "1", "--gpu-memory", "141GB", "--gpu-bandwidth", "2.4TB", "--gpu-flops", "989T"
    )
    assert given["forecast"]["round_s"] == pytest.approx(2 * known["forecast"]["round_s"], rel=0.05)
    assert given["stages"] == known["stages"]


def test_fewer_bytes_a_weight_leave_more_cache() -> None:
    half = planned("--model", "qwen3-8b", "--gpus", "1", "--gpu", "h200", "--dtype", "float8")
    whole = planned("--model", "qwen3-8b", "--gpus", "1", "--gpu", "h200")
    assert whole["weight_bytes"] == 2 * half["weight_bytes"]
    assert half["kv_tokens"] > whole["kv_tokens"]
    assert half["stages"][0]["kv_bytes_per_token"] == whole["stages"][0]["kv_bytes_per_token"]
    assert any("float8 is planned" in note for note in half["notes"])


def test_a_layer_of_prediction_takes_room_on_the_last_stage() -> None:
    degrees = ("--pipeline", "2", "--data", "8", "--expert", "8")
    layout = ("--model", "deepseek-r1", "--gpus", "16", "--gpu", "h200", "--float8", "dequantised", *degrees)
    plain, found = planned(*layout), planned(*layout, "--speculation", "mtp")
    assert planned(*layout, "--speculation", "ngram")["stages"] == plain["stages"]
    assert found["stages"][0] == plain["stages"][0]
    for part in ("weight_bytes", "kv_bytes_per_token"):
        assert found["stages"][1][part] > plain["stages"][1][part]
    assert found["kv_tokens"] < plain["kv_tokens"] and found["forecast"]["round_s"] > plain["forecast"]["round_s"]
    assert any("no guess that comes true" in note for note in found["notes"])


def test_gpus_without_work_are_told() -> None:
    assert "14 of 16 GPUs are not used" in plan("--model", "qwen3-8b", "--gpus", "16", "--tensor", "2").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tensor", "3"), "tensor=3 does not divide num_attention_heads=32"),
        (("--tensor", "3"), "nearest that fit: --tensor 4"),
        (("--pipeline", "37"), "37 ranks, and there are 16 GPUs"),
        (("--tensor", "8", "--replicas", "4"), "tensor 8 = 32 ranks, and there are 16 GPUs"),
        (("--expert", "2"), "expert=2 does not divide data 1 * tensor 1 = 1 ranks of a stage"),
        (("--tensor", "2", "--expert", "2"), "has no experts"),
        (("--tensor", "0"), "--tensor"),
        (("--gpu-memory", "141"), "141GB or 141GiB"),
        (("--gpu-memory", "-1GB"), "--gpu-memory must be a number > 0 with a unit"),
        (("--gpu-memory", "141 gold"), "--gpu-memory must be a number > 0 with a unit"),
        (("--gpu-memory", "12GB"), "no layout fits: 16 * 12.0 GB * 0.1 = 19.2 GB"),
        (("--gpu-flops", "989"), "as in 989T; got '989'"),
        (("--gpu", "h9000"), "--gpu h9000 is not known; known: h200, h100, b200, a100"),
        (("--case", "256"), "--case must be REQUESTSxPROMPTxOUTPUT"),
        (("--case", "0x1x1"), "--case must be REQUESTSxPROMPTxOUTPUT"),
        (("--case", "1x40000x2000"), "40000 + 2000 = 42000 tokens are more than max-context 40960"),
        (("--max-context", "50000"), "--max-context 50000 is more than max_position_embeddings=40960"),
        (("--dtype", "int4"), "--dtype int4 is not one of float8, float32, bfloat16, float16"),
        (("--for", "speed"), "--for"),
        (("--gpus", "0"), "--gpus"),
        (("--speculation", "mtp"), "Qwen3ForCausalLM has num_nextn_predict_layers=0"),
        (("--speculation", "guess"), "'guess' is not one of 'off', 'ngram', 'mtp'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_flags_get_one_clear_error(arguments: tuple[str, ...], message: str) -> None:
    usual = {"--model": "qwen3-8b", "--gpus": "16"}
    if "12GB" in arguments:
        usual["--gpu-memory-fraction"] = "0.1"
    rest = [word for flag, value in usual.items() if flag not in arguments for word in (flag, value)]
    assert message in refused(*arguments, *rest)


def test_a_directory_that_is_none_is_told() -> None:
    assert "missing/config.json: no such file" in refused("--model", "missing", "--gpus", "8")
    Path("empty").mkdir()
    assert "empty/config.json: no such file" in refused("--model", "empty", "--gpus", "8")
    write_config(Path("odd"), {**QWEN3_8B, "architectures": ["FalconForCausalLM"]})
    assert "'FalconForCausalLM' is not supported" in refused("--model", "odd", "--gpus", "8")


def test_a_large_model_is_planned_from_its_config_alone() -> None:
    found = planned("--model", "deepseek-r1", "--gpus", "16", "--gpu", "h200", "--auto")
    assert found["parameters"] == 671_026_419_200
    assert sum(found["degrees"].values()) > 5 and found["ranks"] == 16
    eight = ("--model", "deepseek-r1", "--gpus", "8", "--gpu", "h200")
    assert "11 such GPUs hold the weights alone" in refused(*eight, "--float8", "dequantised")


@pytest.mark.parametrize(
    "otherwise",
    [("--gpu", "b200"), ("--dtype", "float32"), ("--model", "qwen3-8b"), ("--tensor", "32", "--pipeline", "1")],
    ids=" ".join,
)
def test_matrices_are_planned_as_serve_settles_them(otherwise: tuple[str, ...]) -> None:
    """Dequantised on other devices, in other dtypes, where there are none, and where ranks would cut their blocks."""
    write_few_layers()
    asked = ("--model", "few-layers", "--gpus", "32", "--gpu", "h200", "--tensor", "16", "--pipeline", "2")
    assert planned(*asked)["weight_bytes"] == planned(*asked, "--float8", "kept")["weight_bytes"]
    plain = planned(*asked, *otherwise, "--float8", "dequantised")
    assert planned(*asked, *otherwise)["weight_bytes"] == plain["weight_bytes"]


def test_missing_flags_are_named() -> None:
    assert "--model" in refused("--gpus", "8")
    assert "--gpus" in refused("--model", "qwen3-8b")


@pytest.mark.parametrize(
    ("text", "count"),
    [("141GB", 141e9), ("80GiB", 80 * 2**30), ("4.8 TB/s", 4.8e12), ("80gb", 80e9), ("64Gi", 2**36), (".5TB", 5e11)],
)
def test_bytes_as_people_type_them(text: str, count: float) -> None:
    assert byte_count(text, "--gpu-memory") == count


def test_rates_as_people_type_them() -> None:
    assert flop_rate("989T") == flop_rate("989TFLOPS") == flop_rate("0.989P") == 989e12


def documented() -> list[tuple[str, str]]:
    """Commands of docs/plan.md with what the page shows below them."""
    text = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n\$ echelon (plan .*?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.parametrize(("command", "shown"), documented(), ids=[command for command, _ in documented()])
def test_the_documentation_shows_what_is_printed(command: str, shown: str) -> None:
    result = CliRunner().invoke(app, shlex.split(command))
    printed = "".join(f"{line.rstrip()}\n" for line in result.output.splitlines())
    assert printed == shown
