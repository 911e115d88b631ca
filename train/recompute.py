"""Which blocks compute their activations again in backward instead of keeping them.

The first ones: backward comes to them last, when everything after them has been freed, so that what they take then adds
to no peak. The base's very first block costs nothing, since nothing before it is trained: it keeps no activation, and
has no backward. What is computed again is the same to the bit, but for kernels that do not repeat themselves.

    recompute.apply(family, base, controlnet, base_blocks=12, controlnet_blocks=0)

may be called at any time between two steps, after blocks were compiled or put into wrappers, and again with other
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from shared.families.base import Family


def apply(
    family: Family, base: torch.nn.Module, controlnet: torch.nn.Module | None, base_blocks: int, controlnet_blocks: int
) -> tuple[int, int]:
    """Of the base and the ControlNet (the bare module; None where there is none), recompute the first blocks in order
    of execution, as many of each as are asked for or as there are; keep the activations of all others. Back comes how
    many it are."""
    own = 0 if controlnet is None else _first(family, controlnet, controlnet_blocks)
    return _first(family, base, base_blocks), own


def _first(family: Family, module: torch.nn.Module, count: int) -> int:
    assert count >= 0, count
    chosen = frozenset(family.blocks(module)[:count])
    if chosen:
        # The models' own door: they call every block through this function while gradients are wanted.
        module.enable_gradient_checkpointing(_through(chosen))  # type: ignore[operator]
    else:
        module.disable_gradient_checkpointing()  # type: ignore[operator]
    return len(chosen)


def _through(chosen: frozenset[torch.nn.Module]) -> Callable[..., Any]:
    def call(block: torch.nn.Module, *inputs: Any) -> Any:
        if block not in chosen:
            return block(*inputs)
        # Non-reentrant, since the first block's inputs require no gradient; a block draws no random numbers.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    return call
