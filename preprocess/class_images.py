"""Class images for prior preservation (DreamBooth, arXiv 2208.12242): what the model itself paints of a class.

They are painted once, by the model that is trained, kept as pictures in the cache (`prior-1f3a9c02/00000.png`), and
encoded like any other sample. Each is a function of its number and of what the folder's fingerprint stands for, so that
an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from preprocess import images
from preprocess.images import ImageError
from preprocess.sources import File, Part, Record, Source
from shared import atomic
from shared.cache import schema
from shared.cache.storage import Storage
from shared.errors import UserError
from shared.families.base import Family
from shared.model_folder import ModelFolder, file_sha256
from shared.report import progress, say

if TYPE_CHECKING:
    from preprocess.layers import Layers


_ZEROS = "force_zeros_for_empty_prompt"
"""What SDXL's pipeline is told in `model_index.json`: what its pictures are guided away from."""


def components(family: Family) -> list[str]:
    """The folders of a model that painting reads beside those of the encoders. Raises `UserError` where the family
    cannot paint."""
    if family.text_to_image is None:
        raise UserError(f"prior.prompt: {family.name} has no pipeline that paints class images; leave it out")
    return [family.base_component, "scheduler"]


class ClassImages:
    """The class images that the options ask for, and those of them that the cache has."""

    def __init__(self, layers: Layers, storage: Storage) -> None:
        """`layers`: of the options, with a prompt. Raises `UserError` where the model cannot paint."""
        self._layers, self._storage, self._options = layers, storage, layers.options.prior
        for component in components(layers.family):
            if not layers.model.has(component):
                raise UserError(
                    f"prior.prompt: class images are painted by the whole pipeline, but model {layers.model.name} has "
                    f"no folder '{component}'"
                )

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All that a class image depends on beside its number."""
        family, model, options = self._layers.family, self._layers.model, self._options
        facts = family.text_to_image
        assert facts is not None
        assert options.prompt is not None
        side = self._layers.options.geometry.resolution
        recipe: dict[str, Any] = {
            "prompt": options.prompt.strip(),
            "seed": options.seed,
            "num_steps": facts.num_steps if options.steps is None else options.steps,
            "guidance": facts.guidance if options.guidance is None else options.guidance,
            "width": side,
            "height": side,
            "precision": str(self._layers.dtype).removeprefix("torch."),
            "pipeline": facts.pipeline,
            "weights": _weights(family, model),
        }
        if facts.text_length is not None:
            recipe["text_length"] = self._layers.text_length
        if not model.index().get(_ZEROS, True):
            recipe[_ZEROS] = False
        return recipe

    @cached_property
    def folder(self) -> str:
        """Of the pictures, in the cache."""
        return schema.layer_folder(schema.PRIOR, schema.fingerprint(self.recipe))

    def _name(self, number: int) -> str:
        return f"{self.folder}/{number:05d}.png"

    @property
    def names(self) -> set[str]:
        """Of all of them, relative to the cache."""
        return {self._name(number) for number in range(self._options.images)}

    def missing(self) -> list[int]:
        """Numbers of those that have to be painted: they are not there, or no picture."""
        there = self._storage.listing(f"{self.folder}/")
        return [number for number in range(self._options.images) if not self._is_sound(self._name(number), there)]

    def _is_sound(self, name: str, there: Any) -> bool:
        with suppress(ImageError):
            return name in there and bool(images.size(self._storage.fetch(name).read_bytes()))
        return False

    def paint(self, numbers: Sequence[int], device: str) -> None:
        """Paint these, one after the other; each is in the cache when it is painted."""
        from shared.families.parts.text_to_image import Wish, open_text_to_image

        layers, recipe = self._layers, self.recipe
        say(f"painting {len(numbers)} of {self._options.images} class images: '{recipe['prompt']}'")
        paint = open_text_to_image(layers.family, layers.model, device, layers.dtype)
        wish = Wish(
            recipe["prompt"], recipe["width"], recipe["height"], recipe["num_steps"], recipe["guidance"],
            layers.text_length,
        )  # fmt: skip
        atomic.make_directory(self._storage.root / self.folder)
        for number in progress(list(numbers), title="class images", unit="image"):
            picture = paint(wish, seed_of(self._options.seed, number))
            atomic.write_bytes(self._storage.root / self._name(number), _png(picture))
            self._storage.finished(self._name(number))
        self._storage.flush()

    def beside(self, source: Source) -> Source:
        """The data set with the class images that the cache has."""
        unpainted = set(self.missing())
        numbers = [number for number in range(self._options.images) if number not in unpainted]
        return _Beside(source, _Painted(self.folder, [self._record(number) for number in numbers]))

    def _record(self, number: int) -> Record:
        name = self._name(number)
        return Record(
            name=name, image=File(str(self._storage.root), name), captions=(self.recipe["prompt"],), weights=(1.0,),
            conditioning_name=None, conditioning=None, split=None, error=None, prior=True,
        )  # fmt: skip

    def publish(self) -> None:
        """Write down what they were painted by. Not before the cache's lists: what has no such note is unfinished."""
        name = f"{self.folder}/{schema.PRIOR}.json"
        content = schema.seal({"fingerprint": schema.fingerprint(self.recipe), "recipe": self.recipe})
        path = self._storage.root / name
        if not path.is_file() or path.read_bytes() != atomic.json_bytes(content):
            atomic.write_json(path, content)
            self._storage.finished(name)


class _Painted(Part):
    """The class images, as a part of the data set."""

    def __init__(self, name: str, records: list[Record]) -> None:
        self.name, self._records = name, records

    def records(self) -> Iterator[Record]:
        yield from self._records

    def __len__(self) -> int:
        return len(self._records)


class _Beside(Source):
    """A data set, and class images after it."""

    def __init__(self, source: Source, painted: _Painted) -> None:
        self._source, self._painted = source, painted
        self.conditioned, self.conditioning_advice = source.conditioned, source.conditioning_advice
        self.num_images = None if source.num_images is None else source.num_images + len(painted)

    @property
    def parts(self) -> Sequence[Part]:
        return [*self._source.parts, self._painted]


def seed_of(seed: int, number: int) -> int:
    """Of the noise that class image `number` begins as: 60 bits, the same everywhere."""
    return int(hashlib.sha256(f"prior {seed} {number}".encode()).hexdigest()[:15], 16)


def _weights(family: Family, model: ModelFolder) -> dict[str, str]:
    """Digests of all that paints."""
    parts = {component for kind in family.layers for component in kind.components} | {family.base_component}
    scheduler = model.path / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise UserError(f"prior.prompt: model {model.name} lacks {scheduler.name}; download the model again")
    return {part: model.sha256(part) for part in sorted(parts)} | {"scheduler": file_sha256(scheduler)}


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
