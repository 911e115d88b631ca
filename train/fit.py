"""Fitting a step into the memory there is: decided before anything is loaded, held against what the first steps take.

    fitted = fit.decide(options, ...)             # batch and accumulation, hoisted or not, streamed or not, recomputed
    loader = Loader(samples, fitted.loader, ...)
    ... load, hoist if fitted.hoist, compile, stream if fitted.stream, make the optimizer ...
    guard = fit.Guard(fitted, family, adapter, optimizer, device)      # applies what is recomputed
    figures = guard(batches, lambda: step(batches, number, rate))      # every step
    held_out = fit.look(validation, lambda: validation.held_out(adapter))

A step that runs out of memory before any weight has moved is taken again with more blocks recomputed. Of a step of full
size, the second one on (the first also compiles), the peak is held against the budget: above it more blocks are
recomputed, far below it fewer, once. What is decided and corrected is said; nothing of it changes what is learned.

Without a budget, as on the CPU by default, nothing is counted and nothing is recomputed unasked.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator

from shared.errors import UserError
from shared.families.base import Batch, Family
from shared.report import say, warn
from train import adapters, recompute
from train.adapters.base import Adapter
from train.budget import GIB, MemoryOptions, parse_budget, parse_recompute
from train.counting import Setting
from train.loader import LoaderOptions
from train.memory_plan import Recompute, cheapest_change, count, fewest_recomputed, fitting, hoistable
from train.optimizer import AnyOptimizer
from train.validation import Validation

T = TypeVar("T")

RESERVE_SHARE = 0.02
"""Of a card, what is left alone by an automatic budget: cuBLAS' workspaces, and gaps between tensors. The CUDA context
is not free memory any more when it is looked at."""
MARGIN_SHARE = 0.01
"""Of the budget, what must be left over before fewer blocks are recomputed than was decided."""
BATCH_FLOPS = 900
"""What a batch costs beside its arithmetic, in operations for each parameter of the base: turning int8 weights into
floating point, and launching kernels, whatever the number of samples. From performance counted for an A100 (323 ms at
batch 1, 277 a sample at batch 3): it makes larger batches worth recomputing a little for."""


@dataclass(frozen=True)
class Fit:
    """What a run does to stay within its memory."""

    loader: LoaderOptions
    """The user's, with the batch size and the accumulation that were chosen."""
    hoist: bool
    stream: bool
    shard: bool
    budget_bytes: int | None
    setting: Setting | None
    """The largest step of the run, where it was counted."""
    recompute: Recompute
    fixed: bool
    """The user said how much is recomputed: it is not corrected."""
    beside_bytes: int = 0
    """On the device, what others hold that train on the same base. It is no part of the budget, nor of what is counted
    and measured."""

    def words(self) -> str | None:
        """What was decided, in a sentence; None where nothing was."""
        if self.setting is None or self.budget_bytes is None:
            return None
        return (
            f"memory: {self.recompute.peak_bytes / GIB:.1f} GiB of {self.budget_bytes / GIB:.1f} are expected to be "
            f"used at batch {self.setting.batch_size} x {self.setting.accumulation}, with "
            f"{_blocks(self.setting, self.recompute)} recomputed"
            + (", modulation kept off the device" if self.hoist else "")
            + (", the base's blocks streamed from the host" if self.stream else "")
            + (f", the base's blocks spread over {self.setting.cards} cards" if self.shard else "")
            + (f"; {self.beside_bytes / GIB:.1f} GiB are held by others beside it" if self.beside_bytes else "")
        )


