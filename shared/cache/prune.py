"""Remove what nothing in a cache refers to any more, after naming it: `python -m shared.cache.prune CACHE [--yes]`.

Layers that an earlier run made with other settings, shards of which no row is wanted, and what killed runs left. Work
that an interrupted run has finished is referred to by nothing yet, and is kept unless `--unfinished` says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared import atomic
from shared.cache import index, schema, writer
from shared.cache.reader import Cache, CacheError
from shared.cache.storage import Storage
from shared.errors import UserError, run_command_line
from shared.report import say

Why = Literal["old layer", "no row wanted", "left by a killed run", "unfinished", "not of this cache"]
_REMOVED: tuple[Why, ...] = ("old layer", "no row wanted", "left by a killed run")
_LISTS = {schema.MANIFEST, schema.SAMPLES, schema.CAPTIONS, schema.OPTIONS}
_KEPT_FOLDERS = {index.FOLDER, "scan"}


@dataclass(frozen=True)
class Leftover:
    """A file, or a layer's folder with all in it, that nothing refers to."""

    name: str
    """Relative to the cache; a folder ends in a slash."""
    why: Why
    detail: str
    files: tuple[str, ...]
    num_bytes: int

    @property
    def shard(self) -> tuple[str, str]:
        """Folder and shard name of a file in a layer's folder."""
        folder, file = self.name.split("/")
        return folder, file.split(".")[0]


def leftovers(cache: Cache) -> list[Leftover]:
    """What nothing in a sound cache refers to, by name. Raises `CacheError` where a list is damaged."""
    storage = cache.storage
    by_top: dict[str, dict[str, int]] = {}
    for name, size in _files(storage).items():
        by_top.setdefault(name.split("/")[0], {})[name] = size
    layers = {entry["folder"]: name for name, entry in cache.manifest["layers"].items()}
    class_images = {sample.source.split("/")[0] for sample in cache.class_images}
    found: list[Leftover] = []
    for top, files in sorted(by_top.items()):
        if top in layers:
            found += _in_layer(cache, layers[top], files)
        elif top in _LISTS or top in _KEPT_FOLDERS:
            continue
        elif top.endswith(atomic.PART):
            found.append(Leftover(top, "left by a killed run", "", tuple(files), sum(files.values())))
        elif top in class_images:
            parts = {name: size for name, size in files.items() if name.endswith(atomic.PART)}
            found += [Leftover(name, "left by a killed run", "", (name,), size) for name, size in parts.items()]
        elif f"{top}/{schema.PRIOR}.json" in files:
            detail = "class images that were painted with other settings than now"
            found.append(Leftover(f"{top}/", "old layer", detail, tuple(files), sum(files.values())))
        elif f"{top}/{schema.LAYER}" in files:
            detail = f"made with other settings than {_named_like(top, layers)} now"
            found.append(Leftover(f"{top}/", "old layer", detail, tuple(files), sum(files.values())))
        elif top.startswith(f"{schema.PRIOR}-") or any(n.endswith((".tar", ".parquet")) and "/" in n for n in files):
            detail = "a run that made it did not come to its end"
            found.append(Leftover(f"{top}/", "unfinished", detail, tuple(files), sum(files.values())))
        else:
            shown = top if top in files else f"{top}/"
            found.append(Leftover(shown, "not of this cache", "", tuple(files), sum(files.values())))
    return found


def _named_like(folder: str, layers: Iterable[str]) -> str:
    name = folder.rsplit("-", 1)[0]
    return next((layer for layer in layers if layer.rsplit("-", 1)[0] == name), "any layer")


def _in_layer(cache: Cache, name: str, files: dict[str, int]) -> list[Leftover]:
    """Files of a layer's folder that nothing refers to, and shards of it in which no row is wanted."""
    layer = cache.layer(name)
    wanted = {schema.shard_name(int(number)) for number in np.unique(layer.places.shard)}
    listed = {shard.name for shard in layer.summary.shards}
    found = []
    for file, size in sorted(files.items()):
        stem, _, ending = file.split("/")[1].partition(".")
        if ending.endswith(atomic.PART.removeprefix(".")):
            found.append(Leftover(file, "left by a killed run", "", (file,), size))
        elif file.endswith(f"/{schema.LAYER}") or stem in wanted:
            continue
        elif stem in listed:
            found.append(Leftover(file, "no row wanted", "all of its samples or captions have changed", (file,), size))
        elif ending in ("tar", "parquet"):
            detail = "a run that made it did not come to its end"
            found.append(Leftover(file, "unfinished", detail, (file,), size))
        else:
            found.append(Leftover(file, "not of this cache", "", (file,), size))
    return found


def _files(storage: Storage) -> dict[str, int]:
    """Every file of the cache with its size, what is being written too."""
    found = storage.listing()
    if not storage.remote:
        for path in storage.root.rglob(f"*{atomic.PART}"):
            found[path.relative_to(storage.root).as_posix()] = path.stat().st_size
    return found


def remove(cache: Cache, going: Iterable[Leftover]) -> None:
    """Remove these. Lists that name them are written first, so that a reader never misses what it was promised."""
    going = list(going)
    names = {entry["folder"]: name for name, entry in cache.manifest["layers"].items()}
    without: dict[str, set[str]] = {}
    for leftover in going:
        if leftover.why in ("no row wanted", "unfinished") and not leftover.name.endswith("/"):
            folder, shard = leftover.shard
            without.setdefault(names[folder], set()).add(shard)
    if without:
        if cache.storage.remote:
            cache.storage.synchronize()
        writer.publish_layers_again(cache.path, without, cache.storage)
    for leftover in going:
        for name in leftover.files:
            if name.endswith(atomic.PART):
                (cache.path / name).unlink(missing_ok=True)
            else:
                cache.storage.remove(name)
        emptied = cache.path / leftover.name
        if leftover.name.endswith("/") and emptied.is_dir() and not any(emptied.iterdir()):
            emptied.rmdir()


def main() -> int:
    """The command line: names what nothing refers to, and with `--yes` removes it."""
    words = sys.argv[1:]
    flags = {word for word in words if word.startswith("-")}
    paths = [word for word in words if not word.startswith("-")]
    if len(paths) != 1 or flags - {"--yes", "--unfinished"}:
        raise UserError(
            "python -m shared.cache.prune CACHE [--yes] [--unfinished]: names what nothing in the cache refers to; "
            "--yes removes it; --unfinished takes along what interrupted runs have finished"
        )
    alone = atomic.alone(Cache(paths[0]).path, "removing from") if "--yes" in flags else nullcontext()
    with alone:
        cache = Cache(paths[0])
        try:
            found = leftovers(cache)
        except CacheError as error:
            raise UserError(f"{error} Nothing is removed from a damaged cache.") from error
        removed = (*_REMOVED, "unfinished") if "--unfinished" in flags else _REMOVED
        going = [leftover for leftover in found if leftover.why in removed]
        for leftover in found:
            what = "remove" if leftover in going else "keep  "
            detail = f": {leftover.detail}" if leftover.detail else ""
            say(f"{what} {leftover.name} ({leftover.num_bytes / 1e6:,.1f} MB; {leftover.why}{detail})")
        total = sum(leftover.num_bytes for leftover in going)
        if not going:
            say(f"{cache.url}: there is nothing to remove")
        elif "--yes" not in flags:
            say(f"{total / 1e6:,.1f} MB can be removed; nothing was. To remove them: make prune CACHE={paths[0]} YES=1")
        else:
            remove(cache, going)
            say(f"{total / 1e6:,.1f} MB removed")
    return 0


if __name__ == "__main__":
    run_command_line(main)
