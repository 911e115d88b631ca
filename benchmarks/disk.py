"""What a sample takes on disk, beside the least that its numbers could take in bf16."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import flux_cache
from benchmarks.flux_cache import FAMILY, FluxSamples
from shared.cache.writer import bytes_on_disk
from shared.report import table


@dataclass(frozen=True)
class Size:
    """A finished cache and its size in bytes."""

    samples: FluxSamples
    whole: int
    """All files but the drawings, which are there for people: training reads their latents."""
    text: int
    """Of that, the captions, the empty one aside."""

    @property
    def ratio(self) -> float:
        """Bytes on disk over those of the numbers."""
        return self.whole / self.samples.minimum_bytes


def measure(folder: Path, caches: Sequence[FluxSamples]) -> list[Size]:
    """Write each cache below `folder`, take its size, and remove it."""
    sizes = []
    for samples in caches:
        cache = folder / "cache"
        with flux_cache.writing(cache, samples) as add:
            for i in range(samples.count):
                add(i, samples.tensors(i))
        sizes.append(size_of(cache, samples))
        shutil.rmtree(cache)
    return sizes


def size_of(cache: Path, samples: FluxSamples) -> Size:
    """The size of a cache of these samples: it has no drawings."""
    text = sum(bytes_on_disk(flux_cache.layer_folder(cache, kind)) for kind in FAMILY.layers if kind.rows == "captions")
    return Size(samples, bytes_on_disk(cache), text * samples.num_captions // (samples.num_captions + 1))


def closing_line(sizes: Sequence[Size]) -> str:
    """`bytes ratio=...`: the largest of the caches whose captions are all different."""
    return f"bytes ratio={max(size.ratio for size in sizes if size.samples.images_per_caption == 1):.4f}"


def report(sizes: Sequence[Size]) -> str:
    """The table."""
    rows = [
        (
            f"{size.samples.resolution} px",
            size.samples.posterior,
            f"{size.samples.images_per_caption}",
            f"{size.samples.count}",
            f"{size.samples.minimum_bytes / size.samples.count:,.0f}",
            f"{size.whole / size.samples.count:,.0f}",
            f"{size.text / size.samples.count:,.0f}",
            f"{size.ratio:.4f}",
        )
        for size in sizes
    ]
    head = (
        "samples", "posterior", "images a caption", "count", "raw bf16, bytes a sample", "on disk", "of it captions",
        "ratio",
    )  # fmt: skip
    return f"{table(head, rows, right=2)}\nThe raw minimum counts the empty caption once; drawings come on top."
