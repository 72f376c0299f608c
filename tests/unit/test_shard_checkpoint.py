"""Shard checkpoints: what a rank gets back is what it had, to the bit, or the source's with the reason told."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Barrier, get_native_id

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from echelon.errors import ConfigError
from models.config import read_model_config
from models.files import model_digest
from parallel.degrees import Degrees
from tests.cluster.layouts import COVER, LONGROPE, PRODUCT, SHAPES, TIED_ODD, Layout
from tests.shards import KeepingRank, assert_same
from tests.tiny import make_checkpoint, write_weights
from tests.unit.test_loader import bytes_read
from worker.checkpoint import restore, write
from worker.checkpoint.manifest import MANIFEST_FILE, ShardAddress
from worker.checkpoint.write import ShardWriter, Written

FUSED_AND_TIED = [
    Layout("phi3", Degrees(pipeline=2, tensor=2), LONGROPE),
    Layout("gemma3", Degrees(tensor=4), SHAPES["gemma3"]),
    Layout("qwen2", Degrees(pipeline=2, data=2), TIED_ODD),  # a vocabulary that is padded
    Layout("mistral", Degrees(tensor=2), SHAPES["mistral"]),
]
MANY = [pytest.param(layout, id=str(layout)) for layout in (*COVER, *FUSED_AND_TIED)]
ALL = [pytest.param(layout, id=f"all-{layout}", marks=[pytest.mark.long]) for layout in PRODUCT]
DTYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.fixture
def rank(tmp_path: Path) -> KeepingRank:
    """Without a shard so far."""
    return KeepingRank(make_checkpoint(tmp_path / "model", shards=2), tmp_path / "store")


@pytest.fixture
def kept(rank: KeepingRank) -> KeepingRank:
    """With a shard that is fit."""
    assert rank.keep().bytes > 0
    return rank


def assert_kept(rank: KeepingRank, expected: dict[str, Tensor]) -> None:
    found, loaded = rank.load()
    assert (loaded.origin, loaded.reason, loaded.writer) == ("shard", "", None)
    assert_same(found, expected)
    assert loaded.bytes == sum(tensor.nbytes for tensor in expected.values())


# What is right.


@pytest.mark.parametrize("layout", [*MANY, *ALL])
def test_every_rank_gets_back_what_it_had(tmp_path: Path, layout: Layout) -> None:
    """In dtypes by turns; safetensors' own reader finds the same in the file."""
    model = make_checkpoint(tmp_path / "model", layout.family, shards=2, **layout.shape)
    for number in range(layout.degrees.replica_ranks):
        dtype = DTYPES[(number + len(layout.family)) % len(DTYPES)]
        rank = KeepingRank(model, tmp_path / "store", layout.degrees.place(number), dtype)
        expected, loaded = rank.load()
        assert loaded.origin == "source" and "there is no shard" in loaded.reason and loaded.writer is not None
        written = loaded.writer.write()
        assert written.reason == "" and written.bytes == rank.weights.stat().st_size
        assert_kept(rank, expected)
        assert_same(load_file(rank.weights), expected)
    assert len(list(tmp_path.glob(f"store/*/*/*/{MANIFEST_FILE}"))) == layout.degrees.replica_ranks


def test_a_restore_reads_the_shard_and_nothing_else(kept: KeepingRank) -> None:
    config_bytes = bytes_read()
    read_model_config(kept.model)
    config_bytes = bytes_read() - config_bytes
    size = kept.weights.stat().st_size + (kept.folder / MANIFEST_FILE).stat().st_size
    before = bytes_read()
    shards, loaded = kept.load()
    read = bytes_read() - before - config_bytes
    tensors = sum(tensor.nbytes for tensor in shards.values())
    assert loaded.origin == "shard" and loaded.bytes == tensors
    assert tensors < size <= read + 4096  # the header's last page may not be asked for
    assert read <= size + 16_384, "buffers of the two small reads, and /proc"


def test_the_source_may_be_gone(kept: KeepingRank) -> None:
    expected, _ = kept.load()
    for path in kept.model.glob("model*"):
        path.unlink()
    assert_kept(kept, expected)


