"""Rows read straight into batch memory: the bytes that were written, or a refusal; memory that is used again only when
nobody holds it; few open files."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.cache.reader import Cache, CacheError
from shared.cache.repair import mend
from tests.shared.small_cache import flip
from tests.train import made_cache
from train import rows as rows_module
from train.rows import OPEN_TARS, Buffers, Rows, Stacking, Taken

SIZES = ((16, 32), (32, 16))
"""Two shapes whose rows have the same number of bytes, headers too."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [made_cache.sample(f"s{i:03d}", size=SIZES[i % 2]) for i in range(12)]
    return made_cache.write(tmp_path_factory.mktemp("rows") / "cache", samples, drawings={"canny": 1, "lineart": 3})


def rows_of(cache: Path, layer: str) -> Rows:
    return Rows(Cache(cache).layer(layer), drawings=layer in ("canny_latents", "lineart_latents"))


def stacked(taken: list[Taken], buffers: Buffers | None = None) -> dict[str, torch.Tensor]:
    return Stacking({"layer": taken}, buffers or Buffers(pinned=False)).finish()


def stored(cache: Cache, layer: str, number: int) -> dict[str, torch.Tensor]:
    """By another way: the reader's view of the mapped tar."""
    key = cache.index.caption_id(number) if layer in ("clip", "t5") else cache.index.key(number)
    return {f"layer.{field}": tensor for field, tensor in cache.layer(layer).tensors(key).items()}


@pytest.mark.parametrize("layer", ["latents", "clip", "t5"])
@pytest.mark.parametrize("start", [0, 6])
def test_a_stack_holds_the_rows_one_below_the_other_also_the_second_time(layer: str, start: int, made: Path) -> None:
    rows, cache = rows_of(made, layer), Cache(made)
    numbers = [start + i for i in (3, 0, 5, 0, 1)]
    for _ in range(2):  # the first time every row is compared with its checksum
        found = stacked([Taken(rows, number) for number in numbers])
        for i, number in enumerate(numbers):
            for field, tensor in stored(cache, layer, number).items():
                assert found[field].dtype == tensor.dtype
                assert torch.equal(found[field][i], tensor)


def test_of_several_drawings_one_is_taken(made: Path) -> None:
    cache = Cache(made)
    for start in (0, 6):
        rows = rows_of(made, "lineart_latents")
        for shares in ([0.0, 0.4, 0.999], [0.7, 0.0, 0.34], [0.5, 0.1, 0.9]):
            found = stacked([Taken(rows, start + i, share) for i, share in enumerate(shares)])
            for i, share in enumerate(shares):
                for field, tensor in stored(cache, "lineart_latents", start + i).items():
                    assert torch.equal(found[field][i], tensor[int(3 * share)])


def test_of_several_drawings_only_the_one_is_read_once_the_row_is_known_to_be_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = made_cache.samples_named(4, size=(256, 256))
    rows = rows_of(made_cache.write(tmp_path / "cache", samples, drawings={"lineart": 3}), "lineart_latents")
    stacked([Taken(rows, number) for number in range(4)])
    read: list[int] = []
    preadv = os.preadv

    def counted(handle: int, targets: Any, offset: int) -> int:
        read.append(preadv(handle, targets, offset))
        return read[-1]

    monkeypatch.setattr(rows_module.os, "preadv", counted)
    found = stacked([Taken(rows, number, 0.5) for number in range(4)])
    drawing = found["layer.mean"][0].nbytes
    assert read.count(drawing) >= 8  # mean and std of each
    assert sum(read) < 8 * drawing + 2 * rows_module.HEADER_BYTES


def test_layers_with_different_numbers_of_drawings_share_a_batch(made: Path) -> None:
    cache, one, three = Cache(made), rows_of(made, "canny_latents"), rows_of(made, "lineart_latents")
    for _ in range(2):
        found = stacked([Taken(one, 0, 0.9), Taken(three, 1, 0.9), Taken(one, 2, 0.0), Taken(three, 3, 0.0)])
        for i, (layer, drawing) in enumerate([("canny", 0), ("lineart", 2), ("canny", 0), ("lineart", 0)]):
            for field, tensor in stored(cache, f"{layer}_latents", i).items():
                assert torch.equal(found[field][i], tensor[drawing])


def test_rows_of_two_shapes_are_refused_in_one_stack(made: Path) -> None:
    rows = rows_of(made, "latents")
    with pytest.raises(CacheError, match="has another shape or dtype than the other samples of its batch"):
        stacked([Taken(rows, 0), Taken(rows, 6)])


