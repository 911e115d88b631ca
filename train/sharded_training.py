"""The trained base spread over a machine's cards: each holds a part of every weight, of its gradient and of what the
optimizer keeps for it.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers a block before its forward and before its backward, as with a
frozen base (`train.sharding`), and after its backward brings the cards' gradients together so that each has its part of
the sum. Parts are rows: of a weight's first dimension card i of n has the i-th n-th. Between machines gradients are
averaged as DDP would; each machine has all of the weights.

    shards = sharded_training.spread(family, base, device, cards=2)     # after a checkpoint's weights were loaded
    optimizer = ShardedOptimizer(options, shards)                       # train/sharded_optimizer.py
    whole = shards.whole(shards.parts)                                  # every process; on the main one, to be saved

What is kept is whole, as one process would have it, so that a run goes on with any number of processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed

from shared.families.base import Family
from train.sharding import Shards, gather_ahead, local, mesh_of


class TrainedShards(Shards):
    """A trained base that is spread over the cards of each machine. What belongs to no block is one part more."""

    def __init__(
        self, family: Family, base: torch.nn.Module, device: torch.device, group: Any, shapes: Mapping[str, torch.Size]
    ) -> None:
        super().__init__([*family.blocks(base), base], device, group)
        self.card, self.cards = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self.shapes = dict(shapes)
        """Of each weight, whole."""
        self._sharded = dict(base.named_parameters())
        self.parts = {
            name: torch.nn.Parameter(local(parameter.detach()))
            for name, parameter in self._sharded.items()
            if local(parameter.detach()).numel()
        }
        """Of each weight the rows that lie here, in the memory that FSDP gathers from; without those of which none
        do."""

    def backward(self, share: torch.Tensor, last: bool) -> None:
        """Of every batch the gradients come together at once, so that none lies whole anywhere. Adds their sum over the
        processes."""
        (share * torch.distributed.get_world_size()).backward()  # FSDP averages

    def take_gradients(self) -> None:
        """Give the parts the gradients that backward has left."""
        for name, part in self.parts.items():
            gradient = self._sharded[name].grad
            part.grad = None if gradient is None else local(gradient)

    def forget_gradients(self) -> None:
        """Of the weights, and of the parts."""
        for parameter in [*self._sharded.values(), *self.parts.values()]:
            parameter.grad = None

    def span(self, name: str, card: int | None = None) -> tuple[int, int]:
        """From which to before which value of the flattened weight a card's part goes; this card's where none is
        named."""
        shape = self.shapes[name]
        card = self.card if card is None else card
        rows, per_row = shape[0], math.prod(shape[1:])
        each = -(-rows // self.cards)
        return min(card * each, rows) * per_row, min((card + 1) * each, rows) * per_row

    def cut(self, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of whole tensors by weights' names, the rows of this card's parts."""
        return {
            name: whole[name].reshape(-1)[slice(*self.span(name))].view(part.shape)
            for name, part in self.parts.items()
            if name in whole
        }

    def whole(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of parts by weights' names (a card may have none of a weight) the whole tensors on the main process' CPU;
        nothing on others. All processes call it, and name the same weights."""
        gathered: dict[str, torch.Tensor] = {}
        dtype = next(iter(parts.values())).dtype
        for name, shape in self.shapes.items():
            sizes = [stop - start for start, stop in (self.span(name, card) for card in range(self.cards))]
            found = self.joined(parts.get(name), sizes, dtype)
            if found is not None:
                gathered[name] = found.view(shape)
        return gathered

    def joined(self, part: torch.Tensor | None, sizes: list[int], dtype: torch.dtype) -> torch.Tensor | None:
        """The cards' parts, flat and of these sizes, one after the other, on the main process' CPU; None on others."""
        own = torch.zeros(max(sizes), dtype=dtype, device=self.device)
        if part is not None:
            own[: part.numel()] = part.detach().reshape(-1).to(self.device)
        everyone = [torch.empty_like(own) for _ in sizes]
        torch.distributed.all_gather(everyone, own, group=self.group)
        if not self.is_main:
            return None
        return torch.cat([each[:size].cpu() for each, size in zip(everyone, sizes, strict=True)])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Of what each card has worked out of its parts."""
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def agreed(self, said: Any) -> Any:
        """What the first card of the machine says."""
        everyone: list[Any] = [None] * self.cards
        torch.distributed.all_gather_object(everyone, said, group=self.group)
        return everyone[0]


def spread(family: Family, base: torch.nn.Module, device: torch.device, *, cards: int) -> TrainedShards:
    """Spread all of a base that is trained over the `cards` processes of each machine, in place. The base may be on the
    CPU still: only this card's parts come to the device. All processes call it."""
    from torch.distributed.fsdp import fully_shard

    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    kind = type(base).__name__
    mesh = mesh_of(device, cards, replicated=True)
    # A single block's outputs are views of one tensor. The model adds to them, but never in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in [*family.blocks(base), base]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    gather_ahead([*family.blocks(base), base])
    type(base).__name__ = kind  # diffusers writes it into the configuration
    for buffer in base.buffers():
        buffer.data = buffer.data.to(device)
    group = mesh.get_group("card")
    return TrainedShards(family, base, device, group, shapes)