def test_a_shard_holds_experts_at_their_first_places(tmp_path: Path) -> None:
    """They may have been moved before it is written, and the model is no longer as it was loaded."""
    model = make_checkpoint(tmp_path / "model", "mixtral")
    rank = KeepingRank(model, tmp_path / "store", Degrees(tensor=2, expert=2).place(1))
    found, loaded = rank.load()
    expected = {name: tensor.clone() for name, tensor in found.items()}
    for tensor in found.values():
        tensor.zero_()
    assert loaded.writer is not None and loaded.writer.write().bytes
    assert_kept(rank, expected)


def test_a_shard_holds_what_stays_in_float32(tmp_path: Path) -> None:
    """The correction of DeepSeek-V3's routers, between tensors of two bytes."""
    model = make_checkpoint(tmp_path / "model", "deepseek-v3")
    rank = KeepingRank(model, tmp_path / "store", Degrees(tensor=2, expert=2).place(1), "bfloat16")
    assert rank.keep().bytes > 0
    expected, _ = KeepingRank(model, None, rank.place, "bfloat16").load()
    wide = [name for name, tensor in expected.items() if tensor.dtype == torch.float32]
    assert wide == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert_kept(rank, expected)
    assert_same(load_file(rank.weights), expected)


def test_layouts_and_dtypes_have_shards_of_their_own(rank: KeepingRank) -> None:
    places = [
        rank.place,
        Degrees().place(0),
        Degrees(pipeline=2).place(0),
        Degrees(data=2, tensor=2, expert=2).place(1),
    ]
    made = [KeepingRank(rank.model, rank.store, place, dtype) for place in places for dtype in ("bfloat16", "float32")]
    assert len({each.folder for each in made}) == len(made)
    expected = []
    for each in made:
        shards, loaded = each.load()
        assert loaded.origin == "source", "another layout is cut from the source"
        assert loaded.writer is not None and loaded.writer.write().bytes
        expected.append(shards)
    for each, shards in zip(made, expected, strict=True):
        assert_kept(each, shards)
    assert rank.store is not None
    replicas = ShardAddress(rank.store, rank.digest, Degrees(replicas=2, tensor=2).place(1), "float32")
    assert replicas.folder == rank.folder, "replicas hold the same"


