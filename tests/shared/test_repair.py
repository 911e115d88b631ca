"""`mend` keeps every row whose bytes are as they were written, drops the others, and may be killed at any instant."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import atomic
from shared.cache import index, schema, writer
from shared.cache.reader import Cache
from shared.cache.repair import Mended, mend
from shared.cache.schema import CacheError
from shared.cache.verify import verify
from shared.errors import UserError
from tests.shared.small_cache import (
    BROKEN,
    CAPTIONS,
    SAMPLES,
    content,
    files,
    flip,
    flipped_everywhere,
    folder_of,
    make,
    sample,
)  # fmt: skip
from tests.shared.test_writer import killed_while

LATER = [sample("s0", "number 0", "a box", content="painted over"), *SAMPLES[1:]]


def latents(cache: Path) -> Path:
    return folder_of(cache, "latents")


def place_of(cache: Path, layer: str, key: str, member: str = "safetensors") -> int:
    return Cache(cache).layer(layer).members(key)[member].offset


def made_again(cache: Path, before: dict[str, object]) -> set[str]:
    """Run the ordinary way; the rows (layer/key) that had to be made. Everything is as before then."""
    rows = {name: writer.finished_rows(folder_of(cache, name)) for name in ("latents", "edges", "text")}
    make(cache)
    assert content(cache) == before
    assert verify(cache).sound
    return {
        f"{name}/{key}" for name, had in rows.items() for key, _ in writer.finished_rows(folder_of(cache, name)) - had
    }


def test_a_sound_cache_is_left_as_it_is(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    assert mend(tmp_path) == []
    assert files(tmp_path) == before


def test_of_a_damaged_tar_the_intact_rows_stay_and_the_others_are_made_again(tmp_path: Path) -> None:
    before = content(make(tmp_path, shard_rows=5))
    flip(latents(tmp_path) / "00000.tar", place_of(tmp_path, "latents", "s3") + 9)
    name = f"{latents(tmp_path).name}/00000.tar"
    assert mend(tmp_path) == [Mended(name, "altered", num_kept=4, num_dropped=1, dropped=("s3",))]
    assert made_again(tmp_path, before) == {"latents/s3"}


def test_a_row_of_several_members_is_dropped_where_one_is_damaged(tmp_path: Path) -> None:
    before = content(make(tmp_path))
    flip(folder_of(tmp_path, "edges") / "00000.tar", place_of(tmp_path, "edges", "s1", "1.png"))
    (mended,) = mend(tmp_path)
    assert mended.dropped == ("s1",)
    assert made_again(tmp_path, before) == {"edges/s1"}


def test_of_a_tar_that_is_cut_off_what_lies_before_stays(tmp_path: Path) -> None:
    before = content(make(tmp_path, shard_rows=5))
    os.truncate(latents(tmp_path) / "00000.tar", place_of(tmp_path, "latents", "s3") + 9)
    (mended,) = mend(tmp_path)
    assert mended.dropped == ("s3", "s4")
    assert made_again(tmp_path, before) == {"latents/s3", "latents/s4"}


def test_what_surrounds_the_rows_is_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    tar = latents(tmp_path) / "00001.tar"
    place = Cache(tmp_path).layer("latents").members("s3")["safetensors"]
    for position in (place.offset - 300, place.offset + place.length, tar.stat().st_size - 1):
        flip(tar, position)
        (mended,) = mend(tmp_path)
        assert (mended.num_kept, mended.num_dropped) == (2, 0)
        assert files(tmp_path) == before


def test_a_tar_that_is_gone_is_made_again_as_a_whole(tmp_path: Path) -> None:
    before = content(make(tmp_path))
    (latents(tmp_path) / "00001.tar").unlink()
    (mended,) = mend(tmp_path)
    assert (mended.damage, mended.dropped) == ("missing", ("s2", "s3"))
    assert made_again(tmp_path, before) == {"latents/s2", "latents/s3"}


@pytest.mark.parametrize("layer", ["latents", "edges", "text"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_an_index_that_is_lost_is_made_again_from_its_sound_tar(
    tmp_path: Path, layer: str, damage: Callable[[Path], object]
) -> None:
    before = files(make(tmp_path))
    damage(folder_of(tmp_path, layer) / "00001.parquet")
    (mended,) = mend(tmp_path)
    assert (mended.num_kept, mended.num_dropped) == (2, 0)
    assert files(tmp_path) == before


def test_an_index_with_any_bit_flipped_costs_no_row(tmp_path: Path) -> None:
    before = files(make(tmp_path, layers=("latents",)))
    parquet = latents(tmp_path) / "00000.parquet"
    for _ in flipped_everywhere(parquet, step=31):
        damaged = parquet.read_bytes()
        (mended,) = mend(tmp_path)
        assert (mended.file, mended.num_dropped) == (f"{latents(tmp_path).name}/00000.parquet", 0)
        assert files(tmp_path) == before
        parquet.write_bytes(damaged)  # for `flipped_everywhere` to flip back


def test_an_index_that_is_lost_with_what_could_replace_it_costs_its_rows(tmp_path: Path) -> None:
    before = content(make(tmp_path))
    (latents(tmp_path) / "00001.parquet").unlink()
    flip(tmp_path / index.name_of("latents"), 700)
    assert {mended.file: mended.num_dropped for mended in mend(tmp_path)} == {
        index.name_of("latents"): 0,
        f"{latents(tmp_path).name}/00001.parquet": 2,
    }
    assert made_again(tmp_path, before) == {"latents/s2", "latents/s3"}


def test_an_index_and_its_tar_that_are_both_damaged_cost_their_rows(tmp_path: Path) -> None:
    before = content(make(tmp_path))
    (latents(tmp_path) / "00001.parquet").write_bytes(b"nothing")
    flip(latents(tmp_path) / "00001.tar", 600)
    (mended,) = mend(tmp_path)
    assert (mended.num_kept, mended.num_dropped, mended.dropped) == (0, 2, ("s2", "s3"))
    assert made_again(tmp_path, before) == {"latents/s2", "latents/s3"}


def test_damaged_lists_are_named_and_written_anew_by_the_ordinary_run(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    names = [schema.SAMPLES, schema.CAPTIONS, index.name_of("samples"), f"{latents(tmp_path).name}/{schema.LAYER}"]
    for name in names:
        flip(tmp_path / name, 60)
    assert sorted(mended.file for mended in mend(tmp_path)) == sorted(names)
    assert files(make(tmp_path)) == before


def test_without_a_manifest_each_shard_still_vouches_for_itself(tmp_path: Path) -> None:
    before = content(make(tmp_path, shard_rows=5))
    (tmp_path / schema.MANIFEST).write_bytes(b"{")
    (_, table), *_ = writer.finished_shards(latents(tmp_path))
    flip(latents(tmp_path) / "00000.tar", table["offset"][0].as_py())
    damaged = {mended.file: mended.dropped for mended in mend(tmp_path)}
    assert damaged == {schema.MANIFEST: (), f"{latents(tmp_path).name}/00000.tar": ("s0",)}
    assert made_again(tmp_path, before) == {"latents/s0"}


def test_rows_that_an_encoder_failed_for_keep_their_reason(tmp_path: Path) -> None:
    broken = [*SAMPLES, sample("s9", "a box", source=BROKEN)]
    before = content(make(tmp_path, broken, shard_rows=9))
    flip(latents(tmp_path) / "00000.tar", place_of(tmp_path, "latents", "s1"))
    (mended,) = mend(tmp_path)
    assert (mended.num_kept, mended.dropped) == (5, ("s1",))
    assert content(make(tmp_path, broken)) == before


def test_rows_of_an_earlier_state_stay_too(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, LATER)
    flip(latents(tmp_path) / "00000.tar", place_of(tmp_path, "latents", "s1"))
    (mended,) = mend(tmp_path)
    assert (mended.num_kept, mended.dropped) == (1, ("s1",))
    before = writer.finished_rows(latents(tmp_path))
    assert ("s0", SAMPLES[0].input("image")) in before
    make(tmp_path, SAMPLES)
    assert writer.finished_rows(latents(tmp_path)) - before == {("s1", SAMPLES[1].input("image"))}


def test_killed_at_any_rename_it_loses_at_most_the_shard_that_it_was_writing(tmp_path: Path) -> None:
    start = make(tmp_path / "start", shard_rows=3)
    before = content(start)
    for number, key in ((0, "s1"), (1, "s4")):
        flip(latents(start) / f"{number:05d}.tar", place_of(start, "latents", key))
    (folder_of(start, "text") / "00000.parquet").unlink()
    for rename, first in itertools.product(range(100), (True, False)):
        cache = tmp_path / f"{rename} {first}"
        shutil.copytree(start, cache)
        killed = killed_while(lambda cache=cache: mend(cache), rename, first)  # type: ignore[misc]
        mend(cache)
        lost = made_again(cache, before)
        assert {"latents/s1", "latents/s4"} <= lost
        others = {f"latents/s{i}" for i in range(3)}, {f"latents/s{i}" for i in (3, 4)}
        captions = {f"text/{caption.id}" for caption in CAPTIONS[:3]}
        assert any(lost <= {"latents/s1", "latents/s4"} | shard for shard in (*others, captions)), (rename, first)
        if not killed:
            return
        shutil.rmtree(cache)
    raise AssertionError("no end")


def test_until_the_ordinary_run_has_followed_there_is_something_to_mend(tmp_path: Path) -> None:
    before = content(make(tmp_path))
    flip(latents(tmp_path) / "00000.tar", place_of(tmp_path, "latents", "s1"))
    mend(tmp_path)
    assert mend(tmp_path) == [Mended(f"{latents(tmp_path).name}/{schema.LAYER}", "lists an earlier 00000")]
    assert made_again(tmp_path, before) == {"latents/s1"}
    assert mend(tmp_path) == []


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = content(make(tmp_path))
    flip(latents(tmp_path) / "00000.tar", place_of(tmp_path, "latents", "s1"))
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the disk is full"):
            mend(tmp_path)
    assert files(tmp_path).items() >= {name: data for name, data in before.items() if name.endswith(".tar")}.items()
    mend(tmp_path)
    assert made_again(tmp_path, sound) == {"latents/s1"}


def full(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_no_cache_or_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such cache"):
        mend(tmp_path / "nowhere")
    make(tmp_path)
    manifest = schema.read_sealed(tmp_path / schema.MANIFEST)
    atomic.write_json(tmp_path / schema.MANIFEST, schema.seal({**manifest, "schema_version": 99}))
    before = files(tmp_path)
    with pytest.raises(CacheError, match="has cache schema version 99"):
        mend(tmp_path)
    assert files(tmp_path) == before
