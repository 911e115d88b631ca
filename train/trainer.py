"""The training stage: cache -> trained weights. Only the base and what is trained on it are in memory.

The step is a function of (weights, batch, seed): data order, captions, noise, times and rounding are drawn from the
seed and a position, so that a resumed run goes on as an undisturbed one would have: on the CPU to the bit, on a GPU as
far as its kernels repeat themselves.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial

import torch

from shared.config import to_dict
from shared.families.base import Batch
from shared.report import components_table, progress, quiet_libraries, say
from train import adapters, attention, checkpoints, eight_bit, fit, models, objectives, optimizer, processes, zero
from train.baseline import Baseline
from train.budget import grow_segments
from train.config import TrainConfig
from train.early_stop import taken_up
from train.ema import Ema
from train.looks import Looks
from train.objectives import Objective
from train.optimizer import AnyOptimizer, learning_rate
from train.preparation import Prepared, base_dtype, dtypes, prepare
from train.sharded_optimizer import ShardedOptimizer
from train.step import Backward, Step
from train.stopping import Stop, stopping
from train.validation import Validation, flatten


def train(options: TrainConfig) -> int:
    """Train, or go on training, the run that `options` describe. Exit code 0. Raises `UserError` before anything is
    loaded where something does not fit."""
    quiet_libraries()
    grow_segments()
    with ExitStack() as stack:
        if (prepared := prepare(options, stack)) is None:
            return 0
        trainer = stack.enter_context(closing(Trainer(prepared)))
        trainer.begin()
        trainer.run_to_the_end()
    return 0


def choose_attention(prepared: Sequence[Prepared]) -> str:
    """The kernel for runs on one base, for what it will be called with in training. To be called before anything is
    loaded."""
    first, shapes = prepared[0], []
    for run in prepared:
        base, samples = run.family.make_base(run.model), run.loader.samples
        shapes += [
            attention.Shape(
                run.loader.options.batch_size,
                *run.family.attention_shape(base, height, width, samples.text_length or 0),
            )
            for width, height in samples.sizes
        ]
    options, device = first.options, first.accelerator.device
    folder = options.base.folder_beside(options.cache, options.remote)
    return attention.choose(options.speed.attention, shapes, dtypes(options, device)[0], device, folder)


def open_base(prepared: Sequence[Prepared], attention: str) -> models.Base:
    """The frozen base that these runs train on. Raises `UserError`."""
    first = prepared[0]
    device = first.accelerator.device
    shapes = {(run.fitted.loader.batch_size, *size) for run in prepared for size in run.loader.samples.sizes}
    return models.open_frozen(
        first.options, first.family, first.model,
        device=device, dtype=base_dtype(first.options, device), hoist=first.fitted.hoist, stream=first.fitted.stream,
        # With several LoRAs on the base, each one's are compiled for themselves.
        num_shapes=len(shapes) * max(1, sum(not adapters.get(run.options.adapter).conditioned for run in prepared)),
        attention=attention,
        shard_over=processes.per_machine(first.accelerator) if first.fitted.shard else 1,
    )  # fmt: skip


class Trainer:
    """One run in one process (of possibly several)."""

    def __init__(self, prepared: Prepared, base: models.Base | None = None) -> None:
        """Load what is trained, and the base unless one is given. With a checkpoint, go back to its state: weights,
        optimizer; the loader is there already."""
        options, accelerator, family, model = prepared.options, prepared.accelerator, prepared.family, prepared.model
        fitted, loader, checkpoint = prepared.fitted, prepared.loader, prepared.checkpoint
        self.prepared, self.options, self.accelerator, self.run = prepared, options, accelerator, prepared.run
        self.family, self.model, self.loader, self.samples = family, model, loader, loader.samples
        self.device = accelerator.device
        self.dtype, weights = dtypes(options, self.device)
        self.attention = choose_attention([prepared]) if base is None else base.attention
        self.models = models.load(
            options, family, model, lambda: base or open_base([prepared], self.attention),
            device=self.device, dtype=self.dtype, weights=weights, num_shapes=len(self.samples.sizes),
            checkpoint=checkpoint,
        )  # fmt: skip
        self.adapter, modulation = self.models.adapter, self.models.modulation
        spread = self.models.trained_shards
        trained = dict(self.adapter.named_parameters()) if spread is None else spread.parts
        self.optimizer: AnyOptimizer
        if spread is not None:
            self.optimizer = ShardedOptimizer(options.optimizer, spread)
        elif zero.wanted():
            assert self.models.shards is None, "what DeepSpeed trains is not spread"
            rates = self.adapter.rates(options)
            self.optimizer = zero.ZeroOptimizer(options.optimizer, self.adapter.bare, trained, accelerator, rates=rates)
        else:
            self.optimizer = optimizer.make(options.optimizer, trained, self.adapter.rates(options))
        state = {} if checkpoint is None else checkpoints.state(checkpoint)
        if checkpoint is not None:
            self.optimizer.load_state(checkpoints.optimizer_tensors(checkpoint), state["optimizer"])
        self.ema: Ema | None = None
        """Of the main process: it alone looks and saves. Of spread weights, each process averages its parts."""
        if options.ema.on and (accelerator.is_main_process or spread is not None):
            self.ema = Ema(options.ema, trained)
            if checkpoint is not None:
                saved = self.adapter.read(checkpoint / checkpoints.EMA)
                self.ema.load(saved if spread is None else spread.cut(saved))
        backward: Backward | None = None
        if spread is not None:
            backward = spread.backward
        elif isinstance(self.optimizer, zero.ZeroOptimizer):
            backward, self.adapter.module = self.optimizer.backward, self.optimizer.engine
        elif processes.without_ddp(accelerator) or (self.models.shards is not None and not self.adapter.conditioned):
            backward = processes.adding_up(self.adapter, accelerator)
        else:
            idle = self.adapter.has_idle_parameters
            self.adapter.module = processes.together(self.adapter.bare, accelerator, idle=idle)
        self.objective: Objective = objectives.make(options.objective, family, model)
        self.step = Step(
            family, self.adapter, self.objective, self.optimizer,
            recipes=self.samples.recipes, seed=options.seed, device=self.device, dtype=self.dtype,
            condition_draw=options.loader.condition_draw, modulation=modulation,
            compiled_for=loader.options.batch_size if self.models.compiled else None, accelerator=accelerator,
            backward=backward,
        )  # fmt: skip
        if modulation is not None:
            modulation.follow(loader, self.step.times, batches=options.memory.hoist_steps)
        self.guard = fit.Guard(
            fitted, family, self.adapter, self.optimizer, self.device,
            num_processes=accelerator.num_processes, is_main=accelerator.is_main_process,
        )  # fmt: skip
        self.validation = None
        if len(prepared.held_out) and accelerator.is_main_process:
            self.validation = Validation(
                prepared.held_out, family, model, self.objective, options.validation,
                seed=options.validation.seed, device=self.device, dtype=self.dtype,
                baseline=Baseline.of(self.run.folder), modulation=modulation,
            )  # fmt: skip
        self.look = Looks(
            options.validation, accelerator, self.run, self.adapter, self.validation,
            last_step=options.steps, paints=model.has("vae"), compiled=self.models.compiled,
            run_seconds=lambda: self.device_seconds / accelerator.num_processes, shards=self.models.shards,
            weights=self.ema.in_place if self.ema is not None and options.ema.evaluate else nullcontext,
        )  # fmt: skip
        self.early_stop = taken_up(options.early_stop, checkpoint)
        counts, times = state.get("trainer", {}), state.get("times", {})
        self.samples_seen: int = counts.get("samples_seen", 0)
        self.device_seconds: float = times.get("device_seconds", 0.0)
        """Of all processes together, looks and saving too."""
        self.look.seconds = times.get("look_seconds", 0.0)
        self._since = time.perf_counter()
        self._unwritten: tuple[int, dict[str, float]] | None = None
        """Of the main process, a step with its figures."""
        if accelerator.is_main_process:
            say(components_table(self.models.components))
            say(
                f"{len(self.samples)} samples to train on, {len(prepared.held_out)} held out"
                f"{f', {self.samples.num_prior} class images' if loader.prior else ''}; "
                f"{loader.batches_per_epoch} batches an epoch; "
                f"global batch {loader.options.batch_size * loader.batches_per_step}; run {self.run.folder}"
            )

    def begin(self) -> None:
        """Write into the run's folder what it is, and drop the figures of steps that are now taken again."""
        if not self.accelerator.is_main_process:
            return
        step = self.loader.step
        num_processes, size = self.accelerator.num_processes, self.loader.options.batch_size
        if step and (remark := processes.changed(self.run, num_processes, self.loader.options)) is not None:
            say(remark)
        self.run.begin(self.options, self.prepared.facts, step, self.models.components)
        self.run.note({"num_processes": num_processes, "global_batch": size * self.loader.batches_per_step})
        # Figures after the last checkpoint are of steps that are now run again; all, if there was none yet.
        self.run.keep_metrics_until(step or -1)
        if step:
            say(f"resuming after step {step}")

    def run_to_the_end(self) -> None:
        """Step until the last step. On Ctrl-C or SIGTERM the step in hand is finished and saved."""
        with stopping() as stop, attention.use(self.attention):
            for _ in self.steps(stop):
                pass

    def steps(self, stop: Stop) -> Generator[int, None, None]:
        """Step until the last step, or until `stop` asks, looking at the held-out samples and saving on the way. Yields
        each step's number when all is done that belongs to it, so that several trainers can take turns."""
        options = self.options
        self.look.begin(self.loader.step)
        self._since, waited = time.perf_counter(), _Waiting(self.loader.step + 1)
        try:
            if self.loader.step == 0:
                self.look(0)
            with (
                progress(title="train", unit="step", total=options.steps, initial=self.loader.step) as bar,
                closing(iter(self.loader)) as steps,
            ):
                for batches in steps:
                    step = self.loader.step  # counts from 1: this step's number
                    figures = self._take(step, batches, waited)
                    self._count_time()
                    if self.accelerator.is_main_process:
                        self._write(self.step.arrived)
                        figures |= {"samples_seen": self.samples_seen, "device_hours": self.device_seconds / 3600}
                        self._unwritten = step, figures
                        if any(self.look.due(step)):
                            self._write(self.step.late())
                    bar.set_postfix(loss=f"{figures['loss']:.4f}", wait=f"{figures['data_wait_seconds'] * 1e3:.0f}ms")
                    bar.update()
                    self.look(step)
                    looked = options.early_stop.on and self.look.at_losses(step)  # processes ask each other then only
                    best = looked and self._anyone(self._is_best(step))
                    self._count_time()
                    last = step >= options.steps or self._anyone(stop.asked or self.early_stop.asks)
                    if last or best or step % options.checkpoint.every == 0:
                        self._save(step, best=best)
                    del batches  # their memory serves for the next ones
                    if last:
                        break
                    self._count_time()
                    yield step
                    self._since = time.perf_counter()  # others may have had their turn
            self._end(waited.share)
            yield step
        finally:
            self._write({})
            self.accelerator.end_training()

    def _write(self, late: dict[str, float]) -> None:
        """Write the figures of the last step that has not been written, with what came of its update, which is read
        with the next step's loss: each reading waits for the device."""
        if self._unwritten is None:
            return
        (step, figures), self._unwritten = self._unwritten, None
        figures |= late
        self.run.log(step, figures)
        if self.accelerator.trackers:
            self.accelerator.log(flatten(figures, "train"), step=step)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.device_seconds += (now - self._since) * self.accelerator.num_processes
        self._since = now

    def _take(self, step: int, batches: list[Batch], waited: _Waiting) -> dict[str, float]:
        """Take one step; its figures."""
        began = time.perf_counter()
        if step == waited.first and self.options.speed.arithmetic != "exact":
            self._hold_to_exact(batches)
        rate = learning_rate(self.options.optimizer, step - 1, self.options.steps)
        figures = self.guard(batches, partial(self.step, batches, step, rate))
        if self.ema is not None:
            self.ema.update(step)
        self.samples_seen += batches[0].step_samples
        figures["data_wait_seconds"] = self.loader.waited_seconds
        figures["step_seconds"] = time.perf_counter() - began
        figures["data_wait_share"] = waited.count(step, figures["data_wait_seconds"], figures["step_seconds"])
        return figures

    def _end(self, waited: float) -> None:
        """Say what became of the run."""
        if not self.accelerator.is_main_process:
            return
        step, trained = self.loader.step, self.loader.step >= self.options.steps
        why = "trained" if trained else "early_stop" if self.early_stop.asks else "stopped"
        self.run.note({"ended": {"step": step, "why": why}})
        if why == "early_stop":
            say(self.early_stop.words())
        say(
            f"{'trained to' if trained else 'stopped and saved at'} step {step}: "
            f"{self.run.folder / self.adapter.folder}; {waited:.1%} of the time went into waiting for data, "
            f"{self._look_share():.1%} into looks"
        )

    def _look_share(self) -> float:
        """Of the time of the whole run."""
        seconds = self.device_seconds / self.accelerator.num_processes
        return self.look.seconds / seconds if seconds else 0.0

    def close(self) -> None:
        """Let go of what goes on in the background."""
        self.look.close()
        self.adapter.leave_base()
        if self.ema is not None:
            self.ema.close()
        if self.models.modulation is not None:
            self.models.modulation.close()

    def _hold_to_exact(self, batches: list[Batch]) -> None:
        """Refuse 8-bit arithmetic that turns these batches' gradients too far."""
        recomputed = self.guard.recompute.base_blocks, self.guard.recompute.controlnet_blocks
        reference = eight_bit.unquantized(self.family, self.model)
        measured = eight_bit.gate(self.step, batches, reference=reference, recomputed=recomputed)
        if self.accelerator.is_main_process:
            say(measured.sentence())
            self.run.note({"arithmetic": measured.figures()})

    def _is_best(self, step: int) -> bool:
        """Whether held-out losses, which were looked at after this step, are the best so far."""
        validation = self.validation
        if validation is None:
            return False
        grid = f"{len(validation.last_losses)} samples at {validation.options.timesteps} times"
        return self.early_stop.look(step, validation.last_losses, grid)

    def _save(self, step: int, *, best: bool = False) -> None:
        spread, save_weights = self.models.trained_shards, self.adapter.save
        average = None if self.ema is None else partial(self.ema.save, write=self.adapter.write)
        if self.accelerator.is_main_process or spread is not None or zero.wanted():
            tensors, meta = self.optimizer.state()
        if spread is not None:
            save_weights = partial(self.adapter.write, tensors=spread.whole(spread.parts))
            if self.ema is not None:
                self.ema.wait()
                average = partial(self.adapter.write, tensors=spread.whole(self.ema.average))
        if self.accelerator.is_main_process:
            self._write(self.step.late())
            self.run.sync_metrics()
            self.run.note({"memory": self.guard.figures()})
            state = {
                "optimizer": meta,
                "loader": self.loader.state(),
                "options": to_dict(self.options),
                "trainer": {"samples_seen": self.samples_seen, "early_stop": self.early_stop.state()},
                "times": {"device_seconds": self.device_seconds, "look_seconds": self.look.seconds},
            }
            beside = {} if average is None else {checkpoints.EMA: average}
            keep = self.options.checkpoint.keep
            checkpoints.save(
                self.run.folder, step, save_weights, tensors, state, keep, beside, best=best,
                name=self.adapter.folder,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)


class _Waiting:
    """The share of the time that went into waiting for data, from the second step on: nothing could be read ahead of
    the first."""

    def __init__(self, first: int) -> None:
        self.first, self.share, self._waited, self._worked = first, 0.0, 0.0, 0.0

    def count(self, step: int, waited_seconds: float, worked_seconds: float) -> float:
        """The share after this step."""
        if step > self.first:
            self._waited += waited_seconds
            self._worked += worked_seconds
            self.share = self._waited / (self._waited + self._worked)
        return self.share
