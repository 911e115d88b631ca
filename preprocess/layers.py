"""Which layers a cache has: what each is made from, all that its bytes depend on, and how its producer is opened.

Nothing here knows what is in a cache already. Making the list is cheap; a recipe hashes weights, once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from preprocess import conditions, encode, geometry
from preprocess.config import PreprocessConfig
from preprocess.encode import Producer
from preprocess.units import PlacedImage
from shared import families
from shared.cache import schema
from shared.cache.schema import Field, Reads
from shared.families.base import Family, LayerKind, Tensors
from shared.model_folder import ModelFolder

_DRAWN = "the drawing that was encoded, 0.png to R-1.png, lines white on black"
_DRAWING = (Field("R.png", "uint8", "H W or H W 3", _DRAWN),)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def components(family: Family) -> list[str]:
    """The folders of a model that this stage reads."""
    return sorted({component for kind in family.layers for component in kind.components})


class Layers:
    """The layers that these options ask for, in the order in which they are reported."""

    def __init__(self, options: PreprocessConfig, model: ModelFolder) -> None:
        self.options, self.model = options, model
        self.family = families.get(options.family)
        self.dtype = _DTYPES[options.precision]
        self.text_length = options.text_length or self.family.max_text_length
        kinds = self.family.layers
        images: list[PlannedLayer] = [
            EncodedLayer(self, kind, kind.name, "image") if kind.components else SizesLayer(self, kind)
            for kind in kinds
            if kind.reads == "image"
        ]
        captions = [EncodedLayer(self, kind, kind.name, "caption") for kind in kinds if kind.reads == "caption"]
        if options.text_tokens:
            tokens = (encoder.tokens for encoder in self.family.text_encoders)
            captions += [EncodedLayer(self, kind, kind.name, "caption") for kind in tokens]
        of_conditions: list[PlannedLayer] = []
        for name in options.condition:
            drawn = DrawnLayer(self, name)
            of_conditions += [drawn, *(self._of_condition(kind, drawn) for kind in self.condition_kinds)]
        self.all: list[PlannedLayer] = [*images, *of_conditions, *captions]
        self._by_name = {layer.name: layer for layer in self.all}

    def __iter__(self) -> Iterator[PlannedLayer]:
        return iter(self.all)

    def __getitem__(self, name: str) -> PlannedLayer:
        return self._by_name[name]

    def _of_condition(self, kind: LayerKind, drawn: DrawnLayer) -> PlannedLayer:
        name = kind.name_in_cache(drawn.name)
        if kind.components:
            return EncodedLayer(self, kind, name, drawn.reads, drawn)
        return PixelsLayer(self, kind, name, drawn)

    @property
    def condition_kinds(self) -> list[LayerKind]:
        """What the family encodes of each condition's drawings."""
        return [kind for kind in self.family.layers if kind.reads == "condition"]

    def stages(self) -> list[list[PlannedLayer]]:
        """The layers in groups: those of one group need nothing of each other, only of the groups before."""
        first = [layer for layer in self.all if layer.drawn is None and layer.reads != "caption"]
        return [first, [layer for layer in self.all if layer not in first]]

    def encoder_recipe(self, kind: LayerKind, name: str, drawings: str | None) -> dict[str, Any]:
        """All that an encoder's layer depends on. `drawings`: fingerprint of the layer that is encoded, where it is not
        the images or captions themselves."""
        assert kind.components, f"{name} is nothing but its drawings: see condition_recipe"
        recipe = self.family.encoder_recipe(kind, self.model, self.text_length, self.options.posterior)
        if any(field.dtype == "as encoded" for field in kind.fields):  # tokens are whole numbers
            recipe["precision"] = str(self.dtype).removeprefix("torch.")
        if drawings is not None:
            recipe["drawings"] = drawings
        elif kind.reads == "image":
            recipe["resampling"] = "lanczos"
        return _recipe(name, recipe)

    def condition_recipe(self, kind: LayerKind, condition: str, drawings: str) -> dict[str, Any]:
        """The recipe of what this kind of layer makes of a condition's drawings, which have this fingerprint."""
        name = kind.name_in_cache(condition)
        if kind.components:
            return self.encoder_recipe(kind, name, drawings)
        return _recipe(name, {"drawings": drawings, "channels": conditions.get(condition).channels})


def _recipe(name: str, rest: Mapping[str, Any]) -> dict[str, Any]:
    return {"layer": name, "schema_version": schema.SCHEMA_VERSION, **rest}


class PlannedLayer(ABC):
    """One layer that the cache shall have."""

    drawn: DrawnLayer | None = None
    """The layer of drawings that it encodes."""

    def __init__(self, layers: Layers, name: str, reads: Reads) -> None:
        self._layers, self._options, self.name, self.reads = layers, layers.options, name, reads

    @cached_property
    @abstractmethod
    def recipe(self) -> Mapping[str, Any]:
        """All that its bytes depend on. `UserError` where a detector's weights are not to be had."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the recipe."""
        return schema.fingerprint(self.recipe)

    @property
    def folder(self) -> str:
        """Its folder in the cache."""
        return schema.layer_folder(self.name, self.fingerprint)

    @property
    @abstractmethod
    def fields(self) -> Sequence[Field]:
        """What a member holds."""

    @property
    @abstractmethod
    def shard_rows(self) -> int:
        """Rows of one shard at most."""

    @property
    def batch_size(self) -> int:
        """Rows that are encoded together."""
        return self._options.encode.image_batch

    @property
    def batch_option(self) -> str:
        """What to lower where memory is too small."""
        return "image_batch"

    @abstractmethod
    def row_bytes(self, pixels: int) -> int:
        """About how large a row is on disk, for a sample of so many pixels."""

    @abstractmethod
    @contextmanager
    def open(self, device: str) -> Iterator[Producer]:
        """Load the producer onto `device`, for the length of a `with` block."""


