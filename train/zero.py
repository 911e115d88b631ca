"""DeepSpeed's ZeRO, stages 1 and 2, for those who train with it: gradients and moments are spread over the processes,
and may rest, with a float32 copy of the weights, in the host's memory, where they are stepped as well.

    accelerate launch --config_file examples/launch/deepspeed_stage_2.yaml -m train ...

accelerate's configuration says the stage and where things rest; everything else is training's own, so the step is the
same: AdamW in float32, times, noise and clipping as without. In a checkpoint the states are whole and under their
weights' names, as `optimizer.kind adamw` has them: a run goes on with any number of processes, or without DeepSpeed.

What rests on the host in 8 bits, in one process too, is `optimizer.states cpu`, and weights that are spread as well are
`memory.shard`: neither needs DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from shared.errors import UserError
from train.optimizer import Update
from train.optimizer_options import OptimizerOptions

MOMENTS = ("exp_avg", "exp_avg_sq")
STAGES = (1, 2)


def wanted() -> bool:
    """Whether this process was launched by accelerate for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def refuse_missing() -> None:
    """Raises `UserError` where DeepSpeed is wanted and not installed."""
    if wanted() and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "accelerate is set up for DeepSpeed, which is not installed: pip install 'deepspeed>=0.18', or "
            "launch without it; --optimizer.states cpu keeps moments on the host as well"
        )


def refuse_spread(shard: str) -> None:
    """Raises `UserError` where DeepSpeed is wanted and `memory.shard` is yes."""
    if wanted() and shard == "yes":
        raise UserError("memory.shard yes spreads weights by FSDP2, which DeepSpeed does not: choose one of the two")


def refuse(options: OptimizerOptions, weights: torch.dtype, stage: int, *, rates: Mapping[str, float]) -> None:
    """Refuse (`UserError`) what DeepSpeed does not do here. `rates`: what the learning rate is multiplied by for some
    weights."""
    if stage not in STAGES:
        raise UserError(
            f"accelerate is set up for DeepSpeed stage {stage}; here it is stage 1 or 2. Weights are spread without "
            "DeepSpeed: --memory.shard yes with --config_file examples/launch/one_machine.yaml"
        )
    if any(rate != 1 for rate in rates.values()):
        raise UserError(
            "lora.text_learning_rate: under DeepSpeed all weights have one learning rate; leave it out, or launch "
            "without DeepSpeed"
        )
    wrong = {
        "kind": (options.kind, "adamw", "it keeps moments in float32"),
        "release": (options.release, False, "it steps when all gradients are there"),
        "clip": (options.clip, "global", "it clips all gradients together"),
        "master": (options.master, weights != torch.float32, "it keeps a float32 copy of bf16 weights, of no others"),
    }
    for name, (value, needed, why) in wrong.items():
        if value != needed:
            raise UserError(
                f"optimizer.{name} {value} is not DeepSpeed's: {why}; set --optimizer.{name} {needed}, or launch "
                "without DeepSpeed"
            )


