"""Compiling the transformer blocks: each kind of block once for each shape, not the model as a whole.

Between the blocks a model does next to nothing, and a kind of block is compiled once for all blocks of its class: the
base's two and the ControlNet's two. Where gradients are wanted of fewer inputs (at the base's beginning) or a tensor
lies otherwise in memory (after the first single block), a variant is compiled beside it. What is compiled has one exact
shape, and is whole: whatever cannot be compiled is an error, not a silent detour.

How it is used, after the blocks were quantized and hoisted and before they are streamed or recomputed:

    keep_in(folder, attention)                          # what is compiled, for the next start
    if wanted(options.speed, device):
        blocks = [*family.blocks(base), *family.blocks(controlnet)]
        compile_blocks(blocks, num_shapes=len(samples.sizes))
    with eager(unless=len(batch) == batch_size):        # around a batch's forward AND its backward
        loss(batch).backward()
    with eager():                                       # around held-out losses and pictures
        validation.held_out(adapter)

A bucket's last batch, which is smaller, and everything without gradients come too seldom to be worth a compilation:
they run as they are, with the same result up to rounding.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shared.errors import UserError
from shared.report import say, warn
from train.speed import SpeedOptions

VARIANTS = 8
"""Of one class's forward, compiled for blocks of one kind and batches of one shape, with room to spare: 3 in the base
and 2 in the ControlNet are needed."""

Backend = str | Callable[..., Any]


def wanted(options: SpeedOptions, device: torch.device) -> bool:
    """Whether to compile. Where a tool is missing, auto says so and does without; yes raises `UserError`."""
    if options.compile == "no" or (options.compile == "auto" and device.type != "cuda"):
        return False
    missing = missing_tool(device)
    if missing is None:
        return True
    if options.compile == "yes":
        raise UserError(f"speed.compile yes: {missing}; install it, or set speed.compile no")
    warn(f"blocks are not compiled, so that steps take longer: {missing}")
    return False


def missing_tool(device: torch.device) -> str | None:
    """What compiling for this device needs and this machine lacks, in words; None where everything is there."""
    on_gpu = device.type == "cuda"
    if on_gpu and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    named = os.environ.get("CC" if on_gpu else "CXX")
    names = [shlex.split(named)[0]] if named else ["gcc", "clang"] if on_gpu else ["g++"]
    if not any(map(shutil.which, names)):
        return f"no {'C' if on_gpu else 'C++'} compiler is found (looked for {' and '.join(names)})"
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).is_file():
        return f"{header} is missing, which comes with Python's development files (python3-dev)"
    return None


def keep_in(folder: Path, attention: str = "default") -> None:
    """From now on compiled code is kept in this folder, unless the environment says where: the compiler's own choice
    is the temporary folder. Call it before anything is compiled.

    Code that was compiled for one attention kernel (its name, of `train.attention`) goes on calling it, and the
    compiler, asked under another, would take it for what it looks for: so each has a folder of its own."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute() / f"attention-{attention}"))


def compile_blocks(blocks: Sequence[torch.nn.Module], *, num_shapes: int, backend: Backend = "inductor") -> None:
    """Have the blocks' forward compiled when it is first called, in place. `num_shapes`: how many different shapes of
    full batches will come. Hooks and wrappers of a block stay outside of what is compiled."""
    if not blocks:
        return
    # Beyond these limits a call would not be compiled but refused. They are documented for users to set.
    from torch._dynamo import config

    # A UNet's blocks of one class differ in their channels, and each kind of them is compiled for itself.
    unlike = {(type(block), tuple(parameter.shape for parameter in block.parameters())) for block in blocks}
    most = max(Counter(kind for kind, _ in unlike).values())
    config.recompile_limit = max(config.recompile_limit, VARIANTS * most * (num_shapes + 1))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * config.recompile_limit)
    for block in blocks:
        assert "forward" not in vars(block), "a block is compiled once"
        # The instance's own: all blocks of a class share one function, and with it what is compiled.
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
    kinds = {(type(block), any(p.requires_grad for p in block.parameters())) for block in blocks}
    say(
        f"compiling {len(kinds)} kinds of block for {num_shapes} shape(s): the first step of each shape takes longer, "
        "minutes if it was never compiled here"
    )


@contextmanager
def eager(*, unless: bool = False) -> Iterator[None]:
    """Within, nothing is compiled and nothing compiled is called; with `unless` everything is as outside.

    A batch's backward belongs within too: blocks that are computed again must be so in the same way."""
    if unless:
        yield
    else:
        with torch.compiler.set_stance("force_eager"):  # it holds from here on, not from entering
            yield
