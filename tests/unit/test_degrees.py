"""Degrees and places: the mesh is an arange reshaped, and a product that is none is refused with its arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import ConfigError
from parallel.degrees import Degrees


@st.composite
def degrees(draw: st.DrawFn) -> Degrees:
    pipeline, data, tensor = (draw(st.integers(1, 5)) for _ in range(3))
    fitting = [expert for expert in range(1, data * tensor + 1) if (data * tensor) % expert == 0]
    return Degrees(
        replicas=draw(st.integers(1, 3)),
        pipeline=pipeline,
        data=data,
        tensor=tensor,
        expert=draw(st.sampled_from(fitting)),
    )


@given(degrees())
def test_every_rank_has_one_place(product: Degrees) -> None:
    places = [product.place(rank) for rank in range(product.replica_ranks)]
    assert [place.rank for place in places] == list(range(product.replica_ranks))
    assert len({(p.pipeline_rank, p.data_rank, p.tensor_rank) for p in places}) == len(places)
    assert product.ranks == product.replicas * len(places)
    for place in places:
        assert place.expert_rank * product.expert_tensor + place.expert_tensor_rank == place.stage_rank
        assert 0 <= place.expert_rank < product.expert
        assert place.on_stage(place.pipeline_rank) == place


def test_tensor_ranks_are_neighbours_and_stages_far_apart() -> None:
    product = Degrees(pipeline=2, data=2, tensor=2, expert=2)
    places = [product.place(rank) for rank in range(8)]
    assert [place.tensor_rank for place in places] == [0, 1] * 4
    assert [place.data_rank for place in places] == [0, 0, 1, 1] * 2
    assert [place.pipeline_rank for place in places] == [0] * 4 + [1] * 4
    assert [place.expert_rank for place in places] == [0, 0, 1, 1] * 2
    assert places[1].on_stage(1) == places[5]


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({"tensor": 0}, "tensor", "tensor=0 is not a number of ranks; it is 1 or more"),
        (
            {"data": 2, "tensor": 3, "expert": 4},
            "expert",
            "expert=4 does not divide data 2 * tensor 3 = 6 ranks of a stage; expert may be 1, 2, 3, 6",
        ),
        (
            {"data": 4, "expert": 4, "redundant_experts": 6},
            "redundant_experts",
            "redundant-experts=6 is no equal part for each of expert=4 groups of ranks; it may be any multiple of 4",
        ),
    ],
)
def test_what_is_no_product_is_refused(given: dict[str, int], field: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Degrees(**given)
    assert (caught.value.message, caught.value.field) == (message, field)


def test_the_whole_product_is_shown() -> None:
    shown = str(Degrees(replicas=2, pipeline=2, tensor=4))
    assert shown == "replicas 2 * pipeline 2 * data 1 * tensor 4 = 16 ranks"
