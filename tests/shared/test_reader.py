"""Reading a cache: views of the mapped file, by key, from several threads, at a size that people have."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from shared.cache import schema, writer
from shared.cache.reader import Cache, CacheError, LayerSummary, open_layer, parse_safetensors, usable
from shared.cache.schema import Caption, Sample
from shared.cache.storage import LocalStorage
from tests.shared import small_cache
from tests.shared.small_cache import BROKEN, CAPTIONS, SAMPLES, content, folder_of, make, sample

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def address(data: memoryview) -> int:
    return torch.frombuffer(data, dtype=torch.uint8).data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_views_of_the_bytes_they_were_read_from(dtype: torch.dtype) -> None:
    written = torch.arange(12).reshape(3, 4).remainder(2).to(dtype)
    data = memoryview(bytearray(save({"x": written})))
    read = parse_safetensors(data)["x"]
    assert read.dtype == dtype
    assert read.shape == (3, 4)
    assert torch.equal(read.view(torch.uint8), written.view(torch.uint8))
    assert address(data) < read.data_ptr() < address(data) + len(data)
    data[-1] ^= 1
    assert not torch.equal(read.view(torch.uint8), written.view(torch.uint8)), "a copy would not have changed"


def test_scalars_empty_tensors_and_mixed_dtypes_survive() -> None:
    written = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "byte": torch.tensor([7], dtype=torch.uint8),
        "long": torch.arange(5),
    }
    read = parse_safetensors(memoryview(bytearray(save(written, metadata={"who": "cares"}))))
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)
    assert all(read[name].dtype == written[name].dtype for name in written)
    assert read["scalar"].shape == ()
    assert read["empty"].shape == (0, 4)


def test_a_layer_s_tensors_share_memory_with_the_mapped_tar(tmp_path: Path) -> None:
    layer = Cache(make(tmp_path)).layer("latents")
    first, again = layer.tensors("s1"), layer.tensors("s1")
    assert first["mean"].data_ptr() == again["mean"].data_ptr()
    assert first["mean"].data_ptr() % first["mean"].element_size() == 0
    view = layer.read("s1")
    assert address(view) < first["mean"].data_ptr() < address(view) + len(view)


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    layer = Cache(make(tmp_path)).layer("latents")
    before = content(tmp_path)
    layer.tensors("s1")["mean"].zero_()
    assert content(tmp_path) == before


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    before = content(make(tmp_path))
    for file in tmp_path.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    assert content(tmp_path) == before


def test_tensors_outlive_the_layer_and_the_file_s_name(tmp_path: Path) -> None:
    cache = Cache(make(tmp_path))
    tensor = cache.layer("latents").tensors("s1")["std"]
    expected = tensor.clone()
    del cache
    (folder_of(tmp_path, "latents") / "00000.tar").unlink()
    assert torch.equal(tensor, expected)


def test_altered_data_of_one_sample_are_refused_by_its_name_and_the_others_are_read(tmp_path: Path) -> None:
    cache = Cache(make(tmp_path))
    place = cache.layer("latents").members("s1")["safetensors"]
    tar = folder_of(tmp_path, "latents") / f"{place.shard}.tar"
    refused = 0
    for position in range(place.offset, place.offset + place.length):
        small_cache.flip(tar, position, position % 8)
        layer = Cache(tmp_path).layer("latents")
        with pytest.raises(CacheError, match="sample 's1' of layer 'latents' was altered on disk"):
            layer.tensors("s1")
        assert layer.tensors("s0")["mean"].shape == (2, 2, 2)
        small_cache.flip(tar, position, position % 8)
        refused += 1
    assert refused == place.length > 100


def test_a_member_is_compared_with_its_checksum_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Cache(make(tmp_path)).layer("edges")
    layer.members("s0")  # reads the shard's own index, which has a checksum of its own
    compared: list[int] = []
    real = schema.checksum

    def noted(data: memoryview) -> str:
        compared.append(len(data))
        return real(data)

    monkeypatch.setattr(schema, "checksum", noted)
    for _ in range(3):
        layer.read("s0", "0.png")
    layer.read("s0", "1.png")
    assert len(compared) == 2


def test_threads_share_a_layer(tmp_path: Path) -> None:
    layer = Cache(make(tmp_path)).layer("latents")
    expected = {s.key: small_cache.tensors("latents", s.key, s.input("image"))["std"] for s in SAMPLES}
    wrong: list[str] = []
    begin = threading.Barrier(8)

    def work() -> None:
        begin.wait()
        for _ in range(50):
            wrong.extend(key for key, std in expected.items() if not torch.equal(layer.tensors(key)["std"], std))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(layer._maps) == 3


def test_a_layer_that_another_process_is_given_maps_its_shards_anew(tmp_path: Path) -> None:
    layer = Cache(make(tmp_path)).layer("latents")
    layer.tensors("s0")
    given = copy.deepcopy(layer)  # by the same protocol that hands it to a process
    assert given._maps == {}
    assert torch.equal(given.tensors("s0")["mean"], layer.tensors("s0")["mean"])


def test_a_layer_that_another_process_is_given_compares_its_rows_anew(tmp_path: Path) -> None:
    layer = Cache(make(tmp_path)).layer("latents")
    layer.tensors("s1")
    given = copy.deepcopy(layer)  # by the same protocol
    small_cache.flip(folder_of(tmp_path, "latents") / "00000.tar", layer.members("s1")["safetensors"].offset + 20)
    with pytest.raises(CacheError, match="sample 's1' of layer 'latents' was altered"):
        given.tensors("s1")


def test_a_layer_is_opened_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    cache = Cache(make(tmp_path))
    assert cache.layer("text") is cache.layer("text")


def test_what_is_wanted_decides_between_two_states_of_one_key(tmp_path: Path) -> None:
    inputs = {"old": b"1", "new": b"2"}
    for number, (input_digest, data) in enumerate(inputs.items()):
        with writer.ShardWriter(tmp_path, number) as shard:
            shard.add("a", input_digest, {"x": data})
    writer.publish_layer(tmp_path, name="x", reads="image", recipe={}, fields=[], made_with={})
    shards = list(writer.finished_shards(tmp_path))
    for input_digest, data in inputs.items():
        layer = open_layer(LocalStorage(tmp_path.parent), summary_of(tmp_path, shards), shards, {"a": input_digest})
        assert bytes(layer.read("a", "x")) == data
    with pytest.raises(CacheError, match=r"nothing for 1 of 1 rows \(first: a\)"):
        open_layer(LocalStorage(tmp_path.parent), summary_of(tmp_path, shards), shards, {"a": "another"})


def test_a_row_that_succeeded_later_is_no_error(tmp_path: Path) -> None:
    with writer.ShardWriter(tmp_path, 0) as shard:
        shard.add_error("a", "input", "out of memory")
        shard.add_error("b", "input", "not finite")
    with writer.ShardWriter(tmp_path, 1) as shard:
        shard.add("a", "input", {"x": b"1"})
    shards = list(writer.finished_shards(tmp_path))
    layer = open_layer(
        LocalStorage(tmp_path.parent), summary_of(tmp_path, shards), shards, {"a": "input", "b": "input"}
    )
    assert layer.errors == {"b": "not finite"}
    assert bytes(layer.read("a", "x")) == b"1"


def summary_of(folder: Path, shards: list[tuple[schema.Shard, pa.Table]]) -> LayerSummary:
    return LayerSummary(
        name="x", folder=folder.name, reads="image", fingerprint="", recipe={},
        fields=(schema.Field("0.png", "uint8", "H W", "made up"),),
        shards=schema.Shards.of(shard for shard, _ in shards),
    )  # fmt: skip


def test_usable_are_the_samples_that_every_layer_has_and_whose_captions_are_encoded(tmp_path: Path) -> None:
    samples = [
        *SAMPLES[:2],
        sample("s8", "a box", source=BROKEN),
        Sample(**{**{n: getattr(SAMPLES[3], n) for n in schema.SAMPLES_TABLE.names}, "status": "error", "error": "x"}),
        SAMPLES[4],
    ]
    cache = Cache(make(tmp_path, samples, CAPTIONS))
    latents, text = cache.layer("latents"), cache.layer("text")
    assert [s.key for s in usable(cache.samples.values(), [latents], [text])] == ["s0", "s1", "s4"]
    text.places = replace(text.places, length=text.places.length.copy())
    text.places.length[cache.index.caption_numbers[Caption.of("number 4").id]] = -1
    assert [s.key for s in usable(cache.samples.values(), [latents], [text])] == ["s0", "s1"]


def test_a_cache_says_what_it_holds(tmp_path: Path) -> None:
    cache = Cache(make(tmp_path))
    assert cache.family == "made up"
    assert cache.conditions == ["edges"]
    assert cache.layer_names == ["latents", "edges", "text"]
    assert cache.fingerprints == {name: schema.fingerprint(small_cache.recipe(name)) for name in small_cache.LAYERS}
    assert cache.summary("latents").fields == small_cache.LATENTS


# At size


@contextmanager
def open_files_limit(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_a_process_may_have_open_files(tmp_path: Path) -> None:
    samples = [sample(f"s{i}", "a box") for i in range(120)]
    make(tmp_path, samples, CAPTIONS[:2], layers=("latents",), shard_rows=1)
    layer = Cache(tmp_path).layer("latents")
    with open_files_limit(len(os.listdir("/proc/self/fd")) + 20):
        tensors = [layer.tensors(s.key)["mean"] for s in samples]
    assert len(tensors) == len(layer._maps) == 120


NUM_SAMPLES = 6_000

OPEN = """
import json, sys
from pathlib import Path
from shared.cache.reader import Cache
def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def open_all(path):
    cache = Cache(Path(path))
    return [cache.layer(name) for name in cache.layer_names]
