"""Reading runs' folders as they are: trained, still training, failed before the first step, or cut off by a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared.errors import UserError
from train.run import CONFIG, METRICS, RUN

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Folder:
    """What a run's folder says."""

    path: Path
    stated: Mapping[str, Any]
    """run.json; empty where the run never began."""
    options: Mapping[str, Any]
    """Every option by its full name."""
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
    """The runs among `paths`: runs' folders, and those of folders that hold runs (sweeps). What a shell's * brings
    along beside them (sweep.json, recipes, pages) is passed over. `UserError` where there is none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: --runs takes runs' folders, or a sweep's")
        if _is_run(path):
            found[path] = None
        elif path.is_dir():
            found |= dict.fromkeys(sorted(child for child in path.iterdir() if _is_run(child) or _failed(child)))
    found |= dict.fromkeys(path for path in paths if path.is_dir() and path not in found and _failed(path))
    if not found:
        raise UserError(
            f"no run in {', '.join(map(str, paths))}: a run's folder holds {RUN}, as `make train` writes it"
        )
    return list(found)


def _is_run(path: Path) -> bool:
    return (path / RUN).is_file()


def _failed(path: Path) -> bool:
    """Whether the sweep that the folder is in knows it: then it is shown even if it never began."""
    return path.is_dir() and path.name in _outcomes(path.parent)


def read(path: Path) -> Folder:
    """All that the folder of a run says. Nothing in it must be whole: what cannot be read is a note."""
    notes: list[str] = []
    stated, options, figures = _json(path / RUN, notes), _options(path, notes), _figures(path / METRICS, notes)
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


def _options(path: Path, notes: list[str]) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        notes.append(f"{path.name}: {CONFIG} cannot be read ({error})")
        return {}
    return dict(flatten(found)) if isinstance(found, dict) else {}


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
    experiments = _json(folder / SWEEP, []).get("experiments", {})
    if isinstance(experiments, list):
        experiments = {entry.get("name"): entry for entry in experiments if isinstance(entry, dict)}
    return {name: entry for name, entry in experiments.items() if isinstance(entry, dict)}
