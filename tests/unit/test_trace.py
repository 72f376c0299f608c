"""`echelon trace`: what it reads, refuses, prints and draws, and that docs/pipeline.md shows what it does."""

from __future__ import annotations

import builtins
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from echelon.cli.app import app
from echelon.cli.trace.chrome import to_chrome
from echelon.cli.trace.drawing import Box, Label, Line, Picture, to_png, to_svg
from echelon.cli.trace.figures import figures
from echelon.cli.trace.picture import PALE, STRONG, Panel, draw
from echelon.errors import ConfigError
from parallel.schedule import Kind, Op, Schedule, decode_rounds, one_f_one_b
from parallel.timeline import OpRecord, Timeline, simulate
from parallel.trace import merged, parse_records, record_line

ROOT = Path(__file__).resolve().parents[2]
OPS = st.builds(Op, st.sampled_from(Kind), st.integers(0, 9), st.integers(0, 3))
SECONDS = st.floats(0, 1e6)


def trace(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["trace", *arguments])


def timeline(schedule: Schedule) -> Timeline:
    return simulate(schedule, lambda stage, op: 1.0 if op.kind is Kind.FORWARD or schedule.trains else 0.0)


def panel(steps: Timeline, returns: bool = True) -> Panel:
    return Panel(figures("a title", steps), steps, returns=returns)


def executed(epoch: int = 1, shift_s: float = 100.0) -> list[str]:
    """Lines of a log: two stages, two cohorts, three rounds."""
    records = timeline(decode_rounds(2, 2, 3, 2)).records
    return [
        record_line(
            r._replace(start_s=r.start_s + shift_s, end_s=r.end_s + shift_s, epoch=epoch, step=r.op.microbatch + 1)
        )
        for r in records
    ]


