"""`echelon bench` on real ranks, and random weights in a cluster: the answers of a saved copy, in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from echelon.cli.app import app
from echelon.testing import LocalCluster
from models.config import read_model_config
from models.registry import build_model
from models.tables import parameter_table
from parallel.context import solo_context
from tests.tiny import make_checkpoint
from worker.random_weights import fill_randomly

pytestmark = [pytest.mark.cluster, pytest.mark.long]

PROMPTS = [[7, 11, 13, number] for number in range(4)]
LAYOUTS = ({"tensor": 2, "expert": 2}, {"tensor": 1, "expert": 1, "pipeline": 2})
Answers = list[tuple[tuple[int, ...], list[float]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, saved by one process."""
    directory = make_checkpoint(tmp_path_factory.mktemp("whole") / "tiny", "qwen3-moe")
    config, context = read_model_config(directory), solo_context(torch.device("cpu"), torch.float64)
    model = build_model(config, context)
    fill_randomly(model, config, context, lambda *_: None)
    saved = {each.name: model.shards[each.name].clone() for each in parameter_table(config)}
    save_file(saved, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def bare(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config.json alone."""
    directory = tmp_path_factory.mktemp("bare") / "tiny"
    directory.mkdir()
    shutil.copy(whole / "config.json", directory)
    return directory


def answers(cluster: LocalCluster) -> Answers:
    found = []
    for prompt in PROMPTS:
        told = cluster.client().generate(token_ids=prompt, max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
        found.append((told.token_ids, [logprob.logprob for logprob in told.logprobs]))
    return found


def assert_equal(found: Answers, expected: Answers) -> None:
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(found, expected, strict=True):
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-9)


def test_every_layout_answers_as_a_saved_copy_does(whole: Path, bare: Path, tmp_path: Path) -> None:
    """And so does one whose ranks have been killed; a store of shards that is asked for is left alone."""
    with LocalCluster(whole, dtype="float64", max_context=64) as cluster:
        expected = answers(cluster)
    assert len({ids for ids, _ in expected}) == len(PROMPTS)
    store = tmp_path / "store"
    with LocalCluster(bare, dtype="float64", load_format="random", checkpoint_dir=store, max_context=64) as cluster:
        assert_equal(answers(cluster), expected)
        for layout in LAYOUTS:
            cluster.reconfigure(**layout)
            assert_equal(answers(cluster), expected)
        epoch = cluster.status().replicas[0].epoch
        cluster.kill(1)
        cluster.wait_epoch(0, epoch + 1)
        assert_equal(answers(cluster), expected)
        completion = cluster.client().generate("17 204", max_tokens=2, ignore_eos=True)
        assert completion.text.split() == [str(token) for token in completion.token_ids]
    assert not store.exists()


@pytest.mark.parametrize("through", ["engine", "grpc"])
def test_offline_cases_are_rows(bare: Path, tmp_path: Path, through: str) -> None:
    """More requests than run at once wait for their turn; a file gets the lines as stdout does."""
    results = tmp_path / "results.jsonl"
    command = f"bench offline --model {bare} --load-format random --device cpu --dtype float32 --tensor 2 --expert 2"
    command += f" --max-context 64 --max-running 4 --case 1x8x6 --case 9x8x6 --repeats 2 -o {results}"
    found = CliRunner().invoke(app, [*command.split(), *(["--grpc"] if through == "grpc" else [])])
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert rows == [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["case"], row["through"]) for row in rows] == [("1x8x6", through), ("9x8x6", through)]
    for row in rows:
        assert len(row["all_seconds"]) == 2 and row["seconds"] == min(row["all_seconds"]) > 0
        assert (row["cached_tokens"], row["weights"], row["layout"]) == (0, "random", {"tensor": 2, "expert": 2})
        assert 0 < row["floor_seconds"][0] <= row["floor_seconds"][1]
        assert 3 <= row["distinct_experts"]["of_a_layer_in_a_step"] <= 8
    assert ("counted" in rows[0]["distinct_experts"]["from"]) == (through == "engine")
    if through == "engine":
        assert rows[0]["distinct_experts"]["of_a_layer_in_a_step"] == 3  # one row


def test_online_loads_are_rows_and_a_picture(bare: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    with LocalCluster(bare, load_format="random", max_context=64) as cluster:
        command = f"bench online --model {bare} --target {cluster.target} --rate 4 --rate 8 --duration 3"
        command += f" --prompt-tokens 8 --output-tokens 6 --spread 0.5 --ttft-slo-s 60 --itl-slo-s 60 -o {results}"
        found = CliRunner().invoke(app, command.split())
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["rate"] for row in rows] == [4, 8]
    for row in rows:
        assert row["failed"] == 0 < row["requests"] and row["goodput_per_s"] == row["requests_per_s"]
        assert 0 < row["ttft_s"]["p50"] <= row["ttft_s"]["p99"] <= row["e2e_s"]["p99"]
    drawn = CliRunner().invoke(app, ["bench", "plot", str(results), "-o", str(tmp_path / "online.svg")])
    assert drawn.exit_code == 0 and "Waiting against throughput" in (tmp_path / "online.svg").read_text()
