"""`echelon checkpoint`: what it says of a store, what it finds damaged, and what it removes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from echelon.cli.app import app
from parallel.degrees import Degrees
from tests.shards import KeepingRank
from tests.tiny import make_checkpoint, write_weights
from worker.checkpoint.manifest import MANIFEST_FILE
from worker.checkpoint.store import locked

DAY_S = 86_400
WHOLE, PAIR = Degrees(), Degrees(tensor=2)


@pytest.fixture
def ranks(tmp_path: Path) -> list[KeepingRank]:
    """Two models: one over one rank, long ago, and over two, the other over one; ages are 3, 2, 2 and 0 days."""
    models = [make_checkpoint(tmp_path / name) for name in ("first", "second")]
    places = [(models[0], WHOLE.place(0)), (models[0], PAIR.place(0)), (models[0], PAIR.place(1))]
    made = [KeepingRank(model, tmp_path / "store", place) for model, place in [*places, (models[1], WHOLE.place(0))]]
    for rank, days in zip(made, (3, 2, 2, 0), strict=True):
        assert rank.keep().bytes
        age(rank.folder, days)
    return made


def age(folder: Path, days: float) -> None:
    for path in (*folder.iterdir(), folder):
        stat = path.stat()
        os.utime(path, (stat.st_atime, stat.st_mtime - days * DAY_S))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHELON_CHECKPOINT_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


def checkpoint(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *arguments])


def answered(*arguments: str, code: int = 0) -> Any:
    result = checkpoint(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def names(shards: list[dict[str, Any]]) -> list[str]:
    return sorted(shard["folder"] for shard in shards)


def folders(*ranks: KeepingRank) -> list[str]:
    return sorted(str(rank.folder) for rank in ranks)


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# list


def test_a_store_is_listed_by_model_layout_and_place(ranks: list[KeepingRank]) -> None:
    found = answered("list")
    assert names(found) == folders(*ranks)
    by_folder = {shard["folder"]: shard for shard in found}
    for rank, layout in zip(ranks, ("one rank", "tensor 2", "tensor 2", "one rank"), strict=True):
        shard = by_folder[str(rank.folder)]
        assert (shard["model"], shard["layout"], shard["place"]) == (str(rank.model), layout, rank.folder.name)
        assert (shard["state"], shard["problem"], shard["dtype"]) == ("complete", "", "float32")
        assert shard["bytes"] == sum(path.stat().st_size for path in rank.folder.iterdir())
    text = checkpoint("list")
    assert text.exit_code == 0
    first = next(line.split() for line in text.stdout.splitlines() if "p0-d0-t1" in line)
    assert first[0] == "first" and first[2:4] == ["tensor", "2"] and first[-3:] == ["2", "d", "complete"]
    assert text.stdout.splitlines()[-1].startswith("4 shards, ")


def test_what_is_not_fit_is_listed_with_the_reason(ranks: list[KeepingRank]) -> None:
    whole, left, right, other = ranks
    (whole.folder / MANIFEST_FILE).unlink()
    left.weights.write_bytes(b"")
    write_weights(other.model, seed=1)
    with locked(right.folder):
        found = {shard["folder"]: (shard["state"], shard["problem"]) for shard in answered("list")}
    assert found[str(whole.folder)] == ("torn", f"{whole.folder / MANIFEST_FILE} is missing")
    assert found[str(left.folder)][0] == "torn" and "is torn: 0 bytes, written were" in found[str(left.folder)][1]
    assert found[str(right.folder)] == ("writing", "")
    assert found[str(other.folder)][0] == "stale" and "model.safetensors has changed" in found[str(other.folder)][1]
    assert "the source has changed" in checkpoint("list").stdout.replace("\n", " ")


def test_an_empty_store_is_no_error_and_none_is(store: Path) -> None:
    result = checkpoint("list")
    assert result.exit_code == 2 and f"{store} is no folder; give the --checkpoint-dir" in result.stderr
    store.mkdir()
    assert answered("list") == [] == answered("verify")
    assert checkpoint("list").stdout.splitlines()[-1] == "0 shards, 0 B"


def test_what_cannot_be_read_is_named(store: Path) -> None:
    folder = store / "a" / "b" / "p0-d0-t0"
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")
    result = checkpoint("list")
    assert result.exit_code == 2 and f"{folder} cannot be read: Not a directory" in result.stderr


# verify


def test_whole_shards_are_verified(ranks: list[KeepingRank]) -> None:
    assert [each["damage"] for each in answered("verify")] == [[], [], [], []]
    lines = checkpoint("verify").stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("ok    ") for line in lines)


def test_damage_is_told_by_file_and_tensor(ranks: list[KeepingRank]) -> None:
    flip(ranks[1].weights)
    ranks[2].weights.write_bytes(ranks[2].weights.read_bytes()[:-1])
    found = {each["folder"]: each["damage"] for each in answered("verify", code=1)}
    assert found[str(ranks[0].folder)] == found[str(ranks[3].folder)] == []
    (flipped,), (torn,) = found[str(ranks[1].folder)], found[str(ranks[2].folder)]
    assert flipped["file"] == str(ranks[1].weights) and flipped["tensor"].endswith(".weight")
    assert "crc32c is" in flipped["problem"]
    assert (torn["file"], torn["tensor"]) == (str(ranks[2].folder), "") and "is torn" in torn["problem"]
    result = checkpoint("verify")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("fail")]
    assert len(failed) == 2
    assert any(f"{ranks[1].weights} {flipped['tensor']}: crc32c is" in line for line in failed)


@pytest.mark.parametrize("place", [0, 9, 5000, -1])
def test_each_part_of_a_file_is_looked_at(ranks: list[KeepingRank], place: int) -> None:
    flip(ranks[0].weights, place)
    assert [bool(each["damage"]) for each in answered("verify", code=1)].count(True) == 1


# prune


def test_the_last_used_layout_of_each_model_stays(ranks: list[KeepingRank]) -> None:
    would = answered("prune", "--dry-run")
    assert names(would["removed"]) == folders(ranks[0])
    assert ranks[0].folder.exists()
    assert answered("prune") == would
    assert names(answered("list")) == folders(*ranks[1:])
    assert not ranks[0].folder.parent.exists() and ranks[1].folder.exists()
    assert answered("prune")["removed"] == []


def test_what_is_named_stays_and_nothing_else(ranks: list[KeepingRank]) -> None:
    named = answered("prune", "--keep", ranks[0].folder.parent.name[:8])
    assert names(named["kept"]) == folders(ranks[0], ranks[3]), "both models have that layout"
    answered("prune", "--keep", ranks[3].digest)
    assert names(answered("list")) == folders(ranks[3])
    result = checkpoint("prune", "--keep", "nothing")
    assert result.exit_code == 2 and "--keep nothing: no model or layout" in result.stderr
    assert names(answered("list")) == folders(ranks[3])


def test_a_layout_that_is_used_again_is_no_longer_old(ranks: list[KeepingRank]) -> None:
    _, loaded = ranks[0].load()
    assert loaded.origin == "shard"
    assert names(answered("prune")["removed"]) == folders(*ranks[1:3])


@pytest.mark.parametrize(("text", "left"), [("60h", 3), ("2d", 1), ("47.5h", 1), ("1m", 1), ("30d", 4)])
def test_what_is_older_goes(ranks: list[KeepingRank], text: str, left: int) -> None:
    answered("prune", "--older-than", text)
    assert names(answered("list")) == folders(*ranks[4 - left :])


@pytest.mark.parametrize("text", ["2", "d", "-1d", "2 weeks"])
def test_an_age_has_a_unit(ranks: list[KeepingRank], text: str) -> None:
    result = checkpoint("prune", f"--older-than={text}")
    assert result.exit_code == 2 and "as in 90m, 12h or 7d" in result.stderr
    assert len(answered("list")) == 4


def test_what_is_torn_or_stale_goes_and_what_is_being_written_stays(ranks: list[KeepingRank]) -> None:
    """A changed source leaves a shard under its earlier digest: it is of use to nobody, however new it is."""
    _, left, right, other = ranks
    (left.folder / MANIFEST_FILE).unlink()
    write_weights(other.model, seed=1)
    later = KeepingRank(other.model, other.store, other.place)
    later.keep()
    age(later.folder, 1)
    with locked(right.folder):
        found = answered("prune", "--older-than", "30d")
        assert names(found["removed"]) == folders(left)
        assert names(answered("prune")["removed"]) == folders(other)
    assert names(answered("list")) == folders(ranks[0], right, later)


def test_a_rank_writes_what_was_removed_anew(ranks: list[KeepingRank]) -> None:
    answered("prune", "--older-than", "1m")
    _, loaded = ranks[0].load()
    assert loaded.origin == "source" and loaded.writer is not None and loaded.writer.write().bytes
    assert names(answered("list")) == folders(ranks[0], ranks[3])
