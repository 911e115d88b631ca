"""The frozen base's blocks kept in the host's memory, each copied to the device just before it is needed.

A few places on the device are shared by all blocks: block i always lies in place i modulo their number. While a block
is computed, the next one, in the order of forward or of backward, is copied into a place whose block has been used
already, from pinned memory and on a stream of its own. FLUX.1-dev's 57 int8 blocks take 8 GiB of the host (pinned
memory comes in powers of two: 9.5), two places 0.4 GiB of the device, and a step copies nearly all blocks twice: 17 GB,
0.7 s over PCIe 4, which is hidden where a step computes for longer than that.

    streamed = streaming.stream(family, base, device)    # after the blocks were quantized, hoisted, compiled
    recompute.apply(family, base, controlnet, ...)       # after it

The blocks' matrices go to the host, and every block into a wrapper that fetches it; norms, scales and biases stay on
the device. On the CPU the same code copies between two places of the host's memory.

What autograd keeps of a matrix for backward is the matrix itself, in its place on the device. Others lie there
meanwhile, without autograd noticing, and by the time the block's backward reads it, it has been fetched again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared.errors import UserError
from shared.families.base import Family
from train.frozen_linear import FrozenInt8Linear

ALIGNMENT = 256
"""Bytes: a multiple of this is where a matrix begins in its place."""
PLACES = 2
"""On the device: one for the block that is computed, one for the next."""


class StreamedBlock(torch.nn.Module):
    """A block that is fetched before it is called, and again before its backward."""

    def __init__(self, block: torch.nn.Module, stream: Stream, index: int) -> None:
        super().__init__()
        self.block, self.stream, self.index = block, stream, index

    def forward(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        """What the block gives."""
        self.stream.fetch_for_forward(self.index)
        outputs: tuple[torch.Tensor, ...] = self.block(*inputs, **named)
        return _Fetch.apply(self.stream, self.index, *outputs)  # backward comes through here before it enters the block


class _Fetch(torch.autograd.Function):
    """Forward: nothing. Backward: fetch the block whose outputs these are."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, index: int, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.stream, ctx.index = stream, index
        ctx.set_materialize_grads(False)  # where no gradient comes none is to go on
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.stream.fetch_for_backward(ctx.index)
        return (None, None, *gradients)


@dataclass
class _Matrix:
    """A layer's weight, and where it lies among its block's bytes."""

    layer: torch.nn.Module
    name: str
    begin: int

    @property
    def tensor(self) -> torch.Tensor:
        """The weight, wherever it is now."""
        tensor = getattr(self.layer, self.name)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    @property
    def end(self) -> int:
        return self.begin + self.tensor.numel() * self.tensor.itemsize

    def within(self, block_bytes: torch.Tensor) -> torch.Tensor:
        """The weight as it lies in its block's bytes."""
        return block_bytes[self.begin : self.end].view(self.tensor.dtype).view(self.tensor.shape)

    def move(self, block_bytes: torch.Tensor) -> None:
        """From now on the layer finds its weight there."""
        there = self.within(block_bytes)
        if isinstance(self.tensor, torch.nn.Parameter):
            there = torch.nn.Parameter(there, requires_grad=False)
        setattr(self.layer, self.name, there)


