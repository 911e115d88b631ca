"""What opening a cache costs by its number of rows, and what a step then looks up: time and memory.

The caches have real lists and indexes of made-up rows, and tars that are holes: files of the right size that hold
nothing. Each is opened in a process of its own, as training opens it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from benchmarks import page_cache
from benchmarks.flux_cache import CONDITION, FAMILY, FluxSamples, layer_folder, recipe
from shared import atomic
from shared.cache import index, schema
from shared.cache.index import Bucket, Places
from shared.cache.reader import Cache
from shared.cache.schema import Shard
from shared.families.base import LayerKind
from shared.report import say, table
from train.loader import CachedSamples, Loader, LoaderOptions

SAMPLES = FluxSamples(resolution=512, count=1)
"""What a row would hold."""
BATCH = 8
ROW_BYTES = 190
"""What a row takes in all indexes together."""


@dataclass(frozen=True)
class Opened:
    """What one process saw."""

    rows: int
    shards: int
    index_bytes: int
    seconds: float
    """From nothing to a loader that can make its first batch; imports aside."""
    before_bytes: int
    """Resident before, with torch and all else imported."""
    peak_bytes: int
    """The most that was ever resident, file pages that are mapped included, after opening."""
    own_after_steps_bytes: int
    """This process's own memory after the steps; pages of files that it looked into are the page cache's."""
    step_seconds: float
    """To choose a batch of 8 out of all rows and find where each tensor is; the median."""


def measure(folder: Path, rows: Sequence[int], steps: int = 1000) -> list[tuple[Opened, Opened]]:
    """For each number of rows: opened with a cold page cache, then a warm one. Each cache is removed again."""
    measured = []
    for count in rows:
        cache = folder / f"rows-{count}"
        say(f"writing an index of {count:,} rows ...")
        write(cache, count)
        page_cache.drop(sorted(path for path in cache.rglob("*") if path.suffix in (".arrow", ".json")))
        measured.append((_in_a_fresh_process(cache, steps), _in_a_fresh_process(cache, steps)))
        shutil.rmtree(cache)
    return measured


def _in_a_fresh_process(cache: Path, steps: int) -> Opened:
    words = [sys.executable, "-m", "benchmarks.index", "--open", str(cache), "--steps", str(steps)]
    root = Path(__file__).parent.parent
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Opened(**json.loads(done.stdout.splitlines()[-1]))


def write(cache: Path, count: int) -> None:
    """A cache of `count` samples, each with a caption of its own, in shards of the family's own sizes."""
    (cache / index.FOLDER).mkdir(parents=True)
    numbers = pa.array(np.arange(count))
    captions = pa.LargeListArray.from_arrays(np.arange(count + 1), pa.array(np.arange(1, count + 1, dtype=np.int32)))
    samples = pa.table(
        {
            "key": pc.utf8_lpad(numbers.cast(pa.large_string()), 10, "0"),
            "image": pa.array(np.arange(count, dtype=np.int32)),
            "captions": captions,
        },
        schema=index.SAMPLES_INDEX,
    )
    side = SAMPLES.resolution
    samples = index.with_buckets(samples, [Bucket("train", side, side, 0, count)])
    random = np.random.default_rng(0)
    ids = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), count + 1, [None, pa.py_buffer(random.bytes(16 * (count + 1)))]
    )
    tables = {
        "samples": {
            "rows": count, "errors": 0, "checksum": "made up",
            "index_checksum": index.write(cache / index.name_of("samples"), samples),
        },
        "captions": {
            "rows": count + 1, "checksum": "made up",
            "index_checksum": index.write(
                cache / index.name_of("captions"), pa.table([ids], schema=index.CAPTIONS_INDEX)
            ),
        },
    }  # fmt: skip
    del samples, captions, ids, numbers
    layers = {kind.name_in_cache(CONDITION): _write_layer(cache, kind, count) for kind in FAMILY.layers}
    head = {"format": schema.FORMAT, "schema_version": schema.SCHEMA_VERSION, "family": FAMILY.name}
    facts = {"model": {"name": "made up", "revision": None}, "condition": CONDITION, "conditions": [CONDITION]}
    atomic.write_json(cache / schema.MANIFEST, schema.seal({**head, **facts, "layers": layers, **tables}))


