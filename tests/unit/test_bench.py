"""`echelon bench`: cases, prompts, experts that were counted, and the table beside a peer's figures."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coordinator.plan.floor import Rates, floor
from echelon.bench.cases import Case, prompts
from echelon.bench.compare import Row, pairs, read_rows, table
from echelon.bench.experts import distinct, expected_distinct
from echelon.cli.app import app
from echelon.cli.bench import engine
from echelon.cli.bench import grpc as bench_grpc
from echelon.cli.bench.engine import engine_ranks
from echelon.cli.bench.setting import Setting, settle
from echelon.client import Client
from echelon.errors import ConfigError, UnavailableError
from tests.published import PUBLISHED, write_config, write_published

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks/peers/vllm-0.24.0-2xh200.jsonl"
COUNT = st.integers(1, 10**6)


@given(st.builds(Case, COUNT, COUNT, COUNT))
def test_a_case_is_what_it_says(case: Case) -> None:
    assert Case.parse(str(case)) == Case.parse(f" {str(case).upper()} ") == case
    assert case.tokens == case.prompt_tokens + case.output_tokens
    assert case.output_count == case.requests * case.output_tokens


@given(st.text("0123456789xX.- ", max_size=12))
def test_what_is_no_case_is_refused(text: str) -> None:
    """Whatever parses is written so again, but for leading zeros."""
    try:
        case = Case.parse(text)
    except ConfigError as error:
        assert error.field == "case" and "as in 256x1024x256" in error.message
    else:
        assert str(case) == "x".join(str(int(part)) for part in text.strip().lower().split("x"))


@pytest.mark.parametrize("text", ["", "x", "1x2", "1x2x3x4", "1.5x2x3", "-1x2x3", "0x1x1", "1x0x1", "1x1x0", "1 x2x3"])
def test_these_are_no_cases(text: str) -> None:
    with pytest.raises(ConfigError, match="REQUESTSxPROMPTxOUTPUT"):
        Case.parse(text)


def test_a_request_longer_than_the_context_is_refused() -> None:
    Case(9, 100, 28).check_fits(128)
    with pytest.raises(ConfigError, match=r"100 \+ 29 = 129 tokens are more than max-context 128"):
        Case(1, 100, 29).check_fits(128)


def test_prompts_are_distinct_and_the_same_again() -> None:
    case = Case(8, 16, 4)
    drawn = prompts(case, 320, seed=1)
    assert drawn == prompts(case, 320, seed=1) and len(drawn) == 8
    assert all(len(prompt) == 16 and all(0 <= token < 320 for token in prompt) for prompt in drawn)
    others = [*prompts(case, 320, seed=2), *prompts(Case(8, 16, 5), 320, seed=1)]
    assert len({tuple(prompt[:4]) for prompt in drawn + others}) == len(drawn + others)


def test_experts_are_counted_once_whichever_rank_has_chosen_them() -> None:
    """Two ranks, two steps, two layers: {0, 1, 2}, {0}; {3}, {0, 3}."""
    ranks = [[[0b011, 0b1], [0b1000, 0b0001]], [[0b110, 0b1], [0b1000, 0b1000]]]
    assert distinct([*ranks, []]) == (3 + 1 + 1 + 2) / 4
    assert distinct([[], []]) is None


def test_experts_that_are_chosen_more_often_are_fewer() -> None:
    """Evenly two of four: each with a half; else what a row chooses always, and one of three thirds."""
    assert expected_distinct([[5, 5, 5, 5], [0, 0, 0, 0]], 2, rows=3) == pytest.approx(4 * (1 - 0.5**3))
    assert expected_distinct([[30, 10, 10, 10]], 2, rows=2) == pytest.approx(1 + 3 * (1 - (2 / 3) ** 2))


def row(model: str, layout: dict[str, int], seconds: float, **more: object) -> dict[str, object]:
    return {"model": model, "layout": layout, "case": "1x2x3", "seconds": seconds, "output_tokens_per_s": 3.0, **more}


def written(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_rows_are_met_by_layout_and_else_by_devices(tmp_path: Path) -> None:
    """The quickest of ours; a layout that the peer has too stands for itself alone."""
    peers = read_rows(
        written(
            tmp_path / "peers",
            {"peer": "A", "what": "a line of no figures"},
            row("m", {}, 9.0),
            row("m", {"tensor": 2}, 8.0),
            row("m", {"tensor": 2, "expert": 2}, 7.0),
            row("other", {}, 6.0),
        ),
        "--peers",
    )
    own = read_rows(
        written(
            tmp_path / "own",
            row("m", {"tensor": 1}, 3.0, floor_seconds=[0.6, 1.5]),
            row("m", {}, 2.0, floor_seconds=[0.6, 1.5]),
            row("m", {"tensor": 2}, 1.0),
            row("m", {"data": 2, "expert": 2}, 14.0, floor_seconds=[7.0, 7.001]),
        ),
        "RESULTS",
    )
    found = pairs(own, peers)
    assert [pair.own and pair.own.seconds for pair in found] == [2.0, 1.0, 14.0, None]
    lines = table(found, "A").splitlines()
    assert "| m | 1 device | 1x2x3 | 9.000 | 3 | 2.000 | 3 | 4.50 | 0.60–1.50 | 30%–75% |" in lines
    assert "| m | tensor 2 | 1x2x3 | 8.000 | 3 | 1.000 | 3 | 8.00 | - | - |" in lines
    assert any(line.startswith("| m | tensor 2 expert 2 (ours: data 2 expert 2) |") for line in lines)
    assert any(line.endswith("| 14.000 | 3 | 0.50 | 7.00 | 50% |") for line in lines)
    assert lines[-1] == "3 of 4 rows measured; ahead of A on 2."


def test_the_peer_s_file_is_whole() -> None:
    rows = read_rows(PEERS, "--peers")
    assert len(rows) == 15 and {row.source for row in rows} == {"vLLM 0.24.0"}
    assert {row.devices for row in rows if row.layout_name != "1 device"} == {2}
    for each in rows:
        assert each.tokens_per_s == pytest.approx(Case.parse(each.case).output_count / each.seconds, rel=0.006)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no JSON\n", "line 1 is no JSON object"),
        ('{"case": "1x2x3", "seconds": "soon"}\n', "row of case 1x2x3 is not whole"),
        ("{}\n", "has no line with a case"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "peers.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_rows(path, "--peers")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--case", "3"], "--case must be REQUESTSxPROMPTxOUTPUT"),
        (["--case", "1x99999x2"], "99999 + 2 = 100001 tokens are more than max-context 40960"),
        (["--case", "1x2x3", "--tensor", "3"], "tensor=3 does not divide num_attention_heads=32"),
        (["--case", "1x2x3", "--speculation", "ngram"], "speculation=ngram: rows are compared without it"),
        (["--case", "1x2x3", "--bandwidth", "12"], "--bandwidth must be a number > 0 with a unit"),
        (["--case", "1x2x3", "--flops", "12"], "--flops must be a number > 0"),
        (["--case", "1x2x3", "--tensor", "zero"], "--tensor: must be a valid integer"),
        (["--case", "1x2x3", "--max-running", "0"], "--max-running: must be greater than or equal to 1"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    model = write_published(tmp_path, "qwen3-8b")
    found = CliRunner().invoke(app, ["bench", "offline", "--model", str(model), *arguments])
    assert found.exit_code == 2 and complaint in found.output


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", "offline", "--model", str(tmp_path), "--case", "1x2x3"])
    assert found.exit_code == 2 and "has no config.json" in found.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--replicas", "2"], "replicas=2: the engine of one"), (["--ray-address", "a:1"], "processes of this machine")],
)
def test_what_a_coordinator_does_is_not_the_engine_s(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    model = write_published(tmp_path, "qwen3-8b")
    setting = settle({"model": str(model), arguments[0][2:].replace("-", "_"): arguments[1]})
    with pytest.raises(ConfigError, match=complaint), engine_ranks(setting):
        pass


def test_the_engine_needs_no_port_of_a_cluster_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise UnavailableError("started")

    monkeypatch.setattr(engine, "Rank", start)
    model = write_published(tmp_path, "qwen3-8b")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        setting = settle({"model": str(model), "device": "cpu", "load_format": "random"})
        setting = Setting(setting.config.model_copy(update={"address": address}), setting.model)
        with pytest.raises(UnavailableError, match="started"), engine_ranks(setting):
            pass


def test_what_is_started_has_the_flags_that_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables go before the file that the cluster has them from."""
    seen: list[dict[str, str]] = []

    def start(**_: object) -> None:
        seen.append(dict(os.environ))
        raise RuntimeError("echelon: error: started")

    monkeypatch.setattr(bench_grpc, "LocalCluster", start)
    monkeypatch.setenv("ECHELON_MAX_RUNNING", "3")
    monkeypatch.setenv("ECHELON_ELSE", "kept")
    setting = settle({"model": str(write_published(tmp_path, "qwen3-8b")), "device": "cpu"})
    with pytest.raises(UnavailableError, match="started"), bench_grpc.cluster(setting, None):
        pass
    assert "ECHELON_MAX_RUNNING" not in seen[0] and seen[0]["ECHELON_ELSE"] == "kept"
    assert os.environ["ECHELON_MAX_RUNNING"] == "3"


