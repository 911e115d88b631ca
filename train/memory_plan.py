"""What fits: the memory that a step takes at its peak, and how few blocks must be recomputed to stay within a budget.

From counted steps (`train.counting`), so without a GPU and before anything is loaded. Not in the figures: the CUDA
context and cuBLAS' workspaces, for which a card's budget has room (`train.budget`), and fragmentation.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from shared import families
from shared.errors import UserError
from train import adapters
from train.buckets import make_buckets
from train.counting import ROUNDING, Holder, Segment, Setting, Trace, Work, trace
from train.offload import NUM_SLOTS
from train.sharding import GATHERED
from train.streaming import PLACES

GIB = 2**30
IN_BACKWARD = 3
"""Gradients that are whole on a card at a time where they are spread, in blocks: those of the block whose backward it
is, and what is sent of the one before, with what comes back."""

COMPONENTS = (
    "base weights", "ControlNet weights", "average of the weights", "optimizer states", "gradients",
    "activations of the base", "activations of the ControlNet", "batch and loss", "temporaries",
)  # fmt: skip
_COMPONENT: dict[Holder, str] = {
    "gradients": "gradients",
    "base": "activations of the base",
    "controlnet": "activations of the ControlNet",
    "step": "batch and loss",
    "loss": "batch and loss",
}
_STEPPED_BYTES = {torch.bfloat16: 8, torch.float32: 4}
"""For each value that is stepped at once, by the dtype of the weights. A test of the optimizer holds all figures."""
_MEASURED_BYTES = {torch.bfloat16: 14, torch.float32: 12}
"""The same in a step that measures what survives rounding."""


@dataclass(frozen=True)
class Counted:
    """A step's memory and work."""

    setting: Setting
    base_blocks: int
    """Blocks that are recomputed, of the base and ..."""
    controlnet_blocks: int
    """... of the ControlNet."""
    num_base_parameters: int
    num_trained: int
    num_base_blocks: int
    num_controlnet_blocks: int
    peak_bytes: int
    """The most that is allocated at once."""
    when: str
    """At what point of the step."""
    components: dict[str, int]
    """Bytes of each of `COMPONENTS` at that point."""
    pass_peak_bytes: int
    """The most during forward and backward, without the optimizer's own step."""
    work: dict[str, Work] = field(repr=False)
    """By part and direction: "base forward", "controlnet backward", ...; what is recomputed belongs to backward."""
    recomputed_flops: float
    streamed_bytes: int
    """Copied from the host for one batch, of the base."""
    host_states_bytes: int
    """Copied from the host, and back again, for one step, of the optimizer."""

    @property
    def model_flops(self) -> float:
        """Operations that the method asks for, whatever is recomputed, of all batches of a step."""
        return self.setting.num_batches * sum(work.flops for work in self.work.values()) - self.recomputed_flops


@dataclass(frozen=True)
class Recompute:
    """How many of the first blocks are recomputed, and what the step then takes."""

    base_blocks: int
    controlnet_blocks: int
    peak_bytes: int


def count(setting: Setting, base_blocks: int = 0, controlnet_blocks: int = 0, *, whole: bool = False) -> Counted:
    """Memory and work of a step in which the first so many blocks are recomputed. Some seconds for a setting that was
    not counted before, at once for others. `whole` counts every block of the base instead of a few."""
    traced = trace(setting, whole=whole)
    work: dict[str, Work] = {}
    for segment in traced.of(base_blocks, controlnet_blocks):
        work.setdefault(f"{segment.part} {'backward' if segment.backward else 'forward'}", Work()).__iadd__(
            segment.work
        )
    none = sum(segment.work.flops for segment in traced.of(0, 0))
    peak = _peak(setting, traced, traced.of(base_blocks, controlnet_blocks))
    return Counted(
        setting=setting,
        base_blocks=base_blocks,
        controlnet_blocks=controlnet_blocks,
        num_base_parameters=traced.weights.num_base_parameters,
        num_trained=traced.weights.num_trained,
        num_base_blocks=traced.num_base_blocks,
        num_controlnet_blocks=traced.num_controlnet_blocks,
        peak_bytes=peak.num_bytes,
        when=peak.when,
        components=_components(setting, traced, peak),
        pass_peak_bytes=peak.pass_bytes,
        work=work,
        recomputed_flops=setting.num_batches * (sum(part.flops for part in work.values()) - none),
        streamed_bytes=2 * sum(traced.weights.base_blocks) if setting.stream else 0,
        host_states_bytes=_states_bytes(setting, traced) if setting.optimizer.states == "cpu" else 0,
    )


