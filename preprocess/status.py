"""What a cache has, lacks and no longer needs, and why: before any model is loaded.

`python -m preprocess.status` says it and stops; preprocessing says what it is about to make in the same words.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess import explain
from preprocess.config import PreprocessConfig
from preprocess.explain import State
from shared.cache import schema
from shared.cache.schema import CacheError, Reads
from shared.config import load
from shared.errors import run_command_line
from shared.report import say, table


@dataclass(frozen=True)
class Before:
    """The cache as the last finished run left it; empty where there was none, or where its lists are damaged."""

    finished: bool
    """Whether there is a manifest that can be read."""
    state: State = field(default_factory=State)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the layers that the manifest names."""
    shards: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the shards of those layers."""

    @classmethod
    def read(cls, cache: Path) -> Before:
        """What the lists of the cache say."""
        try:
            manifest = schema.read_sealed(cache / schema.MANIFEST)
            state = State.of(schema.read_samples(cache / schema.SAMPLES), schema.read_captions(cache / schema.CAPTIONS))
        except CacheError:
            return cls(finished=False)
        recipes, shards = {}, {}
        for name, entry in manifest["layers"].items():
            try:
                layer = schema.read_sealed(cache / entry["folder"] / schema.LAYER)
            except CacheError:
                continue  # damaged: its rows are looked for one by one all the same
            recipes[name] = layer["recipe"]
            shards[name] = [shard["name"] for shard in layer["shards"]]
        return cls(True, state, recipes, shards)


@dataclass(frozen=True)
class Wanted:
    """A layer that the cache shall have, and what is there of it."""

    name: str
    reads: Reads
    recipe: Mapping[str, Any]
    drawn: str | None
    """The layer of drawings that it encodes."""
    rows: Mapping[str, str]
    """Key to input of every row that it must have."""
    missing: Sequence[str]
    """Keys of those that are in no finished shard."""
    finished: set[tuple[str, str]]
    """(key, input) of what its finished shards hold."""
    finished_shards: set[str]
    num_units: int
    """Shards that will be made."""
    bytes_on_disk: int
    bytes_to_come: int


@dataclass(frozen=True)
class LayerStatus:
    """What there is of one layer."""

    name: str
    fresh: int
    """Rows that are there as they shall be."""
    stale: Mapping[str, int]
    """Rows that are there and wanted no more, by reason."""
    missing: Mapping[str, int]
    """Rows that have to be made, by reason."""
    num_units: int
    bytes_on_disk: int
    bytes_to_come: int


def status(layers: Sequence[Wanted], now: State, before: Before) -> list[LayerStatus]:
    """Each layer's state, with the reasons in words."""
    users = now.users()
    changed = {layer.name: _recipe_reason(layer, before, layers) for layer in layers}
    return [
        LayerStatus(
            name=layer.name,
            fresh=len(layer.rows) - len(layer.missing),
            stale=Counter(
                explain.stale(layer.reads, key, now)
                for key, input_digest in layer.finished
                if layer.rows.get(key) != input_digest
            ),
            missing=Counter(
                changed[layer.name] or _row_reason(layer, key, now, before, users) for key in layer.missing
            ),
            num_units=layer.num_units,
            bytes_on_disk=layer.bytes_on_disk,
            bytes_to_come=layer.bytes_to_come,
        )
        for layer in layers
    ]


def _recipe_reason(layer: Wanted, before: Before, layers: Sequence[Wanted]) -> str | None:
    """Why the layer as a whole is another one than before; None where it is the same."""
    if not before.finished:
        return "not made yet"
    recipe = before.recipes.get(layer.name)
    if recipe is None:
        return "new layer"
    if schema.fingerprint(recipe) == schema.fingerprint(layer.recipe):
        return None
    reason = explain.recipe_changed(layer.recipe, recipe)
    drawn = next((other for other in layers if other.name == layer.drawn), None)
    if drawn is not None and reason == explain.DRAWINGS_CHANGED:
        return f"{drawn.name}: {_recipe_reason(drawn, before, layers)}"
    return reason


def _row_reason(layer: Wanted, key: str, now: State, before: Before, users: Mapping[str, Any]) -> str:
    reason = explain.missing(layer.reads, key, now, before.state, users)
    if reason == explain.LOST:
        lost = sorted(set(before.shards.get(layer.name, ())) - layer.finished_shards)
        return f"lost with {', '.join(lost)}.tar or its index" if lost else "not made yet"
    return reason


def report(found: Sequence[LayerStatus], free_bytes: int) -> None:
    """Say it as a table, with what is to be made and what is stale line by line."""
    rows = [
        (
            layer.name, f"{layer.fresh:,}", f"{sum(layer.missing.values()):,}", f"{sum(layer.stale.values()):,}",
            f"{layer.num_units:,}", f"{layer.bytes_on_disk / 1e6:,.1f}", f"{layer.bytes_to_come / 1e6:,.1f}",
        )
        for layer in found
    ]  # fmt: skip
    say(table(("layer", "fresh", "to make", "stale", "units of work", "MB on disk", "MB to come"), rows, right=1))
    for layer in found:
        if layer.missing:
            say(f"  {layer.name}, to make: {explain.summary(layer.missing)}")
    for layer in found:
        if layer.stale:
            say(f"  {layer.name}, stale: {explain.summary(layer.stale)}")
    units, to_come = (sum(getattr(layer, name) for layer in found) for name in ("num_units", "bytes_to_come"))
    if not units:
        say("all is fresh: there is nothing to make")
        return
    fits = "" if to_come <= free_bytes else ": THEY DO NOT FIT, and preprocessing will not start"
    say(f"{units:,} units of work, about {to_come / 1e6:,.1f} MB to come; {free_bytes / 1e9:,.1f} GB are free{fits}")


def recorded_options(cache: Path) -> dict[str, Any]:
    """What the cache was made with last; nothing where it does not say, or where its note is damaged."""
    try:
        return schema.read_sealed(cache / schema.OPTIONS)
    except CacheError:
        return {}


def cache_of(words: Sequence[str]) -> Path:
    """The cache that a command line names."""
    for i, word in enumerate(words):
        if word.startswith("--cache="):
            return Path(word.split("=", 1)[1]).expanduser()
        if word == "--cache" and i + 1 < len(words):
            return Path(words[i + 1]).expanduser()
    return Path(PreprocessConfig.cache)


def main() -> int:
    """The command line: the options of preprocessing, beginning with those that the cache was made with."""
    words = sys.argv[1:]
    command = "python -m preprocess.status"
    config = load(PreprocessConfig, command=command, recorded=recorded_options(cache_of(words)))
    if config is None:
        return 0
    from preprocess.pipeline import tell_status  # after --help and every refusal that needs no torch

    return tell_status(config)


if __name__ == "__main__":
    run_command_line(main)
