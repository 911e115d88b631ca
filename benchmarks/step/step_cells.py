"""One cell measured: a step's time, its parts and its peak; the base's forward; how true the gradients are."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import ceilings, timing
from benchmarks.step.assembly import Assembled, assemble, cap_memory
from benchmarks.step.cells import LARGEST, Cell
from benchmarks.step.data import make_batch
from benchmarks.step.models import make_base
from benchmarks.step.planned import setting_of
from benchmarks.step.sizes import FULL, GIB, Size, flops
from benchmarks.step.ways import WAYS
from shared import families
from shared.errors import UserError
from train import attention
from train.compile import compile_blocks, keep_in
from train.memory_plan import fewest_recomputed

OUT_OF_MEMORY = "out of memory"


def measure(cell: Cell, size: Size, device: torch.device, folder: Path) -> dict[str, Any]:
    """The cell's figures. Where the device's memory does not suffice, {"outcome": "out of memory"}. Compiled code and
    the attention kernels' times are kept in `folder`."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernel = _attention(cell, size, device, dtype, folder)
    keep_in(folder, attention=kernel)
    with attention.use(kernel):
        match cell.part:
            case "ceilings":
                return ceilings.measure(size, device, dtype)
            case "forward":
                return _forward(cell, size, device, dtype)
            case "fidelity":
                return _fidelity(cell, size, device, dtype)
            case _:
                return _step(cell, size, device, dtype) | {"attention": kernel}


