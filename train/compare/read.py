"""Reading runs' folders as they are: trained, still training, failed before the first step, or cut off by a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared import families
from shared.config import completed, to_dict
from shared.errors import UserError
from train.config import TrainConfig
from train.objectives import ObjectiveOptions
from train.run import CONFIG, METRICS, RUN

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Folder:
    """What a run's folder says."""

    path: Path
    stated: Mapping[str, Any]
    """run.json; empty where the run never began."""
    options: Mapping[str, Any]
    """Every option by its full name; one that was not there yet when the run began has its default."""
    figures: Mapping[str, Mapping[int, float]]
    """metrics.jsonl: each figure by its full name ("held_out/loss") at its steps, in their order."""
    outcome: Mapping[str, Any]
    """What the sweep says of it; empty outside of one."""
    notes: Sequence[str]
    """What could not be read."""

    @property
    def last_start(self) -> Mapping[str, Any]:
        """What run.json says of the last start."""
        starts = self.stated.get("starts") or [{}]
        return starts[-1]


def find(paths: Sequence[Path]) -> list[Path]:
    """The runs among `paths`: runs' folders, and those of folders that hold runs. Of a sweep those that failed before
    they had a folder are among them. What a shell's * brings along (sweep.json, recipes, pages) is passed over.
    `UserError` where there is no run."""
    found: dict[Path, None] = {}
    for path in paths:
        if (path / RUN).is_file() or path.name in _failed(path.parent):
            found[path] = None
        elif path.is_dir():
            inside = {child for child in path.iterdir() if (child / RUN).is_file()}
            found |= dict.fromkeys(sorted(inside | {path / name for name in _failed(path)}))
        elif not path.exists():
            raise UserError(f"{path} does not exist: --runs takes the folders of runs, or a sweep's")
    if not found:
        raise UserError(
            f"no run in {', '.join(map(str, paths))}: a run's folder holds {RUN}, as `make train` writes it"
        )
    return list(found)


def _failed(sweep: Path) -> list[str]:
    return [name for name, entry in _outcomes(sweep).items() if entry.get("outcome") == "failed"]


def read(path: Path) -> Folder:
    """All that the folder of a run says. Nothing in it must be whole: what cannot be read is a note."""
    notes: list[str] = []
    stated, figures = _json(path / RUN, notes), _figures(path / METRICS, notes)
    options = _options(path, stated.get("family"), notes)
    return Folder(path, stated, options, figures, _outcomes(path.parent).get(path.name, {}), notes)


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.parent.name}: {path.name} cannot be read ({error})")
        return {}
    return found if isinstance(found, dict) else {}


def _options(path: Path, family: str | None, notes: list[str]) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        file = path.parent / f"{path.name}.yaml"  # of an experiment that failed before it began: the sweep's recipe
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        notes.append(f"{path.name}: {CONFIG} cannot be read ({error})")
        return {}
    if not isinstance(found, dict):
        return {}
    options = completed(found, to_dict(TrainConfig()))
    if family in families.names():
        options["objective"] = ObjectiveOptions.left_open(options["objective"], families.get(family).objective)
    return dict(flatten(options))


def flatten(content: Mapping[str, Any], prefix: str = "", separator: str = ".") -> Iterator[tuple[str, Any]]:
    """(full name, value) of nested dictionaries: "optimizer.learning_rate"."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}{separator}", separator)
        else:
            yield f"{prefix}{key}", value


def _figures(path: Path, notes: list[str]) -> dict[str, dict[int, float]]:
    if not path.is_file():
        return {}
    found: dict[str, dict[int, float]] = {}
    damaged = 0
    raw = path.read_bytes().splitlines(keepends=True)
    for i, line in enumerate(raw):
        try:
            figures = json.loads(line)
            step = int(figures.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            if i + 1 < len(raw) or line.endswith(b"\n"):
                damaged += 1  # the last one may be being written, or was cut off by a kill
            continue
        for name, value in flatten(figures, separator="/"):
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {})[step] = float(value)
    if damaged:
        notes.append(f"{path.parent.name}: {damaged} line(s) of {path.name} cannot be read and are left out")
    return {name: dict(sorted(figure.items())) for name, figure in found.items()}


def _outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """What a sweep's sweep.json says of its experiments, by their folder's name."""
    return _json(folder / SWEEP, []).get("experiments") or {}
