"""How often experts are chosen: counted on ranks, told when it changes, added up, shown as numbers and as pictures."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from coordinator.expert_loads import ExpertLoads as Added
from coordinator.internal_server import loads_of
from echelon import convert_cluster
from echelon.aio import AsyncClient
from echelon.cli.app import app
from echelon.cli.experts.command import _watch
from echelon.cli.experts.heat import COLD, HOT, MEAN, colour, heats, pooled, since
from echelon.errors import InternalError, UnavailableError
from echelon.internal.v1 import control_pb2
from echelon.types import ExpertLoad
from echelon.v1 import cluster_pb2
from models.config import read_model_config
from models.expert_balance import rebalance_experts
from models.expert_load import ExpertLoads, LayerLoad
from models.registry import build_model
from parallel.context import ParallelContext
from parallel.degrees import Degrees
from parallel.expert import ExpertStep
from tests.ranks import as_ranks
from tests.tiny import make_checkpoint
from tests.unit.scripted import ScriptedServer, fail
from worker import expert_news
from worker.expert_news import ExpertLoadNews
from worker.loader import load_weights

LOAD = ExpertLoad(replica=1, epoch=3, layer=5, rows=(6, 0, 1, 1), slots=((0, 1), (2, 3)))
ROWS, CHOSEN, WAIT_S = 6, 3, 60.0


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second layer of three has an MLP."""
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3-moe", num_hidden_layers=3, mlp_only_layers=[1])


LAYOUTS = [Degrees(tensor=2), Degrees(tensor=2, expert=2), Degrees(data=2, expert=2)]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: f"data-{d.data}-tensor-{d.tensor}-expert-{d.expert}")
def test_every_choice_is_counted_by_one_rank(model_directory: Path, degrees: Degrees) -> None:
    """Steps before it is built do not count; experts that move do not begin anew."""

    @torch.inference_mode()
    def as_rank(context: ParallelContext) -> list[dict[int, LayerLoad]]:
        config = read_model_config(model_directory)
        model = build_model(config, context)
        load_weights(model, config, model_directory, context, lambda loaded_bytes, total_bytes: None)
        hidden = torch.randn(ROWS, config.hidden_size, generator=torch.Generator().manual_seed(1)).double()

        def step() -> None:
            for layer in model.layers:
                layer.mlp(hidden, ExpertStep(rows_per_rank=(ROWS,) * degrees.data))

        step()
        loads, found = ExpertLoads(model, context, 0), []
        for _ in range(2):
            found.append(dict(loads.read()))
            step()
            rebalance_experts(model, context)
        return [*found, dict(loads.read())]

    ranks = as_ranks(degrees, as_rank)
    for time in range(3):
        spoken = [rank[time] for rank in ranks if rank[time]]
        assert len(spoken) == (degrees.stage_ranks if degrees.exchanges_rows else 1)
        for layer in (0, 2):
            rows = [sum(loads[layer].rows) for loads in spoken]
            assert sum(rows) == time * ROWS * CHOSEN * degrees.data
            assert {len(loads[layer].slots) for loads in spoken} == {degrees.expert if degrees.exchanges_rows else 0}
        assert set(spoken[0]) == {0, 2}
    first, last = ([rank[time][0].slots for rank in ranks if rank[time]] for time in (0, 2))
    assert len({*last}) == 1 and (first != last) == (degrees.expert > 1)


class Counters:
    """In place of what is read from a device."""

    def __init__(self) -> None:
        self.loads: dict[int, LayerLoad] = {}
        self.error: Exception | None = None

    def read(self) -> dict[int, LayerLoad]:
        if self.error is not None:
            raise self.error
        return self.loads


def test_news_are_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_news, "LEAST_S", 0.0)
    counters = Counters()
    news = ExpertLoadNews(counters)  # type: ignore[arg-type]
    assert news.news() is None
    counters.loads = {5: LayerLoad((6, 0, 1, 1), ((0, 1), (2, 3)))}
    told = news.news()
    assert told is not None
    (layer,) = told.layers
    assert (layer.layer, list(layer.rows), list(layer.slots), layer.slots_per_rank) == (
        5,
        [6, 0, 1, 1],
        [0, 1, 2, 3],
        2,
    )
    assert news.news() is None
    news.forget_told()  # another coordinator has come
    assert news.news() == told
    counters.loads = {5: LayerLoad((6, 0, 1, 1), ((1, 0), (2, 3)))}
    assert news.news() is not None