def decide(
    memory: MemoryOptions,
    loader: LoaderOptions,
    setting: Setting,
    *,
    device: torch.device,
    free_bytes: int | None,
    num_processes: int = 1,
    cards: int = 1,
    beside_bytes: int = 0,
    saved: Mapping[str, Any] | None = None,
) -> Fit:
    """What to do for a run: of all ways to make up a global batch the one of the fewest operations, of equal ones the
    largest batch; and then as little as will do.

    `setting` is the largest step but for its batch and what is decided here: depth, largest size, model, optimizer.
    `cards`: of the processes' cards, how many are in each machine.
    `free_bytes` is what an automatic budget may take, None for no limit: see `free_bytes`, the least of all processes'.
    `beside_bytes`: what others on the same base hold of the budget.
    `saved` is the loader's state of the checkpoint to go on from, whose batches stay. Some seconds where there is a
    budget. Raises `UserError`, which names the cheapest change, where nothing fits.
    """
    budget = free_bytes if memory.budget == "auto" else parse_budget(memory.budget)
    if budget is not None and free_bytes is not None and budget > free_bytes:
        warn(f"the device has {free_bytes / GIB:.1f} GiB free, less than MEMORY {memory.budget}: that is the budget")
        budget = free_bytes
    if budget is not None:
        budget -= beside_bytes
    if setting.prior and setting.optimizer.release:
        raise UserError(
            "optimizer.release cannot add up the gradients of pictures and class images: leave it out, or the class "
            "images (loader.prior_weight 0)"
        )
    adapter = adapters.get(setting.adapter)
    frozen = adapter.keeps_base
    hoist = memory.hoist == "yes" or (memory.hoist == "auto" and device.type == "cuda" and frozen)
    hoist = hoist and hoistable(setting)
    shard = _may_shard(memory, setting, cards)
    setting = replace(setting, hoist=hoist, stream=memory.stream == "yes", shard=memory.shard == "yes")
    setting = replace(setting, num_processes=num_processes, cards=cards)
    given = parse_recompute(memory.recompute)

    def found(loader: LoaderOptions) -> tuple[float, Fit] | None:
        """For these batches: operations of a step, all in all, and what to do; None where they do not fit."""
        here = replace(setting, batch_size=loader.batch_size, accumulation=loader.accumulation)
        if budget is None:
            kept = Recompute(*(given or (0, 0)), peak_bytes=0)
            return 0.0, Fit(loader, hoist, here.stream, here.shard, None, None, kept, fixed=given is not None)
        chosen = _given(here, given) if given is not None else fitting(here, budget)
        if chosen is None and shard and not here.stream:  # other cards are nearer than the host
            spread = replace(here, shard=True)
            if (chosen := fitting(spread, budget)) is not None:
                here = spread
        # quanto's own cannot be moved
        if chosen is None and memory.stream == "auto" and frozen and here.base != "quanto":
            here = replace(here, stream=True, shard=False)
            chosen = fitting(here, budget)
        if chosen is None:
            return None
        counted = count(here, chosen.base_blocks, chosen.controlnet_blocks)
        flops = counted.model_flops + counted.recomputed_flops
        flops += here.num_batches * BATCH_FLOPS * counted.num_base_parameters
        return flops, Fit(loader, hoist, here.stream, here.shard, budget, here, chosen, fixed=given is not None)

    if loader.global_batch is not None and saved is not None:
        loader = _as_saved(loader, saved, num_processes)
    ways = [loader] if loader.global_batch is None else _ways(loader, num_processes, setting.optimizer.release)
    best: tuple[float, Fit] | None = None
    for way in ways:
        setting.optimizer.check_release(way.accumulation, num_processes)
        fit = found(way)
        if fit is not None and (best is None or fit[0] <= best[0]):
            best = fit
        if fit is None and best is not None:
            break  # nor do larger batches fit; the smallest may not, since gradients stay while it accumulates
    if best is not None:
        return replace(best[1], beside_bytes=beside_bytes)
    assert budget is not None
    first = replace(setting, batch_size=ways[0].batch_size, accumulation=ways[0].accumulation)
    fewest_recomputed(first, budget)
    raise AssertionError("it fits after all")


def _may_shard(memory: MemoryOptions, setting: Setting, cards: int) -> bool:
    """Whether the base can be spread over cards, and may. Raises `UserError` where it must and cannot."""
    if memory.shard == "yes" and cards == 1:
        raise UserError(
            "memory.shard yes: there is one process on this machine, and the base is spread over those of a machine: "
            "start several with accelerate launch, or set memory.shard auto"
        )
    adapter = adapters.get(setting.adapter)
    if memory.shard == "yes" and not adapter.spreads_base:
        raise UserError(f"memory.shard yes: adapter {setting.adapter} needs its base whole; leave it out")
    if memory.shard == "yes" and setting.base == "quanto":
        raise UserError("memory.shard yes: quanto's own weights cannot be cut; set base.weights int8")
    if setting.optimizer.kind == "prodigy" and not adapter.keeps_base:
        return False  # it finds one step size from all weights, which would be spread with it
    return adapter.spreads_base and memory.shard == "auto" and cards > 1 and setting.base != "quanto"