open_all(sys.argv[2])  # what Arrow and Python take for any cache at all
before = resident_bytes()
layers = open_all(sys.argv[1])
print(json.dumps({"bytes": resident_bytes() - before, "rows": len(layers[0].places)}))
"""


def test_reading_a_table_starts_no_threads_that_could_abort_the_process_at_its_end(tmp_path: Path) -> None:
    table = schema.captions_table([schema.Caption.of(str(i)) for i in range(1000)])
    stated = schema.write_table(tmp_path / "captions.parquet", table)
    program = (
        "import os, sys; from pathlib import Path; from shared.cache import schema\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads(); schema.read_table(Path(sys.argv[1]), sys.argv[2]); print(threads() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "captions.parquet"), stated],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0"


def test_opening_a_cache_takes_no_memory_for_its_rows(tmp_path: Path) -> None:
    # In five layers with shards as long as FLUX's.
    texts = [f"a picture of thing number {i} on a table, in the evening light" for i in range(NUM_SAMPLES)]
    captions = [Caption.of(""), *map(Caption.of, texts)]
    samples = [
        sample(f"picture_{i:06d}-{hashlib.sha256(str(i).encode()).hexdigest()[:8]}-0", texts[i])
        for i in range(NUM_SAMPLES)
    ]
    layers = {}
    reads: schema.Reads
    for name, reads, shard_rows in (
        ("latents", "image", 256), ("canny", "image", 256), ("canny_latents", "image", 256),
        ("clip", "caption", 4096), ("t5", "caption", 64),
    ):  # fmt: skip
        folder = tmp_path / schema.layer_folder(name, schema.fingerprint({"layer": name}))
        inputs = [(s.key, s.input("image")) for s in samples] if reads == "image" else [(c.id, c.id) for c in captions]
        for number, i in enumerate(range(0, len(inputs), shard_rows)):
            with writer.ShardWriter(folder, number) as shard:
                for key, input_digest in inputs[i : i + shard_rows]:
                    shard.add(key, input_digest, {"safetensors": b"made up"})
        layers[name] = writer.publish_layer(
            folder, name=name, reads=reads, recipe={"layer": name}, fields=[], made_with={}
        )
    writer.publish(tmp_path, samples=samples, captions=captions, layers=layers)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path), str(make(tmp_path / "small"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
    )
    found = json.loads(done.stdout)
    assert found["rows"] == NUM_SAMPLES
    # The indexes are mapped: nothing of them is in memory until a row is asked for.
    assert found["bytes"] < 25e6, found
