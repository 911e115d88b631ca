"""How the frozen base is held: in int8 or as it is, and frozen for good.

What is quantized are the linears of its blocks, per output channel by optimum-quanto's own functions; activations stay
as they are, and so do the embedders and the output layer, 0.6 % of FLUX's parameters. `train/base_store.py` brings a
base that was quantized before from the disk; here is what is done to one in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from shared.cache.storage import RemoteOptions, is_remote
from shared.errors import UserError
from train.frozen_linear import FrozenInt8Linear

Weights = Literal["int8", "quanto", "none"]

FOLDER = "bases"
"""Beside the cache: where quantized bases are kept."""


@dataclass(frozen=True)
class BaseOptions:
    """How the frozen base is held."""

    weights: Weights = "int8"
    """int8: a third of the memory, 12 GB for FLUX.1-dev, in a layer that keeps no activations. quanto: the same numbers
    in optimum-quanto's own layer, to compare with. none: as they are, 24 GB in bf16."""
    folder: str | None = None
    """Where bases that were quantized once are kept. Default: `bases` beside the cache; of a cache at a URL, in the
    folder of fetched shards."""

    def check(self) -> None:
        """Nothing that the types do not rule out."""

    def folder_beside(self, cache: str, remote: RemoteOptions) -> Path:
        """The folder of quantized bases for a run on this cache."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        if is_remote(cache):
            return remote.local_folder / FOLDER
        return Path(cache.removeprefix("file://").removeprefix("local://")).expanduser().absolute().parent / FOLDER


def place_base(base: torch.nn.Module, device: torch.device, weights: Weights) -> torch.nn.Module:
    """Put a base that is in memory on the device, the linears of its blocks in int8 if asked, frozen. In place; the
    base comes back.

    Block after block is moved and quantized there, so that the device never holds the whole model unquantized. Make
    what is initialised from the base first: a quantized base has no weights to copy.
    """
    if weights != "none":
        for block in blocks_of(base):
            quantize_block(block.to(device), weights)
    base.to(device)
    return frozen(base)


def blocks_of(base: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose linears are quantized: the members of the base's lists."""
    blocks = [block for child in base.children() if isinstance(child, torch.nn.ModuleList) for block in child]
    if not blocks:
        raise UserError(f"nothing to quantize: {type(base).__name__} has no list of blocks")
    return blocks


def quantize_block(block: torch.nn.Module, weights: Literal["int8", "quanto"]) -> None:
    """Every linear in the block in int8, where it is, in place."""
    if weights == "quanto":
        from optimum.quanto import freeze, qint8, quantize

        quantize(block, weights=qint8)
        freeze(block)
        return
    for parent, name, linear in _linears(block):
        setattr(parent, name, FrozenInt8Linear.from_float(linear))


def make_room(block: torch.nn.Module) -> None:
    """An int8 layer in the place of every linear of a block on the meta device, in place: for numbers to come."""
    for parent, name, linear in _linears(block):
        empty = FrozenInt8Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        setattr(parent, name, empty.train(linear.training))


def frozen(base: torch.nn.Module) -> torch.nn.Module:
    """The base, without gradients, in evaluation mode. quanto's `freeze` makes new parameters, and new parameters
    require gradients: at full size 22 GiB of them."""
    base.requires_grad_(False)
    refuse_trainable(base)
    return base.eval()


def refuse_trainable(base: torch.nn.Module) -> None:
    """Raise `UserError` where a tensor of the base requires a gradient: a library that wraps or loads a model may
    switch that on again, and training would go on, slower and with more memory, without a word."""
    tensors = [*base.named_parameters(), *base.named_buffers()]
    trainable = [name for name, tensor in tensors if tensor.requires_grad]
    if trainable:
        raise UserError(
            f"the frozen base has become trainable: {len(trainable)} of its tensors require gradients (as "
            f"{trainable[0]}). What wrapped or loaded it last did that: call base.requires_grad_(False) after it"
        )


def _linears(block: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """(parent, name in it, linear) of every plain linear below a block; the block may be changed meanwhile."""
    found = [(parent, *named) for parent in block.modules() for named in parent.named_children()]
    yield from ((parent, name, child) for parent, name, child in found if isinstance(child, torch.nn.Linear))
