"""Several ControlNets or LoRAs side by side on one frozen base: `python -m train.together --recipes a.yaml b.yaml`.

The base is most of what training takes, and it is the same for all. It is opened once; the trainers take turns on it,
step by step. Each has what is its own: ControlNet or LoRA, optimizer, loader and its position, modulation, folder. At
its turn it says which of the base's blocks recompute their activations, with which modulation they compute, and whose
pairs act on them, so every step is the one that it would be alone, to the bit on the CPU.

On the device lie the base, of each run its weights and optimizer states, and the gradients and activations of one step,
for they are gone when the next one has its turn. Where not all fit side by side, as many do as fit, and the others
follow when those are done. One that fails is dropped with its reason, the others go on.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shared import atomic
from shared.config import load
from shared.errors import EXIT_INCOMPLETE, UserError, run_command_line
from shared.report import quiet_libraries, say, speaking_as, warn
from train import adapters, attention, fit, grid, outcomes
from train.budget import grow_segments
from train.config import TrainConfig
from train.memory_plan import resting_bytes
from train.models import Base
from train.preparation import Begun, Prepared, begin, decide_fit, ready, setting_of
from train.stopping import Stop, stopping
from train.trainer import Trainer, choose_attention, open_base

Note = Callable[[str, dict[str, Any]], None]
"""Takes the name of a run and what became of it: "outcome", and "step" or "why"."""


@dataclass(frozen=True)
class TogetherConfig:
    """Train several runs side by side on one frozen base."""

    recipes: tuple[str, ...]
    """Of each run its options, as a sweep writes them: experiment.yaml."""
    outcomes: str | None = None
    """File that is to say, as JSON, what became of each."""

    def check(self) -> None:
        """Refuse impossible values."""
        if not self.recipes:
            raise UserError("recipes: name at least one")


def train_together(runs: Sequence[TrainConfig], note: Note = lambda name, outcome: None) -> int:
    """Train, or go on training, all of these. `note` is called with what became of each as soon as it is known. Exit
    code 0, or 3 where some failed. Raises `UserError` where they cannot share a base."""
    quiet_libraries()
    grow_segments()
    named = {options.run_name: options for options in runs}
    if len(named) < len(runs):
        raise UserError("two of these runs have the same NAME")
    side_by_side = _SideBySide(named, note)
    with stopping() as stop, ExitStack() as stack:
        side_by_side.train(stop, stack)
    return EXIT_INCOMPLETE if side_by_side.num_failed else 0


@dataclass
class _Run:
    """A run that was begun, in the memory that was decided for it."""

    begun: Begun
    fitted: fit.Fit
    hold: ExitStack
    """Holds its folder."""


class _SideBySide:
    """The runs, from their beginning to their ends."""

    def __init__(self, runs: dict[str, TrainConfig], note: Note) -> None:
        self.runs, self.note, self.num_failed = runs, note, 0

    def train(self, stop: Stop, stack: ExitStack) -> None:
        """Train all of them. What they hold is let go when `stack` closes, or before."""
        groups = self._groups(self._begun(stack))
        prepared: list[dict[str, tuple[Prepared, ExitStack]]] = []
        for group in groups:
            prepared.append({})
            for name, run in group.items():
                with speaking_as(name), self._or_failed(name, run.hold):
                    prepared[-1][name] = ready(run.begun, run.fitted), run.hold
        everyone = [each for group in prepared for each, _ in group.values()]
        if not everyone:
            return
        kernel = choose_attention(everyone)
        base = open_base(everyone, kernel)
        with attention.use(kernel):
            for number, group_ in enumerate(prepared):
                if len(prepared) > 1:
                    say(f"side by side, {number + 1} of {len(prepared)}: {', '.join(group_)}")
                if not stop.asked:
                    self._take_turns(group_, base, stop)

    # --- before anything is loaded ----------------------------------------------------------------------------------

    def _begun(self, stack: ExitStack) -> dict[str, tuple[Begun, ExitStack]]:
        """Those that are not trained yet. Raises `UserError` where they cannot share a base."""
        found: dict[str, tuple[Begun, ExitStack]] = {}
        for name, options in self.runs.items():
            hold = stack.enter_context(ExitStack())
            with speaking_as(name), self._or_failed(name, hold):
                begun = begin(replace(options, name=name), hold)
                if begun is None:
                    self._done(name, hold)
                else:
                    found[name] = begun, hold
        needs = {name: _base_of(begun) for name, (begun, _) in found.items()}
        for name, mine in needs.items():
            for key, value in next(iter(needs.values())).items():
                if mine[key] != value:
                    raise UserError(
                        f"{next(iter(needs))} and {name} cannot share a base: {key} is {value} and {mine[key]}"
                    )
        for begun, _ in found.values():
            if len(found) > 1 and not adapters.get(begun.options.adapter).shares_base:
                raise UserError(
                    f"adapter {begun.options.adapter} changes what the base computes, so it does not share one with "
                    "other runs: start it by itself"
                )
            if begun.accelerator.num_processes > 1:
                raise UserError("runs side by side share one process, and here are several: start it by itself")
            if begun.options.tracker == "wandb" and len(found) > 1:
                raise UserError("W&B follows one run in a process: set --tracker tensorboard or none")
        return found

    def _groups(self, found: dict[str, tuple[Begun, ExitStack]]) -> list[dict[str, _Run]]:
        """Who trains side by side with whom: as many as fit, in their order."""
        streams = self._streams(found)
        waiting = {name: each for name, each in found.items() if name in streams}
        stream = "yes" if any(streams.values()) else "no"
        groups: list[dict[str, _Run]] = []
        while waiting:
            group: dict[str, _Run] = {}
            for name in list(waiting):
                try:
                    group = _fitting({each: waiting[each] for each in [*group, name]}, stream)
                except UserError:
                    assert group, "each one fits alone"
                    break
            groups.append(group)
            waiting = {name: each for name, each in waiting.items() if name not in group}
        return groups

    def _streams(self, found: dict[str, tuple[Begun, ExitStack]]) -> dict[str, bool]:
        """Of each that fits alone, whether the base's blocks must be streamed for it. One that does not fit fails."""
        streams: dict[str, bool] = {}
        for name, (begun, hold) in found.items():
            with speaking_as(name), self._or_failed(name, hold):
                wanted = begun.options.memory.stream
                try:
                    streams[name] = _decided(begun, "no" if wanted == "auto" else wanted, 0).stream
                except UserError:
                    if wanted != "auto":
                        raise
                    streams[name] = _decided(begun, "yes", 0).stream
        return streams

    # --- in turns ---------------------------------------------------------------------------------------------------

    def _take_turns(self, group: dict[str, tuple[Prepared, ExitStack]], base: Base, stop: Stop) -> None:
        live: dict[str, tuple[Trainer, Generator[int, None, None]]] = {}
        with ExitStack() as stack:
            for name, (prepared, hold) in group.items():
                with speaking_as(name), self._or_failed(name, hold):
                    trainer = Trainer(prepared, base)
                    hold.enter_context(closing(trainer))
                    trainer.adapter.act(False)
                    trainer.begin()
                    live[name] = trainer, stack.enter_context(closing(trainer.steps(stop)))
                    del trainer
            while live:
                for name in list(live):
                    if not self._turn(name, *live[name], group[name][1]):
                        del live[name]
                        fit.free_memory()

    def _turn(self, name: str, trainer: Trainer, steps: Generator[int, None, None], hold: ExitStack) -> bool:
        """One step; False where it was the last."""
        with speaking_as(name), self._or_failed(name, hold):
            trainer.guard.resume()
            trainer.adapter.act(True)
            try:
                going_on = next(steps, None) is not None
            finally:
                trainer.adapter.act(False)
            if going_on:
                trainer.optimizer.zero_grad()  # their memory serves for the others' steps
                return True
            self._done(name, hold)
        return False

    def _done(self, name: str, hold: ExitStack) -> None:
        options = self.runs[name]
        hold.close()
        self.note(name, outcomes.ended(Path(options.runs) / name, options.steps))

    def _or_failed(self, name: str, hold: ExitStack) -> _OrFailed:
        return _OrFailed(self, name, hold)

    def failed(self, name: str, why: str, hold: ExitStack) -> None:
        """One is dropped; the others go on."""
        self.num_failed += 1
        warn(f"dropped, the others go on: {why}")
        hold.close()
        self.note(name, {"outcome": "failed", "why": why})