def test_large_tensors_are_written_and_read_in_pieces(rank: KeepingRank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.checkpoint.checksum.PIECE_BYTES", 1000)
    monkeypatch.setattr("worker.checkpoint.checksum.CACHED_BYTES", 700)
    monkeypatch.setattr("worker.weight_file.BUFFER_BYTES", 1000)
    monkeypatch.setattr(write, "SYNC_BYTES", 5000)
    expected, loaded = rank.load()
    assert loaded.writer is not None and loaded.writer.write().bytes
    assert_kept(rank, expected)


def test_a_device_gets_a_shard_in_pieces(kept: KeepingRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but for the memory, which only a device can pin."""
    expected, _ = kept.load()
    monkeypatch.setattr(restore, "PIECE_BYTES", 1000)
    sent_bytes = []

    def fill(self: restore.ShardFile, shard: Tensor, first_byte: int) -> int:
        sent_bytes.append(shard.nbytes)
        return self.send(shard.view(-1).view(torch.uint8), first_byte, pinned=False)

    monkeypatch.setattr(restore.ShardFile, "fill", fill)
    assert_kept(kept, expected)
    assert sum(sent_bytes) == sum(tensor.nbytes for tensor in expected.values())


# What is not: the source is loaded, the reason told, and the shard written anew.


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(rank: KeepingRank, **fields: object) -> None:
    path = rank.folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def of_another_place(rank: KeepingRank) -> None:
    other = KeepingRank(rank.model, rank.store, Degrees(tensor=2).place(0))
    other.keep()
    shutil.rmtree(rank.folder)
    shutil.copytree(other.folder, rank.folder)


def with_another_cut(rank: KeepingRank) -> None:
    tensors = json.loads((rank.folder / MANIFEST_FILE).read_text())["tensors"]
    tensors["model.norm.weight"]["regions"] = [[[0, 32]]]
    edit(rank, tensors=tensors)


def left_behind(rank: KeepingRank) -> None:
    """By a writer that was killed before it renamed shard.json."""
    path = rank.folder / MANIFEST_FILE
    path.rename(rank.folder / f"{MANIFEST_FILE}.partial")
    rank.weights.write_bytes(rank.weights.read_bytes()[:1000])


DAMAGES: dict[str, tuple[Callable[[KeepingRank], object], str]] = {
    "flipped byte": (
        lambda r: flip(r.weights, -1),
        r"weights-\w+\.safetensors: \S+\.weight has crc32c \w{8}, expected",
    ),
    "flipped first byte": (lambda r: flip(r.weights, 0), r"weights-\w+\.safetensors"),
    "flipped header": (lambda r: flip(r.weights, 9), r"weights-\w+\.safetensors"),
    "truncated": (lambda r: r.weights.write_bytes(r.weights.read_bytes()[:-1]), r"is torn: \d+ bytes, written were"),
    "empty": (lambda r: r.weights.write_bytes(b""), "is torn: 0 bytes"),
    "missing weights": (lambda r: r.weights.unlink(), "is missing"),
    "missing shard.json": (lambda r: (r.folder / MANIFEST_FILE).unlink(), "there is no shard in"),
    "torn shard.json": (lambda r: (r.folder / MANIFEST_FILE).write_text('{"mod'), "shard.json is broken"),
    "empty shard.json": (lambda r: (r.folder / MANIFEST_FILE).write_text(""), "shard.json is broken"),
    "list for shard.json": (lambda r: (r.folder / MANIFEST_FILE).write_text("[]"), "shard.json is broken"),
    "wrong digest": (lambda r: edit(r, model_digest="0" * 16), "model_digest 0000000000000000, expected"),
    "wrong layout": (lambda r: edit(r, layout_digest="0" * 16), "layout_digest 0000000000000000, expected"),
    "later format": (lambda r: edit(r, format=2), "format 2, expected 1"),
    "another place": (of_another_place, "place p0-d0-t0, expected p0-d0-t1"),
    "another cut": (with_another_cut, "model.norm.weight"),
    "no tensors": (lambda r: edit(r, tensors={}), "has .* as None, this rank holds"),
    "left behind": (left_behind, "there is no shard in"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_unfit_falls_back_to_the_source_and_is_written_anew(kept: KeepingRank, name: str) -> None:
    damage, reason = DAMAGES[name]
    expected, _ = kept.load()
    damage(kept)
    found, loaded = kept.load()
    assert_same(found, expected)
    assert loaded.origin == "source"
    assert re.search(reason, loaded.reason), loaded.reason
    assert loaded.writer is not None
    assert loaded.writer.write().bytes > 0
    assert_kept(kept, expected)
    assert len(list(kept.folder.iterdir())) == 2, "nothing is left of what was unfit"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_of_a_shard_is_ever_loaded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """In whatever file and place: what is loaded is what the source has, or what was kept."""
    folder = tmp_path_factory.getbasetemp() / "flipped"
    rank = KeepingRank(folder / "model" if folder.exists() else make_checkpoint(folder / "model"), folder / "store")
    expected, loaded = rank.load()
    if loaded.writer is not None:
        loaded.writer.write()
    path = data.draw(st.sampled_from([rank.weights, rank.folder / MANIFEST_FILE]))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        found, _ = rank.load()
        assert_same(found, expected)
    finally:
        path.write_bytes(content)


def add_index(model: Path) -> None:
    """The same tensors under an index that names other files."""
    for path in model.glob("*.safetensors*"):
        path.unlink()
    write_weights(model, seed=1, shards=3)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights of the same size": lambda model: write_weights(model, seed=1, shards=2),
    "other files": add_index,
    "times alone": lambda model: os.utime(model / "model-00001-of-00002.safetensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_source_never_serves_old_weights(kept: KeepingRank, name: str) -> None:
    before, _ = kept.load()
    CHANGES[name](kept.model)
    found, loaded = kept.load()
    assert loaded.origin == "source" and "the source has changed" in loaded.reason
    assert name == "times alone" or not torch.equal(found["lm_head.weight"], before["lm_head.weight"])
    assert loaded.writer is not None and loaded.writer.write().bytes
    assert_kept(kept, found)
    assert model_digest(kept.model) != kept.digest, "and the next start looks elsewhere"


def test_another_config_is_another_model(kept: KeepingRank) -> None:
    path = kept.model / "config.json"
    path.write_text(path.read_text().replace("10000.0", "20000.0"))
    assert model_digest(kept.model) != kept.digest


def test_a_source_that_changes_while_it_is_cut_gives_no_shard(rank: KeepingRank) -> None:
    _, loaded = rank.load()
    write_weights(rank.model, seed=1, shards=2)
    assert loaded.writer is not None
    written = loaded.writer.write()
    assert written.bytes == 0 and "has changed since it was loaded" in written.reason
    assert list(rank.folder.iterdir()) == []


def test_neither_shard_nor_source_is_told_at_once(kept: KeepingRank) -> None:
    flip(kept.weights, -1)
    for path in kept.model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no such file.* from the shard checkpoint: .*has crc32c"):
        kept.load()


def test_without_a_store_nothing_is_kept(rank: KeepingRank) -> None:
    rank.store = None
    _, loaded = rank.load()
    assert (loaded.origin, loaded.reason, loaded.writer) == ("source", "", None)


# What keeps a shard from being written costs nothing else.


@contextmanager
def files_end_at(limit_bytes: int) -> Iterator[None]:
    """As a full disk ends them, with another error."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("limit_bytes", [1, 10_000, 100_000])
def test_a_full_disk_is_told_and_leaves_nothing(rank: KeepingRank, limit_bytes: int) -> None:
    expected, loaded = rank.load()
    assert loaded.writer is not None
    with files_end_at(limit_bytes):
        written = loaded.writer.write()
    assert written.bytes == 0 and "File too large" in written.reason and str(rank.folder) in written.reason
    assert list(rank.folder.iterdir()) == []
    found, loaded = rank.load()
    assert_same(found, expected)
    assert loaded.writer is not None and loaded.writer.write().bytes > 0
    assert_kept(rank, expected)


def test_a_disk_is_not_filled_to_its_end(rank: KeepingRank, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(rank.model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    written = rank.keep()
    assert written.bytes == 0 and re.search(r"\d+ bytes are needed and 100000 are free", written.reason)


def test_a_store_that_cannot_be_written_is_told(rank: KeepingRank) -> None:
    assert rank.store is not None
    rank.store.write_text("a file")
    _, loaded = rank.load()
    assert loaded.origin == "source" and loaded.writer is not None
    assert "Not a directory" in loaded.writer.write().reason


def test_two_writers_of_a_shard_write_it_once(rank: KeepingRank) -> None:
    """Ranks of two replicas, say, that have loaded the source at the same time."""
    writers = [rank.load()[1].writer for _ in range(2)]
    barrier = Barrier(2)

    def run(writer: ShardWriter | None) -> Written:
        assert writer is not None
        barrier.wait()
        return writer.write()

    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(run, writers))
    assert sorted(each.bytes > 0 for each in written) == [False, True]
    assert not any(each.reason for each in written)
    assert len(list(rank.folder.iterdir())) == 2


def test_what_another_has_repaired_is_left_alone(kept: KeepingRank) -> None:
    flip(kept.weights, -1)
    first, second = (kept.load()[1].writer for _ in range(2))
    assert first is not None and second is not None
    assert first.write().bytes > 0
    repaired = kept.weights
    again = second.write()
    assert (again.bytes, again.reason) == (0, "")
    assert kept.weights == repaired


def test_a_cancelled_writer_ends_at_once_and_leaves_nothing(rank: KeepingRank, monkeypatch: pytest.MonkeyPatch) -> None:
    _, loaded = rank.load()
    assert loaded.writer is not None

    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    loaded.writer.cancel()
    assert "cancelled" in loaded.writer.write().reason
    assert not synced, "it went on to the end of the weights"
    assert list(rank.folder.iterdir()) == []


def test_a_writer_that_breaks_in_a_way_nobody_thought_of_is_told(
    rank: KeepingRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loaded = rank.load()
    assert loaded.writer is not None

    def fsync(descriptor: int) -> None:
        raise MemoryError("no memory for it")

    monkeypatch.setattr(os, "fsync", fsync)
    written = loaded.writer.write()
    assert written.bytes == 0 and "MemoryError: no memory for it" in written.reason
    assert list(rank.folder.iterdir()) == []


def test_a_writer_beside_the_steps_is_nicer_and_tells_what_came_of_it(rank: KeepingRank) -> None:
    told: Queue[tuple[Written, int]] = Queue()
    _, loaded = rank.load()
    assert loaded.writer is not None
    own = os.getpriority(os.PRIO_PROCESS, 0)
    loaded.writer.start(lambda written: told.put((written, os.getpriority(os.PRIO_PROCESS, get_native_id()))))
    written, niceness = told.get(timeout=60)
    assert written.bytes > 0 and niceness == max(own, write.NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
