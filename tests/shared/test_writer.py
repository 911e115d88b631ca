"""Writing a cache: round trips, same data same bytes, and every way to be interrupted."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import webdataset
from safetensors.torch import load

from shared import atomic
from shared.cache import schema, writer
from shared.cache.reader import Cache
from shared.cache.schema import CacheError, Caption
from shared.cache.verify import verify
from shared.errors import UserError
from tests.shared import small_cache
from tests.shared.small_cache import BROKEN, CAPTIONS, SAMPLES, content, files, folder_of, make, sample, write_layer

# The data set a while later: s1 is another picture, s3 is gone, s5 is new, s4 has another caption.
LATER = [
    SAMPLES[0],
    sample("s1", "number 1", "a box", content="painted over"),
    SAMPLES[2],
    sample("s4", "number 4 in red", "a box"),
    sample("s5", "number 5", "a box"),
]
LATER_CAPTIONS = [
    Caption.of(t) for t in ("", "a box", "number 0", "number 1", "number 2", "number 4 in red", "number 5")
]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cache = Cache(make(tmp_path))
    assert list(cache.samples.values()) == SAMPLES
    assert list(cache.captions.values()) == CAPTIONS
    for name in ("latents", "text"):
        layer = cache.layer(name)
        for key, input_digest in cache.wanted(layer.summary.reads).items():
            written = small_cache.tensors(name, key, input_digest)
            read = layer.tensors(key)
            assert read.keys() == written.keys()
            assert all(torch.equal(read[field], written[field]) for field in written)
            assert all(read[field].dtype == written[field].dtype for field in written)


def test_several_members_of_one_sample_are_kept_apart(tmp_path: Path) -> None:
    cache = Cache(make(tmp_path))
    layer = cache.layer("edges")
    for key, input_digest in cache.wanted("image").items():
        assert small_cache.everything_of(layer, key) == small_cache.members("edges", key, input_digest)


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    assert files(make(tmp_path / "one")) == files(make(tmp_path / "two"))


def test_running_again_changes_no_byte(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    assert files(make(tmp_path)) == before


def test_webdataset_opens_a_shard_and_yields_the_same_tensors(tmp_path: Path) -> None:
    make(tmp_path)
    shards = [str(tar) for tar in sorted(folder_of(tmp_path, "latents").glob("*.tar"))]
    cache = Cache(tmp_path)
    seen = {}
    for item in webdataset.WebDataset(shards, shardshuffle=False):
        seen[item["__key__"]] = load(item["safetensors"])
    assert seen.keys() == cache.samples.keys()
    for key, tensors in seen.items():
        own = cache.layer("latents").tensors(key)
        assert all(torch.equal(tensors[field], own[field]) for field in ("mean", "std"))


def test_webdataset_groups_the_drawings_of_one_sample(tmp_path: Path) -> None:
    make(tmp_path)
    tar = folder_of(tmp_path, "edges") / "00000.tar"
    items = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [item["__key__"] for item in items] == ["s0", "s1"]
    assert all(item["1.png"].startswith(f"drawing 1 of {item['__key__']}".encode()) for item in items)


def test_a_changed_data_set_adds_shards_and_leaves_the_old_ones(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    after = files(make(tmp_path, LATER, LATER_CAPTIONS))
    shards = [name for name in before if name.endswith((".tar", "0.parquet", "1.parquet", "2.parquet"))]
    assert shards
    assert all(after[name] == before[name] for name in shards)
    cache = Cache(tmp_path)
    assert list(cache.samples.values()) == LATER
    for sample_ in LATER:
        expected = small_cache.tensors("latents", sample_.key, sample_.input("image"))["mean"]
        assert torch.equal(cache.layer("latents").tensors(sample_.key)["mean"], expected)


def test_only_what_is_new_is_made(tmp_path: Path) -> None:
    make(tmp_path)
    made_before = {name: writer.finished_rows(folder_of(tmp_path, name)) for name in small_cache.LAYERS}
    make(tmp_path, LATER, LATER_CAPTIONS)
    new = {name: writer.finished_rows(folder_of(tmp_path, name)) - made_before[name] for name in small_cache.LAYERS}
    assert {key for key, _ in new["latents"]} == {"s1", "s5"}
    assert {key for key, _ in new["text"]} == {Caption.of("number 4 in red").id, Caption.of("number 5").id}


def test_a_sample_without_tensors_is_a_row_with_its_reason(tmp_path: Path) -> None:
    broken = [*SAMPLES, sample("s9", "a box", source=BROKEN)]
    make(tmp_path, broken)
    layer = Cache(tmp_path).layer("latents")
    assert layer.errors == {"s9": BROKEN}
    assert "s9" not in layer
    assert sum(shard.errors for shard in layer.summary.shards) == 1
    with pytest.raises(KeyError, match="s9"):
        layer.members("s9")


def test_a_shard_of_nothing_but_errors_is_sound(tmp_path: Path) -> None:
    make(tmp_path, [sample(f"s{i}", "a box", source=BROKEN) for i in range(2)])
    assert verify(tmp_path).sound
    assert Cache(tmp_path).layer("edges").errors == {"s0": BROKEN, "s1": BROKEN}


@pytest.mark.parametrize(("key", "members"), [("a.b", {"x": b""}), ("a/b", {"x": b""}), ("a", {})])
def test_keys_that_no_tar_reader_would_find_and_rows_without_content_are_our_own_mistakes(
    tmp_path: Path, key: str, members: dict[str, bytes]
) -> None:
    with pytest.raises(AssertionError), writer.ShardWriter(tmp_path, 0) as shard:
        shard.add(key, "input", members)
    assert files(tmp_path) == {}


def test_a_finished_shard_cannot_be_written_again(tmp_path: Path) -> None:
    make(tmp_path)
    before = files(tmp_path)
    with pytest.raises(AssertionError, match="never changed"), writer.ShardWriter(folder_of(tmp_path, "latents"), 0):
        pass
    assert files(tmp_path) == before


# Interrupted


class Killed(BaseException):
    pass


def write_and_die(folder: Path) -> None:
    with writer.ShardWriter(folder, 0) as shard:
        shard.add("b", "input b", {"x": b"2"})
        raise Killed


def test_a_shard_that_was_interrupted_while_written_leaves_nothing_that_counts(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write_and_die(tmp_path)
    assert files(tmp_path) == {}


def test_a_tar_without_an_index_and_a_part_file_do_not_count_and_are_written_again(tmp_path: Path) -> None:
    whole = files(make(tmp_path / "whole"))
    cache = make(tmp_path / "cache")
    folder = folder_of(cache, "latents")
    (folder / "00001.parquet").unlink()
    (folder / "00001.tar").write_bytes(b"half")
    (folder / "00002.parquet").unlink()
    (folder / "00002.tar").rename(folder / "00002.tar.part")
    assert [shard.name for shard, _ in writer.finished_shards(folder)] == ["00000"]
    assert list(itertools.islice(writer.unused_numbers(folder), 3)) == [1, 2, 3]
    assert files(make(cache)) == whole


def test_the_index_of_a_lost_tar_never_stands_beside_a_new_one(tmp_path: Path) -> None:
    # Another data set's tar of the very same size would otherwise be read through the old index.
    folder = tmp_path
    with writer.ShardWriter(folder, 0) as shard:
        shard.add("a", "input a", {"x": b"1"})
    (folder / "00000.tar").unlink()
    with pytest.raises(Killed):
        write_and_die(folder)
    assert files(folder) == {}


def test_an_altered_index_is_never_taken_for_finished(tmp_path: Path) -> None:
    folder = folder_of(make(tmp_path), "latents")
    index = folder / "00000.parquet"
    (expected,) = [table for shard, table in writer.finished_shards(folder) if shard.name == "00000"]
    refused = 0
    for position in small_cache.flipped_everywhere(index, step=3):
        found = {shard.name: table for shard, table in writer.finished_shards(folder)}
        refused += "00000" not in found
        # What does pass (a bit of Parquet's own statistics) says the same of every row.
        assert "00000" not in found or found["00000"].equals(expected), position
    assert refused > 100


def test_an_index_in_which_an_empty_column_has_another_type_is_not_taken_for_finished(tmp_path: Path) -> None:
    # One flipped bit can do that, and no row says anything else.
    folder = folder_of(make(tmp_path), "latents")
    shards = {shard.name: table for shard, table in writer.finished_shards(folder)}
    table = shards["00001"]
    at = table.schema.names.index("error")
    schema.write_table(folder / "00001.parquet", table.set_column(at, "error", pa.nulls(len(table), pa.binary())))
    assert {shard.name for shard, _ in writer.finished_shards(folder)} == shards.keys() - {"00001"}


def test_an_altered_samples_table_is_never_taken_for_an_earlier_plan(tmp_path: Path) -> None:
    make(tmp_path)
    refused = 0
    for position in small_cache.flipped_everywhere(tmp_path / schema.SAMPLES, step=5):
        try:
            assert schema.read_samples(tmp_path / schema.SAMPLES) == SAMPLES, position
        except CacheError:
            refused += 1
    assert refused > 100


def die_at(rename: int, before: bool) -> Callable[[Any, Any], None]:
    """An `os.replace` that ends the process at the given call, as a power cut would: no clean-up runs."""
    real, calls = os.replace, itertools.count()

    def replace_or_die(source: Any, target: Any) -> None:
        now = next(calls) == rename
        if now and before:
            os._exit(7)
        real(source, target)
        if now:
            os._exit(7)

    return replace_or_die


def killed_while(work: Callable[[], object], rename: int, before: bool) -> bool:
    """Do `work` in a process that dies at its `rename`-th rename. Whether it did."""
    child = os.fork()
    if child == 0:
        try:
            os.replace = die_at(rename, before)  # type: ignore[assignment]
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (7, 1), code
    return code == 7


def states_after_every_kill(start: Path | None, work: Callable[[Path], object], tmp_path: Path) -> list[str]:
    """Kill `work` before and after each of its renames. Each time: a reader finds the old state, the new one, or
    refuses; and running again gives the bytes of an undisturbed run. What the reader found, in order."""
    undisturbed = tmp_path / "undisturbed"
    if start is not None:
        shutil.copytree(start, undisturbed)
    old = None if start is None else content(start)
    work(undisturbed)
    new, expected = content(undisturbed), files(undisturbed)
    found = []
    for rename, before in itertools.product(range(1000), (True, False)):
        cache = tmp_path / f"{rename} {before}"
        if start is not None:
            shutil.copytree(start, cache)
        killed = killed_while(lambda cache=cache: work(cache), rename, before)  # type: ignore[misc]
        try:
            state = content(cache)
        except CacheError as error:
            found.append("refused" if "make preprocess" in str(error) else str(error))
        else:
            assert state in (old, new), f"neither old nor new after rename {rename}"
            found.append("old" if state == old else "new")
        work(cache)
        assert files(cache) == expected, f"killed at rename {rename}, another cache came out"
        shutil.rmtree(cache)
        if not killed:
            return found
    raise AssertionError("no end")


def test_killed_at_any_rename_of_a_first_run_a_reader_refuses_until_all_is_there(tmp_path: Path) -> None:
    found = states_after_every_kill(None, lambda cache: make(cache, layers=("latents", "text"), shard_rows=3), tmp_path)
    renames = (
        (2 + 3) * 2 + 2 + 4 + 2 + 1
    )  # shards' tars and indexes; layers' lists; tables with indexes; layers' indexes; manifest
    assert found == ["refused"] * (2 * renames - 1) + ["new"] * 2


def test_killed_at_any_rename_of_a_later_run_a_reader_finds_the_old_or_the_new_cache_or_refuses(tmp_path: Path) -> None:
    start = make(tmp_path / "start")
    found = states_after_every_kill(start, lambda cache: make(cache, LATER, LATER_CAPTIONS), tmp_path)
    # While shards are made, which takes hours, the cache of before can be read.
    shards = 3 * 2
    assert found[: 2 * shards + 1] == ["old"] * (2 * shards + 1)
    lists = 3 + 4 + 3  # layers, tables with their indexes, layers' indexes: in milliseconds
    assert found[2 * shards + 1 :] == ["refused"] * (2 * lists) + ["new"] * 2


def test_killed_while_another_condition_is_added_the_cache_of_before_stays_readable(tmp_path: Path) -> None:
    start = make(tmp_path / "start", layers=("latents", "text"))
    found = states_after_every_kill(start, make, tmp_path)
    assert "refused" not in [state for state in found if state != "new"][:12]
    assert found[-1] == "new"


# Full disks


def full_after(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Every file opened for writing takes so many bytes, then the disk is full."""
    real = open

    def open_full(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        file = real(path, mode, *more, **options)
        if "w" in mode:
            write, taken = file.write, itertools.count()

            class Full:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *error: object) -> None:
                    file.close()

                def write(self, data: Any) -> int:
                    if next(taken) * 512 >= num_bytes:
                        raise OSError(errno.ENOSPC, "No space left on device", str(path))
                    return write(data)

                def flush(self) -> None:
                    file.flush()

                def fileno(self) -> int:
                    return file.fileno()

            return Full()
        return file

    monkeypatch.setattr("builtins.open", open_full)


