"""The frozen base spread over a machine's cards: each holds a part of every block, and gathers a block when it is its
turn.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers: a block before its forward and before its backward, the next one
meanwhile, and lets go of it afterwards. Nothing is trained here, so no gradient is ever scattered. Of FLUX.1-dev in
int8 two cards hold 4 GiB each instead of 8, and a step receives (n - 1) / n of the blocks on each of n cards, twice:
over NVLink in some hundredths of a second, between machines in many seconds, so that it is never between machines.

    shards = sharding.shard(family, base, device, cards=4)    # after the blocks were quantized, hoisted, compiled
    recompute.apply(family, base, controlnet, ...)            # after it
    with sharding.main_alone(shards):                         # every process
        ...                                                   # what the main process does with the base by itself

Gathering takes all cards. Where the main process uses the base alone, to look at held-out samples, the others hand it
their parts: it names each block before it gathers it, and they gather with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed

from shared.errors import EXIT_REFUSED, UserError
from shared.families.base import Family
from train.frozen_linear import FrozenInt8Linear, linears

GATHERED = 4
"""Blocks that are whole on a card at a time, at most: the one that is computed, what it was gathered in, and both of
the next one."""
_DONE, _FAILED = -1, -2
"""Said instead of a block's number: the main process needs no more; or it has ended in an error."""


class Shards:
    """A base that is spread over the cards of each machine."""

    def __init__(self, blocks: list[torch.nn.Module], device: torch.device, group: Any) -> None:
        self.blocks, self.device, self.group = blocks, device, group
        """`group`: the processes of this machine."""
        self.is_main = torch.distributed.get_rank() == 0
        self.has_main = 0 in torch.distributed.get_process_group_ranks(group)
        """Whether the main process is one of them."""

    @property
    def held_bytes(self) -> int:
        """Of the blocks' weights, what this card holds."""
        return sum(local(parameter).nbytes for block in self.blocks for parameter in block.parameters())

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Name each block to the others before it is gathered."""

        def naming(number: int) -> Callable[..., None]:
            def name(*_: Any) -> None:  # what a hook returned would be taken for the block's input
                self._say(number)

            return name

        hooks = [
            block.register_forward_pre_hook(naming(number), prepend=True) for number, block in enumerate(self.blocks)
        ]
        try:
            yield
        except BaseException:
            self._say(_FAILED)
            raise
        else:
            self._say(_DONE)
        finally:
            for hook in hooks:
                hook.remove()

    def _serve(self) -> None:
        """Gather each block that the main process names, until it needs no more."""
        while (number := self._say(_DONE)) >= 0:
            block: Any = self.blocks[number]
            block.unshard()
            block.reshard()
        if number == _FAILED:
            raise SystemExit(EXIT_REFUSED)  # the main process says why

    def _say(self, number: int) -> int:
        """What the main process says, on all of them."""
        said = torch.tensor(number, device=self.device)
        torch.distributed.broadcast(said, src=0, group=self.group)
        return int(said.item())


@contextmanager
def main_alone(shards: Shards | None) -> Iterator[None]:
    """Within, the main process may use the base by itself, without gradients; the others enter when it is done, and
    must not use the base. All processes come here; where nothing is spread it does nothing."""
    if shards is None or not shards.has_main:
        yield
    elif shards.is_main:
        with shards._naming(), torch.no_grad():
            yield
    else:
        shards._serve()
        yield


def shard(family: Family, base: torch.nn.Module, device: torch.device, *, cards: int) -> Shards:
    """Spread the base's blocks over the `cards` processes of each machine, in place; the rest of it goes to the device
    whole. The base may be on the CPU still: only this card's parts come to the device. All processes call it.

    Raises `UserError` where the weights are of a kind that cannot be cut."""
    from torch.distributed.fsdp import fully_shard

    blocks = family.blocks(base)
    for layer in linears(base).values():
        _as_parameter(layer)
    for block in blocks:
        for name, parameter in block.named_parameters():
            if type(parameter) is not torch.nn.Parameter:
                raise UserError(
                    f"memory.shard: a weight that is held as {type(parameter).__name__} cannot be cut ({name}); set "
                    "base.weights to int8"
                )
            assert not parameter.requires_grad, "gradients of what is spread are nobody's business here"
    mesh = mesh_of(device, cards)
    # A single block's outputs are views of one tensor. The model adds to them, but never in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    gather_ahead(blocks)
    cut = {parameter for block in blocks for parameter in block.parameters()}
    rest = {parameter for parameter in base.parameters() if parameter not in cut}
    for tensor in [*rest, *base.buffers()]:
        tensor.data = tensor.data.to(device)
    # The root gathers nothing: it only has the blocks know of each other.
    fully_shard(base, mesh=mesh, reshard_after_forward=True, ignored_params=rest)
    return Shards(blocks, device, mesh.get_group())


def _as_parameter(layer: FrozenInt8Linear) -> None:
    """FSDP cuts parameters alone. It cannot train: integers have no gradient."""
    weight = layer.weight_int8
    del layer.weight_int8
    layer.register_parameter("weight_int8", torch.nn.Parameter(weight, requires_grad=False))


def gather_ahead(blocks: Sequence[Any]) -> None:
    """Have each block's backward begin to gather the block before it. Said, since FSDP would else go by the order of
    all forwards since the last backward, and at looks one process has made some that the others have not."""
    for block, before in zip(blocks, [blocks[0], *blocks], strict=False):
        block.set_modules_to_backward_prefetch([before])


def mesh_of(device: torch.device, cards: int, *, replicated: bool = False) -> Any:
    """This machine's cards; `replicated`: and, where there are several machines, those that hold the same elsewhere."""
    from torch.distributed.device_mesh import init_device_mesh

    machines = torch.distributed.get_world_size() // cards
    mesh = init_device_mesh(device.type, (machines, cards), mesh_dim_names=("machine", "card"))
    return mesh if replicated and machines > 1 else mesh["card"]


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this card."""
    from torch.distributed.tensor import DTensor

    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