def fewest_recomputed(setting: Setting, budget_bytes: int) -> Recompute:
    """The blocks to recompute, as little arithmetic as will do, so that a step takes no more than the budget.

    Raises `UserError`, which names the cheapest change that would fit, where recomputing all of them does not."""
    found = fitting(setting, budget_bytes)
    if found is None:
        least = least_bytes(setting)
        change = cheapest_change(setting, budget_bytes)
        raise UserError(
            f"a step of {describe(setting)} takes {least / GIB:.1f} GiB at least, with every block recomputed, and the "
            f"budget is {budget_bytes / GIB:.1f} GiB. " + (
                f"The cheapest change that fits: {change}" if change is not None
                else "Nothing that can be given up makes it fit: choose a lower DEPTH or RESOLUTION"
            )
        )  # fmt: skip
    return found


def least_bytes(setting: Setting) -> int:
    """The peak with every block recomputed."""
    traced = trace(setting)
    return _peak(setting, traced, traced.of(traced.num_base_blocks, traced.num_controlnet_blocks)).num_bytes


def resting_bytes(setting: Setting) -> int:
    """What a run holds between its steps, beside the base: the weights that are trained, text encoders of its own, and
    the optimizer's states."""
    traced = trace(setting)
    states, _ = _optimizer_bytes(setting, traced)
    return traced.weights.controlnet + traced.weights.text_encoders + _average_bytes(setting, traced) + states


def hoistable(setting: Setting) -> bool:
    """Whether the base has a modulation that can be computed ahead: of a pooled text that stays what it was."""
    return bool(families.get(setting.family).pooled) and not adapters.get(setting.adapter).trains_text(setting)


def cheapest_change(setting: Setting, budget_bytes: int) -> str | None:
    """The first of what can be given up, from what costs least to what costs most, that makes a step fit. None where
    nothing does."""
    for words, changed in changes(setting):
        found = fitting(changed, budget_bytes)
        if found is not None:
            traced = trace(changed)
            recomputed = ""
            if found.base_blocks or found.controlnet_blocks:
                recomputed = (
                    f", {found.base_blocks} of {traced.num_base_blocks} + {found.controlnet_blocks} of "
                    f"{traced.num_controlnet_blocks} blocks recomputed"
                )
            return f"{words} ({found.peak_bytes / GIB:.1f} GiB{recomputed})"
    return None


def changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """What can be given up, from what costs least to what costs most: option words, and the setting then."""
    on_host = replace(setting.optimizer, states="cpu")
    frozen = adapters.get(setting.adapter).keeps_base
    kept = setting
    if setting.base == "none" and frozen:
        kept = replace(setting, base="int8")
        yield "--base.weights int8", kept
    if not setting.hoist and frozen and hoistable(setting):
        kept = replace(kept, hoist=True)
        yield "--memory.hoist yes", kept
    spreads = adapters.get(setting.adapter).spreads_base and setting.cards > 1
    if spreads and not setting.shard and not setting.stream and setting.base != "quanto":
        yield "--memory.shard yes", replace(kept, shard=True)
    for batch_size in range(setting.batch_size - 1, 0, -1):
        if setting.batch_size % batch_size == 0 and not setting.optimizer.release:
            accumulation = setting.accumulation * setting.batch_size // batch_size
            yield (
                f"--loader.batch-size {batch_size} --loader.accumulation {accumulation}",
                replace(kept, batch_size=batch_size, accumulation=accumulation),
            )
    words = ""
    if setting.averaged:
        words = "--ema.device cpu"
        kept = replace(kept, averaged=False)
        yield words, kept
    prodigy = setting.optimizer.kind == "prodigy"  # which keeps all on the device
    if setting.optimizer.states != "cpu" and not prodigy:
        words = f"{words} --optimizer.states cpu".strip()
        kept = replace(kept, optimizer=on_host)
        yield words, kept
    if not setting.stream and frozen:
        alone = replace(kept, stream=True, optimizer=setting.optimizer, averaged=setting.averaged)
        yield "--memory.stream yes", alone
        kept = replace(kept, stream=True)
        yield f"{words} --memory.stream yes".strip(), kept
    if not (setting.accumulates or setting.num_processes > 1 or setting.optimizer.release or prodigy):
        releasing = replace(kept.optimizer, release=True, clip="parameter")
        streamed = "--memory.stream yes " if frozen else ""
        yield (
            f"{words} {streamed}--optimizer.release True --optimizer.clip parameter".strip(),
            replace(kept, optimizer=releasing),
        )
    if setting.batch_size > 1 or setting.accumulation > 1:
        for words, changed in changes(replace(setting, batch_size=1, accumulation=1)):
            yield f"--loader.batch-size 1 --loader.accumulation 1 {words}", changed


