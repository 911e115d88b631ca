"""Which of torch's attention kernels: the card's fastest at the run's own shapes.

How it is used, before models take memory:

    shapes = [Shape(batch_size, *family.attention_shape(base, height, width, text_length)) for each bucket]
    name = choose(options.speed.attention, shapes, dtype, device, folder)
    keep_in(folder, attention=name)        # train.compile: compiled code contains the choice
    with use(name):                        # for the whole run: forward, backward, validation
        ...

Which kernel wins differs: cuDNN's on an H200, flash's on an A100, neither in fp32. So they are timed, forward and
backward together, once for each kind of card, version and shape; a run that is resumed finds the same answer.

Letters: B samples, H heads, S tokens, D features of a head.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared import atomic
from shared.errors import UserError
from shared.report import say, warn
from train.speed import Attention

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DEFAULT = "default"
"""torch's own choice, each time anew."""
TIMINGS = "attention.json"
"""In the folder: card and versions -> shape -> kernel -> milliseconds, or null where it cannot."""
ROUNDS, CALLS = 3, 5
"""The kernels take turns; of the rounds the fastest counts, as a mean over its calls."""


class Shape(NamedTuple):
    """What attention is called with."""

    B: int
    H: int
    S: int
    D: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def choose(wanted: Attention, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, folder: Path) -> str:
    """The name of a kernel, for `use`. auto: on a GPU the one that takes the least time over these shapes, as measured
    now or before (in `folder`); on the CPU `DEFAULT`. Raises `UserError` where a kernel that was asked for cannot."""
    if wanted == "auto":
        return DEFAULT if device.type != "cuda" else _fastest(shapes, dtype, device, folder)
    for shape in shapes:
        try:
            _call(wanted, _inputs(shape, dtype, device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"speed.attention {wanted} cannot run here, with {str(dtype).removeprefix('torch.')} on "
                f"{_card(device)} at {shape.B} x {shape.S} tokens ({reason}); set speed.attention auto"
            ) from error
    return wanted


def use(name: str) -> AbstractContextManager[object]:
    """Within, attention is computed by this kernel: everywhere in the process, backward's threads included. What it
    cannot do (the VAE's decoder has one head of 512 features), the others do."""
    if name == DEFAULT:
        return nullcontext()
    others = [kernel for other, kernel in KERNELS.items() if other != name]
    return sdpa_kernel([KERNELS[name], *([] if name == "math" else others)], set_priority=True)


def _fastest(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, folder: Path) -> str:
    known = _known(folder)
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    here = known.setdefault(f"{_card(device)}, {versions}, {dtype}", {})
    candidates = [name for name in KERNELS if name != "math"]
    distinct = sorted({*shapes})
    if new := [shape for shape in distinct if here.get(str(shape), {}).keys() != {*candidates}]:
        try:
            here |= {str(shape): measure(candidates, shape, dtype, device) for shape in new}
        except torch.OutOfMemoryError:  # says nothing of the kernels, so nothing is noted
            warn("which attention kernel is fastest was not measured, for want of memory: torch chooses")
            return DEFAULT
        atomic.make_directory(folder)
        atomic.write_json(folder / TIMINGS, known)
    able = [name for name in candidates if all(here[str(shape)][name] is not None for shape in distinct)]
    if not able:
        return DEFAULT
    totals = {name: sum(here[str(shape)][name] or 0.0 for shape in distinct) for name in able}
    best, *slower = sorted(able, key=lambda name: totals[name])
    others = f"; {', '.join(f'{name} {totals[name]:.2f}' for name in slower)}" if slower else ""
    where = f"{distinct[0].B} x {distinct[0].S} tokens" if len(distinct) == 1 else f"{len(distinct)} shapes"
    say(f"attention: {best}, {totals[best]:.2f} ms forward and backward at {where}{others}")
    return best


def _known(folder: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    try:
        return dict(json.loads((folder / TIMINGS).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):  # never measured, or no longer readable: measured again
        return {}


def measure(names: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float | None]:
    """Milliseconds of one forward and backward by each kernel; None for one that cannot."""
    inputs = _inputs(shape, dtype, device)
    best: dict[str, float | None] = {}
    for name in names:
        try:
            with warnings.catch_warnings(action="ignore"):  # of why a kernel cannot
                _timed(partial(_call, name, inputs), device, calls=2)  # the first call also plans
            best[name] = float("inf")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            best[name] = None
    for _ in range(ROUNDS):
        for name, before in best.items():
            if before is not None:
                best[name] = min(before, _timed(partial(_call, name, inputs), device, CALLS))
    return best


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Query, key and value (B, H, S, D), lying in memory as the models have them: (B, S, H, D)."""
    B, H, S, D = shape
    return [torch.randn(B, S, H, D, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3)]


def _call(name: str, inputs: Sequence[torch.Tensor]) -> None:
    """Forward and backward with one kernel alone. Raises `RuntimeError` where it cannot."""
    query, key, value = inputs
    with sdpa_kernel(KERNELS[name]):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def _timed(call: Callable[[], None], device: torch.device, calls: int) -> float:
    """Milliseconds of one call, the mean of several in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