class _OrFailed:
    """Around what belongs to one run: where it fails, the run is dropped, and what comes after the block goes on."""

    def __init__(self, runs: _SideBySide, name: str, hold: ExitStack) -> None:
        self._runs, self._name, self._hold = runs, name, hold

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        if isinstance(error, UserError):
            why = str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            why = "memory ran out: try fewer side by side, a smaller --loader.batch-size, or --memory.recompute all"
        else:
            traceback.print_exception(error)  # our own mistake; the others need not suffer from it
            why = f"{type(error).__name__}: {error}"
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
        self._runs.failed(self._name, why, self._hold)
        return True


def _base_of(begun: Begun) -> dict[str, Any]:
    """What the frozen base of a run depends on."""
    options = begun.options
    return {
        "model": begun.ground.facts["model"],
        "precision": options.precision,
        "base": options.base,
        "speed": options.speed,
        "device": begun.accelerator.device,
        "memory.hoist": options.memory.hoist,
        "memory.stream": options.memory.stream,
        "lora.train_text_encoder": adapters.get(options.adapter).trains_text(options),  # decides what is computed ahead
    }


def _fitting(runs: dict[str, tuple[Begun, ExitStack]], stream: Any) -> dict[str, _Run]:
    """What each does to fit beside what the others hold between their turns. Raises `UserError` where one cannot."""
    resting = {name: _resting(begun) for name, (begun, _) in runs.items()}
    return {
        name: _Run(begun, _decided(begun, stream, sum(resting.values()) - resting[name]), hold)
        for name, (begun, hold) in runs.items()
    }


def _decided(begun: Begun, stream: Any, beside_bytes: int) -> fit.Fit:
    options = replace(begun.options, memory=replace(begun.options.memory, stream=stream))
    ground = begun.ground
    return decide_fit(
        options, begun.accelerator, ground.family, ground.model, ground.samples, begun.checkpoint, beside_bytes
    )


def _resting(begun: Begun) -> int:
    """Bytes that a run holds on the device while others have their turn. 0 where memory is not counted."""
    options, ground = begun.options, begun.ground
    if begun.accelerator.device.type != "cuda" and options.memory.budget == "auto":
        return 0
    return resting_bytes(
        setting_of(options, begun.accelerator.device, ground.family, ground.model, ground.samples, begun.checkpoint)
    )


def main() -> int:
    """Read the recipes, then train."""
    options = load(TogetherConfig, command="python -m train.together")
    if options is None:
        return 0
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, outcome: dict[str, Any]) -> None:
        found[name] = outcome
        if options.outcomes is not None:
            atomic.write_json(Path(options.outcomes), found)

    return train_together([grid.read(Path(recipe)) for recipe in options.recipes], note)


if __name__ == "__main__":
    run_command_line(main)