def _write_layer(cache: Path, kind: LayerKind, count: int) -> dict[str, str]:
    """A layer's list, index and empty tars; what the manifest says of it comes back."""
    num_rows = count + (kind.rows == "captions")
    shapes = [shape for name, shape in SAMPLES.shapes.items() if name.startswith(f"{kind.name}.")]
    length = sum(2 * torch.Size(shape).numel() for shape in shapes) + 128  # the member's own header
    row_bytes = 512 + -(-length // 512) * 512
    numbers = np.arange(num_rows)
    places = Places(
        shard=(numbers // kind.shard_rows).astype(np.int32),
        offset=numbers % kind.shard_rows * row_bytes + 512,
        length=np.full(num_rows, length, np.int32),
        checksums=np.frombuffer(np.random.default_rng(1).bytes(16 * num_rows), np.uint8).reshape(-1, 16),
    )
    name = kind.name_in_cache(CONDITION)
    checksum = index.write(cache / index.name_of(name), places.table())
    folder = layer_folder(cache, kind)
    folder.mkdir()
    shards = []
    for number in range(-(-num_rows // kind.shard_rows)):
        rows = min(kind.shard_rows, num_rows - number * kind.shard_rows)
        tar = Shard(schema.shard_name(number), rows, 0, rows * row_bytes + 1024, f"{number:032x}", f"{number:032x}")
        shards.append(tar)
        with open(folder / f"{tar.name}.tar", "wb") as file:
            file.truncate(tar.tar_bytes)
    content = {
        "name": name, "reads": "caption" if kind.rows == "captions" else "image",
        "fingerprint": schema.fingerprint(recipe(kind)), "recipe": recipe(kind),
        "fields": [asdict(field) for field in kind.fields], "shards": [asdict(shard) for shard in shards],
        "made_with": {},
    }  # fmt: skip
    sealed = schema.seal(content)
    atomic.write_json(folder / schema.LAYER, sealed)
    return {
        "folder": folder.name, "fingerprint": content["fingerprint"], "checksum": sealed["checksum"],
        "index_checksum": checksum,
    }  # fmt: skip


def open_and_step(cache: Path, steps: int) -> Opened:
    """What a process of its own does: open as training does, then look up what `steps` random batches need."""
    before = _resident_bytes("VmRSS")
    began = time.perf_counter()
    samples = CachedSamples(Cache(cache), FAMILY, CONDITION, "train")
    loader = Loader(samples, LoaderOptions(batch_size=BATCH), seed=0, device=torch.device("cpu"))
    places = [(kind, layer.places) for kind, layers in samples.layers.values() for layer in layers]
    seconds, peak = time.perf_counter() - began, _resident_bytes("VmHWM")
    lookups, rows = samples.cache.index, len(samples)
    step_seconds = []
    for position in np.random.default_rng(0).integers(0, loader.batches_per_epoch, steps).tolist():
        began = time.perf_counter()
        for i in loader.order.places(position).tolist():
            number = samples.number(i)
            lookups.key(number)
            caption = int(lookups.captions(number)[0])
            for kind, found in places:
                found.place(caption if kind.rows == "captions" else number)
        step_seconds.append(time.perf_counter() - began)
    files = [path for path in (cache / index.FOLDER).iterdir()]
    return Opened(
        rows=rows,
        shards=sum(len(layer.summary.shards) for _, layers in samples.layers.values() for layer in layers),
        index_bytes=sum(path.stat().st_size for path in files),
        seconds=seconds,
        before_bytes=before,
        peak_bytes=peak,
        own_after_steps_bytes=_resident_bytes("RssAnon"),
        step_seconds=statistics.median(step_seconds),
    )


def _resident_bytes(field: str) -> int:
    """VmRSS, what this process has in memory now; VmHWM, the most that it ever had; RssAnon, now and without files'
    pages that are mapped, which are the page cache's and go when memory is short."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field} in /proc/self/status")


def report(measured: Sequence[tuple[Opened, Opened]]) -> str:
    """The table."""
    rows = [
        (
            f"{warm.rows:,}",
            f"{warm.shards:,}",
            f"{warm.index_bytes / 1e9:.2f}",
            f"{warm.seconds:.2f}",
            f"{cold.seconds:.2f}",
            f"{warm.before_bytes / 1e6:,.0f}",
            f"{warm.peak_bytes / 1e6:,.0f}",
            f"{warm.own_after_steps_bytes / 1e6:,.0f}",
            f"{warm.step_seconds * 1e6:.0f}",
        )
        for cold, warm in measured
    ]
    head = (
        "rows", "shards", "index, GB", "opens in s, warm", "cold", "MB before", "peak MB", "own MB after the steps",
        "step, microseconds",
    )  # fmt: skip
    return table(head, rows, right=0)


def main() -> None:
    """The part that runs in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--open", type=Path, required=True, help="a cache")
    parser.add_argument("--steps", type=int, default=1000, help="batches to look up")
    options = parser.parse_args()
    print(json.dumps(asdict(open_and_step(options.open, options.steps))))


if __name__ == "__main__":
    main()