def _attention(cell: Cell, size: Size, device: torch.device, dtype: torch.dtype, folder: Path) -> str:
    """This project's ways choose their kernel as training does; the others, and the base's forward, take torch's."""
    if not cell.way.startswith("ours"):
        return attention.DEFAULT
    tokens = (cell.resolution // 16) ** 2 + cell.text_length
    shape = attention.Shape(max(1, cell.batch), size.num_heads, tokens, size.head_dim)
    return attention.choose("auto", [shape], dtype, device, folder)


def _step(cell: Cell, size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        made = assemble(cell, size, device, dtype)
    except torch.OutOfMemoryError:
        return {"outcome": OUT_OF_MEMORY, "while": "making the models"}
    figures: dict[str, Any] = {"build_seconds": time.perf_counter() - began}
    cap_bytes = int(cell.cap_gib * GIB) if cell.cap_gib else _free_bytes(device)
    try:
        return figures | _at_its_batch(made, cap_bytes)
    finally:
        made.close()


def _at_its_batch(made: Assembled, cap_bytes: int) -> dict[str, Any]:
    cell, device, figures = made.cell, made.device, dict[str, Any]()
    batch = cell.batch
    if batch == LARGEST:
        tried: dict[int, int | None] = {}

        def peak_of(batch: int) -> int | None:
            tried[batch] = _peak_of(made, batch, cap_bytes)
            return tried[batch]

        batch = largest_batch(peak_of, cap_bytes, most=64 if device.type == "cuda" else 2) or 1
        figures["tried"] = {str(size): peak and peak / GIB for size, peak in tried.items()}
    figures["batch"] = batch
    began = time.perf_counter()
    peak = _peak_of(made, batch, cap_bytes)
    if peak is None and made.way.recompute == "fit":
        try:
            peak = _recompute_until_it_fits(made, batch, cap_bytes)
        except UserError as error:  # the plan's sentence: nothing fits
            figures["plan"] = str(error)
    if peak is None:
        return figures | {"outcome": OUT_OF_MEMORY, "while": f"a step of batch {batch}"}
    figures["first_steps_seconds"] = time.perf_counter() - began  # compiling included, unless it was tried before
    return figures | _timed(made, batch)


def _recompute_until_it_fits(made: Assembled, batch: int, cap_bytes: int) -> int | None:
    """Recompute the blocks that the plan says, and some more where that does not do; the peak, None in the end."""
    setting = setting_of(made.cell, batch)
    budget = cap_bytes
    for _ in range(4):
        blocks = fewest_recomputed(setting, budget)
        made.recompute(blocks.base_blocks, blocks.controlnet_blocks)
        if (peak := _peak_of(made, batch, cap_bytes)) is not None:
            return peak
        budget -= GIB // 2  # workspaces of the libraries, fragments
    return None


def _timed(made: Assembled, batch: int) -> dict[str, Any]:
    cell, way, device = made.cell, made.way, made.device
    full = device.type == "cuda"
    for _ in range(5 if full else 1):
        last = made.take(batch)
    if full:
        torch.cuda.reset_peak_memory_stats(device)
    found: dict[str, Any] = timing.steps(lambda: made.take(batch), device, *((20, 3) if full else (2, 1)))
    samples, seconds = batch * way.accumulation, found["step_ms"] / 1e3
    counted = flops(made.size, cell.depths, cell.resolution, cell.text_length, samples, made.recomputed)
    found |= {
        "images_per_second": samples / seconds,
        "tflops": counted.model / seconds / 1e12,
        "tflops_machine": counted.machine / seconds / 1e12,
        "flops": asdict(counted),
        "recomputed_blocks": list(made.recomputed),
        "loss": last["loss"],
        "gradient_norm": last["gradient_norm"],
        "card": timing.card(device),
    }
    if full:
        found |= {
            "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return found | {"split_ms": _split(made, batch)}


def largest_batch(peak_of: Callable[[int], int | None], limit_bytes: int, most: int) -> int:
    """The largest batch up to `most` that fits, 0 if none does. `peak_of` tries one: its peak in bytes, or None where
    it does not fit. Peaks grow evenly, so two of them foretell the rest, and few are tried: each is compiled anew."""
    peaks: dict[int, int | None] = {}

    def fits(batch: int) -> bool:
        if batch not in peaks:
            peaks[batch] = peak_of(batch)
        return peaks[batch] is not None

    if not fits(1):
        return 0
    if most == 1 or not fits(2):
        return 1
    first, second = peaks[1], peaks[2]
    assert first is not None
    assert second is not None
    slope = second - first
    found = most if slope <= 0 else min(most, 2 + max(0, limit_bytes - second) // slope)
    while not fits(found):
        found -= 1
    while found < most and fits(found + 1):
        found += 1
    return found


def _peak_of(made: Assembled, batch: int, cap_bytes: int) -> int | None:
    """Peak of two steps, in which the optimizer's states are made and used; None where they do not fit."""
    device = made.device
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(2):
            made.take(batch)
    except torch.OutOfMemoryError:
        fits = False
    else:  # the allocator may not hold segments that can grow to the cap: what it took is looked at too
        fits = device.type != "cuda" or torch.cuda.max_memory_reserved(device) <= cap_bytes
    if not fits:
        made.optimizer.zero_grad()
        gc.collect()
        return None
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _split(made: Assembled, batch: int, count: int = 5) -> dict[str, float]:
    """Where a step's time goes, in milliseconds: medians over a few steps, of the last of their batches. What blocks
    compute again in backward counts there; `update` is clipping and the optimizer."""
    device = made.device
    marks: dict[str, timing.Mark] = {}

    def at(name: str) -> Callable[..., None]:
        return lambda *_: marks.__setitem__(name, timing.mark(device))

    def watch_first_residual(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        at("controlnet forward")()
        first = next(group for group in output if group is not None)[0]
        if first.requires_grad:
            first.register_hook(at("base backward"))  # the base's first block comes last, and has no backward

    controlnet, base = made.adapter.controlnet, made.adapter.base
    hooks = [
        controlnet.register_forward_pre_hook(at("inputs")),
        controlnet.register_forward_hook(watch_first_residual),
        base.register_forward_pre_hook(at("residuals")),
        base.register_forward_hook(at("base forward")),
        *(p.register_post_accumulate_grad_hook(at("controlnet backward")) for p in controlnet.parameters()),
    ]
    rows = []
    try:
        for _ in range(count):
            made.take(batch)
            at("update")()
            timing.wait(device)
            order = (
                "inputs", "controlnet forward", "residuals", "base forward", "base backward", "controlnet backward",
                "update",
            )  # fmt: skip
            row = {b: timing.milliseconds(marks[a], marks[b]) for a, b in itertools.pairwise(order)}
            row["controlnet forward"] += row.pop("residuals")
            rows.append(row)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sorted(row[name] for row in rows)[count // 2] for name in rows[0]}


def _forward(cell: Cell, size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The base's forward, unquantized, compiled, without gradients: what a step is measured in."""
    family, base = families.get("flux"), make_base(size, device, dtype, plain=True).module
    compile_blocks(family.blocks(base), num_shapes=1, backend="inductor" if device.type == "cuda" else "aot_eager")
    cap_memory(None, device)
    batch = make_batch(size, cell.batch, cell.resolution, cell.text_length, device, dtype, 0, cell.batch)
    inputs = family.inputs(batch, None, dtype)
    x_t = torch.randn(cell.batch, (cell.resolution // 16) ** 2, 64, device=device).to(dtype)
    t = torch.rand(cell.batch, device=device)

    @torch.no_grad()
    def call() -> None:
        family.predict(base, x_t, t, inputs, 3.5, None)

    began = time.perf_counter()
    call()
    timing.wait(device)
    first = time.perf_counter() - began
    full = device.type == "cuda"
    for _ in range(5 if full else 1):
        call()
    found = timing.steps(call, device, *((20, 3) if full else (2, 1)))
    counted = flops(size, cell.depths, cell.resolution, cell.text_length, cell.batch)
    return {
        "first_call_seconds": first,
        "forward_ms": found["step_ms"],
        **{name: value for name, value in found.items() if name != "step_ms"},
        "tflops": counted.base_forward / found["step_ms"] / 1e9,
        "card": timing.card(device),
    }


def _fidelity(cell: Cell, size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The ControlNet's gradients on this way's base, beside those on the base in bf16 (and, of this project's own
    base, on quanto's): on the same weights, data, times and noise."""
    reference = {"bf16": "bf16"} | ({"quanto": "quanto"} if WAYS[cell.way].base == "int8" else {})
    ours = _gradients(cell, size, device, dtype)
    found: dict[str, Any] = {}
    for name, way in reference.items():
        found[f"against {name}"] = compare(ours, _gradients(replace(cell, way=way), size, device, dtype))
    return found


def _gradients(cell: Cell, size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    made = assemble(replace(cell, cap_gib=None), size, device, dtype)
    try:
        return made.gradients(cell.batch, number=0)
    finally:
        made.close()


def compare(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Cosine of two gradients, each over all parameters, and the norm of their difference as a share of `theirs`."""
    assert ours.keys() == theirs.keys()
    products = torch.zeros(4, dtype=torch.float64)
    for name, mine in ours.items():
        a, b = mine.float().flatten(), theirs[name].float().flatten()
        products += torch.stack([a @ b, a @ a, b @ b, (a - b) @ (a - b)]).double().cpu()
    cross, mine_squared, their_squared, difference = products.tolist()
    return {
        "cosine": cross / (mine_squared * their_squared) ** 0.5,
        "relative_error": (difference / their_squared) ** 0.5,
    }


__all__ = ["FULL", "OUT_OF_MEMORY", "compare", "largest_batch", "measure"]
