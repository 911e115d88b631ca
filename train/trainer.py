"""The training stage: cache -> a trained ControlNet. Only the frozen base and the ControlNet are in memory.

The step is a function of (weights, batch, seed): data order, captions, noise, times and rounding are drawn from the
seed and a position, so that a resumed run goes on as an undisturbed one would have: on the CPU to the bit, on a GPU as
far as its kernels repeat themselves.
"""

from __future__ import annotations

import importlib.util
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.nn.parallel import DistributedDataParallel

from shared import atomic, families
from shared.cache.reader import Cache
from shared.config import to_dict
from shared.errors import EXIT_REFUSED, UserError
from shared.families.base import Batch, Family
from shared.model_folder import ModelFolder, resolve
from shared.report import components_table, progress, quiet_libraries, say, warn
from train import attention, checkpoints, eight_bit, fit, models
from train.adapters.controlnet import ControlNetOptions, parse_depth
from train.budget import grow_segments
from train.compile import eager
from train.config import TrainConfig
from train.counting import Setting
from train.loader import Loader
from train.objectives import FlowMatching, Objective
from train.optimizer import Optimizer, learning_rate
from train.run import Run
from train.samples import CachedSamples
from train.step import Step
from train.validation import Validation, flatten


def train(options: TrainConfig) -> int:
    """Train, or go on training, the run that `options` describe. Exit code 0. Raises `UserError` before anything is
    loaded where something does not fit."""
    quiet_libraries()
    grow_segments()
    cache = Cache(options.cache, options.remote)
    family = families.get(cache.family)
    conditions = options.condition or (cache.manifest["condition"],)
    samples = CachedSamples(cache, family, conditions, "train")
    held_out = CachedSamples(cache, family, conditions, "validation")
    if not len(samples):
        raise UserError(f"{cache.url} has no sound sample to train on")
    model = resolve(
        options.model or cache.manifest["model"]["name"],
        components=(family.base_component, "vae", "scheduler"),
        revision=options.revision or (None if options.model else cache.manifest["model"]["revision"]),
    )
    remark = family.check_base(model, samples.shapes, samples.recipes)
    _refuse_depth(family, model, options)
    facts = {
        "family": family.name,
        "model": {"name": model.name, "revision": model.revision},
        "condition": list(conditions),
        "cache": samples.fingerprints,
        "sizes": [list(size) for size in samples.sizes],
        "text_length": samples.text_length,
    }
    accelerator = _accelerator(options)
    main = accelerator.is_main_process
    run = Run(Path(options.runs) / options.run_name)
    with ExitStack() as stack:
        before, checkpoint = _begun_before(run, options, facts, accelerator, stack)
        fitted = decide_fit(options, accelerator, family, model, samples, checkpoint)
        loader = Loader(
            samples,
            fitted.loader,
            seed=options.seed,
            device=accelerator.device,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        )
        if checkpoint is not None:
            if main:
                checkpoints.link(run.folder, checkpoint)  # a kill may have come between the two
            if (done := checkpoints.step_of(checkpoint)) >= options.steps:
                if main:
                    say(f"{run.folder} is already trained to step {done}: raise STEPS to go on, or choose another NAME")
                return 0
            loader.load_state(checkpoints.state(checkpoint)["loader"])
        if main:
            unread = family.unread_residuals(model, _depth(family, options, checkpoint))
            _warn(options, remark, unread, (samples, held_out), before if loader.step else None)
        trainer = Trainer(options, accelerator, run, family, model, fitted, loader, held_out, checkpoint)
        if main:
            run.begin(options, facts, loader.step, trainer.models.components)
        with closing(trainer):
            trainer.run_to_the_end()
    return 0


def _refuse_depth(family: Family, model: ModelFolder, options: TrainConfig) -> None:
    depth, deepest = parse_depth(options.depth), family.max_depth(model)
    if options.controlnet.start_from is None and (depth[0] > deepest[0] or depth[1] > deepest[1]):
        raise UserError(
            f"DEPTH {options.depth} is deeper than the base: {model.name} has "
            f"{deepest[0]}-{deepest[1]} blocks to start from"
        )