def describe(setting: Setting) -> str:
    """The setting in a few words."""
    return (
        f"{_trained_words(setting)} at {setting.width}x{setting.height} px with "
        f"{setting.text_length} text tokens, batch {setting.batch_size}"
        + (f" x {setting.accumulation}" if setting.accumulation > 1 else "")
    )


def _trained_words(setting: Setting) -> str:
    return f"DEPTH {setting.depth[0]}-{setting.depth[1]}" if any(setting.depth) else f"adapter {setting.adapter}"


# The search


def fitting(setting: Setting, budget_bytes: int) -> Recompute | None:
    """What `fewest_recomputed` finds; None where nothing does. (To refuse takes longer: what could be given up is
    looked for.)"""
    traced = trace(setting)

    def peak(base_blocks: int, controlnet_blocks: int) -> int:
        return _peak(setting, traced, traced.of(base_blocks, controlnet_blocks)).num_bytes

    if (least := peak(0, 0)) <= budget_bytes:
        return Recompute(0, 0, least)
    best: Recompute | None = None
    best_cost = float("inf")
    for controlnet_blocks in range(traced.num_controlnet_blocks + 1):
        low, high = 0, traced.num_base_blocks  # more recomputed blocks never take more memory
        if peak(high, controlnet_blocks) > budget_bytes:
            continue
        while low < high:
            middle = (low + high) // 2
            if peak(middle, controlnet_blocks) <= budget_bytes:
                high = middle
            else:
                low = middle + 1
        cost = sum(segment.work.flops for segment in traced.of(low, controlnet_blocks))
        if cost < best_cost:
            best, best_cost = Recompute(low, controlnet_blocks, peak(low, controlnet_blocks)), cost
        if low == 0:
            break  # more of the ControlNet's cost more
    return best


# The peak


@dataclass
class _Peak:
    """The highest point of a step."""

    num_bytes: int
    pass_bytes: int
    when: str
    held: Counter[Holder]
    """Bytes of each holder when the segment with the peak began."""
    states_bytes: int


