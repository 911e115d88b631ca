"""How fast training's loader reads FLUX samples, beside plain reading of the same bytes and beside other layouts.

All of them hold the same random tensors, give them back in batches of 8, and are first compared bit by bit. Then they
are read in turn, round after round in one process; what is compared are figures of the same round.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import flux_cache, layouts, page_cache
from benchmarks.flux_cache import CONDITION, FAMILY, FluxSamples
from benchmarks.layouts import ArrowRows, Epoch, HuggingFace, Layout, MosaicStreaming, SafetensorsFiles, WebDataset
from shared.cache.reader import Cache
from shared.errors import UserError
from shared.families.base import Tensors
from shared.report import say, table
from train.loader import CachedSamples, Loader, LoaderOptions

PLAIN, PLAIN_BATCH = "plain reading, one buffer of 8 MB", "plain reading, one buffer of a batch"
"""The first one's bytes never leave the processor's caches; the second one's have to, as those of any batch."""
ONE_WORKER, DEFAULT_WORKERS = "this cache, one worker", "this cache, default workers"
OTHERS: tuple[type[Layout], ...] = (WebDataset, MosaicStreaming, ArrowRows, HuggingFace, SafetensorsFiles)
RATIOS = {
    "raw": (PLAIN,),
    "webdataset": (WebDataset.name,),
    "mds": (MosaicStreaming.name,),
    "arrow": (ArrowRows.name, HuggingFace.name),
    "files": (SafetensorsFiles.name,),
}
"""Which contenders each closing ratio is against: the faster one of several."""

PIECE_BYTES = 8 << 20

Timer = Callable[[int], float]
"""Number of the epoch -> seconds that it took."""


@dataclass(frozen=True)
class Contender:
    """One way to read all samples once."""

    name: str
    files: Sequence[Path]
    open: Callable[[], AbstractContextManager[Timer]]
    anew: bool = False
    """Opened for each epoch: what is measured is the first one."""


@dataclass(frozen=True)
class Figures:
    """Seconds of an epoch, by contender and round."""

    samples: FluxSamples
    warm: Mapping[str, Sequence[float]]
    cold: Mapping[str, Sequence[float]]

    def ratio(self, name: str, others: Sequence[str]) -> float:
        """Throughput of `name` over that of the fastest of the others; the median of the rounds, each by itself."""
        rounds = zip(self.warm[name], *(self.warm[other] for other in others), strict=True)
        return statistics.median(min(theirs) / ours for ours, *theirs in rounds)

    def closing_line(self) -> str:
        """`loader raw_ratio=... webdataset_ratio=...`: one worker, warm, checksums compared before."""
        ratios = [f"{name}_ratio={self.ratio(ONE_WORKER, others):.2f}" for name, others in RATIOS.items()]
        return " ".join(["loader", *ratios])


def measure(folder: Path, samples: FluxSamples, rounds: int, cold_rounds: int) -> Figures:
    """Write all layouts below `folder`, compare their content, read them. Raises `UserError` where a package that one
    of them is read with is not installed."""
    check_packages()
    torch.set_num_threads(1)  # stacking tensors shall not be shared out behind the back of the comparison
    with warnings.catch_warnings():
        # Tensors that look into a mapped file are copied at once.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return _measure(folder, samples, rounds, cold_rounds)


def _measure(folder: Path, samples: FluxSamples, rounds: int, cold_rounds: int) -> Figures:
    cache = folder / "cache"
    others = [kind(folder / kind.folder_name, samples) for kind in OTHERS]
    say(f"writing {samples.count} samples of {samples.resolution} px, {samples.sample_bytes:,} bytes each ...")
    write(cache, samples, others)
    readings: dict[str, Callable[[], AbstractContextManager[Epoch]]] = {
        ONE_WORKER: lambda: reading(cache, workers=1),
        DEFAULT_WORKERS: lambda: reading(cache, workers=None),
        **{layout.name: layout.reading for layout in others},
    }
    compare(samples, readings)
    tars = flux_cache.tars(cache)
    files = {ONE_WORKER: tars, DEFAULT_WORKERS: tars, **{layout.name: layout.files for layout in others}}
    contenders = [
        Contender(PLAIN, tars, partial(_plain_timing, tars, PIECE_BYTES)),
        Contender(PLAIN_BATCH, tars, partial(_plain_timing, tars, layouts.BATCH * samples.sample_bytes)),
        *(
            Contender(name, files[name], partial(_timing, open_reading, samples.count))
            for name, open_reading in readings.items()
        ),
    ]
    first_epochs = [
        Contender(f"{c.name}, first epoch", c.files, c.open, anew=True)
        for c in contenders
        if c.name in (ONE_WORKER, DEFAULT_WORKERS)
    ]
    everything = sorted({path for found in files.values() for path in found})
    warm = in_turn([*contenders, *first_epochs], rounds, warmed=everything)
    cold = in_turn(contenders, cold_rounds, warmed=None)
    return Figures(samples, warm, cold)


def check_packages() -> None:
    """Raises `UserError` that names what is missing."""
    needed = sorted({kind.package for kind in OTHERS if kind.package})
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise UserError(f"not installed: {', '.join(missing)}. Run make bench-cache, which installs what it compares")


def write(cache: Path, samples: FluxSamples, others: Sequence[Layout]) -> None:
    """Write every sample into the cache and into each layout, in one pass."""
    with ExitStack() as stack:
        adds = [stack.enter_context(flux_cache.writing(cache, samples))]
        adds += [stack.enter_context(layout.writing()) for layout in others if layout.writes]
        for i in range(samples.count):
            tensors = samples.tensors(i)
            for add in adds:
                add(i, tensors)


