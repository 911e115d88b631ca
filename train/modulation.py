"""The frozen base's modulation, computed ahead and kept off the device.

Every block of a FLUX base scales and shifts by the output of a linear that sees one vector per sample: of the time,
the guidance and the pooled text. These linears are 27 % of the base's weights and a ten-thousandth of its arithmetic,
and nothing trained comes before them. Times and captions of coming batches are drawn from seeds, so they are known
before the batches are there: the linears' outputs, the rows, are computed for many batches at once, from weights that
pass through the device piece by piece, and wait on the host until their batch comes.

How it is used:

    taken = hoist(family, base)                   # in place; or `open_base(..., hoist=True)`, and LinearsOnDisk below
    modulation = Modulation(family, base, LinearsInMemory(taken), guidance=3.5, device=device, dtype=dtype)
    modulation.follow(loader, step.times, batches=64)  # when the loader is at its position
    modulation.use(batch.position, len(batch))    # before each forward on a training batch
    modulation.compute(t, pooled).use(0, B)       # before a forward on anything else: one stream of all weights a call
    modulation.close()                            # when the run ends, however it ends

On a GPU many batches are one product, and its shape is part of how a sum is rounded: groups of batches begin at fixed
positions, and a row is always computed in the same place of a product of the same shape, wherever a run was resumed.
On the CPU each batch is a product of its own, as it would be in the base: hoisting changes no bit there.

For FLUX.1-dev in bf16 the device is spared 6 GiB (3 of int8). It holds 2 MB of rows for each sample of a batch, and two
pieces of weights for moments. The host holds two groups of rows, the present and the next: 0.26 GiB for each sample of
a batch and 64 batches (pinned memory comes in powers of two: up to twice that), and maps the weights' files.

Letters: B samples of a batch, R the most that a batch has, S batches that are computed together, M = S R rows, P and D
features of the pooled text and of the vector that the linears see, n outputs of one piece of a linear.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from shared.errors import UserError
from shared.families.base import Family
from shared.model_folder import ModelFolder, open_weights
from train.loader import Loader

PIECE_BYTES = 16 << 20
"""Weights that are on the device at a time, twice: one piece arrives while the other is used."""
_ALIGNMENT = 64
"""Numbers. The rows of each linear begin at a multiple, as kernels like it."""


class HoistedLinear(torch.nn.Module):
    """In the place of a linear whose outputs are known before it is called. It has no weights."""

    rows: torch.Tensor | None

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        # A buffer, since compiled code takes buffers as inputs: other rows of the same shape compile nothing anew.
        self.register_buffer("rows", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the present batch, (B, out_features); of x (B, D) nothing but B matters."""
        assert self.rows is not None, "the modulation of this batch has not been set"
        assert self.rows.shape[0] == x.shape[0], "the modulation is that of a batch of another size"
        return self.rows


