"""The gate before 8-bit arithmetic: is the ControlNet's gradient still the one that the unquantized base would give?

How it is used, before the first step of every start:

    eight_bit.use(base, options.speed.arithmetic, device)  # what the base's linears compute with from now on
    if options.speed.arithmetic != "exact":
        reference = eight_bit.unquantized(family, model)
        measured = eight_bit.gate(step, batches, reference=reference, recomputed=(12, 0))  # or a `UserError`
        say(measured.sentence())
        figures["arithmetic"] = measured.figures()

`batches` are those of the first step: the user's own samples, with the noise and the times that the step will draw.
Each is computed three times: in the arithmetic that is asked for, in exact arithmetic, and with every int8 weight
replaced by the model's own, read from its files layer by layer, so that the reference needs no more memory than the
step, on any card. Nothing is stepped, no gradient is left behind. All of it runs uncompiled, whether blocks have been
compiled or not, and with all blocks recomputed, since uncompiled code takes more memory; `recomputed` is what is gone
back to. With several processes all of them call it, each with its own batches, and all come to the same verdict.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import train.int8_arithmetic  # noqa: F401  # puts its products into frozen_linear.ARITHMETIC
from shared.errors import UserError
from shared.families.base import Batch, Family
from shared.model_folder import ModelFolder
from train import frozen_linear, recompute
from train.budget import ALL
from train.frozen_linear import Arithmetic, FrozenInt8Linear
from train.modulation import Linears, LinearsOnDisk
from train.step import Step
from train.streaming import StreamedBlock

MOST_ERROR = 0.02
"""Of the whole gradient, relative: |tested - reference| / |reference|. At FLUX's width, over six blocks of random
weights, int8 weights alone cost 0.3 to 0.5 %, with an int8 gradient 0.4 to 0.6, with int8 activations too 0.5 to 1.3
(the higher where channels have outliers). Two per cent leaves room for more blocks, and none for activations that int8
does not hold; the gradients of two samples differ by tens of times as much."""
LEAST_COSINE = 0.999
"""Of the whole gradient, and of every tensor that carries `NOTABLE` of it: 2.6 degrees. An Adam step does not see how
small a tensor's gradient is beside the others', so a tensor turned by more must not hide behind them."""
NOTABLE = 0.01
"""Share of the whole gradient's norm from which on a tensor is looked at by itself."""
UNQUANTIZED, EXACT = "the unquantized base", "exact arithmetic on the int8 base"
"""What the gradient may be held against."""
_CHUNK = 1 << 24


def use(base: torch.nn.Module, arithmetic: Arithmetic, device: torch.device) -> int:
    """From now on the base's int8 linears compute in this arithmetic; back comes how many they are. Raises `UserError`
    where they cannot: a base that is not in int8, a GPU without int8 tensor cores, no Triton."""
    layers = frozen_linear.linears(base).values()
    if arithmetic != "exact":
        if not layers:
            raise UserError(
                f"speed.arithmetic {arithmetic} computes with int8 weights, and this base has none: set base.weights "
                "int8, or speed.arithmetic exact"
            )
        _check_device(arithmetic, device)
        assert arithmetic in frozen_linear.ARITHMETIC, arithmetic
    for layer in layers:
        layer.arithmetic = arithmetic
    return len(layers)


