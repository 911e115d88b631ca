"""What comes before training: everything that can be refused is refused, and what memory there is is shared out,
before a weight is loaded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from shared import atomic, families
from shared.cache.reader import Cache
from shared.config import differences, to_dict
from shared.errors import EXIT_REFUSED, UserError
from shared.families.base import Family
from shared.model_folder import ModelFolder, resolve
from shared.report import say, warn
from train import adapters, checkpoints, fit, objectives, processes, zero
from train.config import TrainConfig
from train.counting import Setting
from train.early_stop import taken_up
from train.loader import Loader
from train.objectives import Kind
from train.optimizer import learning_rate
from train.run import Run
from train.samples import CachedSamples, conditions_of


@dataclass
class Ground:
    """What a run stands on: looked at, and nothing of it loaded."""

    family: Family
    model: ModelFolder
    samples: CachedSamples
    held_out: CachedSamples
    remark: str | None
    """Of the base: what will not be as the user may think."""
    facts: dict[str, Any]
    """What `run.json` says that the run stands on."""


@dataclass
class Begun:
    """A run whose folder is this process's own."""

    options: TrainConfig
    ground: Ground
    accelerator: Accelerator
    run: Run
    before: dict[str, Any] | None
    """The options of its last start; None at the first."""
    checkpoint: Path | None
    """To go on from."""


@dataclass
class Prepared:
    """A run of which nothing is refused any more, and nothing is loaded yet."""

    options: TrainConfig
    accelerator: Accelerator
    run: Run
    facts: dict[str, Any]
    """What `run.json` says that it stands on."""
    family: Family
    model: ModelFolder
    fitted: fit.Fit
    loader: Loader
    """Of the training samples, at the position to go on from."""
    held_out: CachedSamples
    checkpoint: Path | None
    """To go on from."""


def prepare(options: TrainConfig, stack: ExitStack) -> Prepared | None:
    """The run that `options` describe, new or to be gone on with; None where it is trained already. The run's folder is
    this process's own until `stack` closes. Raises `UserError` where something does not fit."""
    begun = begin(options, stack)
    if begun is None:
        return None
    ground = begun.ground
    fitted = decide_fit(options, begun.accelerator, ground.family, ground.model, ground.samples, begun.checkpoint)
    return ready(begun, fitted)


def ground_of(options: TrainConfig) -> Ground:
    """What the run stands on. Raises `UserError` where options, cache and model do not fit each other."""
    cache = Cache(options.cache, options.remote)
    family = families.get(cache.family)
    adapter = adapters.get(options.adapter)
    conditions = conditions_of(cache, options.condition, conditioned=adapter.conditioned)
    encoders = family.text_encoders if adapter.trains_text(options) else ()
    samples, held_out = (
        CachedSamples(cache, family, conditions, split, tokens=bool(encoders)) for split in ("train", "validation")
    )
    if not len(samples):
        raise UserError(f"{cache.url} has no sound sample to train on")
    model = resolve(
        options.model or cache.manifest["model"]["name"],
        components=(family.base_component, "vae", "scheduler", *(encoder.component for encoder in encoders)),
        revision=options.revision or (None if options.model else cache.manifest["model"]["revision"]),
    )
    said = {name: shape for encoder in encoders for name, shape in encoder.shapes(model).items()}
    remark = family.check_base(model, samples.shapes | said, samples.recipes)
    adapter.refuse(options, family, model)
    objectives.make(options.objective, family, model)  # may refuse
    facts = {
        "family": family.name,
        "model": {"name": model.name, "revision": model.revision},
        "condition": list(conditions),
        "cache": samples.fingerprints,
        "sizes": [list(size) for size in samples.sizes],
        "text_length": samples.text_length,
    }
    return Ground(family, model, samples, held_out, remark, facts)


def begin(options: TrainConfig, stack: ExitStack) -> Begun | None:
    """Take hold of the run's folder; None where the run is trained already. Raises `UserError`."""
    ground = ground_of(options)
    if options.name is None and (name := _name_on(options, ground.family)) != options.run_name:
        options = replace(options, name=name)
    accelerator = processes.accelerator(options)
    processes.refuse_different(accelerator, options, ground.facts)
    run = Run(Path(options.runs) / options.run_name)
    before, checkpoint = _begun_before(run, options, ground.facts, accelerator, stack)
    processes.refuse_unseen(accelerator, checkpoint)
    if checkpoint is not None:
        stopped = taken_up(options.early_stop, checkpoint)
        if accelerator.is_main_process:
            stopped.mark(run.folder)  # a kill may have come before
            checkpoints.settle(run.folder, checkpoint, options.checkpoint.keep)  # and here, too
        if (done := checkpoints.step_of(checkpoint)) >= options.steps:
            if accelerator.is_main_process:
                run.note({"ended": {"step": done, "why": "trained"}})  # a kill may have come before, too
                say(f"{run.folder} is already trained to step {done}: raise STEPS to go on, or choose another NAME")
            return None
        if stopped.asks:
            if accelerator.is_main_process:
                run.note({"ended": {"step": done, "why": "early_stop"}})
                say(f"{run.folder} has ended at step {done}. {stopped.words()}")
            return None
    return Begun(options, ground, accelerator, run, before, checkpoint)