def hoist(family: Family, base: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Put a `HoistedLinear` in the place of each linear that is the base's modulation, in place. The linears come back
    by their names in the base, as they were: with their weights, or on the meta device without."""
    taken: dict[str, torch.nn.Linear] = {}
    for name, linear in family.modulations(base).items():
        assert isinstance(linear, torch.nn.Linear), f"{name} is a {type(linear).__name__}"
        taken[name] = linear
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, HoistedLinear(linear.out_features))
    return taken


class Linears(Protocol):
    """Where the weights of the modulation are."""

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (out, D) and bias (out,) of the linear with this name in the base, on the CPU in any dtype."""
        ...


class LinearsInMemory:
    """Linears that were taken out of a base in memory."""

    def __init__(self, linears: Mapping[str, torch.nn.Linear]) -> None:
        self._linears = {name: linear.cpu() for name, linear in linears.items()}

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Linears.read`."""
        linear = self._linears[name]
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


class LinearsOnDisk:
    """Linears of a model's own files, mapped: their pages are the operating system's to keep or to drop."""

    def __init__(self, model: ModelFolder, component: str) -> None:
        """Raises `UserError` where the files cannot be read."""
        self._model, self._component = model, component
        self._files: dict[str, Any] = {}
        for path in model.weights(component):
            opened = open_weights(path)
            self._files |= dict.fromkeys(opened.keys(), opened)

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Linears.read`. Raises `UserError` where the files lack the linear."""
        weight = self._tensor(f"{name}.weight")
        if weight is None:
            raise UserError(
                f"model {self._model.name}: the weights of {self._component} lack {name}.weight; download it again"
            )
        return weight, self._tensor(f"{name}.bias")

    def _tensor(self, name: str) -> torch.Tensor | None:
        return self._files[name].get_tensor(name) if name in self._files else None


@dataclass(frozen=True)
class _Layout:
    """Where the rows of one batch lie, linear after linear, each (R, out_features)."""

    offsets: dict[str, int]
    numel: int


class Rows:
    """What all linears give for S batches, on the host."""

    def __init__(self, modulation: Modulation, host: torch.Tensor, R: int) -> None:
        self._modulation, self.host, self.R = modulation, host, R
        """`host` is (S, numbers of a batch)."""

    def use(self, slot: int, B: int) -> None:
        """From now on the base computes with the first B rows of batch `slot`."""
        self._modulation.set(self.host[slot], self.R, B)


class _Group(NamedTuple):
    """Rows of batches that follow each other in this process."""

    number: int
    first: int
    """Slots before it hold nothing: their batches had been when the run was resumed."""
    rows: Rows


@dataclass(frozen=True)
class _Following:
    """A run whose coming batches are known."""

    loader: Loader
    times: Callable[[int, int], torch.Tensor]
    S: int
    R: int

    def place(self, position: int) -> tuple[int, int]:
        """(group, slot) of a batch of this process."""
        return divmod(self.loader.own(position), self.S)

    def position(self, group: int, slot: int) -> int:
        """The inverse of `place`."""
        return self.loader.position(group * self.S + slot)


class Modulation:
    """Computes the rows of a base without modulation, and sets them. One thread of its own does the computing."""

    def __init__(
        self,
        family: Family,
        base: torch.nn.Module,
        linears: Linears,
        *,
        guidance: float,
        device: torch.device,
        dtype: torch.dtype,
        places: Mapping[str, HoistedLinear] | None = None,
    ) -> None:
        """`base` is hoisted and on the device, where it computes in `dtype`. `places`: its `places_of`, if blocks
        have been wrapped since. Raises `UserError` where the linears are not those of the base."""
        self.family, self.base, self.guidance, self.device, self.dtype = family, base, guidance, device, dtype
        self._linears, self._places = linears, places_of(family, base) if places is None else places
        self.num_parameters = sum(_checked(linears, name, place) for name, place in self._places.items())
        """Of the weights and biases that the device does not hold."""
        self.together = device.type == "cuda"
        """Whether many batches are one product: each weight is then read once for all of them."""
        self.waited_seconds = 0.0
        """How long training has waited for rows, all in all."""
        self._following: _Following | None = None
        self._group: _Group | None = None
        self._coming: tuple[int, Future[_Group]] | None = None
        """The number of the group that is being computed, and the group."""
        self._host: list[torch.Tensor] = []  # two, in turn
        self._flat: dict[int, torch.Tensor] = {}
        self._bound: tuple[int, int] | None = None
        self._first_rows: torch.Tensor | None = None
        self._giving_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="modulation", initializer=self._begin_thread)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the base may still be arriving

    @property
    def num_bytes(self) -> int:
        """What the device would hold in addition, were the weights there unquantized."""
        return self.num_parameters * self.dtype.itemsize

    def follow(self, loader: Loader, times: Callable[[int, int], torch.Tensor], *, batches: int) -> None:
        """Serve the batches of this loader, so many at a time. `times(position, B)` gives t (B,) of batch number
        `position`, fp32 on the CPU; it is called from another thread. The loader's stream is to stay as it is."""
        self._forget()
        self._following = _Following(loader, times, S=batches, R=loader.options.batch_size)

    def use(self, position: int, B: int) -> None:
        """From now on the base computes with the modulation of training batch `position`, which has B samples.

        Where its group is not there yet, this waits; and the next group begins to be computed.
        """
        following = self._following
        assert following is not None, "nothing is followed"
        number, slot = following.place(position)
        if self._group is None or self._group.number != number or slot < self._group.first:
            self._turn_to(number, slot)
        assert self._group is not None
        self._group.rows.use(slot, B)

    def compute(self, t: torch.Tensor, pooled: torch.Tensor) -> Rows:
        """The rows of S batches with times t (S, R) and pooled text (S, R, P), on the spot: for validation. All weights
        pass through the device once. t is taken as it is: give it the dtype that the base will be called with."""
        S, R = t.shape
        host = self._room(S, R)
        # The thread's stream knows nothing of what is on its way on this one.
        self._thread.submit(self._compute, t.cpu(), pooled.cpu(), host, R).result()
        return Rows(self, host, R)

    def set(self, host: torch.Tensor, R: int, B: int) -> None:
        """Copy the rows of one batch of `_layout(R)` to the device and bind the first B to the base's linears."""
        flat = self._flat.get(R)
        if flat is None:
            flat = self._flat[R] = torch.empty_like(host, device=self.device, pin_memory=False)
        # Always to the same place: what reads it is before or after in the order of the stream.
        flat.copy_(host, non_blocking=True)
        first = next(iter(self._places.values()))
        if self._bound != (R, B) or first.rows is not self._first_rows:  # those of another run on the same base
            for name, offset in self._layout(R).offsets.items():
                place = self._places[name]
                place.rows = flat[offset : offset + R * place.out_features].view(R, place.out_features)[:B]
            self._bound, self._first_rows = (R, B), first.rows

    def close(self) -> None:
        """Compute no further."""
        self._forget()
        self._thread.shutdown(cancel_futures=True)

    def _forget(self) -> None:
        """Let the present group go, and the one that is being computed."""
        self._give_up_coming()
        self._group, self._host = None, []

    def _give_up_coming(self) -> None:
        if self._coming is None:
            return
        _, future = self._coming
        self._coming = None
        self._giving_up.set()
        if not future.cancel():
            future.exception()  # it ends at its next piece; what else may have gone wrong in it concerns nobody now
        self._giving_up.clear()

    def _turn_to(self, number: int, slot: int) -> None:
        """Make this group the present one, and have the next begun."""
        began = time.perf_counter()
        if self._coming is not None and self._coming[0] == number:
            _, future = self._coming
        else:
            self._give_up_coming()
            future = self._begin(number, slot)
        self._coming = None
        self._group = future.result()
        self._coming = number + 1, self._begin(number + 1, 0)
        self.waited_seconds += time.perf_counter() - began

    def _begin(self, number: int, first: int) -> Future[_Group]:
        """Have a group computed, from slot `first` on, into the memory that the present one does not use."""
        following = self._following
        assert following is not None
        if not self._host:
            self._host = [self._room(following.S, following.R) for _ in range(2)]
        busy = None if self._group is None else self._group.rows.host
        host = self._host[1] if busy is self._host[0] else self._host[0]
        # Rows that were used last may still be on their way from there.
        left = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
        return self._thread.submit(self._make, following, number, first, host, left)

    def _make(
        self, following: _Following, number: int, first: int, host: torch.Tensor, left: torch.cuda.Event | None
    ) -> _Group:
        positions = [following.position(number, slot) for slot in range(first, following.S)]
        layer, _, _ = self.family.pooled.partition(".")
        coming = [tensors[self.family.pooled] for tensors in following.loader.peek(positions, [layer])]
        # Of the same shape in every group, for then a row is computed the same way wherever a run began. Slots that
        # are over, and places that a batch leaves empty, are zeros.
        pooled = torch.zeros(following.S, following.R, coming[0].shape[-1], dtype=self.dtype)
        t = torch.zeros(following.S, following.R)
        for slot, (position, embeds) in enumerate(zip(positions, coming, strict=True), start=first):
            B = len(embeds)
            pooled[slot, :B] = embeds.to(self.dtype)
            t[slot, :B] = following.times(position, B)
        if left is not None:
            left.synchronize()
        self._compute(t, pooled, host, following.R)
        return _Group(number, first, Rows(self, host, following.R))

    @torch.no_grad()
    def _compute(self, t: torch.Tensor, pooled: torch.Tensor, host: torch.Tensor, R: int) -> None:
        """Fill `host`, (S, numbers of a batch), with the rows of t (S, R) and pooled (S, R, P)."""
        stages = [_Stage(self.device, self.dtype), _Stage(self.device, self.dtype)]
        t, pooled = (t.reshape(1, -1), pooled.flatten(0, 1)[None]) if self.together else (t, pooled)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            t, pooled = t.to(self.device), pooled.to(device=self.device, dtype=self.dtype)
            xs = [
                self.family.time_embedding(self.base, t_, self.guidance, pooled_)
                for t_, pooled_ in zip(t, pooled, strict=True)
            ]  # (M, D), or S times (R, D)
            for name, offset in self._layout(R).offsets.items():
                weight, bias = self._linears.read(name)
                targets = host[:, offset : offset + R * len(weight)].unflatten(1, (R, len(weight)))  # (S, R, out)
                count = _piece_rows(weight.shape[1], self.dtype)
                for begin in range(0, len(weight), count):
                    if self._giving_up.is_set():
                        raise _GivenUpError
                    end = min(begin + count, len(weight))
                    stages[0].finish()
                    stages[0].start(xs, weight[begin:end], None if bias is None else bias[begin:end])
                    stages[0].target = targets[:, :, begin:end]
                    stages.reverse()
            for stage in stages:
                stage.finish()

    def _layout(self, R: int) -> _Layout:
        offsets, numel = {}, 0
        for name, place in self._places.items():
            offsets[name] = numel
            numel += -(-R * place.out_features // _ALIGNMENT) * _ALIGNMENT
        return _Layout(offsets, numel)

    def _room(self, S: int, R: int) -> torch.Tensor:
        """(S, numbers of a batch) on the host, from where copies to a GPU do not wait."""
        numel = self._layout(R).numel
        return torch.empty(S, numel, dtype=self.dtype, pin_memory=self.device.type == "cuda")

    def _begin_thread(self) -> None:
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # a thread begins on GPU 0


class _GivenUpError(Exception):
    """Nobody waits for these rows any more."""


class _Stage:
    """One piece of a linear on its way: to the device, through the product, and its rows back to the host.

    Of two in turn, one's weights are read and copied while the other is at work. Nothing of a stage is written before
    its last piece is finished, so its pinned memory is never changed under a copy.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype, self._pinned = device, dtype, device.type == "cuda"
        self._weights = torch.empty(0, dtype=dtype)
        self._rows = torch.empty(0, dtype=dtype)
        self._pending: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None
        self.target: torch.Tensor | None = None
        """Where the rows go in the end, (S, R, n)."""

    def start(self, xs: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Begin the products of all x (rows, D) with weight (n, D), plus bias (n,), on the present stream."""
        assert self._pending is None
        n, D = weight.shape
        self._weights = self._grown(self._weights, n * (D + 1))
        staged = self._weights[: n * (D + 1)]
        staged[: n * D].view(n, D).copy_(weight)
        if bias is not None:
            staged[n * D :].copy_(bias)
        there = staged.to(self._device, non_blocking=True)
        weight_, bias_ = there[: n * D].view(n, D), None if bias is None else there[n * D :]
        outputs = [torch.nn.functional.linear(x, weight_, bias_) for x in xs]
        rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # (M, n)
        self._rows = self._grown(self._rows, rows.numel())
        self._pending = self._rows[: rows.numel()].view(rows.shape)
        self._pending.copy_(rows, non_blocking=True)
        if self._pinned:
            self._done = torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        """Wait for what was begun and put its rows where they belong."""
        if self._pending is None:
            return
        if self._done is not None:
            self._done.synchronize()
        assert self.target is not None
        self.target.copy_(self._pending.view(self.target.shape))
        self._pending = None

    def _grown(self, memory: torch.Tensor, numel: int) -> torch.Tensor:
        if memory.numel() >= numel:
            return memory
        return torch.empty(numel, dtype=self._dtype, pin_memory=self._pinned)


def _piece_rows(D: int, dtype: torch.dtype) -> int:
    """Outputs of a linear that are computed at a time: a fixed number, since on a GPU the shape may decide the bits."""
    return max(PIECE_BYTES // (D * dtype.itemsize) // 256, 1) * 256


def places_of(family: Family, base: torch.nn.Module) -> dict[str, HoistedLinear]:
    """The places in a hoisted base, by name."""
    places: dict[str, HoistedLinear] = {}
    for name, place in family.modulations(base).items():
        assert isinstance(place, HoistedLinear), f"{name} is a {type(place).__name__}: the base is not hoisted"
        places[name] = place
    return places


def _checked(linears: Linears, name: str, place: HoistedLinear) -> int:
    """The number of parameters of a linear, which fits its place."""
    weight, bias = linears.read(name)
    if len(weight) != place.out_features:
        raise UserError(
            f"{name} has {len(weight)} outputs in the model's weights and {place.out_features} in its config; download "
            "the model again"
        )
    return weight.numel() + (0 if bias is None else bias.numel())