@pytest.mark.parametrize("num_bytes", [0, 512, 1024])
def test_a_full_disk_is_one_sentence_and_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    before = files(make(tmp_path))
    with monkeypatch.context() as patch:
        full_after(patch, num_bytes)
        with pytest.raises(UserError, match=r"the disk is full: writing .* failed\. Nothing finished is lost"):
            make(tmp_path, LATER, LATER_CAPTIONS)
    assert files(tmp_path) == before
    assert content(make(tmp_path, LATER, LATER_CAPTIONS))


def test_a_disk_that_is_full_at_the_archive_s_end_is_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "close", no_space)
    with pytest.raises(UserError, match="the disk is full"), writer.ShardWriter(tmp_path, 0) as shard:
        shard.add("a", "input", {"x": b"1"})
    assert files(tmp_path) == {}


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k none '{small}' 2>/dev/null"):
        pytest.skip("needs the right to mount")
    try:
        write_layer(small, "latents", SAMPLES, CAPTIONS)
        (shard, _), *_ = writer.finished_shards(folder_of(small, "latents"))
        with pytest.raises(UserError, match="the disk is full"):
            make(small)
        assert not list(small.rglob(f"*{atomic.PART}"))
        assert shard.name == "00000"
        assert writer.finished_rows(folder_of(small, "latents")) == {(s.key, s.input("image")) for s in SAMPLES}
    finally:
        assert os.system(f"umount '{small}'") == 0


