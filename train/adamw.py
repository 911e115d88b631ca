"""One AdamW update of float32 values: on 8-bit moments, by bitsandbytes' kernel or this project's, and on 32-bit ones,
by torch's."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch.optim.adamw import adamw

from shared.errors import UserError
from shared.report import warn

if TYPE_CHECKING:
    from train.buckets import Piece
    from train.optimizer_options import OptimizerOptions


class EightBit:
    """AdamW on 8-bit moments: bitsandbytes' kernel, which reads and writes them in place.

    The kernel itself, not its optimizer class, which waits for the device after each weight.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            # Here, because importing it takes seconds.
            from bitsandbytes.functional import create_dynamic_map, optimizer_update_8bit_blockwise
        except ImportError as error:
            raise UserError(
                f"optimizer.kind 'adamw8bit' needs bitsandbytes ({error}): pip install bitsandbytes, or choose 'adamw'"
            ) from error
        self._kernel = optimizer_update_8bit_blockwise
        self.codes = {
            "qmap1": create_dynamic_map(signed=True).to(device),
            "qmap2": create_dynamic_map(signed=False).to(device),
        }
        """What the 256 values of a byte stand for, (256,) float32: of the mean, and of the mean of squares."""
        self._middles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.one_pass: ModuleType | None = None
        """train/one_pass.py, once it is chosen."""

    def go_over_memory_once(self) -> None:
        """Use the one kernel from here on, if it is what bitsandbytes' kernel is on this device."""
        try:
            from train import one_pass
        except ImportError as error:
            warn(
                f"optimizer.one_pass: there is no Triton ({error}), so stepping takes six times as much memory traffic"
            )
            return
        codes = self.codes["qmap1"], self.codes["qmap2"]
        if not one_pass.agrees(self._kernel, codes):
            warn("optimizer.one_pass: its kernel is not what bitsandbytes' is on this device, so that one is used")
            return
        self.one_pass, self._middles = one_pass, (one_pass.middles_of(codes[0]), one_pass.middles_of(codes[1]))

    def update_at_once(
        self,
        options: OptimizerOptions,
        piece: Piece,
        stepped: torch.Tensor,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        after: torch.Tensor | None,
        state: dict[str, torch.Tensor],
        learning_rate: float,
        scale: torch.Tensor,
        seed: int,
    ) -> torch.Tensor:
        """Step and round a piece: `stepped` is its master copy, or the weight. Back comes the squared norm of the
        change before it was rounded, 0-dim float32."""
        one_pass = self.one_pass
        assert one_pass is not None
        if weight.dtype == torch.float32:
            mode = one_pass.FLOAT32
        elif stepped is not weight:
            mode = one_pass.MASTER
        else:
            mode = one_pass.STOCHASTIC if options.rounding == "stochastic" else one_pass.NEAREST
        square: torch.Tensor = one_pass.adamw(
            stepped=stepped, weight=weight, gradient=gradient, after=after, state=state,
            codes=(self.codes["qmap1"], self.codes["qmap2"]), middles=self._middles, scale=scale, mode=mode, seed=seed,
            num_steps=piece.num_steps, learning_rate=learning_rate, beta1=options.beta1, beta2=options.beta2,
            epsilon=options.epsilon, weight_decay=options.weight_decay,
        )  # fmt: skip
        return square

    def update(
        self,
        options: OptimizerOptions,
        pieces: list[Piece],
        values: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        learning_rate: float,
        scale: float,
    ) -> None:
        """Step float32 `values` by `scale` times their `gradients`; `num_steps` of the pieces count this step."""
        for piece, value, gradient, state in zip(pieces, values, gradients, states, strict=True):
            self._kernel(
                "adam", gradient, value, state["state1"], state["state2"],
                options.beta1, options.beta2, 0.0, 0.0, options.epsilon, piece.num_steps, learning_rate,
                self.codes["qmap1"], self.codes["qmap2"], state["absmax1"], state["absmax2"],
                options.weight_decay, gnorm_scale=scale,
            )  # fmt: skip


def update(
    options: OptimizerOptions,
    pieces: list[Piece],
    values: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: list[dict[str, torch.Tensor]],
    learning_rate: float,
    scale: float,
) -> None:
    """AdamW on 32-bit moments, torch's, in one fused call: step float32 `values` by `scale` times their `gradients`."""
    if scale != 1.0:
        for gradient in gradients:
            gradient.mul_(scale)
    # The fused kernel counts on the device, one up.
    fused = values[0].device.type != "xla"  # which has no such kernel, and counts on the host
    steps = [
        torch.full((), float(piece.num_steps - 1), device=values[0].device if fused else "cpu") for piece in pieces
    ]
    adamw(
        values, gradients, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
        steps, fused=fused, amsgrad=False, maximize=False,
        beta1=options.beta1, beta2=options.beta2, lr=learning_rate,
        weight_decay=options.weight_decay, eps=options.epsilon,
    )  # fmt: skip