def test_rows_whose_headers_differ_in_form_but_not_in_meaning_are_stacked(tmp_path: Path) -> None:
    # Written by another version, say: metadata in the header, or the fields in another order.
    def rewritten(member: bytes, number: int) -> bytes:
        size = int.from_bytes(member[:8], "little")
        header, data = json.loads(member[8 : 8 + size]), member[8 + size :]
        if number == 1:
            header["__metadata__"] = {"made": "elsewhere"}
        if number == 2:
            middle = len(data) // 2
            data = data[middle:] + data[:middle]
            for entry in header.values():
                entry["data_offsets"] = [(at + middle) % len(data) for at in entry["data_offsets"][:1]]
                entry["data_offsets"].append(entry["data_offsets"][0] + middle)
        if number == 3:
            header["__metadata__"] = {"long": "x" * 5000}
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    save, count = made_cache.save, itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_cache, "save", lambda tensors: rewritten(save(tensors), next(count)))
        cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(4))
    for first in range(4):
        rows, numbers = rows_of(cache, "latents"), [first, *(i for i in range(4) if i != first)]
        for _ in range(2):
            found = stacked([Taken(rows, number) for number in numbers])
            for i, number in enumerate(numbers):
                expected = made_cache.tensors("latents", f"s{number:03d}", (16, 16))
                assert torch.equal(found["layer.mean"][i], expected["mean"])
                assert torch.equal(found["layer.std"][i], expected["std"])


# --- what is not as it was written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["latents", "canny_latents", "lineart_latents", "t5"])
@pytest.mark.parametrize("at", [0, 5, 60, -1], ids=["length", "length 2", "header", "data"])
def test_an_altered_member_is_refused_when_it_is_first_read(layer: str, at: int, made: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(made, tmp_path / "cache")
    opened = Cache(cache).layer(layer)
    place = opened.places.place(4)
    flip(opened.tar_path(1), place.offset + (at % place.length))
    rows = rows_of(cache, layer)
    for first in (0, 4):
        with pytest.raises(CacheError, match="was altered on disk") as refusal:
            stacked([Taken(rows, number) for number in (first, 1, 4)])
        assert f"at byte {place.offset}" in str(refusal.value)
    stacked([Taken(rows, number) for number in (0, 1, 2)])  # the others are as sound as before


def test_each_process_looks_at_a_member_s_checksum_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(made, "t5")
    verified: list[int] = []
    verify = Rows._verify

    def counted(self: Rows, number: int, pieces: Any) -> None:
        verified.append(number)
        verify(self, number, pieces)

    monkeypatch.setattr(Rows, "_verify", counted)
    for _ in range(3):
        stacked([Taken(rows, number) for number in range(6)])
    assert sorted(verified) == list(range(6))


def test_a_tar_that_was_cut_off_or_removed_while_it_is_read_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(made, tmp_path / "cache")
    rows = rows_of(cache, "latents")
    stacked([Taken(rows, number) for number in range(6)])
    tar = rows.layer.tar_path(1)
    os.truncate(tar, int(rows.layer.places.offset[5]) + 100)
    with pytest.raises(CacheError, match=r"latents-.*/00001\.tar ends at byte \d+; run the same `make preprocess`"):
        stacked([Taken(rows, 4), Taken(rows, 5)])
    tar.unlink()
    with pytest.raises(CacheError, match=r"latents-.*/00001\.tar is missing"):
        stacked([Taken(Rows(rows.layer, drawings=False), 4)])


def test_a_read_that_comes_in_pieces_is_put_together(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, preadv = rows_of(made, "latents"), os.preadv
    expected = stacked([Taken(rows, number) for number in range(5)])

    def halting(handle: int, targets: list[Any], offset: int) -> int:
        """As a signal or some network file systems have it: at most 37 bytes at a time."""
        few, left = [], 37
        for target in targets:
            few.append(memoryview(target)[:left])
            left -= len(few[-1])
        return preadv(handle, [piece for piece in few if len(piece)], offset)

    monkeypatch.setattr(rows_module.os, "preadv", halting)
    found = stacked([Taken(rows, number) for number in range(5)])
    assert all(torch.equal(tensor, found[field]) for field, tensor in expected.items())


def test_a_read_that_the_disk_refuses_is_told_in_a_sentence(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    rows = rows_of(made, "latents")
    monkeypatch.setattr(rows_module.os, "preadv", fails)
    with pytest.raises(CacheError, match=r"00000\.tar cannot be read \(Input/output error\)"):
        stacked([Taken(rows, 0)])


# --- memory ---------------------------------------------------------------------------------------------------------


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


HOLD: dict[str, Callable[[torch.Tensor], Any]] = {
    "the tensor": lambda tensor: tensor,
    "a view of it": lambda tensor: tensor[2:9].view(torch.int8),
    "a row": lambda tensor: tensor.view(-1, 4)[1],
    "its numpy array": lambda tensor: tensor.numpy()[3:],
    "its bytes": lambda tensor: tensor.numpy().data,
    "its storage": lambda tensor: tensor.untyped_storage(),
    "a detached copy of the handle": lambda tensor: tensor.detach().requires_grad_(False),
}


@pytest.mark.parametrize("what", list(HOLD))
def test_memory_is_not_used_again_while_anything_refers_to_it(what: str) -> None:
    buffers = Buffers(pinned=False)
    tensor = buffers.take(4096)
    held, place = HOLD[what](tensor), address(tensor)
    del tensor
    others = [buffers.take(4096) for _ in range(3)]
    assert place not in {address(other) for other in others}
    del held
    assert address(buffers.take(4096)) == place


def test_memory_is_used_again_without_the_garbage_collector_the_last_one_first() -> None:
    buffers = Buffers(pinned=False)
    gc.disable()
    try:
        first, second = buffers.take(10_000), buffers.take(9_000)
        places = [address(first), address(second)]
        del first
        del second
        assert [address(buffers.take(9_999)) for _ in range(2)] == [places[1], places[1]]
        again = [buffers.take(8_500), buffers.take(12_000)]
        assert [address(tensor) for tensor in again] == places[::-1]
    finally:
        gc.enable()


def test_idle_memory_is_bounded() -> None:
    buffers = Buffers(pinned=False)
    many = [buffers.take(5_000) for _ in range(3 * rows_module.IDLE_BUFFERS)]
    many.clear()
    assert sum(len(idle) for idle in buffers._idle.values()) == rows_module.IDLE_BUFFERS


def test_threads_never_get_memory_that_another_one_holds() -> None:
    buffers, wrong = Buffers(pinned=False), []

    def work(number: int) -> None:
        random, held = np.random.default_rng(number), []
        for i in range(400):
            tensor = buffers.take(int(random.integers(1, 9000)))
            tensor.fill_(mark := (number * 31 + i) % 251)
            held.append((tensor, mark))
            if random.random() < 0.6:
                tensor, mark = held.pop(int(random.integers(len(held))))
                wrong.extend([mark] * (not bool((tensor == mark).all())))
            if len(held) > 6:
                held.pop(0)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert not wrong


# --- files and threads ----------------------------------------------------------------------------------------------


def open_files(folder: Path) -> int:
    """Files below a folder that this process has open."""
    found = 0
    for handle in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{handle}").startswith(str(folder))
        except FileNotFoundError:
            continue
    return found


def test_the_number_of_open_files_is_bounded_and_all_are_closed_in_the_end(tmp_path: Path) -> None:
    count = 3 * OPEN_TARS
    cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(count), shard_rows=1)
    rows = rows_of(cache, "latents")
    before = open_files(cache)
    for number in range(count):
        stacked([Taken(rows, number), Taken(rows, (number * 7) % count)])
        assert open_files(cache) - before <= OPEN_TARS
    del rows
    gc.collect()
    assert open_files(cache) == 0


def test_a_file_is_not_closed_while_another_thread_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(40), shard_rows=1)
    monkeypatch.setattr(rows_module, "OPEN_TARS", 1)
    rows, opened = rows_of(cache, "latents"), Cache(cache)

    def right(number: int) -> bool:
        found = stacked([Taken(rows, number % 40)])
        return all(torch.equal(found[field][0], t) for field, t in stored(opened, "latents", number % 40).items())

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, range(400)))