# Lists


def test_a_layer_s_list_is_not_rewritten_where_only_the_versions_differ(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    small_cache.publish(tmp_path, made_with="2")
    assert files(tmp_path) == before
    write_layer(tmp_path, "latents", LATER, LATER_CAPTIONS)
    small_cache.publish(tmp_path, made_with="2")
    listed = schema.read_sealed(folder_of(tmp_path, "latents") / schema.LAYER)
    assert listed["made_with"] == {"made up": "2"}


def test_a_layer_that_is_published_again_lists_the_shards_that_are_there(tmp_path: Path) -> None:
    make(tmp_path)
    folder = folder_of(tmp_path, "latents")
    (folder / "00002.tar").unlink()
    entry = writer.publish_layer_again(folder)
    listed = schema.read_sealed(folder / schema.LAYER)
    assert [shard["name"] for shard in listed["shards"]] == ["00000", "00001"]
    assert entry["checksum"] == schema.read_sealed_and_checksum(folder / schema.LAYER)[1]
    assert listed["recipe"] == small_cache.recipe("latents")


def test_a_damaged_list_is_written_anew_by_the_next_run(tmp_path: Path) -> None:
    before = files(make(tmp_path))
    for name in (schema.MANIFEST, schema.SAMPLES, schema.CAPTIONS, f"{folder_of(tmp_path, 'text').name}/layer.json"):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(CacheError, match="make preprocess"):
            content(tmp_path)
        assert files(make(tmp_path)) == before


def test_samples_table_has_the_columns_of_a_sample_in_order() -> None:
    odd = replace(
        SAMPLES[0], sha256=None, width=None, height=None, placement=None, bucket_width=None, bucket_height=None,
        status="error", error="cannot be decoded: 'ä'", captions=(),
    )  # fmt: skip
    assert list(schema.Sample.__dataclass_fields__) == schema.SAMPLES_TABLE.names
    for prior in (True, False):
        row = schema.samples_table([replace(odd, prior=prior)]).to_pylist()[0]
        assert row.pop("prior", False) == prior  # the column is there only where it says something
        names = [name for name in schema.SAMPLES_TABLE.names if name != "prior"]
        assert row == {name: getattr(odd, name) for name in names} | {"captions": [], "caption_weights": []}


def test_bytes_on_disk_counts_every_file_below(tmp_path: Path) -> None:
    make(tmp_path)
    assert writer.bytes_on_disk(tmp_path) == sum(len(data) for data in files(tmp_path).values())
