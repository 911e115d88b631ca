"""How much memory a run may take on its device, and what is done to stay within it.

The options stand here; which blocks are computed twice is `train.recompute`'s business, streaming the base
`train.streaming`'s, keeping its modulation off the device `train.modulation`'s.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from shared.errors import UserError

GIB = 2**30
ALL = 1_000_000
"""More blocks than any model has."""
USABLE_GIB = {24.0: 22.9, 40.0: 38.3}
"""What a card of so many GB leaves for tensors: without the CUDA context and cuBLAS' workspaces."""
USABLE_SHARE = 0.955
"""The same for cards that are not in the table."""


@dataclass(frozen=True)
class MemoryOptions:
    """What is given up so that a step fits into memory. Nothing of it changes what is learned."""

    budget: str = "auto"
    """Memory that training may take: 40GB or 24GB as a card of that name has it, or exactly 22.9GiB. auto: what the
    card has free at the start; on the CPU there is no limit. Set it where others use the card too."""
    recompute: str = "auto"
    """Blocks whose activations are computed again in backward instead of kept. auto: as few as the budget allows;
    none; all; 12: the first 12 of the base; 12+2: and the first 2 of the ControlNet. All of them cost 45 % more
    arithmetic."""
    hoist: Literal["auto", "yes", "no"] = "auto"
    """Keep the base's modulation weights, 27 % of FLUX, in the host's memory and compute what they give for many
    steps ahead. auto: on a GPU."""
    hoist_steps: int = 64
    """Batches whose modulation is computed together. More read the weights less often and take more host memory."""
    stream: Literal["auto", "yes", "no"] = "auto"
    """Keep the base's blocks in the host's memory and copy each to the GPU just before it is needed: saves 8 GiB, and
    costs time where a step is shorter than the copies (0.7 s over PCIe 4). auto: where nothing else makes it fit."""
    shard: Literal["auto", "yes", "no"] = "auto"
    """Spread the base's blocks over the cards of a machine (FSDP2), where several processes train; each gathers a block
    when it is its turn. auto: where the base does not fit one card, before streaming is thought of. With `adapter full`
    all of the base is spread, and its gradients and the optimizer's states with it."""

    def check(self) -> None:
        """Refuse impossible values."""
        if self.budget != "auto":
            parse_budget(self.budget)
        parse_recompute(self.recompute)
        if self.hoist_steps < 1:
            raise UserError(f"memory.hoist_steps must be 1 or more, not {self.hoist_steps}")
        if self.shard == self.stream == "yes":
            raise UserError(
                "memory.shard and memory.stream: the base's blocks are on other cards or on the host, not both"
            )

    def unused(self) -> list[str]:
        """Options that differ from their default but have no effect beside the others: warn of them."""
        return ["hoist_steps"] if self.hoist == "no" and self.hoist_steps != MemoryOptions.hoist_steps else []


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where the environment sets up torch's allocator; the second is what all versions read."""


def grow_segments() -> None:
    """Have torch's GPU allocator grow the segments it has instead of adding others, between which gaps would stay: a
    count of tensors knows no gaps. To be called before anything is on a GPU; what the environment says already stays.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def parse_budget(budget: str) -> int:
    """ "40GB" or "22.9GiB" -> bytes for tensors. GB is what a card is sold as, of which the driver keeps a part; GiB
    is exact. Raises `UserError`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(GB|GiB)", budget.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"MEMORY is 40GB (as a card is sold) or 38.3GiB (exactly), or auto, not '{budget}'")
    number = float(match[1])
    gib = number if match[2].lower() == "gib" else USABLE_GIB.get(number, number * USABLE_SHARE)
    return int(gib * GIB)


def parse_recompute(recompute: str) -> tuple[int, int] | None:
    """How many blocks of the base and of the ControlNet are computed twice: "12" -> (12, 0), "12+2" -> (12, 2), "none"
    -> (0, 0), "all" -> very many; "auto" -> None. Raises `UserError`."""
    if recompute == "auto":
        return None
    if recompute in ("none", "all"):
        return (0, 0) if recompute == "none" else (ALL, ALL)
    match = re.fullmatch(r"([0-9]+)(?:\+([0-9]+))?", recompute)
    if match is None:
        raise UserError(
            "memory.recompute is auto, none, all, or a number of the base's blocks and, after a +, of the "
            f"ControlNet's: 12 or 12+2, not '{recompute}'"
        )
    return int(match[1]), int(match[2] or 0)