def test_counters_that_cannot_be_read_end_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has no memory left for a moment, or is broken: its steps say so."""
    monkeypatch.setattr(expert_news, "LEAST_S", 0.0)
    counters = Counters()
    news = ExpertLoadNews(counters)  # type: ignore[arg-type]
    counters.error = torch.OutOfMemoryError("CUDA out of memory")
    assert news.news() is None
    counters.error, counters.loads = None, {0: LayerLoad((1,))}
    assert news.news() is not None


def test_news_come_no_sooner_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a year; but at once to another coordinator."""
    monkeypatch.setattr(expert_news, "LEAST_S", 3e7)
    counters = Counters()
    news = ExpertLoadNews(counters)  # type: ignore[arg-type]
    counters.loads = {0: LayerLoad((1,))}
    assert news.news() is not None
    counters.loads = {0: LayerLoad((2,))}
    assert news.news() is None
    news.forget_told()
    assert news.news() is not None


def test_ranks_of_an_epoch_add_up() -> None:
    added = Added()
    other = replace(LOAD, rows=(0, 1, 2, 3))
    added.told(1, 0, 3, [LOAD, replace(LOAD, layer=6)])
    added.told(1, 1, 3, [other])
    added.told(0, 0, 8, [replace(LOAD, replica=0, epoch=8)])
    assert added.describe({0: 8, 1: 3}) == [
        replace(LOAD, replica=0, epoch=8),
        replace(LOAD, rows=(6, 1, 3, 4)),
        replace(LOAD, layer=6),
    ]
    added.told(1, 1, 3, [replace(other, rows=(0, 1, 2, 4))])  # a rank's next word takes the place of its last
    assert added.describe({1: 3})[0].rows == (6, 1, 3, 5)
    assert added.describe({1: 4}) == []  # a new epoch, of which nothing was told yet


def test_a_ranks_message_is_read() -> None:
    message = control_pb2.RankMessage(fence=control_pb2.Fence(term=1, replica=1, epoch=3))
    layer = control_pb2.LayerLoad(layer=5, rows=[6, 0, 1, 1], slots=[0, 1, 2, 3], slots_per_rank=2)
    message.expert_loads.layers.append(layer)
    assert loads_of(message) == [LOAD]
    layer.ClearField("slots")
    layer.ClearField("slots_per_rank")
    del message.expert_loads.layers[:]
    message.expert_loads.layers.append(layer)
    assert loads_of(message) == [replace(LOAD, slots=())]


def test_a_load_comes_back_over_the_wire() -> None:
    for load in (LOAD, replace(LOAD, slots=()), replace(LOAD, rows=(0, 0, 0, 0))):
        assert convert_cluster.expert_load_from_proto(convert_cluster.expert_load_to_proto(load)) == load
    assert convert_cluster.expert_load_to_proto(LOAD).max_over_mean == 3.0


def test_how_uneven_a_load_is() -> None:
    assert LOAD.max_over_mean == 3.0
    assert LOAD.rank_rows == (6.0, 2.0) and LOAD.rank_max_over_mean == 1.5
    shared = replace(LOAD, slots=((0, 1), (0, 2), (0, 3)))  # the first lies on three ranks, that take turns
    assert shared.rank_rows == (2.0, 3.0, 3.0)
    nothing = replace(LOAD, rows=(0, 0, 0, 0))
    assert nothing.max_over_mean == nothing.rank_max_over_mean == 1.0


def test_between_two_looks() -> None:
    later = replace(LOAD, rows=(7, 0, 1, 3))
    assert since([LOAD], [later]) == [replace(LOAD, rows=(1, 0, 0, 2))]
    assert since([replace(LOAD, epoch=2)], [later]) == [later]  # its counters began again
    assert since([], [later]) == [later]


@pytest.mark.parametrize("rows", [(2, 0, 0, 0), (0, 2, 1), (5, 3)])
def test_counters_that_began_anew_between_two_looks(rows: tuple[int, ...]) -> None:
    """In the same epoch: a coordinator that has not heard every rank yet, or another cluster at the address."""
    later = replace(LOAD, rows=rows, slots=())
    assert since([LOAD], [later]) == [later]


def test_no_expert_was_chosen_less_than_never() -> None:
    """One that a rank on a CPU counted too high while it grew."""
    later = replace(LOAD, rows=(5, 3, 2, 1))
    assert since([LOAD], [later]) == [replace(LOAD, rows=(0, 3, 1, 0))]


def test_heat() -> None:
    assert heats((6, 0, 1, 1)) == [3.0, 0.0, 0.5, 0.5] and heats((0, 0)) == [1.0, 1.0]
    assert (colour(0), colour(1), colour(3), colour(9)) == (COLD, MEAN, HOT, HOT)
    assert pooled([1, 5, 2, 3, 4], 3) == [5, 3, 4] and pooled([1, 2], 3) == [1, 2]