def _depth(family: Family, options: TrainConfig, checkpoint: Path | None) -> tuple[int, int]:
    """Of the ControlNet that is trained: as asked for, or as the one has it that is gone on with."""
    if (start := options.controlnet.start_from) is None:
        return parse_depth(options.depth)
    return family.controlnet_depth(start if checkpoint is None else str(checkpoint / checkpoints.CONTROLNET))


def _accelerator(options: TrainConfig) -> Accelerator:
    if options.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("tracker wandb: the package is not installed; run pip install wandb")
    return Accelerator(
        cpu=options.device == "cpu",
        log_with=None if options.tracker == "none" else options.tracker,
        project_dir=str(Path(options.runs) / options.run_name),
    )


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
) -> fit.Fit:
    """Batches, and what is given up for memory: decided by the largest step that will come."""
    width, height = max(samples.sizes, key=lambda size: size[0] * size[1])
    dtype, weights = _dtypes(options, accelerator.device)
    setting = Setting(
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
    )
    free_bytes = fit.free_bytes(accelerator)
    if accelerator.is_main_process and (free_bytes is not None or options.memory.budget != "auto"):
        say("counting what a step will take ...")
    fitted = fit.decide(
        options.memory,
        options.loader,
        setting,
        device=accelerator.device,
        free_bytes=free_bytes,
        num_processes=accelerator.num_processes,
        saved=None if checkpoint is None else checkpoints.state(checkpoint)["loader"],
    )
    options.optimizer.check_release(fitted.loader.accumulation, accelerator.num_processes)
    if accelerator.is_main_process and (words := fitted.words()) is not None:
        say(words)
    return fitted


