"""Many experiments from one cache: `make sweep DEPTHS="2-0 2-4 4-10" RATES="1e-5 2e-5" SEEDS="0 1" NAME=first`.

    runs/first/
      sweep.json          what is varied, and what became of each experiment
      depth-2-0_lr-1e-05_seed-0/       the run, as `python -m train` makes it
      depth-2-0_lr-1e-05_seed-0.yaml   its recipe: `python -m train --recipe` goes on with this one alone
      depth-2-0_lr-1e-05_seed-0.log    what it said
      compare.html        the page that compares them (train/compare)

Each experiment is a process of its own, one at a time or one on each GPU; with `shared_base` those of a GPU are one
process (train/together.py). What can be refused is refused before the first one starts. One that fails, for want of
memory or else, is recorded with its reason, and the others go on. The same command again resumes what is not finished,
and tries again what failed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import atomic
from shared.config import load, to_dict, to_yaml
from shared.errors import EXIT_INCOMPLETE, EXIT_INTERRUPTED, UserError, run_command_line
from shared.report import progress, say, table, warn
from train import adapters, checkpoints, children, grid, outcomes
from train.grid import Experiment, SweepConfig
from train.outcomes import DONE
from train.stopping import Stop, stopping

SWEEP, PAGE = "sweep.json", "compare.html"
_TICK_SECONDS = 0.2
_BASE_OPTIONS = (
    "cache",
    "model",
    "revision",
    "precision",
    "device",
    "base.",
    "speed.",
    "memory.hoist",
    "memory.stream",
    "lora.train_text_encoder",
)
"""What the frozen base depends on: the same for all that share one."""


def sweep(options: SweepConfig) -> int:
    """Train what is not trained yet. Exit code 0 where all experiments are trained, 3 where some failed, 130 where it
    was stopped. Raises `UserError` before anything starts where something does not fit."""
    folder = Path(options.runs) / options.run_name
    before = recorded(folder)
    found = grid.experiments(options, [experiment for experiment, _ in before.values()])
    if options.shared_base:
        refuse_other_bases(found)
    refuse_impossible(found)
    with atomic.alone(folder, "sweeping in"):
        record = Record(folder, options, found, before)
        code = _Sweep(options, record).run()
        say(_outcomes(record))
        if any((folder / name / "run.json").is_file() for name in record.states):
            from train import compare

            say(f"the page that compares them: {compare.write([folder], folder / PAGE)}")
    return code


def refuse_impossible(found: Sequence[Experiment]) -> None:
    """Raise `UserError` for an experiment that could not be trained, or whose folder holds another one. Nothing is
    loaded."""
    from train.preparation import ground_of
    from train.run import Run

    looked: dict[str, Any] = {}
    for experiment in found:
        options = experiment.options
        reads = (options.cache, options.remote, options.model, options.revision, options.condition, options.depth)
        base = (options.base, options.memory, options.speed, options.optimizer.kind, options.objective)
        key = repr((reads, base, options.controlnet.start_from, options.adapter, options.lora, options.full))
        try:
            if key not in looked:
                looked[key] = ground_of(options).facts
            Run(experiment.folder).refuse_other(options, looked[key])
        except UserError as error:
            raise UserError(f"{experiment.name}: {error}") from error


def refuse_other_bases(found: Sequence[Experiment]) -> None:
    """Raise `UserError` where experiments need different frozen bases."""
    for experiment in found:
        for key in experiment.varied:
            if any(key == name or (name.endswith(".") and key.startswith(name)) for name in _BASE_OPTIONS):
                raise UserError(f"SHARED_BASE: {key} makes another base of it, so it cannot be varied on a shared one")
        if not adapters.get(experiment.options.adapter).shares_base:
            raise UserError(f"SHARED_BASE: adapter {experiment.options.adapter} changes what the base computes")
        if experiment.options.tracker == "wandb":
            raise UserError("SHARED_BASE: W&B follows one run in a process; set --tracker tensorboard or none")


Recorded = tuple[Experiment, dict[str, Any]]


# --- what became of them --------------------------------------------------------------------------------------------


class Record:
    """`sweep.json`: the grid, and of each experiment what became of it; with the recipes beside it."""

    def __init__(
        self, folder: Path, options: SweepConfig, found: Sequence[Experiment], before: Mapping[str, Recorded]
    ) -> None:
        """Write recipes and record. What was recorded `before` stays where nothing else comes in its place."""
        self.folder, self.found = folder, {experiment.name: experiment for experiment in found}
        self.grid = grid.dimensions(options)
        self.states: dict[str, dict[str, Any]] = {}
        """Of this grid's experiments in their order, then of others that were trained here earlier."""
        stated = dict(before)
        for experiment in found:
            old, state = stated.pop(experiment.name, (None, {}))
            if old is None or to_dict(old.options) != to_dict(experiment.options) or not self._is_done(old, state):
                state = {"outcome": "waiting"}
            self.states[experiment.name] = {**state, "varied": dict(experiment.varied)}
            recipe = to_yaml(experiment.options).encode()
            if not self.recipe(experiment.name).exists() or self.recipe(experiment.name).read_bytes() != recipe:
                atomic.write_bytes(self.recipe(experiment.name), recipe)
        self.states |= {name: state for name, (_, state) in stated.items()}
        self._write()

    @staticmethod
    def _is_done(experiment: Experiment, state: Mapping[str, Any]) -> bool:
        folder = experiment.folder
        return state.get("outcome") in DONE and folder.is_dir() and checkpoints.linked(folder) is not None

    def recipe(self, name: str) -> Path:
        """Where an experiment's options are."""
        return self.folder / f"{name}.yaml"

    def log(self, name: str) -> Path:
        """Where it is kept what an experiment said."""
        return self.folder / f"{name}.log"

    def note(self, name: str, outcome: str, **more: Any) -> None:
        """From now on this is what became of an experiment."""
        self.states[name] = {"varied": self.states[name]["varied"], "outcome": outcome, **more}
        self._write()

    def with_outcome(self, *outcomes: str) -> list[str]:
        """Names of this grid's experiments with one of these outcomes."""
        return [name for name in self.found if self.states[name]["outcome"] in outcomes]

    def _write(self) -> None:
        atomic.write_json(self.folder / SWEEP, {"grid": self.grid, "experiments": self.states})


