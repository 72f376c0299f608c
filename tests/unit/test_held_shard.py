"""A shard that a spare holds ready: it is what was checked, or it is not used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.shards import KeepingRank, assert_same
from tests.tiny import make_checkpoint
from worker.checkpoint import restore
from worker.checkpoint.held import HeldShard, Holder, hold
from worker.checkpoint.manifest import MANIFEST_FILE, UnfitShardError


@pytest.fixture
def kept(tmp_path: Path) -> KeepingRank:
    rank = KeepingRank(make_checkpoint(tmp_path / "model"), tmp_path / "store")
    rank.keep()
    return rank


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: object) -> int:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(restore.ShardFile, "fill", fill)


def touch(mapped: Tensor) -> bool:
    """As registering does: each page is made writable, which changes the file's time of change."""
    mapped[0] = mapped[0].item()
    return True


def test_what_is_held_is_fetched_and_the_file_not_read_again(
    kept: KeepingRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = kept.load()
    monkeypatch.setattr("worker.checkpoint.held.registered", touch)
    os.utime(kept.weights, (1, 1))
    held = hold(kept.folder)
    assert kept.weights.stat().st_mtime > 1
    forbid_reading(monkeypatch)
    found, loaded = kept.load(held)
    assert_same(found, expected)
    assert (loaded.origin, loaded.bytes) == ("shard", sum(tensor.nbytes for tensor in expected.values()))


def rewritten(rank: KeepingRank) -> None:
    """By another writer: the same weights under a name of their own."""
    manifest = json.loads((rank.folder / MANIFEST_FILE).read_text())
    weights = rank.weights
    shutil.copy(weights, rank.folder / "weights-other.safetensors")
    weights.unlink()
    (rank.folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"weights": "weights-other.safetensors"}))


@pytest.mark.parametrize("change", [lambda rank: flip(rank.weights), rewritten], ids=["flipped", "rewritten"])
def test_what_has_changed_since_is_checked_anew(kept: KeepingRank, change: Callable[[KeepingRank], None]) -> None:
    """A byte that flips in the file flips in what is mapped of it, too."""
    expected, _ = kept.load()
    held = hold(kept.folder, register=False)
    change(kept)
    found, loaded = kept.load(held)
    assert_same(found, expected)
    assert loaded.origin == ("source" if change is not rewritten else "shard")


def test_a_shard_that_is_not_what_was_written_is_not_held(kept: KeepingRank) -> None:
    flip(kept.weights)
    with pytest.raises(UnfitShardError, match="is not what was written"):
        hold(kept.folder, register=False)
    shutil.rmtree(kept.folder)
    with pytest.raises(UnfitShardError, match="no shard"):
        hold(kept.folder, register=False)


def settled(holder: Holder) -> None:
    if holder._thread is not None:
        holder._thread.join(30.0)


def test_a_holder_waits_for_a_shard_and_follows_its_changes(
    kept: KeepingRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[Path] = []
    monkeypatch.setattr(HeldShard, "release", lambda self: released.append(self.weights))
    holder, absent = Holder(0, register=False), kept.folder.with_name("absent")
    kept.folder.rename(absent)
    holder.want(kept.folder)
    settled(holder)
    assert holder._held is None, "there is none yet"
    absent.rename(kept.folder)
    holder.want(kept.folder)
    settled(holder)
    first, thread = kept.weights, holder._thread
    os.utime(kept.folder / MANIFEST_FILE, (5, 5))  # another rank has restored from it
    holder.want(kept.folder)
    assert holder._thread is thread, "nothing has changed"
    rewritten(kept)
    holder.want(kept.folder)
    settled(holder)
    given = holder.give()
    assert given is not None and given.weights == kept.weights
    assert released == [first]


@pytest.mark.parametrize("away", ["removed", "not there yet in another layout"])
def test_what_is_wanted_no_more_is_let_go_though_nothing_takes_its_place(
    kept: KeepingRank, away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is mapped keeps its memory when it is removed, and what is to be written may lack just that."""
    released: list[Path] = []
    monkeypatch.setattr(HeldShard, "release", lambda self: released.append(self.weights))
    holder = Holder(0, register=False)
    holder.want(kept.folder)
    settled(holder)
    weights, wanted = kept.weights, kept.folder
    if away == "removed":
        shutil.rmtree(kept.folder)
    else:
        wanted = kept.folder.with_name("p9-d0-t0")
    holder.want(wanted)
    settled(holder)
    assert released == [weights] and holder.give() is None


def test_what_is_ready_too_late_is_let_go(kept: KeepingRank, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Path] = []
    monkeypatch.setattr(HeldShard, "release", lambda self: released.append(self.weights))
    holder = Holder(0, register=False)
    assert holder.give() is None
    holder.want(kept.folder)
    settled(holder)
    assert holder.give() is None
    assert released == [kept.weights]


def test_without_a_device_there_is_nothing_to_release(kept: KeepingRank) -> None:
    if torch.cuda.is_available():
        pytest.skip("a device is here")
    hold(kept.folder, register=False).release()
