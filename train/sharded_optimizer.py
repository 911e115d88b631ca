"""The optimizer of weights that are spread over cards: each card steps the parts that it holds, and nothing of the
states is anywhere twice.

What is one number of all weights, a norm, is summed over the cards. In a checkpoint the states are whole, as of one
process: joined when it is saved, cut when it is loaded, by whatever number of cards there then is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from shared.errors import UserError
from train.buckets import BLOCK_NUMEL, in_blocks
from train.optimizer import CHUNK_NUMEL, Optimizer
from train.optimizer_options import OptimizerOptions
from train.optimizer_state import held_as_here
from train.sharded_training import TrainedShards


class ShardedOptimizer(Optimizer):
    """AdamW over the parts of spread weights. Every process makes every call."""

    def __init__(self, options: OptimizerOptions, shards: TrainedShards, *, chunk_numel: int = CHUNK_NUMEL) -> None:
        """As `Optimizer`. Moments of a weight that cannot be cut between two blocks of 8-bit values are in float32."""
        assert options.kind != "prodigy"
        assert not options.release
        self.shards = shards
        self._in_8_bits = frozenset(
            name
            for name, shape in shards.shapes.items()
            if in_blocks(shape.numel())
            and all(shards.span(name, card)[1] % BLOCK_NUMEL == 0 for card in range(shards.cards - 1))
        )
        super().__init__(options, shards.parts, chunk_numel=chunk_numel, in_8_bits=self._in_8_bits)
        self._num_weights = sum(shape.numel() for shape in shards.shapes.values())

    def begin(self, learning_rate: float, rounding: torch.Generator | int | None, *, measure: bool = False) -> None:
        """As in `Optimizer`; each card rounds with noise of its own."""
        if isinstance(rounding, int):
            mixed = np.random.SeedSequence((rounding, self.shards.card)).generate_state(1, np.uint64)[0]
            rounding = int(mixed >> np.uint64(1))
        super().begin(learning_rate, rounding, measure=measure)

    def zero_grad(self) -> None:
        """Forget all gradients and free their memory."""
        self.shards.forget_gradients()

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Of the whole gradient, 0-dim float32."""
        self.shards.take_gradients()
        super().norm()
        now = self._begun
        assert now is not None
        none = torch.zeros((), device=self._device)
        squares = torch.stack([now.norms.get(name, none).square() for name in self.shards.shapes])
        norms = self._together(squares).sqrt()
        now.norms = dict(zip(self.shards.shapes, norms, strict=True))
        return torch.linalg.vector_norm(norms)

    def _together(self, summed: torch.Tensor) -> torch.Tensor:
        return self.shards.sum(summed)

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As `Optimizer.state` gives it of whole weights; the tensors on the main process alone."""
        shards = self.shards
        parts, meta = super().state()
        described = shards.agreed(meta["parameters"])  # the first card has rows of every weight
        tensors: dict[str, torch.Tensor] = {}
        for name, of in described.items():
            of["shape"] = list(shards.shapes[name])
            for key in of["tensors"]:
                part = parts.get(f"{name}.{key}")
                if _of_all(key):
                    found = part
                else:
                    in_8_bits = key in ("state1", "state2")
                    sizes = [_size(key, *shards.span(name, card)) for card in range(shards.cards)]
                    found = shards.joined(part, sizes, torch.uint8 if in_8_bits else torch.float32)
                if found is not None and shards.is_main:
                    flat = _of_all(key) or key.startswith("absmax")
                    tensors[f"{name}.{key}"] = found if flat else found.view(shards.shapes[name])
        return tensors, {**meta, "parameters": described}

    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` returned, of one process or of any number."""
        shapes = {name: list(shape) for name, shape in self.shards.shapes.items()}
        if {name: list(of["shape"]) for name, of in meta["parameters"].items()} != shapes:
            raise UserError(
                "the saved optimizer state is of other parameters than are trained here: resume with the options of "
                "the saved run, or start without its optimizer state"
            )
        codes = self._eight_bit.codes if self._eight_bit is not None else {}
        tensors, meta = held_as_here(tensors, meta, self._in_8_bits, codes)
        mine: dict[str, torch.Tensor] = {}
        described: dict[str, Any] = {}
        for name, part in self.shards.parts.items():
            of = meta["parameters"][name]
            described[name] = {**of, "shape": list(part.shape)}
            start, stop = self.shards.span(name)
            for key in of["tensors"]:
                if (tensor := tensors.get(f"{name}.{key}")) is None:
                    continue  # damaged, which is said below
                if key.startswith("absmax"):
                    first = start // BLOCK_NUMEL
                    tensor = tensor[first : first + _size(key, start, stop)]
                elif not _of_all(key):
                    tensor = tensor.reshape(-1)[start:stop].view(part.shape)
                mine[f"{name}.{key}"] = tensor
        super().load_state(mine, {**meta, "parameters": described})


def _of_all(key: str) -> bool:
    """Whether a state is the same on all cards."""
    return key == "step" or key.startswith("qmap")


def _size(key: str, start: int, stop: int) -> int:
    """Numbers of a state for the values from `start` to before `stop`."""
    return -(-(stop - start) // BLOCK_NUMEL) if key.startswith("absmax") else stop - start
