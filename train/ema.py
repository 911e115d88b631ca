"""The average of a ControlNet's weights over training (EMA): steadier than the last step's, often better to paint with.

How it is used:

    ema = Ema(options, dict(adapter.named_parameters()))
    ...                                       # a step moves the weights
    ema.update(step)                          # counts from 1
    with ema.in_place():                      # within, the weights are the average
        figures = validation.held_out(adapter)
    ema.save(folder, adapter.write)           # as diffusers reads it, in float32: all that resuming needs

The average is kept in float32 whatever the weights are: in bfloat16, steps of a thousandth of the distance would all be
rounded away. It follows the step's number alone, so a resumed run goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from shared.errors import UserError, nearest
from train.offload import free_host_bytes

Write = Callable[[Path, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Writes tensors in the place of the weights with their names into a folder; what was to be written comes back."""
Profile = Literal["off", "power", "constant"]
Place = Literal["cpu", "device"]

CHUNK_NUMEL = 1 << 24
"""Weights that are averaged at once: a float32 copy of them is 64 MiB. A power of two, as page-locked memory is given
out in powers of two."""
WIDEST = 0.28
"""Of `ema.width`; at 0.2887 (1 / sqrt(12)) all steps would have the same weight."""


@dataclass(frozen=True)
class EmaOptions:
    """The average of the weights over training, beside the weights themselves."""

    profile: Profile = "off"
    """How steps are weighted. `power`: by a power of the step's number, so the average reaches back over the same share
    of the run however long it is. `constant`: by powers of `decay`. `off`: no average is kept."""
    width: float = 0.1
    """Of `power`: the standard deviation of the weighted steps, as a share of the run so far (sigma_rel of arXiv
    2312.02696; 0.05 to 0.15 did best there). More is steadier and lags more."""
    decay: float = 0.9999
    """Of `constant`: the share of the average that a step leaves. It begins lower, (1 + step) / (10 + step), so that
    what the run started from is soon forgotten. 0.999 suits runs of a few thousand steps."""
    every: int = 10
    """Steps between updates, each of which counts for all of them. 1 for runs of a few hundred steps."""
    device: Place = "cpu"
    """Where the average is kept: 4 bytes per weight, and on the host 2 more to move bfloat16 weights through. `device`
    is quicker where a GPU's memory allows."""
    evaluate: bool = True
    """Held-out losses and pictures are those of the average, and so is what early stopping goes by. False: of the
    weights as the last step left them."""

    def check(self) -> None:
        """Refuse impossible values. Raises `UserError`."""
        for name, choices in (("profile", Profile), ("device", Place)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise UserError(f"ema.{name} '{value}' is unknown: {nearest(value, get_args(choices))}")
        if not 0 < self.width <= WIDEST:
            raise UserError(f"ema.width must be above 0 and at most {WIDEST}, but is {self.width}")
        if not 0 <= self.decay < 1:
            raise UserError(f"ema.decay must be at least 0 and below 1, but is {self.decay}")
        if self.every < 1:
            raise UserError(f"ema.every must be 1 or more, not {self.every}")

    @property
    def on(self) -> bool:
        """Whether an average is kept."""
        return self.profile != "off"

    @property
    def evaluated(self) -> bool:
        """Whether held-out samples are looked at with the average."""
        return self.on and self.evaluate

    @property
    def on_device(self) -> bool:
        """Whether an average is kept on the device that trains."""
        return self.on and self.device == "device"

    def unused(self) -> list[str]:
        """Options that were changed from their default but have no effect beside the others: warn of them."""
        needed = {"width": self.profile == "power", "decay": self.profile == "constant"}
        needed |= dict.fromkeys(("every", "device", "evaluate"), self.on)
        return [name for name, used in needed.items() if not used and getattr(self, name) != getattr(EmaOptions, name)]


def exponent_of(width: float) -> float:
    """gamma of the power function profile whose relative standard deviation is `width` (sigma_rel).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), of which this is the largest root: section 3.1 of arXiv
    2312.02696 (Karras et al., Analyzing and improving the training dynamics of diffusion models), solved as there."""
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def kept_share(options: EmaOptions, step: int) -> float:
    """beta: the share of the average that an update after step number `step` (from 1) leaves, where `every` steps have
    passed since the one before. average = beta * average + (1 - beta) * weights.

    `power`: (1 - every / step)^(gamma + 1), 0 at the first, so nothing stays of where the run began (section 3.1 of
    arXiv 2312.02696). `constant`: min(decay, (1 + step) / (10 + step))^every, the warm-up being TensorFlow's and
    diffusers'."""
    if options.profile == "power":
        return (1 - options.every / step) ** (exponent_of(options.width) + 1)
    return min(options.decay, (1 + step) / (10 + step)) ** options.every


@dataclass(frozen=True)
class _Piece:
    """A part of a weight: `numel` values from `start` of it, and from `offset` of a chunk on the way to the host."""

    name: str
    start: int
    numel: int
    chunk: int
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part, flat, of a tensor of the weight's shape: a view."""
        return tensor.view(-1)[self.start : self.start + self.numel]

    def on_the_way(self, chunks: list[torch.Tensor]) -> torch.Tensor:
        """This part in the chunks: a view."""
        return chunks[self.chunk][self.offset : self.offset + self.numel]


class Ema:
    """The average of named weights. It begins as they are when it is made."""

    def __init__(
        self,
        options: EmaOptions,
        weights: Mapping[str, torch.Tensor],
        *,
        chunk_numel: int = CHUNK_NUMEL,
        elsewhere: bool | None = None,
    ) -> None:
        """`weights` on one device, of one dtype, contiguous. `elsewhere`: they are copied before they are averaged, by
        default where the average is kept on another device. Raises `UserError` where host memory does not suffice."""
        assert options.on
        assert weights, "nothing to average"
        assert len({(w.device, w.dtype) for w in weights.values()}) == 1, "weights of several devices or dtypes"
        assert all(weight.is_contiguous() for weight in weights.values())
        self.options = options
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        first = next(iter(self._weights.values()))
        self._device, self._dtype = first.device, first.dtype
        place = torch.device("cpu") if options.device == "cpu" else self._device
        self._pieces = list(_pieces(self._weights, chunk_numel))
        self._worker: ThreadPoolExecutor | None = None
        self._averaging: Future[None] | None = None
        self._chunks: list[torch.Tensor] = []
        if place.type == "cpu":
            self._refuse_full_host(2 if self._device.type == "cuda" else 0)
        if place != self._device if elsewhere is None else elsewhere:
            # Copied as they are, and averaged by a thread of the host while the device goes on with the next step.
            self._chunks = self._make_chunks(pinned=self._device.type == "cuda")
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self.average = {
            name: weight.to(place, torch.float32, copy=True) for name, weight in self._weights.items()
        }  # fmt: skip
        """Name to float32 tensor. To be read between `wait` and the next `update` only."""

    def update(self, step: int) -> None:
        """Step number `step` (from 1) has moved the weights. Nothing waits for the device here, but for the update
        before this one where the host is behind."""
        if step % self.options.every:
            return
        moved = 1 - kept_share(self.options, step)
        self.wait()
        if self._worker is None:
            for piece in self._pieces:
                piece.of(self.average[piece.name]).lerp_(piece.of(self._weights[piece.name]).float(), moved)
            return
        for piece in self._pieces:
            piece.on_the_way(self._chunks).copy_(piece.of(self._weights[piece.name]), non_blocking=True)
        arrived = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._averaging = self._worker.submit(self._average, arrived, moved)

    def _average(self, arrived: torch.cuda.Event | None, moved: float) -> None:
        if arrived is not None:
            arrived.synchronize()
        for piece in self._pieces:
            piece.of(self.average[piece.name]).lerp_(piece.on_the_way(self._chunks).float(), moved)

    def wait(self) -> None:
        """Until the last update is made."""
        if self._averaging is not None:
            averaging, self._averaging = self._averaging, None
            averaging.result()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the weights are the average, rounded to their dtype; afterwards, to the bit, what they were."""
        self.wait()
        kept = self._chunks or self._make_chunks(pinned=False)  # on the host: looks are seldom, a GPU's memory is dear
        for piece in self._pieces:
            piece.on_the_way(kept).copy_(piece.of(self._weights[piece.name]))
        try:
            for name, weight in self._weights.items():
                weight.copy_(self.average[name])
            yield
        finally:
            for piece in self._pieces:
                piece.of(self._weights[piece.name]).copy_(piece.on_the_way(kept))

    def save(self, folder: Path, write: Write) -> dict[str, torch.Tensor]:
        """Have the average written in the place of the weights. Back comes what was to be written, by name."""
        self.wait()
        return write(folder, self.average)

    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Go on from what was written. Raises `UserError` where it is the average of other weights."""
        self.wait()
        for name, average in self.average.items():
            if name not in saved or saved[name].shape != average.shape or saved[name].dtype != torch.float32:
                raise UserError(
                    f"the checkpoint does not hold the average of this run's weights ({name}); choose another NAME"
                )
        for name, average in self.average.items():
            average.copy_(saved[name])

    def close(self) -> None:
        """Let the thread go."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)

    def _make_chunks(self, *, pinned: bool) -> list[torch.Tensor]:
        """Memory on the host for all weights as they are."""
        sizes = [0] * (1 + max(piece.chunk for piece in self._pieces))
        for piece in self._pieces:
            sizes[piece.chunk] = piece.offset + piece.numel
        return [torch.empty(size, dtype=self._dtype, pin_memory=pinned) for size in sizes]

    def _refuse_full_host(self, moving_bytes: int) -> None:
        num_bytes = (4 + moving_bytes) * sum(weight.numel() for weight in self._weights.values())
        free = free_host_bytes()
        if free is not None and num_bytes > free:
            raise UserError(
                f"ema.device cpu: the average takes {num_bytes / 2**30:.1f} GiB of the host's memory, but only "
                f"{free / 2**30:.1f} GiB are free: choose ema.device device, a smaller DEPTH, or ema.profile off"
            )


def _pieces(weights: Mapping[str, torch.Tensor], chunk_numel: int) -> Iterator[_Piece]:
    """Weights end to end, cut where a chunk is full."""
    filled = 0
    for name, weight in weights.items():
        start = 0
        while start < weight.numel():
            offset = filled % chunk_numel
            numel = min(weight.numel() - start, chunk_numel - offset)
            yield _Piece(name, start, numel, filled // chunk_numel, offset)
            start, filled = start + numel, filled + numel
