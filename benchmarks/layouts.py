"""The same samples as others lay them out, each read through its own library's pipeline into batches.

A layout is written sample by sample, then opened; an opened one gives epochs: iterators over batches, each a dictionary
of stacked tensors (B, ...) in memory of their own. Random order where the layout can do it, one process, no workers.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load, load_file, save, save_file

from benchmarks.flux_cache import Add, FluxSamples
from shared.families.base import Tensors

BATCH = 8
SHARD_BYTES = 256 << 20

Epoch = Callable[[int], Iterator[Tensors]]
"""Number of the epoch, which seeds its order -> all samples in batches of `BATCH`."""


class Layout(ABC):
    """One way to keep samples on disk and to read them."""

    name: ClassVar[str]
    folder_name: ClassVar[str]
    package: ClassVar[str | None] = None
    """What it is read with, where that is not the project's own requirement."""
    writes: ClassVar[bool] = True
    """False where it reads what another layout has written."""

    def __init__(self, folder: Path, samples: FluxSamples) -> None:
        self.folder, self.samples = folder, samples

    @property
    def files(self) -> list[Path]:
        """All that it has on disk."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    @abstractmethod
    def writing(self) -> AbstractContextManager[Add]:
        """What appends a sample; the layout is whole when the block ends."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Epoch]:
        """Open it."""

    def _shuffled(self, epoch: int) -> Iterator[Sequence[int]]:
        order = np.random.default_rng(epoch).permutation(self.samples.count)
        for i in range(0, len(order), BATCH):
            yield order[i : i + BATCH].tolist()

    def _tensors(self, name: str, buffers: Sequence[Any]) -> torch.Tensor:
        """(B, ...) out of the bytes of each sample's tensor."""
        shape = self.samples.shapes[name]
        return torch.stack([torch.frombuffer(buffer, dtype=torch.bfloat16).view(shape) for buffer in buffers])


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _stacked(samples: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class SafetensorsFiles(Layout):
    """One safetensors file for each sample."""

    name = "one safetensors file a sample"
    folder_name = "files"

    @contextmanager
    def writing(self) -> Iterator[Add]:
        self.folder.mkdir(parents=True)
        yield lambda i, tensors: save_file(tensors, self.folder / f"{i:08d}.safetensors")

    @contextmanager
    def reading(self) -> Iterator[Epoch]:
        def epoch(number: int) -> Iterator[Tensors]:
            for batch in self._shuffled(number):
                yield _stacked([load_file(self.folder / f"{i:08d}.safetensors") for i in batch])

        yield epoch


class WebDataset(Layout):
    """Tars of whole samples through webdataset's own pipeline: a stream, in order (its shuffling is a buffer)."""

    name = "webdataset"
    folder_name = "webdataset"

    @contextmanager
    def writing(self) -> Iterator[Add]:
        import webdataset

        self.folder.mkdir(parents=True)
        with webdataset.ShardWriter(
            str(self.folder / "%05d.tar"), maxcount=10**9, maxsize=SHARD_BYTES, verbose=0
        ) as sink:
            yield lambda i, tensors: sink.write({"__key__": f"{i:08d}", "safetensors": save(tensors)})

    @contextmanager
    def reading(self) -> Iterator[Epoch]:
        import webdataset

        urls = [str(path) for path in self.files]

        def epoch(number: int) -> Iterator[Tensors]:
            stream = webdataset.WebDataset(urls, shardshuffle=False).map_dict(safetensors=load).to_tuple("safetensors")
            return iter(stream.batched(BATCH, collation_fn=lambda rows: _stacked([tensors for (tensors,) in rows])))

        yield epoch


class MosaicStreaming(Layout):
    """MosaicML streaming: MDS shards on this machine, shuffled, its dataset in torch's loader without workers."""

    name = "MosaicML streaming"
    folder_name = "mds"
    package = "streaming"

    @contextmanager
    def writing(self) -> Iterator[Add]:
        from streaming import MDSWriter

        columns = dict.fromkeys(self.samples.shapes, "bytes")
        with MDSWriter(out=str(self.folder), columns=columns, size_limit=SHARD_BYTES) as sink:
            yield lambda _, tensors: sink.write({name: bytes(_bytes(tensor)) for name, tensor in tensors.items()})

    @contextmanager
    def reading(self) -> Iterator[Epoch]:
        from streaming import StreamingDataset
        from torch.utils.data import DataLoader

        locks = self.folder.with_name("mds-locks")
        locks.mkdir(exist_ok=True)
        before, tempfile.tempdir = tempfile.tempdir, str(locks)  # it leaves two files there for each time it is opened
        try:
            dataset = StreamingDataset(local=str(self.folder), shuffle=True, batch_size=BATCH)
        finally:
            tempfile.tempdir = before

        def collate(rows: list[dict[str, bytes]]) -> Tensors:
            return {name: self._tensors(name, [row[name] for row in rows]) for name in rows[0]}

        loader = DataLoader(dataset, batch_size=BATCH, collate_fn=collate)
        yield lambda number: iter(loader)


class ArrowRows(Layout):
    """An Arrow file, memory-mapped: a row for each sample, a column of `large_binary` for each tensor."""

    name = "Arrow large_binary"
    folder_name = "arrow"
    rows_of_batch = 16

    @property
    def table(self) -> Path:
        """The file, in Arrow's stream format, which Hugging Face datasets map too."""
        return self.folder / "samples.arrow"

    @contextmanager
    def writing(self) -> Iterator[Add]:
        self.folder.mkdir(parents=True)
        schema = pa.schema([(name, pa.large_binary()) for name in self.samples.shapes])
        rows: list[Tensors] = []
        with pa.OSFile(str(self.table), "wb") as file, pa.ipc.new_stream(file, schema) as sink:

            def flush() -> None:
                columns = [
                    pa.array([bytes(_bytes(row[name])) for row in rows], pa.large_binary()) for name in schema.names
                ]
                sink.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
                rows.clear()

            def add(_: int, tensors: Tensors) -> None:
                rows.append(tensors)
                if len(rows) == self.rows_of_batch:
                    flush()

            yield add
            if rows:
                flush()

    @contextmanager
    def reading(self) -> Iterator[Epoch]:
        table = pa.ipc.open_stream(pa.memory_map(str(self.table))).read_all()

        def epoch(number: int) -> Iterator[Tensors]:
            for batch in self._shuffled(number):
                yield {
                    name: self._tensors(name, [table[name][i].as_buffer() for i in batch])
                    for name in table.schema.names
                }

        yield epoch


class HuggingFace(ArrowRows):
    """Hugging Face datasets on the same Arrow file: shuffled, its own batches in its Arrow format, the fastest."""

    name = "Hugging Face datasets"
    package = "datasets"
    writes = False

    @contextmanager
    def reading(self) -> Iterator[Epoch]:
        from datasets import Dataset

        dataset = Dataset.from_file(str(self.table)).with_format("arrow")

        def epoch(number: int) -> Iterator[Tensors]:
            shuffled = dataset.shuffle(seed=number, keep_in_memory=True)
            for batch in shuffled.iter(batch_size=BATCH):
                yield {
                    name: self._tensors(name, [row.as_buffer() for row in batch[name]]) for name in batch.schema.names
                }

        yield epoch