def _given(setting: Setting, blocks: tuple[int, int]) -> Recompute:
    """What the user asked for, with what it takes."""
    counted = count(setting)
    base, controlnet = min(blocks[0], counted.num_base_blocks), min(blocks[1], counted.num_controlnet_blocks)
    return Recompute(base, controlnet, count(setting, base, controlnet).peak_bytes)


def _ways(loader: LoaderOptions, num_processes: int, release: bool) -> list[LoaderOptions]:
    """To make up a global batch, from the smallest batch to the largest. What releases gradients does not accumulate
    any."""
    assert loader.global_batch is not None
    if loader.global_batch % num_processes:
        raise UserError(
            f"loader.global_batch {loader.global_batch} cannot be shared by {num_processes} processes: choose a "
            f"multiple of {num_processes}"
        )
    samples = loader.global_batch // num_processes
    sizes = [size for size in range(1, samples + 1) if samples % size == 0 and (size == samples or not release)]
    return [replace(loader, global_batch=None, batch_size=size, accumulation=samples // size) for size in sizes]


def _as_saved(loader: LoaderOptions, saved: Mapping[str, Any], num_processes: int) -> LoaderOptions:
    """The batches that the run began with."""
    batch_size, batches = int(saved["batch_size"]), int(saved["batches_per_step"])
    if batches % num_processes:
        raise UserError(
            f"this run makes its steps of {batches} batches of {batch_size}, which {num_processes} processes cannot "
            f"share: go on with a number of processes that divides {batches}, or start another NAME"
        )
    return replace(loader, global_batch=None, batch_size=batch_size, accumulation=batches // num_processes)


def free_bytes(accelerator: Accelerator) -> int | None:
    """What training may take of the device with an automatic budget, the least of all processes' cards; None on the
    CPU, which has no limit. Call it before anything is loaded."""
    device = accelerator.device
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    mine = free + torch.cuda.memory_reserved(device) - int(RESERVE_SHARE * total)
    return int(accelerator.gather(torch.tensor([mine], device=device)).min())


@dataclass(frozen=True)
class Measured:
    """Memory of one step."""

    allocated_bytes: int
    """The peak of what tensors took."""
    reserved_bytes: int
    """The peak of what was taken from the device, gaps included."""
    num_retries: int
    """How often the allocator had to give back its gaps to find room: with one, the step just fitted."""


class Meter(Protocol):
    """Measures a step."""

    def begin(self) -> None:
        """Before it."""

    def end(self) -> Measured:
        """After it."""
        ...


class CudaMeter:
    """By the counters of torch's allocator; nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._retries = device, 0

    def begin(self) -> None:
        """Forget earlier peaks."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._retries = torch.cuda.memory_stats(self.device)["num_alloc_retries"]

    def end(self) -> Measured:
        """The peaks since `begin`."""
        stats = torch.cuda.memory_stats(self.device)
        return Measured(
            stats["allocated_bytes.all.peak"],
            stats["reserved_bytes.all.peak"],
            stats["num_alloc_retries"] - self._retries,
        )


class Guard:
    """Around every step: takes one that ran out of memory again, and corrects what was decided by what was measured."""

    def __init__(
        self,
        fit: Fit,
        family: Family,
        adapter: Adapter,
        optimizer: AnyOptimizer,
        device: torch.device,
        *,
        num_processes: int = 1,
        is_main: bool = True,
        meter: Meter | None = None,
    ) -> None:
        """Recomputes from now on what was decided, and has the optimizer take its memory, so that the first step needs
        what every step needs. `meter`: instead of the device's own."""
        self.fit, self.family, self.adapter, self.optimizer = fit, family, adapter, optimizer
        self.num_processes, self.is_main = num_processes, is_main
        self.measured: Measured | None = None
        """Of the last step of full size."""
        self.recompute = fit.recompute
        """What is done now."""
        self._meter = meter if meter is not None else CudaMeter(device) if device.type == "cuda" else None
        own = adapter.with_blocks
        self._counts = len(family.blocks(adapter.base)), 0 if own is None else len(family.blocks(own))
        self._ran_out = -1.0
        """Operations of recomputing with which a step ran out of memory: it is not to be tried with fewer again."""
        self._full_steps = 0
        """Steps of full size since the last change."""
        self._went_down = self._settled = False
        self._apply(fit.recompute)
        if self._meter is not None:
            optimizer.reserve()

    def __call__(self, batches: list[Batch], step: Callable[[], T]) -> T:
        """Take the step. Raises `UserError` where it runs out of memory and cannot be taken again."""
        while True:
            had = self.optimizer.num_updates
            if self._meter is not None:
                self._meter.begin()
            try:
                result = step()
            except torch.OutOfMemoryError as error:
                if self.optimizer.num_updates != had:
                    raise UserError(
                        f"memory ran out when a part of the weights had been stepped, so the step cannot be taken "
                        f"again; {self._advice()}; the same command goes on from the last checkpoint"
                    ) from error
                if self.num_processes > 1:
                    raise UserError(
                        "memory ran out in one of several processes, which the others cannot wait for; "
                        f"{self._advice()}; the same command goes on from the last checkpoint"
                    ) from error
                if self.fit.fixed or (more := self._more()) is None:
                    raise UserError(f"memory ran out with {self._words()} recomputed; {self._advice()}") from error
            else:
                if self._meter is not None:
                    self._look(batches, self._meter.end())
                return result
            # Here the step's own tensors are gone: nothing refers to where it stopped any more.
            self.optimizer.zero_grad()
            free_memory()
            self._ran_out = self._cost(self.recompute)
            self._change(more, "memory ran out before any weight was stepped; the step is taken again")

    def resume(self) -> None:
        """Recompute again what this run does: on a base that is shared, others had their turn."""
        self._apply(self.recompute)

    def figures(self) -> dict[str, Any]:
        """What was decided and measured, for the run's records. GiB."""
        found: dict[str, Any] = {
            "recomputed_base_blocks": self.recompute.base_blocks,
            "recomputed_controlnet_blocks": self.recompute.controlnet_blocks,
            "hoist": self.fit.hoist,
            "stream": self.fit.stream,
            "shard": self.fit.shard,
            "batch_size": self.fit.loader.batch_size,
            "accumulation": self.fit.loader.accumulation,
        }
        sizes = {
            "budget_gib": self.fit.budget_bytes,
            "expected_gib": self.recompute.peak_bytes or None,
            "allocated_gib": self.measured.allocated_bytes if self.measured is not None else None,
            "reserved_gib": self.measured.reserved_bytes if self.measured is not None else None,
        }
        return found | {name: round(size / GIB, 3) for name, size in sizes.items() if size is not None}

    # --- what was measured ------------------------------------------------------------------------------------------

    def _look(self, batches: list[Batch], measured: Measured) -> None:
        setting = self.fit.setting
        if setting is None:
            return
        full = setting.batch_size * setting.height * setting.width
        if all(len(batch) * batch.height * batch.width < full for batch in batches):
            return
        measured = replace(measured, allocated_bytes=measured.allocated_bytes - self.fit.beside_bytes)
        self._full_steps += 1
        if self._full_steps == 1:
            return  # compiling and choosing kernels take memory of their own
        self.measured = measured
        if not self._settled:
            self._hold_against_the_budget(measured)

    def _hold_against_the_budget(self, measured: Measured) -> None:
        budget = self.fit.budget_bytes
        assert budget is not None
        taken = (
            f"a step takes {measured.allocated_bytes / GIB:.1f} GiB of {budget / GIB:.1f} "
            f"({self.recompute.peak_bytes / GIB:.1f} expected, {measured.reserved_bytes / GIB:.1f} reserved)"
        )
        too_much = measured.allocated_bytes > budget
        if not self.fit.fixed and (too_much or measured.num_retries):
            # What just fitted, with the allocator looking for room, is not to be closer to the budget than it was.
            limit = budget if too_much else int(min(budget, measured.allocated_bytes) * (1 - MARGIN_SHARE))
            to = self._within(limit, measured)
            if to is None or self._cost(to) <= self._cost(self.recompute):
                to = self._more()
            if to is not None:
                self._change(to, taken)
                return
        elif not self.fit.fixed and not self._went_down:
            to = self._within(int(budget * (1 - MARGIN_SHARE)), measured)
            if to is not None and self._ran_out < self._cost(to) < self._cost(self.recompute):
                self._went_down = True
                self._change(to, taken)
                return
        self._settled = True
        if self.is_main:
            tell = warn if too_much else say
            tell(f"memory: {taken}, with {self._words()} recomputed" + (f"; {self._advice()}" if too_much else ""))

    def _within(self, limit_bytes: int, measured: Measured) -> Recompute | None:
        """What would have to be recomputed for a limit, if the count is then as far off as it is now; None where all
        of it would not be enough."""
        assert self.fit.setting is not None
        error = measured.allocated_bytes - self.recompute.peak_bytes
        return fitting(self.fit.setting, limit_bytes - error)

    def _cost(self, of: Recompute) -> float:
        """Operations that recomputing takes."""
        if self.fit.setting is None:
            return of.base_blocks + of.controlnet_blocks
        return count(self.fit.setting, of.base_blocks, of.controlnet_blocks).recomputed_flops

    # --- more and less ----------------------------------------------------------------------------------------------

    def _more(self) -> Recompute | None:
        """Half of the base's blocks that are not yet recomputed, or else all of the ControlNet's; None at the end."""
        base, controlnet = self.recompute.base_blocks, self.recompute.controlnet_blocks
        if base < self._counts[0]:
            base += -(-(self._counts[0] - base) // 2)
        elif controlnet < self._counts[1]:
            controlnet = self._counts[1]
        else:
            return None
        setting = self.fit.setting
        return Recompute(base, controlnet, count(setting, base, controlnet).peak_bytes if setting is not None else 0)

    def _change(self, to: Recompute, why: str) -> None:
        self._apply(to)
        self._full_steps = 0  # what is done now is measured anew
        if self.is_main:
            say(f"memory: {why}; from here on {self._words()} are recomputed")

    def _apply(self, to: Recompute) -> None:
        base, controlnet = recompute.apply(
            self.family, self.adapter.base, self.adapter.with_blocks, to.base_blocks, to.controlnet_blocks
        )
        self.recompute = replace(to, base_blocks=base, controlnet_blocks=controlnet)

    def _words(self) -> str:
        base, controlnet = self.recompute.base_blocks, self.recompute.controlnet_blocks
        return _in_words(base, self._counts[0], controlnet, self._counts[1])

    def _advice(self) -> str:
        """What to try."""
        setting = self.fit.setting
        if self.fit.fixed:
            return "leave memory.recompute to auto, or name more blocks"
        change = None
        if setting is not None:
            least = count(setting, *self._counts).peak_bytes
            change = cheapest_change(setting, least - 1)
        return f"try {change or '--memory.recompute all, or a smaller --loader.batch-size'}"


def look(validation: Validation, function: Callable[[], T]) -> T:
    """What a look at the held-out samples gives, in smaller batches where memory runs out. Raises `UserError` where not
    even one sample fits."""
    while True:
        try:
            return function()
        except torch.OutOfMemoryError as error:
            if not validation.take_fewer():
                raise UserError(
                    "memory ran out while looking at one held-out sample: set a smaller memory.budget, so that more is "
                    "left free, or turn looks off (validation.every 0, validation.pictures_every 0)"
                ) from error
        free_memory()
        warn(f"memory ran out while looking at held-out samples: {validation.batch_size} at a time from here on")


def free_memory() -> None:
    """Give back what nothing refers to any more, after memory ran out."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _blocks(setting: Setting, of: Recompute) -> str:
    counted = count(setting)
    return _in_words(of.base_blocks, counted.num_base_blocks, of.controlnet_blocks, counted.num_controlnet_blocks)


def _in_words(base: int, num_base: int, controlnet: int, num_controlnet: int) -> str:
    of_controlnet = f" and {controlnet} of {num_controlnet} of the ControlNet" if num_controlnet else ""
    return f"{base} of {num_base} blocks of the base{of_controlnet}"