def _check_device(arithmetic: Arithmetic, device: torch.device) -> None:
    if device.type != "cuda":
        return  # plain torch computes it, slowly
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(
            f"speed.arithmetic {arithmetic} needs an NVIDIA GPU of compute capability 8.0 or more (A100, RTX 30 and "
            f"later), not {torch.cuda.get_device_name(device)}; set speed.arithmetic exact"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError(f"speed.arithmetic {arithmetic} needs Triton ({error}); run pip install triton") from error


def unquantized(family: Family, model: ModelFolder) -> Linears | None:
    """The model's own weights to hold 8-bit arithmetic against; None where their files are not at hand."""
    if not model.has(family.base_component) or not list((model.path / family.base_component).glob("*.safetensors")):
        return None
    return LinearsOnDisk(model, family.base_component)


@dataclass(frozen=True)
class Fidelity:
    """How near a gradient is to the reference's."""

    relative_error: float
    cosine: float
    least_cosine: float
    """Of the tensors that carry `NOTABLE` of the gradient."""
    least_tensor: str
    """Which one it is."""

    @property
    def is_near(self) -> bool:
        """Within both bounds. What is not finite is not."""
        return self.relative_error <= MOST_ERROR and self.cosine >= LEAST_COSINE and self.least_cosine >= LEAST_COSINE

    def __str__(self) -> str:
        return (
            f"relative error {self.relative_error:.2%}, cosine {self.cosine:.5f} (least of its tensors "
            f"{self.least_cosine:.5f}, {self.least_tensor})"
        )


@dataclass(frozen=True)
class Measured:
    """What the gate saw."""

    arithmetic: Arithmetic
    reference: str
    """What it was held against."""
    num_samples: int
    fidelity: Fidelity
    exact: Fidelity
    """The same int8 weights in exact arithmetic: what of the error is the weights' own."""

    def sentence(self) -> str:
        """For the log."""
        return (
            f"arithmetic {self.arithmetic}: the gradient of {self.num_samples} sample(s) against {self.reference}: "
            f"{self.compared()}"
        )

    def compared(self) -> str:
        """The figures, and beside them those of the weights alone where they are others than the reference's."""
        alone = f"; in exact arithmetic on the int8 base: {self.exact}" if self.reference == UNQUANTIZED else ""
        return f"{self.fidelity}{alone}"

    def figures(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def gate(
    step: Step,
    batches: list[Batch],
    *,
    reference: Linears | None,
    recomputed: tuple[int, int] = (0, 0),
) -> Measured:
    """Measure the arithmetic that the base's linears are set to. `reference`: weights of the unquantized base; without
    them exact arithmetic on the int8 weights is the reference. `recomputed`: how many blocks of the base and of the
    ControlNet the run recomputes.

    Raises `UserError` naming both figures where the gradient is not within `MOST_ERROR` and `LEAST_COSINE`.
    """
    adapter = step.adapter
    layers = _named_as_in_the_model(adapter.base)
    [arithmetic] = {layer.arithmetic for layer in layers.values()}
    assert arithmetic != "exact", "exact arithmetic needs no measure"
    # The wrapper for several processes would wait for gradients that are never accumulated.
    wrapped, adapter.module = adapter.module, adapter.bare
    recompute.apply(step.family, adapter.base, adapter.with_blocks, ALL, ALL)
    try:
        with torch.compiler.set_stance("force_eager"):
            tested, exact = _sums(step, batches, layers, arithmetic, reference)
    finally:
        adapter.module = wrapped
        recompute.apply(step.family, adapter.base, adapter.with_blocks, *recomputed)
    count = torch.tensor(float(sum(len(batch) for batch in batches)), device=step.device)
    if step.accelerator is not None:
        tested, exact, count = (step.accelerator.reduce(each, reduction="sum") for each in (tested, exact, count))
    names = [name for name, _ in adapter.named_parameters()]
    measured = Measured(
        arithmetic=arithmetic,
        reference=EXACT if reference is None else UNQUANTIZED,
        num_samples=int(count.item()),
        fidelity=_fidelity(tested, names),
        exact=_fidelity(exact, names),
    )
    if not measured.fidelity.is_near:
        raise UserError(_refusal(measured))
    return measured


def _refusal(measured: Measured) -> str:
    found = measured.fidelity
    if not math.isfinite(found.relative_error):
        what = "the gradient of the first step is zero or not finite, so nothing can be said of it"
    else:
        what = (
            f"the gradient of the first step is too far from that of {measured.reference}: allowed are a relative "
            f"error of {MOST_ERROR:.0%} and a cosine of {LEAST_COSINE}, but found {measured.compared()}"
        )
    milder = "int8_backward, which leaves activations alone, or " if measured.arithmetic == "int8" else ""
    return f"speed.arithmetic {measured.arithmetic}: {what}. Set speed.arithmetic {milder}exact"


def _sums(
    step: Step,
    batches: list[Batch],
    layers: dict[str, FrozenInt8Linear],
    arithmetic: Arithmetic,
    reference: Linears | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the tested and the exact arithmetic, (P, 4) fp64 on the device for the P trained tensors: the sums over all
    batches of reference * gradient, reference^2, gradient^2, (gradient - reference)^2."""
    weights = [parameter for _, parameter in step.adapter.named_parameters()]
    sums = {
        each: torch.zeros(len(weights), 4, dtype=torch.float64, device=step.device) for each in (arithmetic, "exact")
    }

    def gradients(batch: Batch, chosen: Arithmetic) -> list[torch.Tensor | None]:
        for layer in layers.values():
            layer.arithmetic = chosen
        # Straight from the loss: nothing is accumulated, so no hook that waits for a gradient steps or sends it.
        return list(torch.autograd.grad(step.loss(batch).mean(), weights, allow_unused=True))

    try:
        for batch in batches:
            with _replaced(layers, reference):
                # On the host, so that the device never holds two gradients of the whole ControlNet beside activations.
                expected = [None if each is None else each.cpu() for each in gradients(batch, "exact")]
            for chosen, total in sums.items():
                for i, (ours, theirs) in enumerate(zip(gradients(batch, chosen), expected, strict=True)):
                    if ours is not None and theirs is not None:
                        _add_sums(total[i], ours.flatten(), theirs.to(ours.device).flatten())
    finally:
        for layer in layers.values():
            layer.arithmetic = arithmetic
    return sums[arithmetic], sums["exact"]


def _add_sums(total: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    for a, b in zip(ours.split(_CHUNK), theirs.split(_CHUNK), strict=True):
        a, b = a.double(), b.double()
        total += torch.stack([a @ b, b @ b, a @ a, (a - b).square().sum()])


def _fidelity(sums: torch.Tensor, names: list[str]) -> Fidelity:
    dot, reference, tested, difference = sums.sum(dim=0).tolist()
    if not reference or not math.isfinite(reference):
        return Fidelity(relative_error=math.nan, cosine=math.nan, least_cosine=math.nan, least_tensor="")
    notable = [
        (_cosine(*row[:3]), name)
        for name, row in zip(names, sums.tolist(), strict=True)
        if row[1] >= NOTABLE**2 * reference
    ]
    least, tensor = min(notable)
    return Fidelity(
        relative_error=math.sqrt(difference / reference),
        cosine=_cosine(dot, reference, tested),
        least_cosine=least,
        least_tensor=tensor,
    )


def _cosine(dot: float, reference: float, tested: float) -> float:
    return dot / math.sqrt(reference * tested) if reference * tested else math.nan


# --- the unquantized base, layer by layer ---------------------------------------------------------------------------


def _named_as_in_the_model(base: torch.nn.Module) -> dict[str, FrozenInt8Linear]:
    """The int8 layers by the names that their weights have in the model's files: a streamed block is in a wrapper."""
    wrappers = [f"{name}." for name, module in base.named_modules() if isinstance(module, StreamedBlock)]
    named = {}
    for name, layer in frozen_linear.linears(base).items():
        for wrapper in wrappers:
            if name.startswith(wrapper):
                name = wrapper + name.removeprefix(wrapper).removeprefix("block.")
        named[name] = layer
    return named


@contextmanager
def _replaced(layers: dict[str, FrozenInt8Linear], weights: Linears | None) -> Iterator[None]:
    """While the block runs, the layers compute with these weights instead of their own."""
    if weights is None:
        yield
        return
    for name, layer in layers.items():
        layer.forward = functools.partial(_multiply, weights, name, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _multiply(weights: Linears, name: str, layer: FrozenInt8Linear, x: torch.Tensor) -> torch.Tensor:
    def read() -> torch.Tensor:
        """The layer's unquantized weight (N, K), as x is."""
        weight, _ = weights.read(name)
        assert weight.shape == (layer.out_features, layer.in_features), f"{name} is {tuple(weight.shape)} in the model"
        return weight.to(device=x.device, dtype=x.dtype)

    return _Read.apply(x, layer.bias, read)


class _Read(torch.autograd.Function):
    """A linear that holds no weight, but reads it each time, for backward too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.read = read
        return torch.nn.functional.linear(x, read(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        [gradient] = gradients
        return gradient @ ctx.read(), None, None
