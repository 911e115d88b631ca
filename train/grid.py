"""Which experiments a sweep consists of: every combination of the values that were listed, each with its options.

All but what is varied is the same in all of them, the seed too unless several are listed: then data order, noise and
times are the same, and what differs between two results comes from what was varied (common random numbers).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shared.config import field_names, load, to_dict
from shared.errors import UserError, nearest
from train.config import TrainConfig

SWEEP = "sweep"
"""The name of a sweep that is given none."""
SHORT = {"depth": "depth", "optimizer.learning_rate": "lr", "seed": "seed"}
"""What a varied option is called in an experiment's name; others by their last part."""
FIXED = ("name", "runs", "device")
"""Options that the sweep itself decides, or that are the machine's and not the experiment's."""


@dataclass(frozen=True)
class SweepConfig(TrainConfig):
    """Train several runs from one cache, every combination of what is listed. Running the same command again
    goes on where it ended; what is trained already stays as it is. Every option of `python -m train` holds for all of
    them."""

    name: str | None = SWEEP
    """The experiments are kept in RUNS/NAME/EXPERIMENT, what became of each in RUNS/NAME/sweep.json, and the page that
    compares them is RUNS/NAME/compare.html."""
    depths: tuple[str, ...] = ()
    """Depths to compare, as 2-0 2-4 4-10. Default: `depth` alone."""
    rates: tuple[float, ...] = ()
    """Learning rates to compare. Default: `optimizer.learning_rate` alone."""
    seeds: tuple[int, ...] = ()
    """Seeds; two or more show how far a difference is chance. Default: `seed` alone."""
    vary: tuple[str, ...] = ()
    """Any other options to compare, each with its values: "objective.logit_mean=0,1" "loader.batch_size=1,2"."""
    gpus: tuple[str, ...] = ()
    """GPUs to train on, as CUDA numbers them: one experiment at a time on each. Default: one after the other on what
    `device` says."""
    shared_base: bool = False
    """Train all experiments of a GPU side by side in one process, in turns, on one frozen base. Takes the memory of the
    base once and of the largest step, and of each run its weights and optimizer states. Each result is the one
    that it would be alone."""

    def check(self) -> None:
        """Refuse impossible values."""
        super().check()
        dimensions(self)
        if len({*self.gpus}) != len(self.gpus):
            raise UserError(f"GPUS names one twice: {' '.join(self.gpus)}")


@dataclass(frozen=True)
class Experiment:
    """One run of a sweep."""

    name: str
    varied: Mapping[str, Any]
    """Option to its value, of what is listed in the sweep."""
    options: TrainConfig

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.options.runs) / self.options.run_name


def dimensions(options: SweepConfig) -> dict[str, list[str]]:
    """Option to the values that are compared, as they are written; the outermost, of which a value comes back last,
    first. Seeds are outermost, so that everything is trained once before anything is twice. Raises `UserError`."""
    listed: dict[str, list[str]] = {
        "seed": [str(seed) for seed in options.seeds],
        "depth": list(options.depths),
        "optimizer.learning_rate": [str(rate) for rate in options.rates],
    }
    known = [name for name in field_names(TrainConfig) if name not in FIXED]
    for words in options.vary:
        key, equals, values = words.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not values.strip():
            raise UserError(f"vary '{words}': write an option and its values, as objective.logit_mean=0,1")
        if key not in known:
            raise UserError(f"vary '{words}': unknown option '{key}': {nearest(key, known)}")
        if listed.get(key):
            raise UserError(f"vary '{words}': {key} is listed already")
        listed[key] = [value.strip() for value in values.split(",")]
    for key, texts in listed.items():
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise UserError(f"{key} lists {twice[0]} twice")
    return {key: texts for key, texts in listed.items() if texts}


def experiments(options: SweepConfig, before: Sequence[Experiment] = ()) -> list[Experiment]:
    """All of them, in the order in which they are trained. One whose options an experiment of `before` had, those of
    an earlier start of this sweep, keeps its name, whatever is varied now. Raises `UserError` for options that are
    impossible together."""
    folder = Path(options.runs) / options.run_name
    given = to_dict(options)
    common = {field.name: given[field.name] for field in fields(TrainConfig)} | {"runs": str(folder), "name": None}
    varied = dimensions(options)
    known = {_identity(experiment.options): experiment.name for experiment in before}
    found: dict[str, Experiment] = {}
    for values in itertools.product(*varied.values()):
        words = [f"--{key.replace('_', '-')}={text}" for key, text in zip(varied, values, strict=True)]
        chosen = load(TrainConfig, words, command="python -m train", recorded=common)
        assert chosen is not None
        here = {key: _value(chosen, key) for key in varied}
        name = known.get(_identity(chosen)) or _name(here, varied) or chosen.run_name
        if name in found:
            raise UserError(f"two experiments would both be called {name}: vary something that tells them apart")
        found[name] = Experiment(name, here, replace(chosen, name=name))
        found[name].options.check()
    return list(found.values())


def read(recipe: Path) -> TrainConfig:
    """The options of an experiment, as they were written. Raises `UserError`."""
    options = load(TrainConfig, ["--recipe", str(recipe)], command="python -m train")
    assert options is not None
    return options


def _identity(options: TrainConfig) -> str:
    """The same for two configurations that differ in nothing but what a sweep decides."""
    return repr(sorted((key, value) for key, value in to_dict(options).items() if key not in FIXED))


def _value(options: TrainConfig, key: str) -> Any:
    value: Any = options
    for part in key.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def _name(given: Mapping[str, Any], varied: Mapping[str, list[str]]) -> str:
    """`depth-2-0_lr-1e-05_seed-0`: what varies, depth first and the seed last."""
    parts = [f"{SHORT.get(key, key.rpartition('.')[2])}-{_word(given[key])}" for key in varied if len(varied[key]) > 1]
    first = [part for part in parts if not part.startswith("seed-")]
    return "_".join([*first, *(part for part in parts if part.startswith("seed-"))])


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, list):
        value = "+".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-")[-60:]