def recorded(folder: Path) -> dict[str, Recorded]:
    """The experiments of a sweep's earlier starts, as its record has them: by name, with what became of each. Empty at
    the first start. Raises `UserError` where the folder is something else, or damaged."""
    path = folder / SWEEP
    if not path.is_file():
        if (folder / "run.json").is_file():
            raise UserError(f"{folder} is a single run, not a sweep: choose another NAME")
        return {}
    try:
        stated = json.loads(path.read_text())["experiments"].items()
        return {
            name: (Experiment(name, state["varied"], grid.read(folder / f"{name}.yaml")), state)
            for name, state in stated
            if (folder / f"{name}.yaml").is_file()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another NAME, or remove this file to go on") from error


def _outcomes(record: Record) -> str:
    """The table of what became of the experiments."""
    rows = [
        (name, state["outcome"], str(state.get("why", "")).splitlines()[0][:100] if state.get("why") else "")
        for name, state in record.states.items()
    ]
    return table(("experiment", "outcome", "why"), rows, right=3)


# --- training them --------------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A child, and the experiments that it trains."""

    names: list[str]
    child: children.Child
    talk: children.Talk
    outcomes: Path | None = None
    """Where it notes what became of each, where they are several."""
    said: str = ""
    asked: bool = field(default=False)
    """Whether it was asked to stop."""


class _Sweep:
    """Experiments on their way through the slots, one for each GPU."""

    def __init__(self, options: SweepConfig, record: Record) -> None:
        self.options, self.record = options, record
        self.slots: dict[str | None, _Running | None] = dict.fromkeys(options.gpus or (None,))
        self.waiting: list[list[str]] = []
        """Names of the experiments of each child that is to come."""

    def run(self) -> int:
        """Train what is waiting; the sweep's exit code."""
        record, todo = self.record, self.record.with_outcome("waiting")
        if done := record.with_outcome(*DONE):
            say(f"{len(done)} of {len(record.found)} experiments are trained already")
        self.waiting = [[name] for name in todo]
        if self.options.shared_base:
            self.waiting = [part for i in range(len(self.slots)) if (part := todo[i :: len(self.slots)])]
        steps = {name: experiment.options.steps for name, experiment in record.found.items()}
        with stopping() as stop, progress(title="sweep", unit="step", total=sum(steps.values())) as bar:
            try:
                while self.waiting or any(self.slots.values()):
                    self._tick(stop)
                    if not bar.disable:
                        bar.update(sum(min(_last_step(record.folder / name), steps[name]) for name in steps) - bar.n)
                    time.sleep(_TICK_SECONDS)
            finally:
                for running in filter(None, self.slots.values()):
                    running.child.kill()
        if stop.asked:
            say("stopped: run the same command again to go on")
            return EXIT_INTERRUPTED
        failed = record.with_outcome("failed", "stopped")
        for name in failed:
            warn(f"{name} failed: {record.states[name].get('why', 'see its log')}; {record.log(name)} has all it said")
        return EXIT_INCOMPLETE if failed else 0

    def _tick(self, stop: Stop) -> None:
        """See what the children do, and give free slots something to do."""
        if stop.asked:
            self.waiting = []
        for slot, running in self.slots.items():
            if running is not None:
                if stop.asked and not running.asked:
                    running.child.terminate()
                    running.asked = True
                code = running.child.poll()  # before its last words are read
                for line in running.talk.new_lines():
                    say(f"{running.said}{line}")
                if code is not None:
                    self._ended(running, code)
                    self.slots[slot] = None
            elif self.waiting and all(_is_free(self.record.found[name].folder) for name in self.waiting[0]):
                self.slots[slot] = self._start(self.waiting.pop(0), slot)

    def _start(self, names: list[str], gpu: str | None) -> _Running:
        record = self.record
        where = "" if gpu is None else f" on GPU {gpu}"
        say(f"training {', '.join(names)}{where}")
        for name in names:
            record.note(name, "running")
        if not self.options.shared_base:
            log = record.log(names[0])
            talk = children.Talk(log)
            child = children.start("train", ["--recipe", str(record.recipe(names[0]))], log, gpu)
            return _Running(names, child, talk, said=f"{names[0]}: ")
        log = record.folder / f"together{'' if gpu is None else f'-{gpu}'}.log"
        outcomes, talk = log.with_suffix(".json"), children.Talk(log)
        outcomes.unlink(missing_ok=True)
        recipes = [str(record.recipe(name)) for name in names]
        child = children.start("train.together", ["--outcomes", str(outcomes), "--recipes", *recipes], log, gpu)
        return _Running(names, child, talk, outcomes)

    def _ended(self, running: _Running, code: int) -> None:
        """Record what became of a child's experiments."""
        noted: dict[str, Any] = {}
        if running.outcomes is not None and running.outcomes.is_file():
            noted = json.loads(running.outcomes.read_text())
            running.outcomes.unlink()
        for name in running.names:
            state = noted.get(name)
            if state is None and code == 0:
                experiment = self.record.found[name]
                state = outcomes.ended(experiment.folder, experiment.options.steps)
            elif state is None and running.asked:
                state = {"outcome": "stopped"}
            elif state is None:
                state = {"outcome": "failed", "exit_code": code, "why": running.talk.why(code)}
            self.record.note(name, **state)
            say(f"{name}: {state['outcome']}")


def _is_free(run: Path) -> bool:
    """Whether no process trains in a run's folder: one whose sweep was killed saves its step first."""
    try:
        with atomic.alone(run, "training in"):
            return True
    except UserError:
        return False


def _last_step(run: Path) -> int:
    """The step that a run has come to, by its last figures."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError):
            return int(json.loads(line)["step"])
    return 0


def plan_of(options: SweepConfig) -> Iterator[str]:
    """Lines that say what would be trained."""
    folder = Path(options.runs) / options.run_name
    before = recorded(folder)
    found = grid.experiments(options, [experiment for experiment, _ in before.values()])
    yield f"{len(found)} experiments of {options.steps} steps in {folder}:"
    for experiment in found:
        yield f"  {experiment.name}  ({before[experiment.name][1]['outcome'] if experiment.name in before else 'new'})"


def main() -> int:
    """Read the options, then sweep; with --dry-run only say what would be trained."""
    words = [word for word in sys.argv[1:] if word != "--dry-run"]
    options = load(SweepConfig, words, command="python -m train.sweep")
    assert options is not None
    if len(words) < len(sys.argv[1:]):
        for line in plan_of(options):
            say(line)
        return 0
    return sweep(options)


if __name__ == "__main__":
    run_command_line(main)