class EncodedLayer(PlannedLayer):
    """Made by one of the family's encoders from images, captions, or drawings that were made before."""

    def __init__(
        self, layers: Layers, kind: LayerKind, name: str, reads: Reads, drawn: DrawnLayer | None = None
    ) -> None:
        super().__init__(layers, name, reads)
        self._kind, self.drawn = kind, drawn

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        if self.drawn is None:
            return self._layers.encoder_recipe(self._kind, self.name, None)
        return self._layers.condition_recipe(self._kind, self.drawn.name, self.drawn.fingerprint)

    @property
    def fields(self) -> Sequence[Field]:
        precision = str(self._layers.dtype).removeprefix("torch.")
        fields = self._layers.family.fields(self._kind, self._options.posterior)
        return tuple(replace(f, dtype=precision) if f.dtype == "as encoded" else f for f in fields)

    @property
    def shard_rows(self) -> int:
        return self._options.encode.shard_rows or self._kind.shard_rows

    @property
    def _num_drawings(self) -> int:
        return 1 if self.drawn is None else self.drawn.condition.num_drawings

    @property
    def batch_size(self) -> int:
        size = self._options.encode
        # A sample's drawings are encoded together: fewer samples at a time in the same memory.
        return size.text_batch if self.reads == "caption" else max(1, size.image_batch // self._num_drawings)

    @property
    def batch_option(self) -> str:
        return "text_batch" if self.reads == "caption" else "image_batch"

    def row_bytes(self, pixels: int) -> int:
        layers = self._layers
        one = layers.family.row_bytes(
            self._kind, layers.model, layers.dtype, pixels, layers.text_length, self._options.posterior
        )
        return self._num_drawings * one

    @contextmanager
    def open(self, device: str) -> Iterator[Producer]:
        layers = self._layers
        encoder = layers.family.open_encoder(self._kind, layers.model, device, layers.dtype, layers.text_length)
        if self.reads == "caption":
            yield encode.captions_producer(encoder)
        else:
            yield encode.images_producer(encoder, self._keep)

    def _keep(self, item: encode.Item, tensors: Tensors) -> Tensors:
        family, posterior = self._layers.family, self._options.posterior
        return family.keep(self._kind, tensors, posterior, f"{self.name}/{item.input}")


class PixelsLayer(PlannedLayer):
    """Drawings that were made before, as they are: tensors that training stacks without decoding anything."""

    drawn: DrawnLayer

    def __init__(self, layers: Layers, kind: LayerKind, name: str, drawn: DrawnLayer) -> None:
        super().__init__(layers, name, drawn.reads)
        self._kind, self.drawn = kind, drawn

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        return self._layers.condition_recipe(self._kind, self.drawn.name, self.drawn.fingerprint)

    @property
    def fields(self) -> Sequence[Field]:
        return self._kind.fields

    @property
    def shard_rows(self) -> int:
        return self._options.encode.shard_rows or self._kind.shard_rows

    def row_bytes(self, pixels: int) -> int:
        condition = self.drawn.condition
        return condition.num_drawings * condition.channels * pixels + 1024  # two tar blocks, as of any tensors

    @contextmanager
    def open(self, device: str) -> Iterator[Producer]:
        yield encode.pixels_producer(self._kind.fields[0].name, self.drawn.condition.channels)


class SizesLayer(PlannedLayer):
    """What a sample's placement tells of it. Its row is a few numbers, and depends on no pixel."""

    def __init__(self, layers: Layers, kind: LayerKind) -> None:
        super().__init__(layers, kind.name, "image")
        self._kind = kind

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        return _recipe(self.name, {"of": "placement"})

    @property
    def fields(self) -> Sequence[Field]:
        return self._kind.fields

    @property
    def shard_rows(self) -> int:
        return self._options.encode.shard_rows or self._kind.shard_rows

    def row_bytes(self, pixels: int) -> int:
        return 1024  # two tar blocks

    @contextmanager
    def open(self, device: str) -> Iterator[Producer]:
        yield Producer(lambda pixels: pixels, self._row)

    def _row(self, item: encode.Item, pixels: Any) -> encode.Row:
        assert isinstance(item, PlacedImage)
        sample = item.sample
        assert sample.placement is not None
        placement = geometry.Placement(**json.loads(sample.placement))
        left = placement.crop_left
        if placement.flip:  # the mirror's left
            left = placement.resize_width - placement.bucket_width - left
        of_image, of_crop = (sample.height, sample.width), (placement.bucket_height, placement.bucket_width)
        numbers = torch.tensor([*of_image, placement.crop_top, left, *of_crop], dtype=torch.float32)
        return encode.tensors_row(item, {self._kind.fields[0].name: numbers})


class DrawnLayer(PlannedLayer):
    """The drawings of one condition."""

    def __init__(self, layers: Layers, name: str) -> None:
        self.condition: conditions.Condition[Any] = conditions.get(name)(getattr(layers.options.conditions, name))
        super().__init__(layers, name, self.condition.reads)

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        return _recipe(self.name, {"condition": self.name, "resampling": "lanczos", **self.condition.recipe()})

    @property
    def fields(self) -> Sequence[Field]:
        return _DRAWING

    @property
    def shard_rows(self) -> int:
        return self._options.encode.shard_rows or 256

    def row_bytes(self, pixels: int) -> int:
        return self.condition.num_drawings * (int(pixels * self.condition.png_bytes_per_pixel) + 1024)

    @contextmanager
    def open(self, device: str) -> Iterator[Producer]:
        with self.condition.open(device) as draw:
            yield encode.drawings_producer(draw)
