"""A cache that training can read, in milliseconds: FLUX's layers with made-up tensors, through the cache's writer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from shared.cache import index, schema, writer
from shared.cache.schema import Caption, Field, Reads, Sample
from tests.train.conftest import flux

BROKEN = "made up to fail"


def sample(
    name: str,
    *captions: str,
    size: tuple[int, int] = (16, 16),
    weights: tuple[float, ...] = (),
    source: str = "",
    content: str = "",
    split: Literal["train", "validation"] = "train",
) -> Sample:
    """A sound sample of `size` (width, height) in pixels; those of one `source` are variants of one image."""
    return Sample(
        key=name, source=source or f"{name}.png", sha256=hashlib.sha256(f"{name} {content}".encode()).hexdigest(),
        conditioning_source=None, conditioning_sha256=None, width=20, height=20, variant=0, placement='{"left": 2}',
        bucket_width=size[0], bucket_height=size[1], split=split,
        captions=tuple(Caption.of(text).id for text in captions or (f"caption of {name}",)),
        status="ok", error=None, caption_weights=weights,
    )  # fmt: skip


def samples_named(count: int, **changes: Any) -> list[Sample]:
    """`count` samples s000, s001, ..."""
    return [sample(f"s{i:03d}", **changes) for i in range(count)]


def tensors(layer: str, key: str, size: tuple[int, int], drawings: int = 0) -> dict[str, torch.Tensor]:
    """What a layer holds for a row: a function of the layer's name and the row's key."""
    random = torch.Generator().manual_seed(int(hashlib.sha256(f"{layer} {key}".encode()).hexdigest()[:8], 16))
    if layer == "clip":
        return {"pooled_prompt_embeds": torch.randn(5, generator=random)}
    if layer == "t5":
        return {"prompt_embeds": torch.randn(3, 4, generator=random).bfloat16()}
    shape = (*([drawings] if drawings else []), 2, size[1] // 8, size[0] // 8)
    return {name: torch.randn(shape, generator=random).bfloat16() for name in ("mean", "std")}


def write(
    folder: Path,
    samples: Sequence[Sample],
    *,
    drawings: Mapping[str, int] | None = None,
    broken: Mapping[str, Collection[str]] | None = None,
    shard_rows: int = 4,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """A finished cache. `drawings`: R of each condition (canny: 1); `broken`: of a layer the keys that it has nothing
    for; `recipes`: what is special in a layer's recipe."""
    conditions = drawings or {"canny": 1}
    ordered = index.in_order(samples)
    captions = [Caption.of("")]
    captions += [
        Caption(id, id) for id in dict.fromkeys(id for s in ordered for id in s.captions) if id != captions[0].id
    ]
    entries = {}
    for kind in flux().layers:
        for condition in conditions if kind.reads == "condition" else [""]:
            name = kind.name_in_cache(condition)
            recipe = {"layer": name, "precision": "bfloat16", **((recipes or {}).get(name, {}))}
            layer = folder / schema.layer_folder(name, schema.fingerprint(recipe))
            reads: Reads = "caption" if kind.rows == "captions" else "image"
            rows = [(c.id, c.id, (0, 0)) for c in captions]
            if kind.rows == "samples":
                rows = [(s.key, s.input(reads), (s.bucket_width or 0, s.bucket_height or 0)) for s in ordered]
            for i in range(0, len(rows), shard_rows):
                with writer.ShardWriter(layer, i // shard_rows) as shard:
                    for key, input_digest, size in rows[i : i + shard_rows]:
                        if key in (broken or {}).get(name, ()):
                            shard.add_error(key, input_digest, BROKEN)
                        else:
                            made = tensors(name, key, size, conditions.get(condition, 0))
                            shard.add(key, input_digest, {"safetensors": save(made)})
            fields = [Field(f.name, "bfloat16", f.shape, f.meaning) for f in kind.fields]
            entries[name] = writer.publish_layer(
                layer, name=name, reads=reads, recipe=recipe, fields=fields, made_with={}
            )
    writer.publish(
        folder, samples=list(samples), captions=captions, layers=entries, family="flux",
        model={"name": "made up", "revision": None}, condition=next(iter(conditions)), conditions=list(conditions),
    )  # fmt: skip
    return folder