def log(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@settings(deadline=None)
@given(st.lists(st.builds(OpRecord, st.integers(0, 7), OPS, SECONDS, SECONDS, st.integers(0, 5), st.integers(0, 99))))
def test_records_survive_their_lines(records: list[OpRecord]) -> None:
    records = [record._replace(end_s=record.start_s + record.end_s) for record in records]
    assert parse_records([line for record in records for line in (record_line(record), "")], "log") == records


def test_what_a_log_may_leave_out() -> None:
    line = '{"stage": 1, "op": "B", "microbatch": 4, "start_s": 1, "end_s": 2.5, "host": "ignored"}'
    assert parse_records([line], "log") == [OpRecord(1, Op(Kind.BACK, 4), 1.0, 2.5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "G"}, 'log:2: op must be "F" or "B", got "G"'),
        ({"op": None}, 'log:2: op must be "F" or "B", got null'),
        ({"stage": -1}, "log:2: stage must be an integer >= 0, got -1"),
        ({"stage": None}, "log:2: stage must be an integer >= 0, got null"),
        ({"microbatch": True}, "log:2: microbatch must be an integer >= 0, got true"),
        ({"epoch": "1"}, 'log:2: epoch must be an integer >= 0, got "1"'),
        ({"start_s": float("nan")}, "log:2: start_s must be a finite number of seconds, got NaN"),
        ({"start_s": "soon"}, 'log:2: start_s must be a finite number of seconds, got "soon"'),
        ({"end_s": 99.0}, "log:2: end_s 99 is before start_s 100"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place_and_field(change: dict[str, Any], message: str) -> None:
    good = executed()[0]
    with pytest.raises(ConfigError) as error:
        parse_records([good, json.dumps(json.loads(good) | change)], "log")
    assert error.value.message == message


@pytest.mark.parametrize("line", ["{", "[1]", "7", '"F"'])
def test_what_is_no_object_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^log:1: "):
        parse_records([line], "log")


def test_ranks_of_one_stage_become_one_record() -> None:
    one, other = OpRecord(0, Op(Kind.FORWARD, 0), 1.0, 2.0), OpRecord(0, Op(Kind.FORWARD, 0), 0.5, 1.5)
    later = one._replace(epoch=1)
    assert merged([one, other, later]) == [OpRecord(0, Op(Kind.FORWARD, 0), 0.5, 2.0), later]


def test_a_simulation_prints_stages_and_bubble() -> None:
    lines = trace("--simulate", "stages=4,microbatches=8").stdout.splitlines()
    assert lines[0] == (
        "1F1B at inference: 4 stages, 8 micro-batches, 4 cohorts: 11 s, bubble 27.3%; closed form 27.3%; "
        "round 4 s; bubble 0.0% between filling and draining"
    )
    assert [line.split() for line in lines[1:4]] == [
        ["stage", "F", "B", "busy", "s", "idle"],
        ["0", "8", "8", "8", "27.3%"],
        ["1", "8", "0", "8", "27.3%"],
    ]


def test_json_has_the_same_figures() -> None:
    found = json.loads(trace("--simulate", "microbatches=8", "--simulate", "schedule=gpipe", "--json").stdout)
    inference, training = found
    assert (inference["span_s"], inference["round_s"], inference["steady_bubble"]) == (11.0, 4.0, 0.0)
    assert inference["bubble"] == pytest.approx(3 / 11) == inference["ideal_bubble"]
    assert inference["stages"][1] == {"stage": 1, "forwards": 8, "backs": 0, "busy_s": 8.0, "idle": 1 - 8 / 11}
    assert (training["round_s"], training["steady_bubble"]) == (None, None)


@pytest.mark.parametrize(
    ("simulation", "expected"),
    [
        ("schedule=1f1b,stages=4,microbatches=8", "33 s, bubble 27.3%"),
        ("schedule=gpipe,stages=4,microbatches=8,back=1", "22 s, bubble 27.3%"),
        ("schedule=interleaved,stages=4,microbatches=8,chunks=3", "bubble 11.1%; closed form 11.1%"),
        ("stages=4,microbatches=200,slots=0.7/1.3/0.2/1", "round 5.2 s"),
        ("stages=2,microbatches=4,costs=1/3", "13 s"),
        ("stages=4, microbatches=200, latency=0.25, cohorts=5", "round 5 s; bubble 0.0%"),
        ("stages=1,microbatches=1", "1 s, bubble 0.0%"),
    ],
)
def test_what_simulations_cost(simulation: str, expected: str) -> None:
    result = trace("--simulate", simulation)
    assert result.exit_code == 0
    assert expected in result.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("simulation", "message"),
    [
        ("stages=0", "stages must be an integer >= 1, got '0'"),
        ("stages=four", "stages must be an integer >= 1, got 'four'"),
        ("stages=2,stages=3", "stages is given twice"),
        ("layers=3", "expected KEY=VALUE with a key of schedule, stages"),
        ("stages", "got 'stages'"),
        ("", "got ''"),
        ("costs=1/0/1", "costs must be a number > 0, got '1/0/1'"),
        ("costs=1//1", "costs must be a number > 0"),
        ("latency=-1", "latency must be a number >= 0, got '-1'"),
        ("stages=4,costs=1/2", "2 costs for stages=4: give 1 or 4"),
        ("schedule=dualpipe", "schedule must be one of inference, 1f1b, gpipe, interleaved"),
        ("schedule=interleaved,microbatches=6", "divisible by stages; got chunks=2, microbatches=6, stages=4"),
        ("chunks=2", "chunks=2 needs schedule=interleaved"),
        ("stages=1000,microbatches=1000", "= 2000000 operations; at most 100000"),
        ("schedule=interleaved,chunks=2,queue=1", "queue=1 deadlocks interleaved: stage 0 at F(0.1) waits for"),
    ],
)
def test_what_cannot_be_simulated_is_one_line_and_exit_2(simulation: str, message: str) -> None:
    result = trace("--simulate", simulation)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_log_is_shown_with_its_latest_epoch(tmp_path: Path) -> None:
    path = log(tmp_path / "ops.jsonl", *executed(epoch=1), *executed(epoch=2, shift_s=200.0))
    lines = trace(path).stdout.splitlines()
    assert lines[0] == "executed, epoch 2: 7 s, bubble 14.3%; bubble 0.0% between filling and draining"
    assert trace(path, "--epoch", "1").stdout.startswith("executed, epoch 1: 7 s")
    wrong = trace(path, "--epoch", "3")
    assert (wrong.exit_code, wrong.stderr) == (2, "echelon: error: epoch 3 is not in the log; it has 1, 2\n")


def test_a_window_keeps_what_began_in_it(tmp_path: Path) -> None:
    path = log(tmp_path / "ops.jsonl", *executed())
    assert trace(path, "--window", "2:4").stdout.splitlines()[0].startswith("executed, epoch 1: 2 s, bubble 0.0%")
    for window, message in (("4:2", "FROM < TO; got '4:2'"), ("x", "got 'x'"), ("50:", "the log lasts 7 s")):
        result = trace(path, "--window", window)
        assert result.exit_code == 2 and message in result.stderr


def test_logs_of_several_ranks_are_one_timeline(tmp_path: Path) -> None:
    """Two tensor ranks of each stage, each with a log of its own."""
    lines = executed()
    paths = [log(tmp_path / f"rank{rank}.jsonl", *lines) for rank in range(2)]
    assert trace(*paths).stdout == trace(paths[0]).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a log, or --simulate stages=4,microbatches=8"),
        (("no/such.jsonl",), "no/such.jsonl cannot be read: No such file or directory"),
        (("--simulate", "stages=2", "-o", "picture.gif"), "picture.gif: expected one of .json, .jsonl, .png, .svg"),
        (("--simulate", "stages=2", "-o", "no/such.svg"), "no/such.svg cannot be written: No such file or directory"),
        (
            ("--simulate", "stages=8,microbatches=600", "-o", "x.svg"),
            "6000 operations are too many to draw, at most 5000",
        ),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    result = trace(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_log_that_is_empty_or_no_text_is_refused(tmp_path: Path) -> None:
    assert "no operations in" in trace(log(tmp_path / "empty.jsonl")).stderr
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    assert "cannot be read: it is not UTF-8" in trace(str(tmp_path / "binary.jsonl")).stderr


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    path = log(tmp_path / "ops.jsonl", *executed())
    trace(path, "-o", str(tmp_path / "copy.jsonl"))
    assert trace(str(tmp_path / "copy.jsonl")).stdout == trace(path).stdout


def test_the_perfetto_trace_has_every_operation_and_arrows_between_stages() -> None:
    steps = timeline(decode_rounds(3, 3, 2, 3))
    events = json.loads(to_chrome([("planned", steps), ("again", steps)]))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    assert Counter((event["tid"], event["name"]) for event in slices) == Counter(
        (record.stage, str(record.op)) for record in steps.records
    )
    (second,) = (event for event in slices if (event["tid"], event["name"]) == (1, "F(2)"))
    assert (second["ts"], second["dur"]) == (3e6, 1e6)
    names = {event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "process_name"}
    assert names == {"planned", "again"}
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) == 2 * 6 * 2
    assert all(starts[key]["ts"] <= ends[key]["ts"] and starts[key]["tid"] + 1 == ends[key]["tid"] for key in starts)


def boxes(picture: Picture, colours: tuple[str, ...]) -> list[Box]:
    return [shape for shape in picture.shapes if isinstance(shape, Box) and shape.fill in colours]


def test_a_picture_has_a_box_for_each_operation_where_and_as_long_as_it_was() -> None:
    picture = draw([panel(timeline(one_f_one_b(4, 8)), returns=False)])
    strong, pale = boxes(picture, STRONG), boxes(picture, PALE)
    assert (len(strong), len(pale)) == (32, 32)
    assert len({box.y for box in strong}) == 4
    steps = [round(box.width + 1) for box in strong + pale]
    assert len(set(steps)) == 1 and steps[0] == round((1200 - 92 - 96) / 22)
    numbers = Counter(shape.text for shape in picture.shapes if isinstance(shape, Label) and shape.size == 15)
    assert all(numbers[str(m)] == 8 for m in range(8))
    assert all(
        box.x >= 0 and box.x + box.width <= picture.width and box.y + box.height <= picture.height for box in strong
    )


def test_tokens_that_return_are_lines_from_the_last_stage_to_the_first() -> None:
    steps = timeline(decode_rounds(4, 4, 3, 4))
    with_lines, without = (draw([panel(steps, returns=returns)]) for returns in (True, False))
    count = [sum(isinstance(shape, Line) for shape in picture.shapes) for picture in (with_lines, without)]
    assert count[0] - count[1] == 12


def test_panels_lie_under_each_other() -> None:
    steps = timeline(one_f_one_b(2, 2))
    one, two = (draw([panel(steps)] * count) for count in (1, 2))
    assert two.height > 1.8 * one.height
    assert max(box.y for box in boxes(one, STRONG)) < min(
        box.y for box in boxes(two, STRONG)[len(boxes(one, STRONG)) :]
    )


def test_svg_is_well_formed_and_says_what_was_drawn() -> None:
    picture = Picture(
        40, 20, (Box(1, 2, 3.456, 4, "#ff0000", 1), Line(0, 0, 1, 1, "#00ff00"), Label(5, 6, "a<b & c", 7, "#000000"))
    )
    root = ElementTree.fromstring(to_svg(picture))
    assert (root.get("width"), root.get("height")) == ("40", "20")
    _, box, line, label = list(root)
    assert (box.get("x"), box.get("width"), box.get("rx"), box.get("fill")) == ("1", "3.46", "1", "#ff0000")
    assert line.get("stroke") == "#00ff00"
    assert (label.text, label.get("font-size"), label.get("text-anchor")) == ("a<b & c", "7", "start")


def test_png_has_the_boxes_where_they_belong(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "picture.png"
    path.write_bytes(to_png(Picture(40, 20, (Box(10, 5, 20, 10, "#ff0000"), Label(1, 1, "x", 5, "#000000")))))
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    assert image.size == (80, 40)
    assert (image.getpixel((40, 20)), image.getpixel((75, 35))) == ((255, 0, 0), (255, 255, 255))


def test_without_pillow_a_png_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import_module = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return import_module(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    result = trace("--simulate", "stages=2", "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 2
    assert result.stderr == "echelon: error: a PNG needs PIL: pip install 'echelon[viz]', or write an .svg\n"


def test_the_documents_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    from PIL import Image

    page = (ROOT / "docs/pipeline.md").read_text()
    (command,) = re.findall(r"^echelon trace ((?:.*\\\n)*.*)$", page, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    assert {"docs/pipeline.svg", "docs/pipeline.png"} <= set(words)
    assert trace(*(word.replace("docs/", f"{tmp_path}/") for word in words)).exit_code == 0
    assert (tmp_path / "pipeline.svg").read_bytes() == (ROOT / "docs/pipeline.svg").read_bytes()
    with Image.open(tmp_path / "pipeline.png") as drawn, Image.open(ROOT / "docs/pipeline.png") as shown:
        assert drawn.size == shown.size


def test_the_documents_figures_are_what_the_simulator_says() -> None:
    rows = re.findall(
        r"^\| (`.*`)? ?\| ([\d.]+) s \| ([\d.]+) % \|$", (ROOT / "docs/pipeline.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 5
    for keys, round_s, bubble in rows:
        simulation = ",".join(["stages=4,microbatches=200", *filter(None, [keys.strip("`")])])
        assert f"round {round_s} s; bubble {bubble}% between" in trace("--simulate", simulation).stdout