def test_what_stays_8_bit_floats_is_what_rows_and_floors_are_of(tmp_path: Path) -> None:
    model = write_config(tmp_path / "r1", {**PUBLISHED["deepseek-r1"], "num_hidden_layers": 6})
    setting = settle({"model": str(model), "data": "8", "expert": "8"})
    kept, case = setting.stored("kept"), Case(8, 128, 16)
    assert kept.about(None, None)["float8"] == "kept" and kept.stored("dequantised").model == setting.model
    rates = Rates(read_bytes_s=4e12, flops=8e14, all_reduce_s=9e-6)
    wide, narrow = (floor(each.census, each.degrees, case, rates).step_bytes for each in (setting, kept))
    assert 0.5 < narrow / wide < 0.7  # but for the head and what is no matrix


def test_a_target_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    model = write_published(tmp_path, "qwen3-8b")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ["bench", "offline", "--model", str(model), "--case", "1x2x3", "--target", target]
        found = CliRunner().invoke(app, command)
    assert found.exit_code != 0 and isinstance(found.exception, SystemExit) and target in found.output


def test_a_target_without_ranks_has_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "ranks", lambda _: ())
    with pytest.raises(UnavailableError, match="the cluster at a:1 has no ranks yet"):
        bench_grpc._degrees("a:1")


def test_compare_prints_the_table() -> None:
    found = CliRunner().invoke(app, ["bench", "compare", str(PEERS), "--peers", str(PEERS)])
    assert found.exit_code == 0 and "15 of 15 rows measured; ahead of vLLM 0.24.0 on 0." in found.output


def test_a_row_is_of_its_devices() -> None:
    layout = (("replicas", 2), ("pipeline", 3), ("data", 2), ("tensor", 2), ("expert", 4))
    assert Row("m", layout, "1x1x1", 1.0, 1.0).devices == 24