def served(loads: list[ExpertLoad], times: int = 1) -> ScriptedServer:
    server = ScriptedServer()
    answer = cluster_pb2.GetExpertLoadResponse(layers=[convert_cluster.expert_load_to_proto(load) for load in loads])
    server.on("GetExpertLoad", *[lambda request, context: answer] * times)
    return server


def command(server: ScriptedServer, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["experts", "--address", server.address, *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_a_table_and_a_map() -> None:
    with served([LOAD, replace(LOAD, layer=6, slots=(), rows=(1, 1, 1, 1))]) as server:
        lines = command(server).splitlines()
    first = next(line for line in lines if line.split()[:1] == ["1/5"]).split()
    assert first == ["1/5", "4", "8", "2.0", "6", "3.00", "0", "1", "1.50"]
    assert any(line.startswith("1/5   3.  ") for line in lines)  # three times the mean, none, and little twice
    second = next(line for line in lines if line.split()[:1] == ["1/6"]).split()
    assert second[-4:] == ["1.00", "0", "0", "-"]


def test_the_command_prints_json() -> None:
    with served([LOAD]) as server:
        (found,) = json.loads(command(server, "--json"))
    assert (found["replica"], found["layer"], found["rows"]) == (1, 5, [6, 0, 1, 1])
    assert (found["max_over_mean"], found["rank_max_over_mean"], found["slots"]) == (3.0, 1.5, [[0, 1], [2, 3]])


def test_the_command_draws(tmp_path: Path) -> None:
    svg = tmp_path / "heat.svg"
    with served([LOAD, replace(LOAD, layer=6)]) as server:
        command(server, "-o", str(svg))
    text = svg.read_text()
    assert text.count("#b2182b") == 3  # the busiest expert of each layer, and the end of the scale
    assert "2 layers, 16 choices; the busiest expert of a layer has 3.00 times the mean" in text


def test_a_picture_of_pixels(tmp_path: Path) -> None:
    png = tmp_path / "heat.png"
    with served([LOAD]) as server:
        command(server, "-o", str(png))
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_model_without_experts(tmp_path: Path) -> None:
    with served([]) as server:
        assert "no expert has been chosen yet" in command(server)
    with served([]) as server:
        result = CliRunner().invoke(app, ["experts", "--address", server.address, "-o", str(tmp_path / "heat.png")])
    assert result.exit_code != 0 and "is not written" in result.output
    assert CliRunner().invoke(app, ["experts", "-o", "heat.gif"]).exit_code != 0


def test_a_watch_writes_no_picture(tmp_path: Path) -> None:
    """It has no end at which to write one."""
    result = CliRunner().invoke(app, ["experts", "--watch", "-o", str(tmp_path / "heat.png")])
    assert result.exit_code == 2 and "without --watch" in result.output


def watched(capsys: pytest.CaptureFixture[str], *, as_json: bool) -> list[str]:
    """What --watch prints: a look, one more, one at a coordinator that is away, and a third, until it is refused."""

    def answer(given: ExpertLoad) -> Any:
        message = cluster_pb2.GetExpertLoadResponse(layers=[convert_cluster.expert_load_to_proto(given)])
        return lambda request, context: message

    def away(request: Any, context: Any) -> Any:
        fail(context, UnavailableError("draining"))

    with ScriptedServer() as server:
        looks = [replace(LOAD, rows=rows, slots=()) for rows in ((6, 0, 1, 1), (7, 0, 1, 3), (9, 0, 1, 3))]
        first, second, third = map(answer, looks)
        server.on("GetExpertLoad", first, second, away, third)
        client = AsyncClient(server.address, timeout_s=WAIT_S, max_retries=0)
        with pytest.raises(InternalError):
            asyncio.run(_watch(client, 0.0, as_json))
    return capsys.readouterr().out.splitlines()


def test_watching_shows_what_was_chosen_since_the_last_look(capsys: pytest.CaptureFixture[str]) -> None:
    found = watched(capsys, as_json=False)
    rows = [line.split() for line in found if line.split()[:2] == ["1/5", "4"]]
    assert [(row[2], row[4]) for row in rows] == [("8", "6"), ("3", "2"), ("2", "2")]
    assert sum("draining; looking again" in line for line in found) == 1


def test_watching_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    looks = [json.loads(line) for line in watched(capsys, as_json=True)]
    assert [[layer["rows"] for layer in look["layers"]] for look in looks] == [
        [[6, 0, 1, 1]], [[1, 0, 0, 2]], [], [[2, 0, 0, 0]],
    ]  # fmt: skip
    assert [look["error"] for look in looks] == [None, None, "draining", None]
