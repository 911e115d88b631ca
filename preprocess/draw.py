"""The cache's own detectors as a process to be asked: `python -m preprocess.draw`, pictures in, drawings out.

Training measures whether paintings keep to their drawings, and must not load detectors: it starts this process and
keeps it (`train/detector.py`). Over the pipe (`shared/frames.py`) come first the layers of drawings, then pictures; the
process ends when the pipe does.

  -> {"layers": {"canny": RECIPE}, "options": OPTIONS or null, "stand_in": "canny" or null, "device": "cpu"}
  <- {"lines": {"canny": true}}                         or {"refused": SENTENCE}, and the end
  -> {"layer": "canny"} (B, H, W, 3)
  <- {} (B, H, W, 3): of each the last (finest) drawing, or {"refused": SENTENCE}
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import IO, Any

import numpy as np

from preprocess import conditions
from preprocess.conditions.base import Condition, Drawer
from preprocess.images import ImageError
from shared import frames
from shared.errors import UserError

_NOT_THE_DETECTOR_S = frozenset({"layer", "schema_version", "condition", "resampling"})
"""What a layer's recipe holds beside what its condition says; see preprocess/layers.py."""


def serve(incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    """Answer until the other side ends."""
    if (first := frames.read(incoming)) is None:
        return
    asked, _ = first
    with ExitStack() as stack:
        try:
            chosen = {name: choose(name, recipe, asked) for name, recipe in asked["layers"].items()}
            drawers = {name: stack.enter_context(found.open(asked["device"])) for name, found in chosen.items()}
        except UserError as error:
            frames.write(outgoing, {"refused": str(error)})
            return
        frames.write(outgoing, {"lines": {name: found.lines for name, found in chosen.items()}})
        while (request := frames.read(incoming)) is not None:
            words, pictures = request
            assert pictures is not None
            try:
                drawings = np.concatenate([_drawn(drawers[words["layer"]], picture) for picture in pictures])
            except ImageError as error:
                frames.write(outgoing, {"refused": str(error)})
            else:
                frames.write(outgoing, {}, drawings)


def _drawn(drawer: Drawer, picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (1, H, W, 3): one at a time, so that memory does not grow with their number."""
    return drawer(picture[None])[:, -1]


def choose(name: str, recipe: Mapping[str, Any], asked: Mapping[str, Any]) -> Condition[Any]:
    """The detector that made this layer, not opened yet. Raises `UserError` where there is none that draws the same."""
    condition = conditions.get(recipe["condition"])
    if condition.reads == "conditioning_image":
        if asked["stand_in"] is None:
            raise UserError(
                f"the drawings of '{name}' came with the images, no detector made them. Name one that draws alike, as "
                "--validation.adherence-detector canny"
            )
        stand_in = conditions.get(asked["stand_in"])
        if stand_in.reads == "conditioning_image":
            raise UserError(f"validation.adherence_detector: {stand_in.name} detects nothing; take one as canny")
        return stand_in(stand_in.Options())
    stated = {key: value for key, value in recipe.items() if key not in _NOT_THE_DETECTOR_S}
    here: dict[str, Any] = {}
    for options in _candidates(condition, stated, (asked["options"] or {}).get(condition.name, {})):
        if not _possible(options):
            continue
        found = condition(options)
        here = found.recipe()
        if here == stated:
            return found
    differ = [key for key in sorted({*stated, *here}) if stated.get(key) != here.get(key)]
    raise UserError(
        f"the detector that drew '{name}' is not here: its {', '.join(differ)} "
        f"{'is' if len(differ) == 1 else 'are'} another's ({_brief(here, differ)} here, {_brief(stated, differ)} in "
        "the cache)"
    )


def _candidates(
    condition: type[Condition[Any]], stated: Mapping[str, Any], recorded: Mapping[str, Any]
) -> Iterator[Any]:
    """Settings that may have made the layer: those of the cache's last run, and where they were of another layer since,
    what the recipe itself says."""
    fields = {field.name for field in dataclasses.fields(condition.Options)}  # type: ignore[arg-type]

    def made(content: Mapping[str, Any]) -> Any:
        return condition.Options(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in content.items()
                if key in fields
            }
        )

    of_recipe = {key: value for key, value in stated.items() if key != "detector"}  # its class, not our word for it
    yield made(recorded)
    yield made({**recorded, **of_recipe})
    yield made(of_recipe)  # what it leaves out was at its default


def _possible(options: Any) -> bool:
    """Whether a mixture of two runs' settings makes sense."""
    try:
        options.check()
    except UserError:
        return False
    return True


def _brief(recipe: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(str(recipe.get(key))[:20] for key in keys)


def main() -> None:
    """Serve over this process's own pipes. Whatever libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair: it finishes its step, and may ask yet
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as outgoing:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin.buffer, outgoing)


if __name__ == "__main__":
    main()