def test_a_tar_that_repair_wrote_anew_meanwhile_is_not_taken_for_the_verified_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(4), shard_rows=2)
    monkeypatch.setattr(rows_module, "OPEN_TARS", 1)
    rows = rows_of(cache, "latents")
    stacked([Taken(rows, number) for number in range(4)])
    flip(rows.layer.tar_path(0), rows.layer.places.place(0).offset)
    assert [mended.dropped for mended in mend(cache)] == [("s000",)]  # s001 is where it was
    with pytest.raises(CacheError, match=r"00000\.tar was written anew while it was being read .* start again"):
        stacked([Taken(rows, 1)])


def test_threads_that_help_read_every_row_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "PART_BYTES", 1)
    rows, cache, read = rows_of(made, "latents"), Cache(made), []
    read_row = Rows.read

    def counted(self: Rows, number: int, *rest: Any) -> None:
        read.append((threading.current_thread().name, number))
        read_row(self, number, *rest)

    monkeypatch.setattr(Rows, "read", counted)
    for _ in range(20):
        read.clear()
        stacking = Stacking({"layer": [Taken(rows, number) for number in range(6)]}, Buffers(pinned=False))
        helpers = [threading.Thread(target=stacking.help) for _ in range(3)]
        for helper in helpers:
            helper.start()
        found = stacking.finish()
        for helper in helpers:
            helper.join()
        assert sorted(number for _, number in read) == list(range(6))
        for number in range(6):
            assert torch.equal(found["layer.mean"][number], stored(cache, "latents", number)["layer.mean"])


def test_of_several_rows_that_are_wrong_the_first_is_told_whoever_read_it(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "PART_BYTES", 1)
    rows, begun = rows_of(made, "latents"), threading.Event()
    rows.form(0)

    def read(self: Rows, number: int, *_: Any) -> None:
        if number == 1:
            begun.set()
            later.join(5)  # the other thread meets row 2 meanwhile
        if number:
            raise CacheError(f"row {number} is altered")

    monkeypatch.setattr(Rows, "read", read)
    stacking = Stacking({"layer": [Taken(rows, number) for number in range(6)]}, Buffers(pinned=False))

    def help_later() -> None:
        begun.wait(5)
        stacking.help()

    later = threading.Thread(target=help_later)
    later.start()
    with pytest.raises(CacheError, match="row 1 is altered"):
        stacking.finish()
