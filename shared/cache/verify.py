"""Check every byte of a cache and name what was altered: `python -m shared.cache.verify CACHE`.

Nothing is changed. Files that no list names (left by an interrupted run, or layers that the manifest no longer
refers to) are told apart from damage.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from shared.cache import schema
from shared.cache.reader import Cache, CacheError, LayerSummary
from shared.errors import UserError, run_command_line
from shared.report import progress


@dataclass
class Verdict:
    """What a check found."""

    problems: list[str] = field(default_factory=list)
    """Each names the file and, where there are any, the samples."""
    unlisted: list[str] = field(default_factory=list)
    """Files that nothing refers to. Harmless."""
    num_bytes: int = 0
    """Bytes that were read and compared."""

    @property
    def sound(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.problems


def verify(path: Path) -> Verdict:
    """Compare every byte of the cache at `path` with its checksums. Raises `CacheError` where there is no cache."""
    if not path.is_dir():
        raise CacheError(f"no such cache: {path}")
    verdict = Verdict()
    try:
        cache = Cache(path)
    except CacheError as error:
        verdict.problems.append(str(error))
        return verdict
    listed = {schema.MANIFEST, schema.SAMPLES, schema.CAPTIONS}
    verdict.num_bytes += sum((path / name).stat().st_size for name in listed)
    summaries = []
    for name in cache.layer_names:
        try:
            summaries.append(cache.summary(name))
        except CacheError as error:
            verdict.problems.append(str(error))
    shards = [(summary, shard) for summary in summaries for shard in summary.shards]
    with progress(total=sum(shard.tar_bytes for _, shard in shards), unit="B", title="verify") as bar:
        for summary, shard in shards:
            _verify_shard(path / summary.folder, summary, shard, verdict)
            bar.update(shard.tar_bytes)
    for summary in summaries:
        listed.add(f"{summary.folder}/{schema.LAYER}")
        listed.update(f"{summary.folder}/{shard.name}{end}" for shard in summary.shards for end in (".tar", ".parquet"))
        try:
            cache.layer(summary.name)
        except CacheError as error:
            if str(error) not in verdict.problems and not any(summary.folder in known for known in verdict.problems):
                verdict.problems.append(str(error))
    found = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    verdict.unlisted = [name for name in found if name not in listed]
    return verdict


def _verify_shard(folder: Path, summary: LayerSummary, shard: schema.Shard, verdict: Verdict) -> None:
    tar, index = folder / f"{shard.name}.tar", folder / f"{shard.name}.parquet"
    if not index.is_file() or schema.file_checksum(index) != shard.index_checksum:
        verdict.problems.append(f"{index}: missing or altered")
        return
    verdict.num_bytes += index.stat().st_size
    if not tar.is_file():
        verdict.problems.append(f"{tar}: missing, with all its {shard.rows} samples")
        return
    verdict.num_bytes += tar.stat().st_size
    if tar.stat().st_size == shard.tar_bytes and schema.file_checksum(tar) == shard.tar_checksum:
        return
    altered = []
    with open(tar, "rb") as file:
        for row in schema.read_table(index).to_pylist():
            if row["status"] == "ok":
                file.seek(row["offset"])
                if schema.checksum(file.read(row["length"])) != row["checksum"]:
                    altered.append(f"{row['key']}.{row['member']}")
    size = tar.stat().st_size
    what = f"{size} bytes instead of {shard.tar_bytes}" if size != shard.tar_bytes else "altered"
    whose = f"samples {', '.join(altered)}" if altered else "no sample's data, only the archive around it"
    verdict.problems.append(f"{tar}: {what} (layer {summary.name}): {whose}")


def main() -> int:
    """The command line: exit code 0 for a sound cache, 1 for a damaged one."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        raise UserError("python -m shared.cache.verify CACHE: checks every byte of a cache; takes one folder")
    path = Path(sys.argv[1])
    verdict = verify(path)
    for problem in verdict.problems:
        print(f"DAMAGED  {problem}")
    for name in verdict.unlisted:
        print(f"unlisted {path / name} (harmless: nothing refers to it)")
    if verdict.sound:
        print(f"sound: {path}, {verdict.num_bytes / 1e6:,.1f} MB compared")
        return 0
    print(
        f"{len(verdict.problems)} problem(s). To mend: remove the damaged shards (the .tar and .parquet named above) "
        "and run the same `make preprocess` again; only their samples are encoded again."
    )
    return 1


if __name__ == "__main__":
    run_command_line(main)