def _peak(setting: Setting, traced: Trace, segments: Iterator[Segment]) -> _Peak:
    weights = _weight_bytes(setting, traced)
    states, stepping = _optimizer_bytes(setting, traced)
    held: Counter[Holder] = Counter({"step": traced.weights.batch})
    # Of several processes the buckets, in which the gradients lie. What is accumulated before processes meet is beside
    # them: only the last batch's backward brings it in.
    copies = setting.accumulates + (setting.num_processes > 1)
    held["gradients"] = copies * sum(_trained_bytes(setting, traced))
    if _is_spread_whole(setting):  # a card's part, and those of the blocks whose parts are being brought together
        whole = sum(_trained_bytes(setting, traced))
        held["gradients"] = -(-whole // setting.cards) + IN_BACKWARD * max(traced.weights.base_blocks)
    live = weights + states + sum(held.values())
    highest = _Peak(live, live, "forward", held.copy(), states)
    for segment in segments:
        # A weight that is stepped in the middle of backward takes what the optimizer's step takes otherwise.
        trained = "controlnet" if adapters.get(setting.adapter).keeps_base else "base"
        released = stepping if setting.optimizer.release and segment.part == trained and segment.backward else 0
        if live + segment.peak_bytes + released > highest.num_bytes:
            when = f"{'backward' if segment.backward else 'forward'} of the {_name(segment.part)}"
            highest = _Peak(live + segment.peak_bytes + released, 0, when, held.copy(), states)
        held.update(segment.kept)
        live += segment.kept.total()
    highest.pass_bytes = highest.num_bytes
    # Activations are gone now; a few blocks' figures stand for all of them and may come out a little below nothing.
    held = Counter({holder: max(0, num_bytes) for holder, num_bytes in held.items()})
    live = weights + states + sum(held.values())
    if live + stepping > highest.num_bytes:
        highest = _Peak(live + stepping, highest.pass_bytes, "optimizer step", held.copy(), states)
    return highest


def _name(part: str) -> str:
    return {"controlnet": "ControlNet", "step": "inputs"}.get(part, part)


def _components(setting: Setting, traced: Trace, peak: _Peak) -> dict[str, int]:
    parts = dict.fromkeys(COMPONENTS, 0)
    parts["base weights"] = _base_bytes(setting, traced)
    parts["ControlNet weights"] = traced.weights.controlnet
    parts["average of the weights"] = _average_bytes(setting, traced)
    parts["optimizer states"] = peak.states_bytes
    for holder, num_bytes in peak.held.items():
        if holder != "weights":
            parts[_COMPONENT[holder]] += max(0, num_bytes)
    parts["temporaries"] = peak.num_bytes - sum(parts.values())
    return parts


def _weight_bytes(setting: Setting, traced: Trace) -> int:
    return _base_bytes(setting, traced) + traced.weights.controlnet + _average_bytes(setting, traced)


def _average_bytes(setting: Setting, traced: Trace) -> int:
    """In float32, whatever the weights are."""
    if not setting.averaged:
        return 0
    sizes = [torch.Size(shape).numel() * torch.float32.itemsize for _, shape in traced.weights.trained]
    whole = sum(-(-size // ROUNDING) * ROUNDING for size in sizes)
    return -(-whole // setting.cards) if _is_spread_whole(setting) else whole


def _base_bytes(setting: Setting, traced: Trace) -> int:
    blocks = traced.weights.base_blocks
    # Streamed, a block's matrices are on the device only while it is their turn; the rest of it is next to nothing.
    if setting.stream:
        return traced.weights.base + PLACES * max(blocks)
    if _is_spread_whole(setting):  # what is in no block is whole from the first forward on to the last backward
        whole = traced.weights.base + sum(blocks)
        return -(-whole // setting.cards) + traced.weights.base + GATHERED * max(blocks)
    if setting.shard:
        return traced.weights.base + -(-sum(blocks) // setting.cards) + GATHERED * max(blocks)
    return traced.weights.base + sum(blocks)


def _is_spread_whole(setting: Setting) -> bool:
    """Whether it is the base that is trained, and spread over cards with gradients and states."""
    return setting.shard and not adapters.get(setting.adapter).keeps_base


def _trained_bytes(setting: Setting, traced: Trace) -> list[int]:
    size = setting.weights.itemsize
    return [-(-torch.Size(shape).numel() * size // ROUNDING) * ROUNDING for _, shape in traced.weights.trained]


def _optimizer_bytes(setting: Setting, traced: Trace) -> tuple[int, int]:
    """On the device: what stays there between steps, and what a step takes beside it."""
    sizes, largest = _buckets(setting, traced)
    on_host = setting.optimizer.states == "cpu"
    slots = NUM_SLOTS * max(sizes) if on_host else 0
    stepped = (_MEASURED_BYTES if setting.optimizer.survival_every else _STEPPED_BYTES)[setting.weights]
    if setting.optimizer.kind == "prodigy":  # four states where AdamW has two; where all weights were, how they moved
        return 2 * sum(sizes), 2 * traced.weights.num_trained * torch.float32.itemsize
    cards = setting.cards if _is_spread_whole(setting) else 1
    return 0 if on_host else -(-sum(sizes) // cards), slots + largest * stepped


def _states_bytes(setting: Setting, traced: Trace) -> int:
    return sum(_buckets(setting, traced)[0]) // (setting.cards if _is_spread_whole(setting) else 1)


def _buckets(setting: Setting, traced: Trace) -> tuple[tuple[int, ...], int]:
    """Bytes of the states of each bucket, and the most values that one holds."""
    options = setting.optimizer
    return _bucket_sizes(traced.weights.trained, setting.weights, options.kind == "adamw8bit", options.master)


@functools.lru_cache(maxsize=64)
def _bucket_sizes(
    trained: tuple[tuple[str, tuple[int, ...]], ...], dtype: torch.dtype, eight_bit: bool, master: bool
) -> tuple[tuple[int, ...], int]:
    parameters = {name: torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for name, shape in trained}
    buckets = make_buckets(parameters, eight_bit=eight_bit, master=master)
    return tuple(bucket.num_bytes for bucket in buckets), max(bucket.num_weights for bucket in buckets)


__all__ = [
    "COMPONENTS", "GIB", "Counted", "Recompute", "Setting", "cheapest_change", "count", "fewest_recomputed",
    "fitting", "hoistable", "least_bytes",
]  # fmt: skip