class ZeroOptimizer:
    """AdamW under DeepSpeed's engine, which a module is called through while it is trained. Every process makes every
    call. As `train.optimizer.AnyOptimizer`, but that nothing is measured of what rounding leaves."""

    def __init__(
        self,
        options: OptimizerOptions,
        module: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        accelerator: Accelerator,
        *,
        rates: Mapping[str, float],
    ) -> None:
        """Over the named parameters of a module. `rates`: as in `refuse`. Raises `UserError` for what DeepSpeed does
        not do here."""
        from accelerate.utils import DeepSpeedPlugin

        plugin = accelerator.state.deepspeed_plugin or DeepSpeedPlugin()  # on the CPU accelerate leaves it out
        weights = next(iter(parameters.values())).dtype
        refuse(options, weights, plugin.zero_stage, rates=rates)
        import deepspeed

        self.options, self.parameters, self.num_updates = options, dict(parameters), 0
        adamw = torch.optim.AdamW(
            list(parameters.values()), lr=options.learning_rate, betas=(options.beta1, options.beta2),
            eps=options.epsilon, weight_decay=options.weight_decay, fused=True,
        )  # fmt: skip
        stated = plugin.deepspeed_config["zero_optimization"]
        offload = {key: value for key, value in stated.get("offload_optimizer", {}).items() if value is not None}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # batches are training's own business
            "gradient_accumulation_steps": 1,
            "gradient_clipping": options.clip_norm,
            "bf16": {"enabled": weights == torch.bfloat16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its own is compiled on the spot; torch's does the same
            "zero_optimization": {"stage": plugin.zero_stage, "offload_optimizer": offload},
        }
        self.engine: Any
        self._zero: Any
        self.engine, self._zero, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=config)

    def backward(self, share: torch.Tensor, last: bool) -> None:
        """Add the gradients of a loss, of which the sum over the processes is wanted."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(share * self.engine.dp_world_size, scale_wrt_gas=False)  # it averages

    def reserve(self) -> None:
        """Its memory is taken already."""

    def begin(self, learning_rate: float, rounding: torch.Generator | int | None, *, measure: bool = False) -> None:
        """Before backward. Nothing is rounded stochastically: bf16 weights are neighbours of a float32 copy."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate

    def norm(self) -> torch.Tensor:
        """Of the whole gradient, 0-dim float32; infinite where it is not finite."""
        norm = torch.as_tensor(self._zero.scaled_global_norm(), dtype=torch.float32)
        return torch.where(norm < 0, torch.inf, norm)  # what DeepSpeed says of one that is not finite

    def finish(self, norm: float) -> Update:
        """Step, clipped."""
        self.engine.step()
        self.num_updates += 1
        return Update(None, None)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._zero.zero_grad(set_to_none=True)

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As `train.optimizer.Optimizer.state` gives it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            found = {"master": safe_get_full_fp32_param(parameter)} if self.options.master else {}
            found |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            found["step"] = torch.tensor(float(self.num_updates))
            tensors |= {f"{name}.{key}": tensor.detach().cpu() for key, tensor in found.items()}
            described[name] = {"shape": list(parameter.shape), "tensors": list(found), "numbers": {}}
        return tensors, {"kind": self.options.kind, "master": self.options.master, "parameters": described}

    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` returned, or `Optimizer.state` of the same kind. Raises `UserError`."""
        from deepspeed.utils import safe_set_full_fp32_param

        shapes = {name: list(parameter.shape) for name, parameter in self.parameters.items()}
        saved = {name: list(of["shape"]) for name, of in meta["parameters"].items()}
        if (meta["kind"], meta["master"], saved) != (self.options.kind, self.options.master, shapes):
            raise UserError(
                "the saved optimizer state is of another kind or of other weights than are trained here: resume with "
                "the options of the saved run, or start without its optimizer state"
            )
        [group] = self._zero.optimizer.param_groups
        [flat] = group["params"]  # this process's part of all weights, one after the other
        state = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        for name, parameter in self.parameters.items():
            for key in meta["parameters"][name]["tensors"]:
                tensor = tensors[f"{name}.{key}"].to(torch.float32)
                if key == "step":
                    self.num_updates = max(self.num_updates, int(tensor.item()))
                elif key == "master":
                    safe_set_full_fp32_param(parameter, tensor)
                elif (mapped := getattr(parameter, "_hp_mapping", None)) is not None:  # what of it lies here, and where
                    whole, part = mapped.lp_fragment_address, mapped.hp_fragment_address
                    here = tensor.reshape(-1)[whole.start : whole.start + whole.numel]
                    state[key][part.start : part.start + part.numel] = here.to(flat.device)
        # Not by safe_set_full_optimizer_state: before the first step there is nothing that it could set.
        count = torch.tensor(float(self.num_updates), device=flat.device)  # where torch's fused step counts
        self._zero.optimizer.state[flat] = {"step": count, **state}


__all__ = ["ZeroOptimizer", "refuse", "refuse_missing", "refuse_spread", "wanted"]
