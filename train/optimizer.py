"""Optimizers whose updates arrive: AdamW with 32-bit or 8-bit states, over float32 or bfloat16 weights.

A bfloat16 weight near 0.02 has neighbours 1.2e-4 away, and one AdamW update at a learning rate of 2e-5 is six times
smaller than that: rounded to nearest, it is lost. So a bfloat16 weight is stepped on a temporary float32 copy and
rounded back stochastically, up or down with the probability that makes it right on average (arXiv 1502.02551); or, by
option, on a float32 master copy that stays. How much of the updates arrives is measured now and then.

Where memory is short, states and master copies rest in the host's memory (train/offload.py), or each gradient is
stepped and freed as soon as backward has it. Both give the same weights to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from shared.drawn import generator_for
from shared.errors import UserError
from train import adamw
from train.adamw import EightBit
from train.buckets import CHUNK_NUMEL, Bucket, Piece, is_large, make_buckets
from train.offload import DeviceStates, HostStates, States
from train.optimizer_options import Kind, OptimizerOptions, learning_rate
from train.optimizer_state import OptimizerState
from train.rounding import stochastic_round_


@dataclass(frozen=True)
class Survival:
    """What rounding left of one step's update. 0-dim float32 tensors on the device."""

    update_kept: torch.Tensor
    """The projection of the change that was made on the change that was meant, as a share of it: 1 where nothing is
    lost on average, 0 where no weight moved."""
    share_updated: torch.Tensor
    """The share of all weights whose value changed."""


@dataclass(frozen=True)
class Update:
    """What one step did."""

    norm: torch.Tensor | None
    """Of the change of all weights together, as it was meant, before any rounding; 0-dim float32 on the device. (The
    change that was made would be longer by rounding's noise, several times so at usual learning rates.) None where
    the optimizer does not tell it."""
    survival: Survival | None
    """Where it was measured."""
    found: torch.Tensor | None = None
    """The step size that the optimizer has found by itself, 0-dim float32; None where it is told one."""


class AnyOptimizer(Protocol):
    """What a training step is made with: see `Optimizer`, whose words these are."""

    options: OptimizerOptions
    parameters: dict[str, torch.nn.Parameter]

    @property
    def num_updates(self) -> int: ...
    def reserve(self) -> None: ...
    def begin(self, learning_rate: float, rounding: torch.Generator | int | None, *, measure: bool = False) -> None: ...
    def norm(self) -> torch.Tensor: ...
    def finish(self, norm: float) -> Update: ...
    def zero_grad(self) -> None: ...
    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...
    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None: ...


def make(
    options: OptimizerOptions,
    parameters: Mapping[str, torch.nn.Parameter],
    rates: Mapping[str, float] | None = None,
) -> AnyOptimizer:
    """The optimizer that the options name, over named parameters. `rates`: what the learning rate is multiplied by for
    some of them; `prodigy`, which finds one for all, does not heed it. Raises `UserError`."""
    if options.kind == "prodigy":
        from train.prodigy import Prodigy

        return Prodigy(options, parameters)
    return Optimizer(options, parameters, rates=rates)


@dataclass
class _Measured:
    """Sums over what was stepped so far, 0-dim on the device."""

    projected: list[torch.Tensor] = field(default_factory=list)
    meant: list[torch.Tensor] = field(default_factory=list)
    changed: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Pass:
    """One step, while it is made."""

    learning_rate: float
    rounding: torch.Generator | int | None
    measured: _Measured | None
    clip_each: bool = False
    scale: float = 1.0
    """What gradients are multiplied by."""
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    """Buckets, as they were stepped."""
    squares: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Of each bucket's pieces, the squared norm of the change that was meant, 0-dim."""


