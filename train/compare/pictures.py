"""Runs' pictures, made small enough to stand in the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from shared.inspect.thumbnails import Thumbnail, thumbnail
from train.compare.data import Comparison, Picture

_MOST = 900
"""Painted pictures in a page, some 10 MB; beyond, steps between are left out."""
_SIDES = ((240, 384), (_MOST * 2, 256))
_GRID_SIDE, _MOST_GRIDS = 900, 60
STILL = ("drawing", "original", "without")
"""Of a held-out sample, what does not change from step to step."""


@dataclass
class Album:
    """Pictures by number, and where each belongs."""

    images: list[Thumbnail] = field(default_factory=list)
    stills: dict[str, dict[str, int]] = field(default_factory=dict)
    """Held-out sample -> "drawing", "original", "without" -> image."""
    captions: dict[str, str] = field(default_factory=dict)
    painted: dict[str, dict[str, list[tuple[int, int]]]] = field(default_factory=dict)
    """Run -> held-out sample -> (step, image), in the order of steps. The sample "" is a grid of all."""
    num_left_out: int = 0
    """Pictures of steps that are left out, since they would make the page too large."""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""


def album(comparison: Comparison, folders: Mapping[str, Path]) -> Album:
    """The pictures of the runs in these folders, by the runs' names."""
    made, known = Album(), dict[tuple[str, int], int]()
    singles = [(run.name, picture) for run in comparison.runs for picture in run.pictures if picture.key is not None]
    grids = [(run.name, picture) for run in comparison.runs for picture in run.pictures if picture.key is None]
    kept, kept_grids = _fewer(singles, _MOST), _fewer(grids, _MOST_GRIDS)
    made.num_left_out = len(singles) - len(kept) + len(grids) - len(kept_grids)
    side = next((side for most, side in _SIDES if len(kept) <= most), _SIDES[-1][1])

    def add(path: Path, digest: str, side: int) -> int | None:
        if (digest, side) not in known:
            try:
                with Image.open(path) as picture:
                    found = thumbnail(picture, side)
            except (OSError, UnidentifiedImageError) as error:
                made.notes.append(f"{path.name}: no picture that can be read ({error})")
                return None
            known[digest, side] = len(made.images)
            made.images.append(found)
        return known[digest, side]

    for run in comparison.runs:
        for i, (key, caption) in enumerate(run.captions):
            still = made.stills.setdefault(key, {})
            made.captions.setdefault(key, caption)
            for what in STILL:
                path = folders[run.name] / "pictures" / "held-out" / f"{i:02d}-{what}.png"
                if what not in still and path.is_file() and (image := add(path, str(path), side)) is not None:
                    still[what] = image
    for group, size in ((kept, side), (kept_grids, _GRID_SIDE)):
        for name, picture in group:
            if (image := add(folders[name] / picture.path, picture.sha256, size)) is not None:
                made.painted.setdefault(name, {}).setdefault(picture.key or "", []).append((picture.step, image))
    return made


def _fewer(pictures: Sequence[tuple[str, Picture]], most: int) -> list[tuple[str, Picture]]:
    """At most some `most` of them: steps are left out evenly, the same of all runs; each run's last one stays."""
    steps = sorted({picture.step for _, picture in pictures})
    last: dict[str, int] = {}
    for name, picture in pictures:
        last[name] = max(last.get(name, 0), picture.step)
    num_steps = len(steps)
    while num_steps > 1:
        chosen = {steps[round(i * (len(steps) - 1) / (num_steps - 1))] for i in range(num_steps)}
        kept = [(name, picture) for name, picture in pictures if picture.step in chosen or picture.step == last[name]]
        if len(kept) <= most:
            return kept
        num_steps -= 1
    return [(name, picture) for name, picture in pictures if picture.step == last[name]]