def _warn(
    options: TrainConfig,
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
    unused = [f"objective.{name}" for name in options.objective.unused()]
    unused += [f"optimizer.{name}" for name in options.optimizer.unused()]
    unused += [f"memory.{name}" for name in options.memory.unused()]
    unused += [f"loader.{name}" for name in options.loader.unused(remote=parts[0].cache.storage.remote)]
    if options.controlnet.start_from is not None and options.controlnet.embedder != ControlNetOptions.embedder:
        unused.append("controlnet.embedder")
    if not options.loader.condition_draw and "condition_latents.std" not in parts[0].shapes:
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


def _dtypes(options: TrainConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of the computation, and of the trained weights."""
    named = {"bf16": torch.bfloat16, "fp32": torch.float32}
    named["auto"] = torch.bfloat16 if device.type == "cuda" else torch.float32
    compute = named[options.precision]
    weights = compute if options.controlnet.weights == "auto" else named[options.controlnet.weights]
    if (compute, weights) == (torch.float32, torch.bfloat16):
        raise UserError(
            "controlnet.weights bf16 are computed in bf16, but the precision is fp32: set precision bf16 too, or leave "
            "controlnet.weights out"
        )
    return compute, weights


class Trainer:
    """One run in one process (of possibly several)."""

    def __init__(
        self,
        options: TrainConfig,
        accelerator: Accelerator,
        run: Run,
        family: Family,
        model: ModelFolder,
        fitted: fit.Fit,
        loader: Loader,
        held_out: CachedSamples,
        checkpoint: Path | None,
    ) -> None:
        """Load the base and the ControlNet. With a `checkpoint`, go back to its state: weights, optimizer; the loader
        is there already."""
        self.options, self.accelerator, self.run, self.family, self.model = options, accelerator, run, family, model
        self.loader, self.samples, self.device = loader, loader.samples, accelerator.device
        self.dtype, weights = _dtypes(options, self.device)
        self.attention = attention.choose(
            options.speed.attention, self._attention_shapes(), self.dtype, self.device,
            options.base.folder_beside(options.cache, options.remote),
        )  # fmt: skip
        self.models = models.load(
            options, family, model,
            device=self.device, dtype=self.dtype, weights=weights, hoist=fitted.hoist, stream=fitted.stream,
            num_shapes=len(self.samples.sizes), attention=self.attention, checkpoint=checkpoint,
        )  # fmt: skip
        self.adapter, modulation = self.models.adapter, self.models.modulation
        self.optimizer = Optimizer(options.optimizer, dict(self.adapter.named_parameters()))
        if checkpoint is not None:
            meta = checkpoints.state(checkpoint)["optimizer"]
            self.optimizer.load_state(checkpoints.optimizer_tensors(checkpoint), meta)
        if accelerator.num_processes > 1:
            self.adapter.module = DistributedDataParallel(
                self.adapter.controlnet,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=self.adapter.has_idle_parameters,
            )
        self.objective: Objective = FlowMatching(options.objective)
        self.step = Step(
            family, self.adapter, self.objective, self.optimizer,
            recipes=self.samples.recipes, seed=options.seed, device=self.device, dtype=self.dtype,
            condition_draw=options.loader.condition_draw, modulation=modulation,
            compiled_for=loader.options.batch_size if self.models.compiled else None, accelerator=accelerator,
        )  # fmt: skip
        if modulation is not None:
            modulation.follow(loader, self.step.times, batches=options.memory.hoist_steps)
        self.guard = fit.Guard(
            fitted, family, self.adapter, self.optimizer, self.device,
            num_processes=accelerator.num_processes, is_main=accelerator.is_main_process,
        )  # fmt: skip
        self.validation = None
        if len(held_out) and accelerator.is_main_process:
            self.validation = Validation(
                held_out, family, model, self.objective, options.validation,
                seed=options.seed, device=self.device, dtype=self.dtype, modulation=modulation,
            )  # fmt: skip
        self.paints = model.has("vae")
        if accelerator.is_main_process:
            say(components_table(self.models.components))
            say(
                f"{len(self.samples)} samples to train on, {len(held_out)} held out; "
                f"{loader.batches_per_epoch} batches an epoch; "
                f"global batch {loader.options.batch_size * loader.batches_per_step}; run {run.folder}"
            )

    def _attention_shapes(self) -> list[attention.Shape]:
        """What attention will be called with in training."""
        base, length = self.family.make_base(self.model), self.samples.text_length or 0
        return [
            attention.Shape(self.loader.options.batch_size, *self.family.attention_shape(base, height, width, length))
            for width, height in self.samples.sizes
        ]

    def run_to_the_end(self) -> None:
        """Step until the last step, looking at the held-out samples and saving on the way. On Ctrl-C or SIGTERM the
        step in hand is finished and saved."""
        if self.accelerator.is_main_process:
            # Figures after the last checkpoint are of steps that are now run again; all, if there was none yet.
            self.run.keep_metrics_until(self.loader.step or -1)
            if self.loader.step:
                say(f"resuming after step {self.loader.step}")
        if self.options.tracker != "none":
            self.accelerator.init_trackers(
                "tensorboard" if self.options.tracker == "tensorboard" else "underdrawing", config=None
            )
        try:
            with attention.use(self.attention):
                if self.loader.step == 0:
                    self._look(0)
                waited = self._steps()
        finally:
            self.accelerator.end_training()
        if self.accelerator.is_main_process:
            done = "trained to" if self.loader.step >= self.options.steps else "stopped and saved at"
            say(
                f"{done} step {self.loader.step}: {self.run.folder / checkpoints.CONTROLNET}; "
                f"{waited:.1%} of the time went into waiting for data"
            )

    def close(self) -> None:
        """Let go of what goes on in the background."""
        if self.models.modulation is not None:
            self.models.modulation.close()

    def _steps(self) -> float:
        """Step until the last one; the share of the time that went into waiting for data comes back. It begins with
        the second step, since nothing could be read ahead of the first."""
        options, first = self.options, self.loader.step + 1
        waited_seconds, worked_seconds, share = 0.0, 0.0, 0.0
        with (
            _stopping() as stop,
            progress(title="train", unit="step", total=options.steps, initial=self.loader.step) as bar,
            closing(iter(self.loader)) as steps,
        ):
            for batches in steps:
                step = self.loader.step  # counts from 1: this step's number
                began = time.perf_counter()
                if step == first and options.speed.arithmetic != "exact":
                    self._hold_to_exact(batches)
                rate = learning_rate(options.optimizer, step - 1, options.steps)
                figures = self.guard(batches, partial(self.step, batches, step, rate))
                figures["data_wait_seconds"] = self.loader.waited_seconds
                figures["step_seconds"] = time.perf_counter() - began
                if step > first:
                    waited_seconds += figures["data_wait_seconds"]
                    worked_seconds += figures["step_seconds"]
                    share = waited_seconds / (waited_seconds + worked_seconds)
                figures["data_wait_share"] = share
                if self.accelerator.is_main_process:
                    self.run.log(step, figures)
                    self._track(flatten(figures, "train"), step)
                bar.set_postfix(loss=f"{figures['loss']:.4f}", wait=f"{figures['data_wait_seconds'] * 1e3:.0f}ms")
                bar.update()
                self._look(step)
                last = step >= options.steps or self._anyone(stop.asked)
                if last or step % options.checkpoint.every == 0:
                    self._save(step)
                if last:
                    break
                del batches  # their memory serves for the next ones
        return share

    def _hold_to_exact(self, batches: list[Batch]) -> None:
        """Refuse 8-bit arithmetic that turns these batches' gradients too far."""
        recomputed = self.guard.recompute.base_blocks, self.guard.recompute.controlnet_blocks
        reference = eight_bit.unquantized(self.family, self.model)
        measured = eight_bit.gate(self.step, batches, reference=reference, recomputed=recomputed)
        if self.accelerator.is_main_process:
            say(measured.sentence())
            self.run.note({"arithmetic": measured.figures()})

    def _look(self, step: int) -> None:
        """Held-out losses and pictures when they are due, on the main process; the others wait. Nothing is compiled for
        them: they come too seldom."""
        options, last = self.options.validation, step >= self.options.steps
        losses = options.every and (step % options.every == 0 or last)
        pictures = self.paints and options.pictures_every and step and (step % options.pictures_every == 0 or last)
        if not losses and not pictures:
            return
        if self.validation is not None:
            if losses:
                with self._eager():
                    figures = fit.look(self.validation, partial(self.validation.held_out, self.adapter))
                self.run.log(step, {"held_out": figures})
                self._track(flatten(figures, "held_out"), step)
                gap = (
                    f", own drawing beats another's by {figures['condition_gap']:.4f}"
                    if "condition_gap" in figures
                    else ""
                )
                say(
                    f"step {step}: held-out loss {figures['loss']:.4f}, without control "
                    f"{figures['loss_without_control']:.4f}{gap}"
                )
            if pictures:
                with self._eager():
                    picture = fit.look(self.validation, partial(self.validation.pictures, self.adapter))
                path = self.run.save_picture(step, picture)
                for tracker in self.accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"held_out": picture[None]}, step=step, **layout)
                say(f"step {step}: pictures in {path}")
        self.accelerator.wait_for_everyone()

    def _eager(self) -> AbstractContextManager[object]:
        return eager() if self.models.compiled else nullcontext()

    def _track(self, figures: dict[str, Any], step: int) -> None:
        if self.options.tracker != "none":
            self.accelerator.log(figures, step=step)

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.run.sync_metrics()
            self.run.note({"memory": self.guard.figures()})
            tensors, meta = self.optimizer.state()
            state = {"optimizer": meta, "loader": self.loader.state(), "options": to_dict(self.options)}
            checkpoints.save(self.run.folder, step, self.adapter.save, tensors, state, self.options.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)


class _Stop:
    """Set by the first Ctrl-C or SIGTERM; the second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        warn("stopping: the step in hand is finished and saved (again: stop at once)")


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM only ask, while the block runs."""
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
