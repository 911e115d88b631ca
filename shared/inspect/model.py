"""What the model that made a cache can tell of it: its latents as pictures, its captions in tokens.

Only a model that is on this machine is asked, and only where its weights are those that made the cache. Where it cannot
be, the reason comes back in words and the page does without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from shared import families
from shared.cache.reader import LayerSummary
from shared.errors import UserError
from shared.families.base import Family, Tensors
from shared.model_folder import ModelFolder, resolve
from shared.report import quiet_libraries

Picture = Callable[[Tensors, int, int], NDArray[np.uint8]]
"""Tensors of one sample's latents as they are cached, height, width in pixels -> uint8 (H, W, 3)."""

_CPU_WORK = 1e15
"""Bytes of VAE weights times pixels that a CPU is asked to decode: two dozen pictures of 512 px by FLUX's VAE, which is
some minutes on two cores, and more than anyone looks at by a tiny one."""
_LEAST_PICTURES = 8


@dataclass
class Model:
    """The model behind a cache, as far as it can be had. `notes` says in words what could not."""

    family: str
    summaries: dict[str, LayerSummary]
    """The cache's layers, those that can be read."""
    name: str
    """A folder or a hub id."""
    revision: str | None
    device: str
    notes: list[str] = field(default_factory=list)

    @cached_property
    def _found(self) -> tuple[Family, ModelFolder] | None:
        try:
            return families.get(self.family), resolve(self.name, (), self.revision, local_only=True)
        except UserError as error:
            reason = str(error)
            self.notes.append(
                f"{reason[0].upper()}{reason[1:]}. Pictures are not decoded and tokens not counted without it."
            )
            return None

    def decoder(self) -> tuple[str, Picture] | None:
        """The layer that holds the samples' latents, and what makes a picture of one; None where there is none."""
        if self._found is None:
            return None
        family, model = self._found
        for kind in family.layers:
            if kind.reads == "image" and (summary := self.summaries.get(kind.name)):
                try:
                    self._check(kind.components, summary, "pictures are not decoded")
                    quiet_libraries()
                    return kind.name, self._open_decoder(family, model, summary)
                except UserError as error:
                    self.notes.append(str(error))
        return None

    def num_affordable(self, pixels: int) -> int | None:
        """How many pictures of so many pixels to decode; None where all of them are soon done."""
        if self._found is None or self.device != "cpu":
            return None
        family, model = self._found
        component = next(kind.components[0] for kind in family.layers if kind.reads == "image")
        work = sum(file.stat().st_size for file in model.weights(component)) * pixels
        return max(_LEAST_PICTURES, int(_CPU_WORK / work))

    def token_counter(self) -> Callable[[Sequence[str]], list[int]] | None:
        """What counts the tokens of captions; None where nothing can."""
        if self._found is None:
            return None
        family, model = self._found
        try:
            for kind in family.layers:
                if kind.reads == "caption" and (summary := self.summaries.get(kind.name)):
                    tokenizers = tuple(name for name in kind.components if name.startswith("tokenizer"))
                    self._check(tokenizers, summary, "tokens are not counted")
            quiet_libraries()
            family.count_tokens(model, [""])
        except UserError as error:
            self.notes.append(str(error))
            return None
        return lambda captions: family.count_tokens(model, captions)

    def _check(self, components: Sequence[str], summary: LayerSummary, consequence: str) -> None:
        """Refuse a model whose components are not the ones that made the layer."""
        assert self._found is not None
        _, model = self._found
        stated = summary.recipe.get("encoder", {})
        for component in components:
            if model.sha256(component) != stated.get(component):
                raise UserError(
                    f"The {component} of model {self.name} is not the one that made layer {summary.name}, so "
                    f"{consequence}. Name the one that did with --model."
                )

    def _open_decoder(self, family: Family, model: ModelFolder, summary: LayerSummary) -> Picture:
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        decode = family.open_decoder(model, self.device, dtype)

        def picture(tensors: Tensors, height: int, width: int) -> NDArray[np.uint8]:
            batch = {name: tensor[None] for name, tensor in tensors.items()}
            # Without a generator: the posterior's mean, and nothing drawn.
            x_0 = family.model_latents(batch, summary.recipe, None, torch.float32)
            return decode(x_0, height, width)[0].numpy()

        return picture
