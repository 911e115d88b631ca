"""The options of the training stage, composed from those of its parts."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from shared.cache.storage import RemoteOptions
from shared.errors import UserError
from train import adapters
from train.adapters.controlnet import ControlNetOptions, parse_depth
from train.adapters.full import FullOptions
from train.adapters.lora import LoraOptions
from train.budget import MemoryOptions
from train.checkpoints import CheckpointOptions
from train.early_stop import EarlyStopOptions
from train.ema import EmaOptions
from train.loader import LoaderOptions
from train.objectives import ObjectiveOptions
from train.optimizer import OptimizerOptions
from train.quantize import BaseOptions
from train.speed import SpeedOptions
from train.validation import ValidationOptions


@dataclass(frozen=True)
class TrainConfig:
    """Train a ControlNet, a LoRA or a whole base from a cache. Running the same command again resumes."""

    cache: str = "cache"
    """The cache that `make preprocess` made: a folder, or a URL (s3://, gs://, hf://, https://). Family, resolution,
    condition and precision come from it."""
    name: str | None = None
    """The run is kept in RUNS/NAME. Default: depth-<depth>, controlnet where the base leaves no choice of it (SD), or
    from-<folder> of a ControlNet to start from; lora-<rank>; full."""
    runs: str = "runs"
    """Folder of all runs."""
    model: str | None = None
    """The base: a folder in diffusers' layout or a hub id. Default: the one the cache was made with."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    condition: tuple[str, ...] = ()
    """Which of the cache's conditions to train on; of several, one is drawn each time a sample is. Default: the one
    it was made with last."""
    adapter: str = "controlnet"
    """What is trained: a `controlnet` on the frozen base, which follows a condition; a `lora` on the frozen base, which
    learns a subject or a style from pictures and captions alone; or the base itself, in `full`."""
    depth: str = "2-4"
    """num_layers-num_single_layers of the ControlNet. On FLUX.1-dev 2-4 has 1.35 B parameters, 5-10 has 3.3 B."""
    steps: int = 10_000
    """Optimizer steps. Raising it later continues the run; a cosine or linear schedule is then stretched."""
    seed: int = 0
    """Of the data order, the noise and the times. Two runs with the same seed see the same."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the computation. auto: bf16 on a GPU, fp32 on the CPU."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where curves and pictures go beside metrics.jsonl. wandb has to be installed."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    controlnet: ControlNetOptions = field(default_factory=ControlNetOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    full: FullOptions = field(default_factory=FullOptions)
    base: BaseOptions = field(default_factory=BaseOptions)
    loader: LoaderOptions = field(default_factory=LoaderOptions)
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    early_stop: EarlyStopOptions = field(default_factory=EarlyStopOptions)

    def check(self) -> None:
        """Refuse impossible values, of the parts too."""
        adapters.get(self.adapter)
        parse_depth(self.depth)
        if self.steps < 1:
            raise UserError(f"steps must be 1 or more, not {self.steps}")
        if self.seed < 0:
            raise UserError(f"seed must be 0 or more, not {self.seed}")
        for condition in self.condition:
            if self.condition.count(condition) > 1:
                raise UserError(f"condition: {condition} is named twice")
        if not re.fullmatch(r"\w[\w.+-]*", self.run_name):
            raise UserError(
                f"NAME '{self.run_name}' must be one word of letters, digits and . _ + -, a letter or digit first"
            )
        for part in (
            self.memory,
            self.controlnet,
            self.lora,
            self.full,
            self.base,
            self.loader,
            self.remote,
            self.objective,
            self.optimizer,
            self.validation,
            self.checkpoint,
            self.ema,
            self.early_stop,
            *(getattr(self, name) for name in _OTHERS),
        ):
            part.check()
        if self.early_stop.on and not self.validation.every:
            raise UserError("early_stop.patience counts looks at held-out losses: set validation.every above 0")

    @property
    def run_name(self) -> str:
        """The name given, or one from what is trained."""
        return self.name if self.name is not None else adapters.get(self.adapter).run_name(self)


_OTHERS = {
    name: options
    for name in adapters.names()
    if name not in {field.name for field in dataclasses.fields(TrainConfig)}
    and (options := adapters.get(name).Options) is not None
}
"""Adapter to its class of options, of those that stand above under no name: from beyond the tree, for example."""

if not TYPE_CHECKING and _OTHERS:
    TrainConfig = dataclasses.make_dataclass(
        TrainConfig.__name__,
        [(name, options, field(default_factory=options)) for name, options in _OTHERS.items()],
        bases=(TrainConfig,),
        namespace={"__doc__": TrainConfig.__doc__, "__module__": __name__},
        frozen=True,
    )


MAY_CHANGE = (
    "steps", "cache", "runs", "name", "device", "tracker", "validation.", "checkpoint.", "memory.",
    "loader.prefetch", "loader.workers", "loader.lookahead", "loader.accumulation", "remote.", "base.folder",
    "speed.compile", "speed.attention", "optimizer.states", "optimizer.release", "optimizer.survival_every",
    "optimizer.one_pass", "ema.device", "early_stop.", "lora.save_fp32",
)  # fmt: skip
"""Options that a resumed run may have changed without becoming another experiment. (The cache may have moved: its
fingerprints are compared. Accumulation may change together with the number of processes: the loader compares their
product.)"""


def changed_experiment(differences: dict[str, tuple[object, object]]) -> dict[str, tuple[object, object]]:
    """Of all differences between two configurations, those that make another experiment."""
    return {
        key: values
        for key, values in differences.items()
        if not any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in MAY_CHANGE)
    }
