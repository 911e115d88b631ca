"""A way's base, ControlNet and optimizer put together into the step that training takes (train/step.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.step.cells import Cell
from benchmarks.step.data import RECIPES, make_batch
from benchmarks.step.encoders import Encoders
from benchmarks.step.models import make_base, make_controlnet
from benchmarks.step.sizes import Size
from benchmarks.step.ways import WAYS, Way
from shared import families
from shared.families.base import Batch, Tensors
from train import eight_bit, recompute
from train.adapters.controlnet import ControlNetAdapter, ControlNetOptions
from train.budget import ALL, MemoryOptions
from train.compile import compile_blocks
from train.loader import Loader, LoaderOptions
from train.modulation import LinearsInMemory, Modulation
from train.objectives import FlowMatching, ObjectiveOptions
from train.optimizer import Kind, Optimizer, OptimizerOptions, Update
from train.step import Step
from train.streaming import stream

LEARNING_RATE = 1e-5
_DATA = 4
"""Different batches that steps take in turn."""


class PlainOptimizer(Optimizer):
    """What trainers other than this one do: the library's optimizer on the weights as they are, torch's clipping."""

    def __init__(self, kind: Kind, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters, self.options = parameters, OptimizerOptions(kind=kind)
        if kind == "adamw":
            fused = next(iter(parameters.values())).device.type == "cuda"
            self.inner: torch.optim.Optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, fused=fused)
        else:
            from bitsandbytes.optim import AdamW8bit

            self.inner = AdamW8bit(parameters.values(), lr=LEARNING_RATE)

    def begin(self, learning_rate: float, rounding: torch.Generator | int | None, *, measure: bool = False) -> None:
        self.inner.zero_grad(set_to_none=True)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        graded = [p for p in self.parameters.values() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in graded if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(graded, self.options.clip_norm, self._norm)
        return self._norm

    def finish(self, norm: float) -> Update:
        self.inner.step()
        return Update(torch.tensor(torch.nan), None)  # it does not say how far it went

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def clip(self, max_norm: float) -> torch.Tensor:
        return self.norm()

    def step(
        self, learning_rate: float, rounding: torch.Generator | int | None, *, share_updated: bool = False
    ) -> None:
        self.inner.step()


class Coming(Loader):
    """Of the loader, what the modulation asks: the pooled text of coming batches."""

    def __init__(self, pooled: str, batch: int, of_position: Callable[[int], torch.Tensor]) -> None:
        self.options, self.rank, self.num_ranks = LoaderOptions(batch_size=batch), 0, 1
        self._pooled, self._of_position = pooled, of_position

    def peek(self, positions: Iterable[int], layers: Collection[str]) -> list[Tensors]:
        return [{self._pooled: self._of_position(position)} for position in positions]


class Separate(torch.nn.Module):
    """A block whose outputs share no memory: the compiler refuses outputs that do, where weights are of a tensor class
    of quanto's. One copy more."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        return tuple(output.clone() for output in self.block(*inputs, **named))