class Optimizer:
    """AdamW over named parameters: float32 ones in place, bfloat16 ones through a float32 copy.

    Parameters are stepped in buckets, so beside the states a step needs float32 copies of one bucket's weights and
    gradients, never of all. Parameters without a gradient are left alone, as by torch.

    A training step is `begin`, backward, `norm`, `finish`. (`zero_grad`, `clip` and `step` are the same by hand; they
    never release.)
    """

    def __init__(
        self,
        options: OptimizerOptions,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        chunk_numel: int = CHUNK_NUMEL,
        in_8_bits: frozenset[str] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Take the trainable `parameters` by name, all on one device. `in_8_bits`: those whose moments `adamw8bit`
        keeps so, if it is not for their size to say. `rates`: what the learning rate is multiplied by for some. Raises
        `UserError` for weights neither float32 nor bfloat16, and where host memory does not suffice for states."""
        assert parameters, "nothing to train"
        assert len({id(p) for p in parameters.values()}) == len(parameters), "a parameter appears under two names"
        for name, parameter in parameters.items():
            assert parameter.requires_grad, f"{name} is frozen"
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise UserError(
                    f"'{name}' is {parameter.dtype}, but only float32 and bfloat16 weights can be trained: choose one"
                )
        devices = {parameter.device for parameter in parameters.values()}
        assert len(devices) == 1, f"parameters lie on several devices: {devices}"
        self.options = options
        self.parameters = dict(parameters)
        self._device = devices.pop()
        eight_bit: bool | frozenset[str] = options.kind == "adamw8bit"
        if eight_bit and in_8_bits is not None:
            eight_bit = in_8_bits
        self._num_weights = sum(parameter.numel() for parameter in parameters.values())
        self._buckets = make_buckets(
            parameters, eight_bit=eight_bit, master=options.master, chunk_numel=chunk_numel, rates=rates
        )
        self._eight_bit = EightBit(self._device) if any(bucket.eight_bit for bucket in self._buckets) else None
        if self._eight_bit is not None and self._device.type == "cuda" and options.one_pass == "auto":
            self._eight_bit.go_over_memory_once()
        sizes = [bucket.num_bytes for bucket in self._buckets]
        self._states: States = (HostStates if options.states == "cpu" else DeviceStates)(sizes, self._device)
        self._noise: torch.Generator | None = None
        self._begun: _Pass | None = None
        self._following: dict[int, int] = {}
        if options.release:
            for name, parameter in self.parameters.items():
                if is_large(parameter, chunk_numel):
                    buckets = [bucket for bucket in self._buckets if bucket.pieces[0].name == name]
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._release, name, buckets))

    @property
    def state_bytes(self) -> int:
        """Memory that states and master copies take once every weight was stepped, wherever they rest."""
        return sum(bucket.num_bytes for bucket in self._buckets)

    @property
    def num_updates(self) -> int:
        """Updates that weights have had or begun to have, all in all: while it is the same, none has moved."""
        return sum(piece.num_steps for bucket in self._buckets for piece in bucket.pieces)

    def reserve(self) -> None:
        """Take the memory of all states now, so that the first step needs what every step needs."""
        for bucket in self._buckets:
            self._states.at_rest(bucket.index)

    # --- one training step ------------------------------------------------------------------------------------------

    def begin(self, learning_rate: float, rounding: torch.Generator | int | None, *, measure: bool = False) -> None:
        """Forget the gradients; from here on backward may step what is released.

        `rounding` draws the stochastic rounding: a seed, from which each bucket draws by itself, so that the order does
        not matter; or, unless weights are released, a generator on their device. None will do where nothing is rounded
        so. `measure`: find out what survives of the update.
        """
        self.zero_grad()
        clip_each = self.options.clip == "parameter" and self.options.clip_norm > 0
        self._begun = _Pass(learning_rate, rounding, _Measured() if measure else None, clip_each)
        if self.options.release:
            assert not isinstance(rounding, torch.Generator), "released weights come in any order: give a seed"
            self._states.begin()

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """The global norm of the gradients, before any clipping, 0-dim float32 on the device: nothing waits for it
        here. Where it is not finite, it is the caller's to stop before `finish` (released weights are then spoiled
        already, in memory)."""
        now = self._begun
        assert now is not None, "begin first"
        now.norms |= {
            name: _norm(parameter) for name, parameter in self.parameters.items() if parameter.grad is not None
        }
        assert now.norms, "no gradients: call backward first"
        return torch.linalg.vector_norm(torch.stack(list(now.norms.values())))

    @torch.no_grad()
    def finish(self, norm: float) -> Update:
        """Step, clipped, what has a gradient still. `norm` is the value of `norm()`, which the caller has read to see
        whether it is finite: so clipping costs no pass of its own. Gradients may be left scaled. Nothing waits for the
        device here."""
        now, options = self._begun, self.options
        assert now is not None, "begin first"
        if options.clip == "global" and options.clip_norm > 0:
            now.scale = min(1.0, options.clip_norm / (norm + 1e-6))
        if not options.release:
            self._states.begin()
        self._step_all(now)
        self._states.end()
        self._begun = None
        squares = [
            square for _, bucket in sorted(now.squares.items()) for square in bucket
        ]  # whatever order they came in
        return Update(self._together(torch.stack(squares).double().sum()).sqrt().float(), self._survival(now))

    def _together(self, summed: torch.Tensor) -> torch.Tensor:
        """A sum over weights, of all processes that hold a part of them."""
        return summed

    def _release(self, name: str, buckets: list[Bucket], weight: torch.Tensor) -> None:
        """Called by backward when the gradient of a large weight is whole."""
        now = self._begun
        if now is None:  # a backward that is not of a training step
            return
        assert name not in now.norms, f"a second gradient for {name} within a step"
        with torch.no_grad():
            now.norms[name] = _norm(self.parameters[name])
            for bucket in buckets:
                self._step_bucket(bucket, self._following.get(bucket.index), now)
        weight.grad = None

    # --- by hand ----------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Forget all gradients and free their memory."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients, in place, to a global norm of at most `max_norm` (0: leave them).

        Returns the norm before scaling, a 0-dim float32 tensor on the gradients' device: nothing waits for the device
        here. Where it is not finite the gradients are spoiled, and it is the caller's to stop before `step`.
        """
        graded = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        assert graded, "no gradients: call backward first"
        total = torch.linalg.vector_norm(torch.stack([_norm(parameter) for parameter in graded]))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(graded, max_norm, total)
        return total

    @torch.no_grad()
    def step(
        self, learning_rate: float, rounding: torch.Generator | int | None, *, share_updated: bool = False
    ) -> torch.Tensor | None:
        """Step every parameter that has a gradient, and leave the gradients as they are. `rounding` as in `begin`.

        With `share_updated`, returns the share of all weights whose value changed, 0-dim float32 on the device: near 0
        means that updates are rounded away.
        """
        now = _Pass(learning_rate, rounding, _Measured() if share_updated else None)
        self._states.begin()
        self._step_all(now)
        self._states.end()
        survival = self._survival(now)
        return None if survival is None else survival.share_updated

    # --- buckets ----------------------------------------------------------------------------------------------------

    def _step_all(self, now: _Pass) -> None:
        """Step the buckets in which something has a gradient."""
        graded = [bucket for bucket in self._buckets if any(piece.weight.grad is not None for piece in bucket.pieces)]
        for i, bucket in enumerate(graded):
            self._step_bucket(bucket, graded[i + 1].index if i + 1 < len(graded) else None, now)
        self._following = dict(zip(now.order, now.order[1:], strict=False))  # backward's order is the next step's too

    def _step_bucket(self, bucket: Bucket, following: int | None, now: _Pass) -> None:
        if bucket.eight_bit and self._device.type == "cuda":
            # bitsandbytes launches this kernel on the default stream, whichever is current.
            assert torch.cuda.current_stream(self._device) == torch.cuda.default_stream(self._device)
        now.order.append(bucket.index)
        buffer = self._states.take(bucket.index, following)
        pieces = [piece for piece in bucket.pieces if piece.weight.grad is not None]
        states = [{name: of.of(buffer) for name, of in piece.fields.items()} for piece in pieces]
        for piece, state in zip(pieces, states, strict=True):
            if piece.num_steps == 0 and "master" in state:
                state["master"].copy_(piece.cut(piece.weight.detach()))
            piece.num_steps += 1
        before = [piece.cut(piece.weight.detach()).clone() for piece in pieces] if now.measured else []
        now.squares[bucket.index] = []
        meant = (self._at_once if self._goes_over_memory_once(bucket, now) else self._in_passes)(
            bucket, pieces, states, now
        )
        if now.measured is not None:
            for piece, old, intended in zip(pieces, before, meant, strict=True):
                made = piece.cut(piece.weight.detach()).to(torch.float32, copy=True).sub_(old)
                now.measured.projected.append(made.dot(intended))
                now.measured.meant.append(intended.dot(intended))
                now.measured.changed.append(made.count_nonzero())
        self._states.put(bucket.index)

    def _in_passes(
        self, bucket: Bucket, pieces: list[Piece], states: list[dict[str, torch.Tensor]], now: _Pass
    ) -> list[torch.Tensor]:
        """Step a float32 copy of the pieces and round it into the weights. Where it is measured, the change that was
        meant by each comes back, flat float32."""
        values = [
            state["master"] if "master" in state else _float32(piece, piece.weight.detach())
            for piece, state in zip(pieces, states, strict=True)
        ]
        gradients = [_float32(piece, _gradient(piece.weight)) for piece in pieces]
        # What is rounded at the end still stands in the weight until then; what is stepped in place does not.
        stood = [
            None if piece.weight.dtype == torch.bfloat16 and "master" not in state else value.clone()
            for piece, value, state in zip(pieces, values, states, strict=True)
        ]
        if now.clip_each:
            for piece, gradient in zip(pieces, gradients, strict=True):
                gradient.mul_(self._own_scale(piece, now))
        rate = now.learning_rate * bucket.rate
        if bucket.eight_bit:
            assert self._eight_bit is not None
            self._eight_bit.update(self.options, pieces, values, gradients, states, rate, now.scale)
        else:
            adamw.update(self.options, pieces, values, gradients, states, rate, now.scale)
        del gradients
        meant: list[torch.Tensor] = []
        for piece, value, old in zip(pieces, values, stood, strict=True):
            change = value - piece.cut(piece.weight.detach()) if old is None else old.neg_().add_(value)
            now.squares[bucket.index].append(change.dot(change))
            if now.measured is not None:
                meant.append(change)
        del stood, change, old
        generator = self._generator(now.rounding, bucket)
        for piece, value in zip(pieces, values, strict=True):
            self._bring_back(piece, value, generator)
        return meant

    def _at_once(
        self, bucket: Bucket, pieces: list[Piece], states: list[dict[str, torch.Tensor]], now: _Pass
    ) -> list[torch.Tensor]:
        """The same by one kernel for each piece."""
        assert self._eight_bit is not None
        rounding = now.rounding if isinstance(now.rounding, int) else 0  # None: nothing is drawn
        seeds = np.random.SeedSequence((rounding, bucket.index)).generate_state(len(pieces), np.uint64)
        together = torch.full((), now.scale, device=self._device)
        meant: list[torch.Tensor] = []
        rate = now.learning_rate * bucket.rate
        squares = now.squares[bucket.index]
        for piece, state, seed in zip(pieces, states, seeds, strict=True):
            weight = piece.cut(piece.weight.detach())
            stepped = state.get("master", weight)
            stood = stepped.to(torch.float32, copy=True) if now.measured else None
            after = torch.empty_like(stood) if stood is not None else None
            scale = self._own_scale(piece, now) if now.clip_each else together
            gradient = piece.cut(_gradient(piece.weight))
            square = self._eight_bit.update_at_once(
                self.options, piece, stepped, weight, gradient, after, state, rate, scale, int(seed)
            )
            squares.append(square)
            if after is not None and stood is not None:
                meant.append(after.sub_(stood))
        return meant

    def _goes_over_memory_once(self, bucket: Bucket, now: _Pass) -> bool:
        """A weight that is not contiguous has no flat view, and a generator cannot be read without waiting."""
        return (
            bucket.eight_bit
            and self._eight_bit is not None
            and self._eight_bit.one_pass is not None
            and not isinstance(now.rounding, torch.Generator)
            and all(piece.weight.is_contiguous() for piece in bucket.pieces)
        )

    def _own_scale(self, piece: Piece, now: _Pass) -> torch.Tensor:
        """What clips a weight's gradient by itself, 0-dim."""
        return (self.options.clip_norm / (now.norms[piece.name] + 1e-6)).clamp(max=1.0)

    def _bring_back(self, piece: Piece, value: torch.Tensor, generator: torch.Generator | None) -> None:
        """Round what was stepped into the weight. Uses up `value`, unless it is a master copy."""
        weight = piece.weight.detach()
        if weight.dtype == torch.float32 and weight.is_contiguous():
            return  # stepped in place
        if weight.dtype == torch.bfloat16 and "master" not in piece.fields and self.options.rounding == "stochastic":
            assert generator is not None or weight.is_meta, "stochastic rounding draws from a generator"
            value = stochastic_round_(value, generator)
        to = piece.cut(weight) if weight.is_contiguous() else weight
        to.copy_(value.view(to.shape))

    def _generator(self, rounding: torch.Generator | int | None, bucket: Bucket) -> torch.Generator | None:
        """What draws the rounding of a bucket."""
        if not isinstance(rounding, int):
            return rounding
        if self._device.type == "meta":  # where memory is only counted nothing is drawn
            return None
        if self._noise is None:
            self._noise = generator_for(self._device)
        mixed = np.random.SeedSequence((rounding, bucket.index)).generate_state(1, np.uint64)[0]
        return self._noise.manual_seed(int(mixed >> np.uint64(1)))

    def _survival(self, now: _Pass) -> Survival | None:
        if now.measured is None:
            return None
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        projected, meant, changed = (
            self._together(torch.stack([zero, *(one.to(zero.dtype) for one in sums)]).sum())
            for sums in (now.measured.projected, now.measured.meant, now.measured.changed)
        )
        kept = torch.where(meant > 0, projected / meant, 1.0)  # of nothing, nothing is lost
        return Survival(kept.float(), (changed / self._num_weights).float())

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a later run needs to step on exactly as this one would have: tensors, and the rest as plain JSON values.

        Tensors are copies on the CPU, keyed "<parameter>.<state>"; their dtypes are the states' own (float32, uint8).
        The rest is `{"kind": ..., "master": ..., "parameters": {name: {"shape", "tensors", "numbers"}}}`. Settings are
        not part of it: they come from the options of the run that goes on, which may keep its states elsewhere. The
        generator's state is its owner's to keep.
        """
        return self._saved.collect()

    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` returned, in this process or another; the given tensors are copied.

        Raises `UserError`, before anything is changed, where it is of another kind, other parameters, or incomplete.
        """
        self._saved.restore(tensors, meta)

    @property
    def _saved(self) -> OptimizerState:
        codes = self._eight_bit.codes if self._eight_bit is not None else {}
        return OptimizerState(self.options, self.parameters, self._buckets, self._states, codes)


def _float32(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    """The piece's part of a weight or gradient in float32, flat: a view where that is possible."""
    return piece.cut(tensor).to(torch.float32).contiguous()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _norm(parameter: torch.nn.Parameter) -> torch.Tensor:
    """In float32 also for bfloat16 gradients: torch's own total norm would be rounded to bfloat16, to 0.4 %."""
    return torch.linalg.vector_norm(_gradient(parameter), dtype=torch.float32)


__all__ = [
    "AnyOptimizer",
    "Kind",
    "Optimizer",
    "OptimizerOptions",
    "Survival",
    "Update",
    "learning_rate",
    "make",
    "stochastic_round_",
]