def _name_on(options: TrainConfig, family: Family) -> str:
    """Of a run that is given none, where the family is known: its ControlNets may have no depth to be called by."""
    return adapters.get(options.adapter).run_name(options, family)


def ready(begun: Begun, fitted: fit.Fit) -> Prepared:
    """The run with its loader, in the memory that it is to fit into. Raises `UserError` where it cannot go on from its
    checkpoint."""
    options, ground, accelerator, checkpoint = begun.options, begun.ground, begun.accelerator, begun.checkpoint
    loader = Loader(
        ground.samples,
        fitted.loader,
        seed=options.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    if checkpoint is not None:
        loader.load_state(checkpoints.state(checkpoint)["loader"])
    if accelerator.is_main_process:
        if (words := fitted.words()) is not None:
            say(words)
        unread = ground.family.unread_residuals(ground.model, _depth(ground.family, options, checkpoint))
        parts = ground.samples, ground.held_out
        before = begun.before if loader.step else None
        _warn(options, fitted, ground.family.objective, ground.remark, unread, parts, before)
    return Prepared(
        options, accelerator, begun.run, ground.facts, ground.family, ground.model, fitted, loader, ground.held_out,
        checkpoint,
    )  # fmt: skip


def _depth(family: Family, options: TrainConfig, checkpoint: Path | None) -> tuple[int, int]:
    """Of what is trained, blocks of its own."""
    adapter = adapters.get(options.adapter)
    return adapter.depth(options, family, None if checkpoint is None else checkpoints.weights_of(checkpoint, "trained"))


def _begun_before(
    run: Run, options: TrainConfig, facts: dict[str, Any], accelerator: Accelerator, stack: ExitStack
) -> tuple[dict[str, Any] | None, Path | None]:
    """The options of the run's last start, and the checkpoint to go on from. The main process takes hold of the folder
    and looks; all take its answer, and where it refuses they end without a word, for it has said why."""
    nothing, refused = -1, -2
    step, before, refusal = nothing, None, None
    if accelerator.is_main_process:
        try:
            stack.enter_context(atomic.alone(run.folder, "training in"))
            before = run.refuse_other(options, facts)
            if (found := checkpoints.newest(run.folder)) is not None:
                step = checkpoints.step_of(found)
        except UserError as error:
            step, refusal = refused, error
    if accelerator.num_processes > 1:
        step = int(broadcast(torch.tensor(step, device=accelerator.device)).item())
    if refusal is not None:
        raise refusal
    if step == refused:
        raise SystemExit(EXIT_REFUSED)
    return before, None if step == nothing else checkpoints.path_of(run.folder, step)


def decide_fit(
    options: TrainConfig,
    accelerator: Accelerator,
    family: Family,
    model: ModelFolder,
    samples: CachedSamples,
    checkpoint: Path | None,
    beside_bytes: int = 0,
) -> fit.Fit:
    """Batches, and what is given up for memory: decided by the largest step that will come. `beside_bytes`: what others
    hold on the device that train on the same base."""
    setting = setting_of(options, accelerator.device, family, model, samples, checkpoint)
    zero.refuse_spread(options.memory.shard)
    memory = replace(options.memory, shard="no") if zero.wanted() else options.memory
    free_bytes = fit.free_bytes(accelerator)
    if accelerator.is_main_process and (free_bytes is not None or options.memory.budget != "auto") and not beside_bytes:
        say("counting what a step will take ...")
    fitted = fit.decide(
        memory,
        options.loader,
        setting,
        device=accelerator.device,
        free_bytes=free_bytes,
        num_processes=accelerator.num_processes,
        cards=processes.per_machine(accelerator),
        beside_bytes=beside_bytes,
        saved=None if checkpoint is None else checkpoints.state(checkpoint)["loader"],
    )
    options.optimizer.check_release(fitted.loader.accumulation, accelerator.num_processes)
    return fitted


def setting_of(
    options: TrainConfig,
    device: torch.device,
    family: Family,
    model: ModelFolder,
    samples: CachedSamples,
    checkpoint: Path | None,
) -> Setting:
    """The largest step of a run, but for its batch and for what is given up for memory."""
    width, height = max(samples.sizes, key=lambda size: size[0] * size[1])
    dtype, weights = dtypes(options, device)
    return Setting(
        depth=_depth(family, options, checkpoint),
        height=height,
        width=width,
        text_length=samples.text_length or 0,
        family=family.name,
        model=model,
        base=options.base.weights,
        dtype=dtype,
        weights=weights,
        optimizer=options.optimizer,
        averaged=options.ema.on_device,
        adapter=options.adapter,
        lora=options.lora,
        prior=samples.trains_prior(options.loader.prior_weight),
    )


def _warn(
    options: TrainConfig,
    fitted: fit.Fit,
    objective: Kind,
    remark: str | None,
    unread: tuple[int, int],
    parts: tuple[CachedSamples, CachedSamples],
    before: dict[str, Any] | None,
) -> None:
    """Say what will not be as the user may think. `before`: the options of the run that is gone on with."""
    for samples in parts:
        if samples.num_left_out:
            what = "training" if samples.split == "train" else "held-out"
            warn(f"{samples.num_left_out} {what} sample(s) are left out: samples.parquet in the cache says why")
    if not len(parts[1]):
        warn("the cache has no held-out samples: no held-out loss and no pictures")
    unused = [f"objective.{name}" for name in options.objective.unused(objective)]
    unused += [f"optimizer.{name}" for name in options.optimizer.unused()]
    unused += [f"memory.{name}" for name in options.memory.unused()]
    unused += ["memory.hoist"] if options.memory.hoist == "yes" and not fitted.hoist else []
    unused += [f"ema.{name}" for name in options.ema.unused()]
    unused += [f"early_stop.{name}" for name in options.early_stop.unused()]
    if options.early_stop.on and not len(parts[1]):
        unused.append("early_stop.patience")
    remote, prior = parts[0].cache.storage.remote, bool(parts[0].num_prior)
    unused += [f"loader.{name}" for name in options.loader.unused(remote=remote, prior=prior)]
    adapter = adapters.get(options.adapter)
    unused += adapter.unused(options)
    others = {name for name in adapters.names() if name != adapter.name}
    if not adapter.conditioned:
        others |= {"condition", "loader.condition_draw", "depth"}
    changed = differences(to_dict(TrainConfig()), to_dict(options))
    unused += [key for key in changed if key in others or key.split(".")[0] in others]
    if adapter.conditioned and not options.loader.condition_draw and "condition_latents.std" not in parts[0].shapes:
        unused.append("loader.condition_draw")  # of a posterior that is no more, nothing can be drawn
    for name in unused:
        warn(f"option {name} has no effect with the other options as they are")
    if remark:
        warn(remark)
    for count, kind in zip(unread, ("double", "single"), strict=True):
        if count:
            warn(
                f"of this ControlNet's {kind} residuals the base never adds the last {count}: it shares them out over "
                "its blocks evenly, and they come out before they are used up. A smaller DEPTH does as much for less"
            )
    if options.steps <= options.optimizer.warmup_steps:
        warn(
            f"the run ends within its warm-up: after {options.steps} steps the learning rate is "
            f"{learning_rate(options.optimizer, options.steps - 1, options.steps):.3g}, the peak of "
            f"{options.optimizer.learning_rate:.3g} comes at {options.optimizer.warmup_steps}; lower "
            "optimizer.warmup_steps"
        )
    if before is not None and before["steps"] != options.steps and options.optimizer.schedule != "constant":
        warn(
            f"steps were {before['steps']}, are {options.steps}: from here on the {options.optimizer.schedule} "
            "schedule is that of the new number, so the learning rate jumps"
        )


def dtypes(options: TrainConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of the computation, and of the trained weights."""
    named = {"bf16": torch.bfloat16, "fp32": torch.float32}
    named["auto"] = torch.bfloat16 if device.type in ("cuda", "xla") else torch.float32
    compute = named[options.precision]
    return compute, adapters.get(options.adapter).precision(options, compute)


def base_dtype(options: TrainConfig, device: torch.device) -> torch.dtype:
    """Of the base's weights that are not quantized."""
    compute, weights = dtypes(options, device)
    return compute if adapters.get(options.adapter).keeps_base else weights
