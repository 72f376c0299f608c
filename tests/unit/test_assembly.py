"""What the coordinator's parts are told of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.assembly import Layout, read_layout
from echelon.config import CoordinatorConfig
from examples.quantize_fp8 import quantise_checkpoint
from tests.predicting import make_circle
from tests.tiny import make_checkpoint


def layout(folder: Path, **changes: object) -> Layout:
    fields = {
        "model": make_checkpoint(folder / "model"), "served_model_name": "tiny", "device": "cuda", "dtype": "float32",
        "max_context": 64, "state_dir": folder / "state", "ray_address": "h:1", "internal_address": "h:2", "tensor": 2,
        "checkpoint_dir": folder / "store", "model_digest": "m",
    }  # fmt: skip
    return read_layout(CoordinatorConfig.model_validate(fields | changes))


def test_each_rank_of_the_layout_has_a_shard_and_a_spare_beyond_it_none(tmp_path: Path) -> None:
    """As there is for a moment, when a smaller layout has been asked for."""
    made = layout(tmp_path)
    places = [made.shard_for_device(rank).rpartition("/")[2] for rank in range(3)]
    assert places == ["p0-d0-t0", "p0-d0-t1", ""]


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, 0), ({"speculation": "ngram"}, 4), ({"speculation": "ngram", "speculation_tokens": 7}, 7)],
    ids=["off", "as many as by default", "as many as asked"],
)
def test_ranks_are_told_of_drafts_only_where_something_is_guessed(
    tmp_path: Path, changes: dict[str, object], told: int
) -> None:
    settings = layout(tmp_path, **changes).settings
    assert (settings.speculation_tokens, settings.predicts) == (told, False)


def test_a_layer_for_prediction_is_planned_and_told_where_it_is_asked_for(tmp_path: Path) -> None:
    directory = make_circle(tmp_path / "circle")
    plain, predicting = (layout(tmp_path, model=directory, speculation=how) for how in ("off", "mtp"))
    assert predicting.settings.predicts and predicting.model.prediction is not None
    assert min(predicting.plan.parameter_bytes) > max(plain.plan.parameter_bytes)
    assert predicting.plan.block_bytes[0] * 3 == plain.plan.block_bytes[0] * 4, "of three layers and one more"


def test_ranks_are_told_what_stays_8_bit_floats_and_hold_less(tmp_path: Path) -> None:
    quantise_checkpoint(make_checkpoint(tmp_path / "source"), tmp_path / "float8", (16, 16))
    plain, kept = (layout(tmp_path, model=tmp_path / "float8", float8=float8) for float8 in ("dequantised", "kept"))
    assert (plain.settings.keep_float8, kept.settings.keep_float8) == (False, True)
    assert plain.settings.layout != kept.settings.layout
    held = (made.plan.parameter_bytes for made in (kept, plain))
    assert all(less < more for less, more in zip(*held, strict=True))


@pytest.mark.parametrize("changes", [{"checkpoint_dir": None}, {"device": "cpu"}], ids=["no store", "no device"])
def test_there_is_nothing_to_hold_ready_without_a_store_or_a_device(tmp_path: Path, changes: dict[str, object]) -> None:
    assert layout(tmp_path, **changes).shard_for_device(0) == ""