class Stream:
    """Where the blocks of a base are, and their way to the device."""

    def __init__(self, blocks: list[torch.nn.Module], device: torch.device, num_places: int = PLACES) -> None:
        """Take the blocks' matrices to the host, block by block. Raises `UserError` where they cannot be moved."""
        assert num_places >= 2, "what is computed and what is copied need a place each"
        self.device, self.num_places = device, min(num_places, len(blocks))
        layouts = [_layout(block) for block in blocks]
        self.sizes = [layout[-1].end for layout in layouts]
        """Of each block the bytes that are copied."""
        self.copied_bytes = 0
        """To the device, so far."""
        self.num_late = 0
        """Copies that were begun when their block was needed already; after the first step there are none."""
        on_gpu = device.type == "cuda"
        self._places = [
            torch.empty(max(self.sizes[place :: self.num_places]), dtype=torch.uint8, device=device)
            for place in range(self.num_places)
        ]
        self._held = [-1] * self.num_places
        self._host: list[torch.Tensor] = []
        for index, layout in enumerate(layouts):
            host = torch.empty(self.sizes[index], dtype=torch.uint8, pin_memory=on_gpu)
            for matrix in layout:
                matrix.within(host).copy_(matrix.tensor)
                matrix.move(self._places[index % self.num_places])  # where it was is free
            self._host.append(host)
        self._current, self._backward = -1, False
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._arrived = [torch.cuda.Event() for _ in self._places] if on_gpu else []

    @property
    def step_bytes(self) -> int:
        """What one forward and backward copies to the device: every block twice, but for those that are still there
        when the direction turns."""
        return sum(self.sizes[self.num_places :]) + sum(self.sizes[: -self.num_places])

    def fetch_for_forward(self, index: int) -> None:
        """Have a block in its place, and begin to copy one that comes after it."""
        if self._backward and index == self._current:
            return  # its backward computes it again
        self._backward = False
        self._have(index)
        following = index + self.num_places - 1
        if not torch.is_grad_enabled():
            following %= len(self._host)  # no backward: what comes is another forward
        self._begin_to_copy(following)

    def fetch_for_backward(self, index: int) -> None:
        """Have a block in its place, and begin to copy one that comes before it."""
        self._backward = True
        self._have(index)
        self._begin_to_copy(index - self.num_places + 1)

    def _have(self, index: int) -> None:
        place = index % self.num_places
        if self._held[place] != index:
            self.num_late += 1
            self._copy(index)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[place])
        self._current = index

    def _begin_to_copy(self, index: int) -> None:
        place = index % self.num_places
        there_is_one = 0 <= index < len(self._host)
        if there_is_one and self._held[place] != index and place != self._current % self.num_places:
            self._copy(index)

    def _copy(self, index: int) -> None:
        """Queue a copy behind all that has been queued so far: the block that lies in its place has been used then."""
        place, host = index % self.num_places, self._host[index]
        # Through `data`, which counts no changes: that a saved weight's place is written to is not for autograd to see.
        target = self._places[place].data[: len(host)]
        if self._copies is None:
            target.copy_(host)
        else:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._copies):
                target.copy_(host, non_blocking=True)
                self._arrived[place].record()
        self._held[place] = index
        self.copied_bytes += len(host)


def stream(family: Family, base: torch.nn.Module, device: torch.device, num_places: int = PLACES) -> Stream:
    """Keep the base's blocks on the host from now on; in place. Raises `UserError` where they cannot be moved."""
    blocks = family.blocks(base)
    assert not any(isinstance(block, StreamedBlock) for block in blocks), "they are streamed already"
    parents = {child: (parent, name) for parent in base.modules() for name, child in parent.named_children()}
    streamed = Stream(blocks, device, num_places)
    for index, block in enumerate(blocks):
        parent, name = parents[block]
        parent.register_module(name, StreamedBlock(block, streamed, index))
    return streamed


def _layout(block: torch.nn.Module) -> list[_Matrix]:
    """The matrices of a block, one after the other."""
    layout: list[_Matrix] = []
    for layer in block.modules():
        if isinstance(layer, FrozenInt8Linear):
            name = "weight_int8"
        elif isinstance(layer, torch.nn.Linear):
            if type(layer.weight) is not torch.nn.Parameter:
                raise UserError(
                    f"memory.stream: a weight that is held as {type(layer.weight).__name__} cannot be moved; set "
                    "base.weights to int8"
                )
            assert not layer.weight.requires_grad, "only what is frozen is the same when it comes back"
            name = "weight"
        else:
            continue
        begin = -(-layout[-1].end // ALIGNMENT) * ALIGNMENT if layout else 0
        layout.append(_Matrix(layer, name, begin))
    if not layout:
        raise UserError(f"memory.stream: {type(block).__name__} has no weights to stream")
    return layout