@contextmanager
def reading(cache: Path, workers: int | None) -> Iterator[Epoch]:
    """Open the cache as training does; None for the loader's own number of workers."""
    options = LoaderOptions(batch_size=layouts.BATCH, caption_dropout=0.0)
    if workers is not None:
        options = LoaderOptions(batch_size=layouts.BATCH, caption_dropout=0.0, workers=workers)
    samples = CachedSamples(Cache(cache), FAMILY, CONDITION, "train")
    loader = Loader(samples, options, seed=0, device=torch.device("cpu"))

    def epoch(_: int) -> Iterator[Tensors]:
        steps = iter(loader)
        try:
            for _ in range(loader.batches_per_epoch):
                yield from (batch.tensors for batch in next(steps))
        finally:
            steps.close()

    yield epoch


def compare(samples: FluxSamples, readings: Mapping[str, Callable[[], AbstractContextManager[Epoch]]]) -> None:
    """Every reading gives every sample once in an epoch, bit by bit."""
    expected = sorted(_digest(samples.tensors(i)) for i in range(samples.count))
    for name, open_reading in readings.items():
        with open_reading() as epoch:
            found = [
                _digest({field: tensor[i] for field, tensor in batch.items()})
                for batch in epoch(0)
                for i in range(_length(batch))
            ]
        assert sorted(found) == expected, f"{name} gives other samples than were written"


def _digest(tensors: Tensors) -> bytes:
    together = hashlib.sha1(usedforsecurity=False)
    for name in sorted(tensors):
        together.update(name.encode())
        together.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return together.digest()


def _length(batch: Tensors) -> int:
    return len(next(iter(batch.values())))


@contextmanager
def _timing(open_reading: Callable[[], AbstractContextManager[Epoch]], count: int) -> Iterator[Timer]:
    with open_reading() as epoch:

        def seconds(number: int) -> float:
            began = time.perf_counter()
            batches, left = epoch(number), count
            while left:
                left -= _length(next(batches))
            took = time.perf_counter() - began
            assert next(batches, None) is None  # threads that read ahead have ended before the next contender's turn
            return took

        yield seconds


@contextmanager
def _plain_timing(files: Sequence[Path], buffer_bytes: int) -> Iterator[Timer]:
    buffer = memoryview(bytearray(buffer_bytes))
    pieces = [buffer[i : i + PIECE_BYTES] for i in range(0, buffer_bytes, PIECE_BYTES)]

    def seconds(_: int) -> float:
        began, following = time.perf_counter(), itertools.cycle(pieces)
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(next(following)):
                    pass
        return time.perf_counter() - began

    yield seconds


def in_turn(contenders: Sequence[Contender], rounds: int, warmed: Sequence[Path] | None) -> dict[str, list[float]]:
    """Seconds of an epoch for each contender and round; another one begins each round.

    With `warmed` files they stay open and a round that does not count comes first; None: the page cache is emptied
    of a contender's files before it is opened for each epoch.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with ExitStack() as stack:
        kept: dict[str, Timer] = {}
        if warmed is not None:
            for contender in contenders:
                if not contender.anew:
                    kept[contender.name] = stack.enter_context(contender.open())
        for turn in range(-1 if warmed is not None else 0, rounds):
            start = turn % len(contenders)
            for contender in [*contenders[start:], *contenders[:start]]:
                if warmed is None:
                    gc.collect()  # what is still mapped stays in memory
                    page_cache.drop(contender.files)
                    if (left := page_cache.resident(contender.files)) > 0.01:
                        say(f"not cold: {left:.0%} of the files of '{contender.name}' stay in memory")
                took = kept[contender.name](turn + 1) if contender.name in kept else _once(contender, turn + 1)
                if turn >= 0:
                    seconds[contender.name].append(took)
    if warmed is not None and (share := page_cache.resident(warmed)) < 0.99:
        say(f"not warm: only {share:.0%} of the files fit into memory; measure fewer samples")
    return seconds


def _once(contender: Contender, number: int) -> float:
    """Seconds of an epoch for which it is opened; afterwards it has nothing mapped any more."""
    with contender.open() as timer:
        return timer(number)


def report(figures: Figures) -> str:
    """The tables of one size of samples."""
    samples = figures.samples
    lines = []
    for name, seconds in (("warm", figures.warm), ("cold", figures.cold)):
        rounds = len(next(iter(seconds.values()), []))
        if not rounds:
            continue
        title = {
            "warm": "page cache warm",
            "cold": "page cache dropped before each epoch, so with checksums compared",
        }[name]
        lines.append(
            f"\n{samples.count} samples of {samples.resolution} px with {samples.text_length} T5 tokens, "
            f"{samples.sample_bytes / 1e6:.2f} MB each, in batches of {layouts.BATCH}; {title}; {rounds} rounds"
        )
        ours = statistics.median(seconds[ONE_WORKER])
        rows = []
        for contender, each in seconds.items():
            rates = [samples.count * samples.sample_bytes / took / 1e9 for took in each]
            median = statistics.median(each)
            rows.append(
                (
                    contender,
                    f"{statistics.median(rates):.2f}",
                    f"{min(rates):.2f} to {max(rates):.2f}",
                    f"{median / samples.count * 1e3:.2f}",
                    f"{median / ours:.2f}",
                )
            )
        lines.append(table(("reading", "GB/s", "spread", "ms a sample", "time, one worker = 1"), rows, right=1))
    for name in (ONE_WORKER, DEFAULT_WORKERS):
        ratios = [f"{figures.ratio(name, (plain,)):.2f} of {plain}" for plain in (PLAIN, PLAIN_BATCH)]
        lines.append(f"{name}: {'; '.join(ratios)}")
    return "\n".join(lines)
