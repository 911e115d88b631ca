"""The training stage: cache -> a trained ControlNet. Only the frozen base and the ControlNet are in memory.

The step is a function of (weights, batch, seed): data order, captions, noise, times and rounding are drawn from the
seed and a position, so that a resumed run repeats to the bit what an undisturbed one would have done.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from shared import atomic, families
from shared.cache.reader import Cache
from shared.config import to_dict
from shared.errors import UserError
from shared.families.base import Batch, Family
from shared.model_folder import ModelFolder, resolve
from shared.report import component, components_table, progress, quiet_libraries, say, warn
from train import checkpoints
from train.adapters.controlnet import ControlNetAdapter, parse_depth
from train.config import TrainConfig
from train.loader import CachedSamples, Loader
from train.objectives import FlowMatching, Objective
from train.optimizer import Optimizer, learning_rate
from train.quantize import place_base
from train.run import Run
from train.validation import Validation, flatten, seed_of


def train(options: TrainConfig) -> int:
    """Train, or go on training, the run that `options` describe. Exit code 0. Raises `UserError` before anything is
    loaded where something does not fit."""
    quiet_libraries()
    cache = Cache(Path(options.cache))
    family = families.get(cache.family)
    condition = options.condition or cache.manifest["condition"]
    samples = CachedSamples(cache, family, condition, "train")
    held_out = CachedSamples(cache, family, condition, "validation")
    if not len(samples):
        raise UserError(f"{cache.path} has no sound sample to train on")
    model = resolve(
        options.model or cache.manifest["model"]["name"],
        components=(family.base_component, "vae", "scheduler"),
        revision=options.revision or (None if options.model else cache.manifest["model"]["revision"]),
    )
    remark = family.check_base(model, samples.shapes, samples.recipes)
    depth = parse_depth(options.depth)
    _refuse_depth(family, model, options, depth)
    facts = {
        "family": family.name,
        "model": {"name": model.name, "revision": model.revision},
        "condition": condition,
        "cache": {name: layer.summary.fingerprint for name, (_, layer) in samples.layers.items()},
        "sizes": sorted({(s.bucket_width or 0, s.bucket_height or 0) for s in samples.samples}),
        "text_length": samples.shapes["t5.prompt_embeds"][0] if "t5.prompt_embeds" in samples.shapes else None,
    }
    accelerator = _accelerator(options)
    with (
        atomic.alone(Path(options.runs) / options.run_name, "training in")
        if accelerator.is_main_process
        else nullcontext()
    ):
        run = Run.open(options, facts) if accelerator.is_main_process else Run(Path(options.runs) / options.run_name)
        accelerator.wait_for_everyone()
        checkpoint = checkpoints.newest(run.folder)
        if checkpoint is not None and int(checkpoint.name.split("-")[1]) >= options.steps:
            say(
                f"{run.folder} is already trained to step {options.steps}: raise STEPS to go on, or choose another NAME"
            )
            return 0
        for left_out, split in ((samples.num_left_out, "training"), (held_out.num_left_out, "held-out")):
            if left_out:
                warn(f"{left_out} {split} sample(s) are left out: see the reasons in the cache's samples.parquet")
        for unused in [*options.objective.unused(), *options.optimizer.unused()]:
            warn(f"option {unused} has no effect with the other options as they are")
        if remark:
            warn(remark)
        trainer = Trainer(options, accelerator, run, family, model, samples, held_out, depth)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        trainer.run_to_the_end()
    return 0


def _refuse_depth(family: Family, model: ModelFolder, options: TrainConfig, depth: tuple[int, int]) -> None:
    deepest = family.max_depth(model)
    if options.controlnet.start_from is None and (depth[0] > deepest[0] or depth[1] > deepest[1]):
        raise UserError(
            f"DEPTH {options.depth} is deeper than the base: {model.name} has "
            f"{deepest[0]}-{deepest[1]} blocks to start from"
        )


def _accelerator(options: TrainConfig) -> Accelerator:
    if options.tracker == "wandb":
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError("tracker wandb: the package is not installed; run pip install wandb") from error
    single_blocks = parse_depth(options.depth)[1]
    # Without single blocks the last double block's text half feeds nothing: parameters without a gradient.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=single_blocks == 0)]
    return Accelerator(
        cpu=options.device == "cpu",
        log_with=None if options.tracker == "none" else options.tracker,
        project_dir=str(Path(options.runs) / options.run_name),
        kwargs_handlers=handlers,
    )


class Trainer:
    """One run in one process (of possibly several)."""

    def __init__(
        self,
        options: TrainConfig,
        accelerator: Accelerator,
        run: Run,
        family: Family,
        model: ModelFolder,
        samples: CachedSamples,
        held_out: CachedSamples,
        depth: tuple[int, int],
    ) -> None:
        """Load the base and the ControlNet: the ControlNet first, from the unquantized base, then quantize."""
        self.options, self.accelerator, self.run, self.family = options, accelerator, run, family
        self.device = accelerator.device
        on_gpu = self.device.type == "cuda"
        self.dtype = {
            "auto": torch.bfloat16 if on_gpu else torch.float32,
            "bf16": torch.bfloat16,
            "fp32": torch.float32,
        }[options.precision]
        weights = {
            "auto": self.dtype,
            "bf16": torch.bfloat16,
            "fp32": torch.float32,
        }[options.controlnet.weights]
        base = family.load_base(model, self.dtype)
        if options.controlnet.start_from is None:
            torch.manual_seed(options.seed)  # nothing random is left after the copy; asserted, but cheap to pin
            controlnet = family.make_controlnet(base, *depth, embedder=options.controlnet.embedder)
        else:
            controlnet = family.load_controlnet(options.controlnet.start_from, weights)
            family.check_controlnet(controlnet, base, options.controlnet.control_mode)
        controlnet.to(device=self.device, dtype=weights).train()
        base = place_base(base, self.device, options.base)
        self.adapter = ControlNetAdapter(family, base, controlnet, options.controlnet)
        if options.checkpointing:
            self.adapter.enable_checkpointing()
        self.adapter.module = accelerator.prepare_model(controlnet) if accelerator.num_processes > 1 else controlnet
        self.optimizer = Optimizer(options.optimizer, dict(self.adapter.named_parameters()))
        self.objective: Objective = FlowMatching(options.objective)
        self.samples = samples
        self.loader = Loader(
            samples,
            options.loader,
            seed=options.seed,
            device=self.device,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        )
        self.validation = None
        if len(held_out) and accelerator.is_main_process:
            self.validation = Validation(
                held_out, family, model, self.objective, options.validation,
                seed=options.seed, device=self.device, dtype=self.dtype,
            )  # fmt: skip
        elif not len(held_out):
            warn("the cache has no held-out samples: no held-out loss and no pictures")
        self.paints = model.has("vae")
        if accelerator.is_main_process:
            table = components_table([component(f"{family.name} base", base), component("controlnet", controlnet)])
            say(table)
            say(
                f"{len(samples)} samples to train on, {len(held_out)} held out; {self.loader.batches_per_epoch} batches "
                f"an epoch; global batch {options.loader.batch_size * self.loader.batches_per_step}; run {run.folder}"
            )
        if options.tracker != "none":
            accelerator.init_trackers(
                "tensorboard" if options.tracker == "tensorboard" else "underdrawing", config=None
            )

    def resume(self, checkpoint: Path) -> None:
        """Go back to the state of a checkpoint: weights, optimizer, position. Figures after it are dropped."""
        tensors, state = checkpoints.read(checkpoint)
        self.adapter.load(checkpoint / checkpoints.CONTROLNET)
        self.optimizer.load_state(tensors, state["optimizer"])
        self.loader.load_state(state["loader"])
        if self.accelerator.is_main_process:
            self.run.keep_metrics_until(self.loader.step)
            say(f"resuming at step {self.loader.step}")

    def run_to_the_end(self) -> None:
        """Step until the last step, looking at the held-out samples and saving on the way. On Ctrl-C or SIGTERM the
        step in hand is finished and saved."""
        options = self.options
        if self.loader.step == 0:
            if self.accelerator.is_main_process:
                self.run.keep_metrics_until(-1)  # of a start that was killed before its first checkpoint
            self._look(0)
        with (
            _stopping() as stop,
            progress(title="train", unit="step", total=options.steps, initial=self.loader.step) as bar,
        ):
            for batches in self.loader:
                step = self.loader.step  # counts from 1: this step's number
                began = time.perf_counter()
                figures = self.step(batches)
                figures["data_wait_seconds"] = self.loader.waited_seconds
                figures["step_seconds"] = time.perf_counter() - began
                if self.accelerator.is_main_process:
                    self.run.log(step, figures)
                    self._track(flatten(figures, "train"), step)
                bar.set_postfix(loss=f"{figures['loss']:.4f}", wait=f"{figures['data_wait_seconds'] * 1e3:.0f}ms")
                bar.update()
                self._look(step)
                last = step >= options.steps or self._anyone(stop.is_set)
                if last or step % options.checkpoint.every == 0:
                    self._save(step)
                if last:
                    break
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            done = "trained to" if self.loader.step >= options.steps else "stopped and saved at"
            say(f"{done} step {self.loader.step}: {self.run.folder / checkpoints.CONTROLNET}")

    def step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step on the batches of one step. Raises `UserError` naming the samples where the loss or the
        gradient is not finite, before any weight has moved."""
        options, step = self.options, self.loader.step
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        losses: list[torch.Tensor] = []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.adapter.module):
                loss = self.loss(batch)  # (B,)
                # The mean over all samples of the step, whatever the sizes of its batches; DDP averages over processes.
                share = loss.sum() / batch.step_samples * self.accelerator.num_processes
                self.accelerator.backward(share)
            losses.append(loss.detach())
            total += share.detach()
        norm = self.optimizer.clip(options.optimizer.clip_norm)
        mean = self.accelerator.reduce(total, reduction="mean") if self.accelerator.num_processes > 1 else total
        loss_value, norm_value = torch.stack([mean, norm.to(mean)]).tolist()  # the step's one wait for the device
        self._refuse_non_finite(batches, losses, loss_value, norm_value)
        rate = learning_rate(options.optimizer, step - 1, options.steps)
        rounding = torch.Generator(self.device).manual_seed(seed_of(options.seed, step, 2))
        self.optimizer.step(rate, rounding)
        return {"loss": loss_value, "gradient_norm": norm_value, "learning_rate": rate}

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of each sample, (B,) fp32: the method itself."""
        family, recipes = self.family, self.samples.recipes
        generator = torch.Generator(self.device).manual_seed(seed_of(self.options.seed, batch.position, 3))
        raw = batch.tensors
        x_0 = family.model_latents(raw["latents.mean"], raw["latents.std"], recipes["latents"], generator, self.dtype)
        condition = family.model_latents(
            raw["condition_latents.mean"],
            raw["condition_latents.std"],
            recipes["condition_latents"],
            generator if self.options.loader.condition_draw else None,
            self.dtype,
        )
        inputs = family.inputs(batch, condition, self.dtype)
        noised = self.objective.noise(x_0, generator)  # x_t, t, target, weight
        prediction = self.adapter.predict(noised.x_t, noised.t, inputs)  # (B, T, C)
        return self.objective.loss(prediction, noised)

    def _refuse_non_finite(self, batches: list[Batch], losses: list[torch.Tensor], loss: float, norm: float) -> None:
        if torch.isfinite(torch.tensor([loss, norm])).all():
            return
        pairs = [
            (key, value) for batch, each in zip(batches, losses, strict=True)
            for key, value in zip(batch.keys, each.tolist(), strict=True)
        ]  # fmt: skip
        guilty = [key for key, value in pairs if not torch.isfinite(torch.tensor(value))]
        what = f"loss {loss}" if guilty else f"gradient norm {norm}"
        whose = f"of sample(s) {', '.join(guilty)}" if guilty else f"in a step of {', '.join(key for key, _ in pairs)}"
        raise UserError(
            f"step {self.loader.step}: the {what} is not finite {whose}; the optimizer did not step. Look at these "
            "samples, lower optimizer.learning_rate, or resume from the last checkpoint with the same command"
        )

    def _look(self, step: int) -> None:
        """Held-out losses and pictures when they are due, on the main process; the others wait."""
        options = self.options.validation
        if self.validation is not None:
            last = step >= self.options.steps
            due = options.every and (step % options.every == 0 or last)
            if due:
                figures = self.validation.held_out(self.adapter)
                self.run.log(step, {"held_out": {k: v for k, v in figures.items() if v == v}})
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
            if self.paints and options.pictures_every and step and (step % options.pictures_every == 0 or last):
                picture = self.validation.pictures(self.adapter)
                path = self.run.save_picture(step, picture)
                for tracker in self.accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"held_out": picture[None]}, step=step, **layout)
                say(f"step {step}: pictures in {path}")
        self.accelerator.wait_for_everyone()

    def _track(self, figures: dict[str, Any], step: int) -> None:
        if self.options.tracker != "none":
            self.accelerator.log(figures, step=step)

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            tensors, meta = self.optimizer.state()
            state = {"optimizer": meta, "loader": self.loader.state(), "options": to_dict(self.options)}
            checkpoints.save(self.run.folder, step, self.adapter.save, tensors, state, self.options.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _anyone(self, stop: Any) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return bool(stop())
        flag = torch.tensor(float(stop()), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)


class _Stop:
    """Set by the first Ctrl-C or SIGTERM; the second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def is_set(self) -> bool:
        return self.asked

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
