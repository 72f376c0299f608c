"""`echelon bench online`: who arrives when, what is made of what they waited for, and how that is drawn."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from echelon.bench.online import Answer, Load, figures, percentiles, schedule
from echelon.cli.app import app
from echelon.cli.bench.picture import draw
from echelon.cli.trace.drawing import Label, Line
from echelon.errors import ConfigError
from tests.published import write_published


def load(**values: Any) -> Load:
    return Load(**{"rate": 50.0, "duration_s": 40.0, "prompt_tokens": 8, "output_tokens": 4} | values)


def test_arrivals_are_poisson_and_the_same_again() -> None:
    """Gaps of mean 1 / rate whose deviation is their mean; as many in each second as Poisson has, mean and variance."""
    arrivals = schedule(load(), 320)
    assert arrivals == schedule(load(), 320) != schedule(load(seed=1), 320)
    times = [arrival.due_s for arrival in arrivals]
    assert times == sorted(times) and times[0] > 0 and times[-1] < 40
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.1) and deviation == pytest.approx(mean, rel=0.1)
    seconds = Counter(int(time) for time in times)
    variance = sum((seconds[second] - 50) ** 2 for second in range(40)) / 40
    assert 20 < variance < 100


def test_lengths_keep_within_the_spread() -> None:
    arrivals = schedule(load(spread=0.5), 320)
    assert {len(arrival.prompt) for arrival in arrivals} == set(range(4, 13))
    assert {arrival.output_tokens for arrival in arrivals} == {2, 3, 4, 5, 6}
    assert {len(arrival.prompt) for arrival in schedule(load(), 320)} == {8}
    load(spread=0.5).check_fits(18)
    with pytest.raises(ConfigError, match=r"up to 12 \+ 6 = 18 tokens are more than max-context 17"):
        load(spread=0.5).check_fits(17)


@pytest.mark.parametrize(
    "values", [{"rate": 0.0}, {"duration_s": -1.0}, {"rate": float("nan")}, {"prompt_tokens": 0}, {"spread": 1.0}]
)
def test_a_load_that_is_none_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load(**values)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=300))
def test_percentiles_are_the_least_values_that_so_many_do_not_exceed(values: list[float]) -> None:
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        found = percentiles(values)[name]
        within = sum(round(value, 5) <= found for value in values)
        below = sum(round(value, 5) < found for value in values)
        assert within >= share * len(values) - 1e-9 and below < share * len(values) + 1e-9


def test_figures_by_hand() -> None:
    """Two in time, one whose first id is late, one that is too slow behind it, one that fails."""
    answers = [
        Answer([0.1, 0.2, 0.3], 3),
        Answer([0.2], 1),
        Answer([0.6, 0.65], 2),
        Answer([0.1, 0.5], 5),
        Answer([0.1], 1, error="overloaded"),
    ]
    found = figures(answers, 2.0, ttft_slo_s=0.5, itl_slo_s=0.099999 + 1e-5)
    assert (found["requests"], found["failed"], found["first_error"]) == (5, 1, "overloaded")
    assert (found["output_tokens_per_s"], found["requests_per_s"]) == (5.5, 2.0)
    assert found["ttft_s"] == {"p50": 0.1, "p90": 0.6, "p99": 0.6}
    assert found["itl_s"] == {"p50": 0.1, "p90": 0.4, "p99": 0.4}
    assert found["e2e_s"] == {"p50": 0.3, "p90": 0.65, "p99": 0.65}
    assert found["goodput_per_s"] == 1.5  # the fourth has its four ids in 0.4 s
    assert figures(answers, 2.0, itl_slo_s=0.09)["goodput_per_s"] == 1.0
    assert figures(answers, 2.0)["goodput_per_s"] == 2.0


def rows() -> list[dict[str, Any]]:
    """Cases of two layouts, and two rates."""
    roof = {"flop": 4e12, "read_bytes": 1e12, "devices": 2, "read_bytes_s": 4e12, "flops": 8e14, "all_reduce_s": 9e-6}
    offline = {"model": "m", "through": "engine", "case": "1x2x3", "seconds": 0.5, "floor_of": roof}
    waits = {"ttft_s": {"p50": 0.1, "p99": 0.3}, "itl_s": {"p50": 0.01, "p99": 0.02}}
    online = {"model": "m", "through": "grpc", "layout": {}, **waits}
    return [
        {**offline, "layout": {"tensor": 2}},
        {**offline, "layout": {"pipeline": 2}, "floor_of": roof | {"flop": 4e14}},
        {**online, "rate": 2, "output_tokens_per_s": 900.0},
        {**online, "rate": 1, "output_tokens_per_s": 400.0},
    ]


def test_a_picture_has_what_there_is() -> None:
    texts = [shape.text for shape in draw(rows()).shapes if isinstance(shape, Label)]
    assert {"m, tensor 2, engine", "m, pipeline 2, engine", "m, grpc, first token, p99"} <= set(texts)
    assert any(text.startswith("Roofline") for text in texts) and "Waiting against throughput" in texts
    alone = [shape.text for shape in draw(rows()[:2]).shapes if isinstance(shape, Label)]
    assert "Waiting against throughput" not in alone
    with pytest.raises(ConfigError, match="neither a case with its floor nor a rate"):
        draw([{"case": "1x2x3"}])


def test_the_roof_bends_where_flop_a_byte_are_the_rates_ratio() -> None:
    """Both parts meet; the first rises a decade for a decade."""
    lines = [shape for shape in draw(rows()[:1]).shapes if isinstance(shape, Line)]
    slope, flat = [line for line in lines if line.width == 2]
    across = sorted(line.x1 for line in lines if line.x1 == line.x2)
    upward = sorted(line.y1 for line in lines if line.y1 == line.y2 and line is not flat)
    decades = (slope.x2 - slope.x1) / (across[1] - across[0]), (slope.y1 - slope.y2) / (upward[1] - upward[0])
    assert decades[0] == pytest.approx(decades[1])
    assert (slope.x2, slope.y2) == (flat.x1, flat.y1) and flat.y1 == flat.y2 and slope.y1 > slope.y2


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<svg")])
def test_plot_writes_a_picture(tmp_path: Path, suffix: str, begin: bytes) -> None:
    results, picture = tmp_path / "results.jsonl", tmp_path / f"picture{suffix}"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    assert CliRunner().invoke(app, ["bench", "plot", str(results), "-o", str(picture)]).exit_code == 0
    assert picture.read_bytes().startswith(begin)


@pytest.mark.parametrize("missing", ["seconds", "layout", "through"])
def test_a_row_that_is_not_whole_is_refused(tmp_path: Path, missing: str) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({name: value for name, value in rows()[0].items() if name != missing}))
    found = CliRunner().invoke(app, ["bench", "plot", str(results), "-o", str(tmp_path / "picture.svg")])
    assert found.exit_code == 2 and f"a row is not whole: KeyError('{missing}')" in found.output


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", "plot", str(tmp_path / "results.jsonl"), "-o", "x.gif"])
    assert found.exit_code == 2 and "expected one of .png, .svg" in found.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rate", "0"], "--rate 0.0 must be a number above 0"),
        (["--rate", "0.0001", "--duration", "0.1"], "no request arrives; raise --rate or --duration"),
        (["--rate", "1", "--prompt-tokens", "50000"], "are more than max-context 40960"),
        (["--rate", "1", "--spread", "2"], "--spread 2.0 must be at least 0 and below 1"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    model = write_published(tmp_path, "qwen3-8b")
    found = CliRunner().invoke(app, ["bench", "online", "--model", str(model), *arguments])
    assert found.exit_code == 2 and complaint in found.output
