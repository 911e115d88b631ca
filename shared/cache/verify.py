"""Check every byte of a cache and name what was altered: `python -m shared.cache.verify CACHE`.

Nothing is changed. Files that no list names (left by an interrupted run, or layers that the manifest no longer
refers to) are told apart from damage.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shared.cache import index, schema
from shared.cache.reader import Cache, CacheError, LayerSummary
from shared.cache.storage import Listed, RemoteOptions, is_remote
from shared.errors import UserError, run_command_line
from shared.report import progress


@dataclass
class Verdict:
    """What a check found."""

    problems: list[str] = field(default_factory=list)
    """Each names the file and, where there are any, the samples."""
    unlisted: list[str] = field(default_factory=list)
    """Files that nothing refers to; a folder stands for all its files where none is referred to. Harmless."""
    num_bytes: int = 0
    """Bytes that were read and compared."""

    @property
    def sound(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.problems


def verify(where: Path | str) -> Verdict:
    """Compare every byte of the cache in a folder or at a URL with its checksums. Raises `CacheError` where there is no
    cache.

    Where a list is damaged, nothing vouches for what only it lists: that is checked once the list is mended.
    """
    if is_remote(where):
        with tempfile.TemporaryDirectory() as folder:  # what was fetched before is not what the server has now
            return _verify_remote(Cache(str(where), RemoteOptions(folder=folder, shard_cache_bytes=_AT_A_TIME)))
    path = Path(where)
    if not path.is_dir():
        raise CacheError(f"no such cache: {path}")
    verdict = Verdict()
    try:
        cache = Cache(path)
    except CacheError as error:
        verdict.problems.append(str(error))
        return verdict
    listed = [path / name for name in (schema.MANIFEST, schema.SAMPLES, schema.CAPTIONS)]
    listed += [path / index.name_of(name) for name in ("samples", "captions", *cache.layer_names)]
    checks: list[Callable[[], object]] = [lambda: cache.samples, lambda: cache.captions]
    if (path / schema.OPTIONS).exists():
        listed.append(path / schema.OPTIONS)
        checks.append(lambda: schema.read_sealed(path / schema.OPTIONS))
    for check in checks:
        try:
            check()
        except CacheError as error:
            verdict.problems.append(str(error))
    with suppress(CacheError):  # of the table, which is a problem already
        listed += _check_class_images(path, cache, verdict)
    shards: list[tuple[LayerSummary, schema.Shard]] = []
    for name in cache.layer_names:
        try:
            summary = cache.summary(name)
        except CacheError as error:
            verdict.problems.append(str(error))
            continue
        listed.append(path / summary.folder / schema.LAYER)
        shards += [(summary, shard) for shard in summary.shards]
    verdict.num_bytes = sum(file.stat().st_size for file in listed if file.is_file())
    damaged_layers = set()
    with progress(total=sum(shard.tar_bytes for _, shard in shards), unit="B", title="verify") as bar:
        for summary, shard in shards:
            listed += [path / summary.folder / f"{shard.name}{end}" for end in (".tar", ".parquet")]
            if problem := _shard_problem(path / summary.folder, summary, shard, cache):
                verdict.problems.append(problem)
                damaged_layers.add(summary.name)
            else:
                verdict.num_bytes += sum(file.stat().st_size for file in listed[-2:])
            bar.update(shard.tar_bytes)
    for name in {summary.name: None for summary, _ in shards if summary.name not in damaged_layers}:
        try:
            cache.layer(name)  # every row is there
        except CacheError as error:
            verdict.problems.append(str(error))
    verdict.unlisted = _unlisted(path, listed)
    return verdict


_AT_A_TIME = 4_000_000_000
"""Bytes of a remote cache's shards that are on this machine's disk at a time."""


def _verify_remote(cache: Cache) -> Verdict:
    """Fetch every file; what does not arrive as the lists state it is a problem."""
    verdict = Verdict()

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except CacheError as error:
            verdict.problems.append(str(error))

    for check in (lambda: cache.samples, lambda: cache.captions):
        attempt(check)
    for name in cache.layer_names:
        attempt(partial(cache.layer, name))
        try:
            summary = cache.summary(name)
        except CacheError:
            continue
        for shard in progress(summary.shards, title=f"verify {name}", unit="shard"):
            stem = f"{summary.folder}/{shard.name}"
            index_file, tar = f"{stem}.parquet", Listed(f"{stem}.tar", shard.tar_bytes, shard.tar_checksum)
            attempt(partial(cache.storage.fetch, index_file, checksum=shard.index_checksum))
            attempt(partial(cache.storage.fetch, tar.name, num_bytes=tar.num_bytes, checksum=tar.checksum))
            verdict.num_bytes += shard.tar_bytes
    return verdict


def _check_class_images(path: Path, cache: Cache, verdict: Verdict) -> list[Path]:
    """Compare the pictures with what was encoded; all files that belong to them."""
    pictures = {path / sample.source: sample.sha256 for sample in cache.class_images}
    for file, sha256 in sorted(pictures.items()):
        if not file.is_file():
            verdict.problems.append(f"{file} is missing, a class image; {schema.MEND}")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            verdict.problems.append(f"{file} is not the class image that was encoded; `make repair` paints it again.")
    return [*pictures, *{file.parent / f"{schema.PRIOR}.json" for file in pictures}]


def _shard_problem(folder: Path, summary: LayerSummary, shard: schema.Shard, cache: Cache) -> str | None:
    """What is wrong with a shard; None where every byte of its tar and index is as it was written."""
    tar = folder / f"{shard.name}.tar"
    try:
        index = schema.read_table(folder / f"{shard.name}.parquet", shard.index_checksum)
    except CacheError as error:
        return str(error)
    if not tar.is_file():
        return f"{tar} (layer {summary.name}) is missing, with all its {shard.rows} rows"
    size = tar.stat().st_size
    if size == shard.tar_bytes and schema.file_checksum(tar) == shard.tar_checksum:
        return None
    altered = []
    with open(tar, "rb") as file:
        for row in index.to_pylist():
            if row["status"] == "ok":
                file.seek(row["offset"])
                if schema.checksum(file.read(row["length"])) != row["checksum"]:
                    altered.append(f"{row['key']}.{row['member']}{_text(cache, summary.reads, row['key'])}")
    what = f"has {size} bytes instead of {shard.tar_bytes}" if size != shard.tar_bytes else "was altered"
    whose = ", ".join(altered) if altered else "no sample's data, only the archive around it"
    return f"{tar} (layer {summary.name}) {what}: {whose}"


_SHOWN = 60
"""Characters of a caption."""


def _text(cache: Cache, reads: schema.Reads, key: str) -> str:
    """What tells a person which caption it is; nothing for samples, whose keys do."""
    if reads != "caption":
        return ""
    try:
        caption = cache.captions.get(key)
    except CacheError:
        return ""  # the table is a problem of its own
    return " (wanted no more)" if caption is None else f" ({json.dumps(caption.text[:_SHOWN], ensure_ascii=False)})"


def _unlisted(path: Path, listed: list[Path]) -> list[str]:
    """Files below `path` that are not listed, relative to it; a layer's folder as one where no file of it is."""
    referred = {*listed, *(file.parent for file in listed)}
    found = set()
    for file in path.rglob("*"):
        if file.is_file() and file not in referred and file.relative_to(path).parts[0] != schema.SCAN:
            top = path / file.relative_to(path).parts[0]
            found.add(file if top in referred or top == file else top)
    return sorted(f"{file.relative_to(path)}{'/' if file.is_dir() else ''}" for file in found)


def main() -> int:
    """The command line: exit code 0 for a sound cache, 1 for a damaged one."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        raise UserError("python -m shared.cache.verify CACHE: checks every byte of a cache; takes one folder")
    path = sys.argv[1]
    verdict = verify(path)
    for problem in verdict.problems:
        print(f"DAMAGED  {problem}")
    for name in verdict.unlisted:
        print(f"unlisted {path}/{name} (harmless: nothing refers to it)")
    if verdict.sound:
        print(f"sound: {path}, {verdict.num_bytes / 1e6:,.1f} MB compared")
        return 0
    print(f"{len(verdict.problems)} problem(s). To mend, which encodes only what is damaged: make repair CACHE={path}")
    return 1


if __name__ == "__main__":
    run_command_line(main)
