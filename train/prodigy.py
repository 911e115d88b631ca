"""Prodigy: Adam that finds its own learning rate (arXiv 2306.06101), for few float32 weights as a LoRA's.

The library's own step, between our own way of beginning, clipping and keeping one. The size d that it has found stands
in the figures of each step; what the learning rate says is a factor of it, and is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shared.errors import UserError
from train.optimizer import Update
from train.optimizer_options import OptimizerOptions

_FOUND = ("d", "d_max", "d_numerator", "k")
"""What the library finds out over the run, beside the states of each weight."""


class Prodigy:
    """As `train.optimizer.Optimizer`, for float32 parameters, all on the device."""

    def __init__(self, options: OptimizerOptions, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Raises `UserError` where the library is not there, or weights are not float32."""
        try:
            import prodigyopt
        except ImportError as error:
            raise UserError(
                f"optimizer.kind prodigy needs prodigyopt ({error}): pip install prodigyopt, or choose adamw8bit"
            ) from error
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"optimizer.kind prodigy steps float32 weights, and '{name}' is {parameter.dtype}: set "
                    "lora.weights fp32 (controlnet.weights, full.weights), or choose adamw8bit"
                )
        self.options, self.parameters = options, dict(parameters)
        # As diffusers' own DreamBooth training asks for it; the safeguard is for a warm-up.
        self._stepping: torch.optim.Optimizer = prodigyopt.Prodigy(
            list(parameters.values()), lr=options.learning_rate, betas=(options.beta1, options.beta2),
            eps=options.epsilon, use_bias_correction=True, safeguard_warmup=True,
        )  # fmt: skip
        self._group = self._stepping.param_groups[0]
        self._group["weight_decay"] = options.weight_decay  # here, since its constructor prints when it is given one
        self._rate = options.learning_rate

    @property
    def state_bytes(self) -> int:
        """Memory of its states, once every weight was stepped."""
        return sum(
            state.numel() * state.element_size()
            for states in self._stepping.state.values()
            for state in states.values()
            if isinstance(state, torch.Tensor)
        )

    @property
    def num_updates(self) -> int:
        """Steps so far."""
        return int(self._group["k"])

    def reserve(self) -> None:
        """Nothing: the states come with the first step, and are small."""

    def begin(self, learning_rate: float, rounding: torch.Generator | int | None, *, measure: bool = False) -> None:
        """Forget the gradients. Nothing is rounded, so nothing is drawn and nothing measured."""
        self.zero_grad()
        self._rate = learning_rate

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """The global norm of the gradients before any clipping, 0-dim float32 on the device."""
        gradients = self._gradients()
        assert gradients, "no gradients: call backward first"
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def finish(self, norm: float) -> Update:
        """Step, clipped. Waits for the device, as the library does."""
        options, limit = self.options, self.options.clip_norm
        for gradient in self._gradients() if limit > 0 else []:
            own = torch.linalg.vector_norm(gradient) if options.clip == "parameter" else norm
            gradient.mul_(torch.as_tensor(limit / (own + 1e-6), device=gradient.device).clamp(max=1.0))
        before = [parameter.detach().clone() for parameter in self.parameters.values()]
        self._group["lr"] = self._rate
        self._stepping.step()
        moved = torch._foreach_sub([p.detach() for p in self.parameters.values()], before)
        found = torch.tensor(float(self._group["d"]), device=before[0].device)
        return Update(torch.nn.utils.get_total_norm(moved), None, found)

    def zero_grad(self) -> None:
        """Forget all gradients and free their memory."""
        self._stepping.zero_grad(set_to_none=True)

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As `Optimizer.state`: tensors keyed "<parameter>.<state>", copies on the CPU, and plain values."""
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, int] = {}
        for name, parameter in self.parameters.items():
            for key, value in self._stepping.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
                else:
                    steps[name] = value
        found = {key: float(self._group[key]) for key in _FOUND}
        return tensors, {"kind": "prodigy", "steps": steps, "found": found}

    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` returned. Raises `UserError`, before anything is changed, where it is of another kind
        or of other parameters."""
        mend = "resume with the options of the saved run, or start without its optimizer state"
        if meta["kind"] != "prodigy":
            raise UserError(f"the saved optimizer is '{meta['kind']}', but optimizer.kind is 'prodigy': {mend}")
        if unknown := sorted({*meta["steps"]} - {*self.parameters}):
            raise UserError(f"the saved optimizer has states of '{unknown[0]}', which is not trained here: {mend}")
        for name, parameter in self.parameters.items():
            if name not in meta["steps"]:
                continue
            states = {
                key.removeprefix(f"{name}."): tensor.to(parameter.device, copy=True)
                for key, tensor in tensors.items()
                if key.rpartition(".")[0] == name
            }
            self._stepping.state[parameter] = {"step": meta["steps"][name], **states}
        for key in _FOUND:
            self._group[key] = int(meta["found"][key]) if key == "k" else meta["found"][key]


__all__ = ["Prodigy"]