@dataclass
class Assembled:
    """What can take steps."""

    cell: Cell
    size: Size
    way: Way
    device: torch.device
    dtype: torch.dtype
    adapter: ControlNetAdapter
    optimizer: Optimizer
    step: Step
    encoders: Encoders | None
    modulation: Modulation | None
    taken: int = 0
    """Steps so far."""
    recomputed: tuple[int, int] = (0, 0)
    """Blocks of the base and of the ControlNet whose forward is done twice."""
    _made: dict[tuple[int, int], Batch] = field(default_factory=dict)
    """Data by size of the batch and number."""
    _followed: int = 0
    """The batch size whose modulation is computed ahead."""

    def batches(self, batch: int, number: int) -> list[Batch]:
        """Of step `number`, with times and noise of their own; the data come round again."""
        found, count = [], self.way.accumulation
        for i in range(count):
            position = number * count + i
            made = self._data(batch, position % _DATA)
            found.append(dataclasses.replace(made, position=position, step_samples=batch * count))
        if self.encoders is not None:
            generator = torch.Generator(self.device).manual_seed(number)
            for each in found:
                self.encoders.encode(each, self.cell.text_length, generator)
        return found

    def take(self, batch: int) -> dict[str, float]:
        """The next step, encoding and all, on `batch` samples at a time."""
        self.taken += 1
        self.follow(batch)
        return self.step(self.batches(batch, self.taken), self.taken, LEARNING_RATE)

    def gradients(self, batch: int, number: int) -> dict[str, torch.Tensor]:
        """Of the ControlNet, on the batches of step `number`; nothing is stepped."""
        self.follow(batch)
        self.optimizer.zero_grad()
        self.step.backward(self.batches(batch, number))
        return {name: p.grad for name, p in self.adapter.named_parameters() if p.grad is not None}

    def follow(self, batch: int) -> None:
        """Have the modulation of coming batches of this size computed ahead, where it is."""
        if self.modulation is None or self._followed == batch:
            return
        pooled = self.step.family.pooled
        known = [self._data(batch, which).tensors[pooled].cpu() for which in range(_DATA)]
        coming = Coming(pooled, batch, lambda position: known[position % _DATA])
        self.modulation.follow(coming, self.step.times, batches=MemoryOptions().hoist_steps)
        self._followed = batch

    def recompute(self, base_blocks: int, controlnet_blocks: int) -> None:
        """From now on compute the first blocks' activations again in backward."""
        adapter = self.adapter
        self.recomputed = recompute.apply(
            self.step.family, adapter.base, adapter.controlnet, base_blocks, controlnet_blocks
        )

    def close(self) -> None:
        """Leave no thread behind."""
        if self.modulation is not None:
            self.modulation.close()

    def _data(self, batch: int, which: int) -> Batch:
        if (batch, which) not in self._made:
            self._made = {key: value for key, value in self._made.items() if key[0] == batch}
            self._made[batch, which] = make_batch(
                self.size, batch, self.cell.resolution, self.cell.text_length, self.device, self.dtype, which, batch
            )
        made = self._made[batch, which]
        return dataclasses.replace(made, tensors=dict(made.tensors))


def assemble(cell: Cell, size: Size, device: torch.device, dtype: torch.dtype) -> Assembled:
    """Make the models of a cell's way, with its memory cap in force from here on."""
    way, family, options = WAYS[cell.way], families.get("flux"), ControlNetOptions()
    plain = way.optimizer != "ours"
    made = make_base(size, device, dtype, way.base, hoist=way.hoist, plain=plain)
    base = made.module
    controlnet = make_controlnet(
        size, cell.depths, device, torch.float32 if way.controlnet == "fp32" else dtype, plain=plain
    )
    encoders = Encoders(size, device, dtype) if way.encoders else None
    if way.arithmetic != "exact":
        eight_bit.use(base, way.arithmetic, device)
    if way.compiled and way.base == "quanto":
        singles = base.get_submodule("single_transformer_blocks")
        for name, block in list(singles.named_children()):
            singles.register_module(name, Separate(block))
    if way.compiled:
        blocks = [*family.blocks(base), *family.blocks(controlnet)]
        compile_blocks(blocks, num_shapes=4, backend="inductor" if device.type == "cuda" else "aot_eager")
    modulation = None
    if way.hoist:
        modulation = Modulation(
            family, base, LinearsInMemory(made.taken), guidance=options.guidance, device=device, dtype=dtype
        )
    if way.stream:  # what the modulation looks for in a block is not to be found behind a wrapper
        stream(family, base, device)
    adapter = ControlNetAdapter(family, base, controlnet, options)
    parameters = dict(adapter.named_parameters())
    optimizer = (
        Optimizer(OptimizerOptions(states=way.states), parameters)
        if way.optimizer == "ours"
        else PlainOptimizer(way.optimizer, parameters)
    )
    cap_memory(cell.cap_gib, device)
    step = Step(
        family, adapter, FlowMatching(ObjectiveOptions()), optimizer,
        recipes=RECIPES, seed=0, device=device, dtype=dtype, modulation=modulation,
    )  # fmt: skip
    found = Assembled(cell, size, way, device, dtype, adapter, optimizer, step, encoders, modulation)
    if way.recompute == "all":
        found.recompute(ALL, ALL)
    return found


def cap_memory(cap_gib: float | None, device: torch.device) -> None:
    """Let this process take no more than `cap_gib` GiB of the device from here on, and start counting its peak."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    if cap_gib is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total), device)
    torch.cuda.reset_peak_memory_stats(device)
