"""A finished cache of samples of FLUX.1-dev's sizes, through the cache's own writer, without running any encoder.

The tensors are random, so nothing on the way can compress them, and a function of the sample's number alone, so that
every layout of a comparison holds the very same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save

from shared import families
from shared.cache import schema, writer
from shared.cache.schema import Caption, Reads, Sample
from shared.families.base import LayerKind, Tensors

CONDITION = "lineart"
FAMILY = families.get("flux")
EMPTY = Caption.of("")

Add = Callable[[int, Tensors], None]
"""Append sample number i, in order, with its tensors under "layer.field"."""


@dataclass(frozen=True)
class FluxSamples:
    """What the samples of a comparison are."""

    resolution: int
    """Pixels; they are square."""
    count: int
    text_length: int = 512
    """T5 tokens."""
    posterior: Literal["moments", "mean"] = "moments"
    images_per_caption: int = 1
    """How many samples share each caption."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """ "layer.field" -> shape of one sample's tensor, all bfloat16. Latents (16, h, w), h and w an eighth of the
        pixels, those of the condition with R = 1 drawing before; T5 (L, 4096), CLIP (768)."""
        latents = (16, self.resolution // 8, self.resolution // 8)
        fields = ("mean", "std") if self.posterior == "moments" else ("mean",)
        return {
            **{f"latents.{field}": latents for field in fields},
            **{f"condition_latents.{field}": (1, *latents) for field in fields},
            "clip.pooled_prompt_embeds": (768,),
            "t5.prompt_embeds": (self.text_length, 4096),
        }

    @property
    def sample_bytes(self) -> int:
        """What a batch holds of one sample, its caption included."""
        return sum(_num_bytes(shape) for shape in self.shapes.values())

    @property
    def minimum_bytes(self) -> int:
        """The numbers that a cache of all samples must hold: each once, captions only where they differ, the empty
        one among them."""
        of_caption = sum(_num_bytes(shape) for name, shape in self.shapes.items() if name.startswith(("clip.", "t5.")))
        return self.count * (self.sample_bytes - of_caption) + (1 + self.num_captions) * of_caption

    @property
    def num_captions(self) -> int:
        """Distinct ones, the empty one aside."""
        return -(-self.count // self.images_per_caption)

    def caption(self, i: int) -> Caption:
        """The caption of sample number i."""
        return Caption.of(f"caption number {i // self.images_per_caption}")

    def tensors(self, i: int) -> Tensors:
        """The tensors of sample number i, its caption's among them."""
        random = torch.Generator().manual_seed(2 * i)
        random_text = torch.Generator().manual_seed(2 * (i // self.images_per_caption) + 1)
        return {
            name: torch.randn(
                shape, generator=random_text if name.startswith(("clip.", "t5.")) else random, dtype=torch.bfloat16
            )
            for name, shape in self.shapes.items()
        }

    def sample(self, i: int) -> Sample:
        """The row of samples.parquet."""
        key = f"{i:08d}"
        return Sample(
            key=key, source=f"{key}.png", sha256=hashlib.sha256(key.encode()).hexdigest(), conditioning_source=None,
            conditioning_sha256=None, width=self.resolution, height=self.resolution, variant=0, placement='{"left": 0}',
            bucket_width=self.resolution, bucket_height=self.resolution, split="train",
            captions=(self.caption(i).id,), status="ok", error=None,
        )  # fmt: skip


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def recipe(kind: LayerKind) -> dict[str, object]:
    """The made-up recipe of a layer."""
    return {"layer": kind.name_in_cache(CONDITION), "schema_version": schema.SCHEMA_VERSION, "encoder": "random"}


def layer_folder(cache: Path, kind: LayerKind) -> Path:
    """Where a layer's shards are."""
    return cache / schema.layer_folder(kind.name_in_cache(CONDITION), schema.fingerprint(recipe(kind)))


def tars(cache: Path) -> list[Path]:
    """The shards that training reads, layer by layer, in order."""
    return [tar for kind in FAMILY.layers for tar in sorted(layer_folder(cache, kind).glob("*.tar"))]


@contextmanager
def writing(cache: Path, samples: FluxSamples) -> Iterator[Add]:
    """Write a cache sample by sample; it is finished when the block ends. Shards have the family's own sizes."""
    with ExitStack() as stack:
        layers = {
            kind: stack.enter_context(_Rows(layer_folder(cache, kind), kind.shard_rows)) for kind in FAMILY.layers
        }

        def add(i: int, tensors: Tensors) -> None:
            sample = samples.sample(i)
            for kind, rows in layers.items():
                if kind.rows == "captions" and i % samples.images_per_caption:
                    continue
                row = {name.split(".")[1]: t for name, t in tensors.items() if name.split(".")[0] == kind.name}
                reads = _reads(kind)
                key, of = (sample.captions[0],) * 2 if reads == "caption" else (sample.key, sample.input(reads))
                if kind.rows == "captions" and i == 0:
                    rows.add(EMPTY.id, EMPTY.id, {name: torch.zeros_like(tensor) for name, tensor in row.items()})
                rows.add(key, of, row)

        yield add
    _publish(cache, samples)


def _reads(kind: LayerKind) -> Reads:
    return "caption" if kind.reads == "caption" else "image"


class _Rows:
    """Rows of one layer, cut into shards."""

    def __init__(self, folder: Path, shard_rows: int) -> None:
        self.folder, self.shard_rows, self.count = folder, shard_rows, 0
        self._open = ExitStack()

    def __enter__(self) -> _Rows:
        return self

    def add(self, key: str, input_digest: str, tensors: Tensors) -> None:
        if self.count % self.shard_rows == 0:
            self._open.close()
            self._shard = self._open.enter_context(writer.ShardWriter(self.folder, self.count // self.shard_rows))
        self._shard.add(key, input_digest, {"safetensors": save(tensors)})
        self.count += 1

    def __exit__(self, *raised: object) -> None:
        self._open.close()


def _publish(cache: Path, samples: FluxSamples) -> None:
    rows = [samples.sample(i) for i in range(samples.count)]
    captions = [EMPTY, *dict.fromkeys(samples.caption(i) for i in range(samples.count))]
    layers = {
        kind.name_in_cache(CONDITION): writer.publish_layer(
            layer_folder(cache, kind), name=kind.name_in_cache(CONDITION), reads=_reads(kind), recipe=recipe(kind),
            fields=[field for field in kind.fields if f"{kind.name}.{field.name}" in samples.shapes], made_with={},
        )
        for kind in FAMILY.layers
    }  # fmt: skip
    writer.publish(
        cache, samples=rows, captions=captions, layers=layers, family=FAMILY.name,
        model={"name": "random", "revision": None}, condition=CONDITION, conditions=[CONDITION],
    )  # fmt: skip
