"""One trial after another: disturb a run or damage a cache, run again, and count what is lost, double or read as right
although it is wrong. Every number comes from comparing with what an undisturbed run made."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from benchmarks.torture import faults
from benchmarks.torture.children import KILLED, Child, Ended
from benchmarks.torture.faults import Fault, Full, Kill, Nothing, PowerCut, When
from benchmarks.torture.worlds import Reference, World, change_data, files, options_of, read, reference, write_data
from preprocess.config import PreprocessConfig
from preprocess.pipeline import preprocess
from preprocess.repair import repair
from shared import atomic
from shared.cache import prune, schema, writer
from shared.cache.reader import Cache
from shared.cache.verify import verify
from shared.errors import EXIT_INCOMPLETE, EXIT_REFUSED

OPERATIONS_OF_OTHERS = 60
"""About as many changes as a repair or a pruning makes."""
UNWANTED = 99
"""A shard's number that is far from those in use."""
MAX_ROUNDS = 60
"""Of one trial; more, and its kills always come too late."""


@dataclass
class Tally:
    """What was done, and what came of it."""

    kills: int = 0
    """Of preprocessing."""
    kills_of_others: int = 0
    """Of repairing and pruning."""
    power_cuts: int = 0
    enospc: int = 0
    flips: int = 0
    truncations: int = 0
    lost: int = 0
    """Rows that a finished shard had or a reader must find, and that were made again or are not there."""
    duplicated: int = 0
    """Members that the shards of a layer hold more than once."""
    undetected: int = 0
    """Wrong bytes that came out of a reader as if right, and damage that `verify` does not name."""
    problems: list[str] = field(default_factory=list)
    """What else is not as promised, in words."""
    notes: Counter[str] = field(default_factory=Counter)
    """How often what was met."""

    def __iadd__(self, other: Tally) -> Tally:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        return self

    def expect(self, fulfilled: bool, otherwise: str) -> None:
        """Note a broken promise."""
        if not fulfilled:
            self.problems.append(otherwise)


class Stamp(NamedTuple):
    """What tells whether a file was written again."""

    inode: int
    changed_ns: int
    checksum: str


def finished(cache: Path) -> dict[str, tuple[Stamp, Stamp, int]]:
    """Layer folder and name of every shard whose every byte is as its index states: stamps of its two files, and how
    many rows it holds."""
    found = {}
    for folder in sorted(path for path in cache.glob("*") if path.is_dir()):
        for shard, _ in writer.finished_shards(folder):
            tar, index = folder / f"{shard.name}.tar", folder / f"{shard.name}.parquet"
            if schema.file_checksum(tar) == shard.tar_checksum:
                found[f"{folder.name}/{shard.name}"] = (_stamp(tar), _stamp(index), shard.rows)
    return found


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_ino, status.st_mtime_ns, schema.file_checksum(path))


def num_duplicates(cache: Path) -> int:
    """Members beyond the first with the same key and input, over the listed shards of each layer. Reads the files
    without the cache's own reader."""
    count = 0
    for entry in json.loads((cache / schema.MANIFEST).read_text())["layers"].values():
        folder = cache / entry["folder"]
        seen: Counter[tuple[Any, ...]] = Counter()
        for shard in json.loads((folder / schema.LAYER).read_text())["shards"]:
            table = pq.ParquetFile(folder / f"{shard['name']}.parquet").read(use_threads=False)
            seen.update(zip(*(table[name].to_pylist() for name in ("key", "input", "member")), strict=True))
        count += seen.total() - len(seen)
    return count


def check_reading(cache: Path, tally: Tally, *allowed: Reference | None, where: str) -> list[str]:
    """Whatever a reader finds is right, and if it refuses nothing, all of one allowed state is there. The refusals."""
    found, refused = read(cache)
    states = [state.rows for state in allowed if state is not None]
    wrong = [key for key, value in found.items() if all(state.get(key) != value for state in states)]
    tally.undetected += len(wrong)
    tally.expect(not wrong, f"{where}: read as right, though wrong: {wrong[:3]}")
    if not refused:
        complete = any(found == state for state in states)
        tally.undetected += not complete
        tally.expect(complete, f"{where}: a reader finds neither the old nor the new cache")
    return refused


def check_end(cache: Path, tally: Tally, end: Reference, kept: dict[str, tuple[Stamp, Stamp, int]], where: str) -> None:
    """All rows are there, once, as they must be; `verify` is content; no shard of `kept` was touched."""
    found, refused = read(cache)
    lost = {(layer, key) for layer, key, _ in end.rows.keys() - found.keys()}
    tally.lost += len(lost)
    tally.expect(not lost and not refused, f"{where}: lost {sorted(lost)[:3]} {refused[:1]}")
    wrong = [key for key, value in found.items() if end.rows.get(key) != value]
    tally.undetected += len(wrong)
    tally.expect(not wrong, f"{where}: wrong {wrong[:3]}")
    if not refused:
        tally.duplicated += (double := num_duplicates(cache))
        tally.expect(not double, f"{where}: {double} members are there more than once")
    verdict = verify(cache)
    tally.expect(verdict.sound, f"{where}: verify says {verdict.problems[:2]}")
    check_kept(cache, tally, kept, where)


def check_kept(cache: Path, tally: Tally, kept: dict[str, tuple[Stamp, Stamp, int]], where: str) -> None:
    """Every shard of `kept` has the very same files."""
    now = finished(cache)
    for name, stamps in kept.items():
        if now.get(name) != stamps:
            tally.lost += stamps[2]
            tally.problems.append(f"{where}: the finished shard {name} is {'made again' if name in now else 'gone'}")


def check_same_files(cache: Path, tally: Tally, end: Reference, where: str) -> None:
    """Every byte of the cache is that of the undisturbed one."""
    now = files(cache)
    differing = sorted(name for name in now.keys() | end.files.keys() if now.get(name) != end.files.get(name))
    tally.expect(not differing, f"{where}: other bytes than undisturbed in {differing[:5]}")


# Worlds and runs


def run(
    command: Callable[[PreprocessConfig], int],
    options: PreprocessConfig,
    folder: Path,
    fault: Fault | None = None,
    prepare: Callable[[], object] | None = None,
) -> Child:
    """Begin a command in a child. With `fault`, its operations are logged to `folder / "log"` and one goes wrong."""
    log = folder / "log"
    log.unlink(missing_ok=True)

    def begin() -> None:
        if prepare is not None:
            prepare()
        if fault is not None:
            faults.install(Path(options.cache), fault, log)

    return Child(lambda: command(options), folder, begin)


def make_worlds(seed: str, model: Path, folder: Path) -> list[World]:
    """The two journeys of one seed: from nothing, and from the cache of an earlier state of the data set."""
    dice = random.Random(seed)
    data, later = folder / "data", folder / "later"
    write_data(data, dice)
    shutil.copytree(data, later)
    change_data(later, dice)
    options = options_of(data, model, dice)
    new = _undisturbed(f"{seed} new", options, None, folder / "new")
    return [new, _undisturbed(f"{seed} changed", replace(options, data=str(later)), new.end, folder / "changed")]


def _undisturbed(name: str, options: PreprocessConfig, start: Reference | None, folder: Path) -> World:
    world = World(name, options, start, Reference(folder, {}, {}), seconds=0.0, num_operations=0, code=0)
    counted = world.begin(folder / "counted")
    ended = run(preprocess, counted, folder, Nothing()).wait()
    operations = [line.split(" ", 1) for line in (folder / "log").read_text().splitlines()]
    timed = world.begin(folder / "end")
    ended = run(preprocess, timed, folder).wait()
    assert ended.code in (0, EXIT_INCOMPLETE), ended.err
    end = reference(Path(timed.cache))
    assert files(Path(counted.cache)) == end.files, "two undisturbed runs differ"
    before = {} if start is None else start.files
    made = {name for name, checksum in end.files.items() if before.get(name) != checksum}
    unseen = made - {path for kind, path in operations if kind == "rename"}
    assert not unseen, f"written in a way that the torture does not see: {sorted(unseen)}"
    return replace(world, end=end, seconds=ended.seconds, num_operations=len(operations), code=ended.code)


# Killed


def killed_run(
    command: Callable[[PreprocessConfig], int],
    options: PreprocessConfig,
    seconds: float,
    num_operations: int,
    dice: random.Random,
    folder: Path,
    tally: Tally,
) -> bool:
    """Begin a command and kill it, half of the times at a random instant, half around a random operation. Whether it
    was killed: it may have come to its end before."""
    if dice.random() < 0.5:
        child, how = run(command, options, folder), "at a random instant"
        child.kill_after(dice.uniform(0, seconds))
    else:
        whens: tuple[When, ...] = ("before", "half", "after")
        fault = Kill(dice.randrange(num_operations), dice.choice(whens))
        child, how = run(command, options, folder, fault), f"{fault.when} an operation"
    ended = child.wait()
    if ended.code == KILLED:
        if command is preprocess:
            tally.kills += 1
        else:
            tally.kills_of_others += 1
        tally.notes[f"{command.__name__} killed {how}"] += 1
        return True
    expect_code(ended, (0, EXIT_INCOMPLETE), tally, "a run that was to be killed later")
    return False


def expect_code(ended: Ended, codes: tuple[int, ...], tally: Tally, where: str) -> None:
    """The run ended with one of these codes, and without a traceback."""
    fulfilled = ended.code in codes and "Traceback" not in ended.err
    tally.expect(fulfilled, f"{where}: exit code {ended.code} and {ended.err[-300:]!r}")


def check_one_sentence(ended: Ended, sentence: str, tally: Tally, where: str) -> None:
    """The run was refused, and all that it said beside warnings is one line that begins so."""
    expect_code(ended, (EXIT_REFUSED,), tally, where)
    said = [line for line in ended.err.splitlines() if line and not line.startswith("warning: ")]
    right = len(said) == 1 and said[0].startswith(f"error: {sentence}")
    tally.expect(right, f"{where}: it says {said}")


def kill_trial(world: World, seed: str, quota: int, folder: Path) -> Tally:
    """Kill `quota` runs, each time running again; whenever one comes to its end, compare and begin anew."""
    dice, tally = random.Random(seed), Tally()
    for turn in range(MAX_ROUNDS):
        cache = folder / str(turn)
        options = world.begin(cache)
        where = f"{world.name}, kills {seed}/{turn}"
        kept = finished(cache)
        while tally.kills < quota:
            if not killed_run(preprocess, options, world.seconds, world.num_operations, dice, folder, tally):
                break
            if cache.exists():
                tally.notes[_seen(check_reading(cache, tally, world.start, world.end, where=where))] += 1
                check_kept(cache, tally, kept, where)
                kept = finished(cache)
            if dice.random() < 0.4:
                break
        expect_code(run(preprocess, options, folder).wait(), (world.code,), tally, where)
        check_end(cache, tally, world.end, kept, where)
        check_same_files(cache, tally, world.end, where)
        shutil.rmtree(cache)
        if tally.kills >= quota:
            return tally
    tally.problems.append(f"{world.name}: only {tally.kills} of {quota} kills came in time")
    return tally


def _seen(refused: list[str]) -> str:
    return "after a kill a reader refuses" if refused else "after a kill a reader finds the old or the new cache"


def repair_kill_trial(world: World, seed: str, quota: int, folder: Path) -> Tally:
    """Damage some files of a finished cache and kill `quota` repairs of it, each time repairing again."""

    def damage(options: PreprocessConfig, dice: random.Random) -> list[str]:
        names = dice.sample(sorted(world.end.files), 3)
        for name in names:
            dice.choice([flip, cut])(Path(options.cache) / name, dice)
        return names

    return _finished_kill_trial(world, seed, quota, folder, repair, damage)


def prune_kill_trial(world: World, seed: str, quota: int, folder: Path) -> Tally:
    """Kill `quota` prunings of a finished cache that has shards in which no row is wanted, and a layer of old."""

    def outdate(options: PreprocessConfig, dice: random.Random) -> list[str]:
        cache = Path(options.cache)
        layers = sorted(path.parent for path in cache.glob(f"*/{schema.LAYER}"))
        for layer in layers:
            with writer.ShardWriter(layer, UNWANTED) as shard:
                shard.add("gone", "an earlier input", {"safetensors": b"wanted no more"})
        run(preprocess, options, folder).wait()  # which lists them
        shutil.copytree(layers[0], cache / "old-00000000")
        return [f"{name}/{schema.shard_name(UNWANTED)}.tar" for name in (*(p.name for p in layers), "old-00000000")]

    return _finished_kill_trial(world, seed, quota, folder, prune_all, outdate)


def prune_all(options: PreprocessConfig) -> int:
    """`make prune YES=1`, in a process of its own."""
    sys.argv = ["prune", options.cache, "--yes"]
    return prune.main()


def _finished_kill_trial(
    world: World,
    seed: str,
    quota: int,
    folder: Path,
    command: Callable[[PreprocessConfig], int],
    change: Callable[[PreprocessConfig, random.Random], list[str]],
) -> Tally:
    """`change` damages or outdates a finished cache and names the shards that need not stay."""
    dice, tally = random.Random(seed), Tally()
    for turn in range(MAX_ROUNDS):
        cache = folder / str(turn)
        shutil.copytree(world.end.path, cache)
        options = replace(world.options, cache=str(cache))
        where = f"{world.name}, kills of {command.__name__} {seed}/{turn}"
        changed = change(options, dice)
        kept = {name: stamps for name, stamps in _others(finished(cache), *changed).items() if "old-" not in name}
        while tally.kills_of_others < quota:
            # They encode next to nothing.
            if not killed_run(command, options, world.seconds / 4, OPERATIONS_OF_OTHERS, dice, folder, tally):
                break
            if check_reading(cache, tally, world.end, where=where) and command is not repair:
                break  # a cache that is damaged is not pruned
        expect_code(run(repair, options, folder).wait(), (0, world.code), tally, where)
        check_end(cache, tally, world.end, kept, where)
        shutil.rmtree(cache)
        if tally.kills_of_others >= quota:
            return tally
    tally.problems.append(f"{world.name}: only {tally.kills_of_others} of {quota} kills came in time")
    return tally


def power_cut_trial(world: World, seed: str, folder: Path) -> Tally:
    """Cut the power at a random operation: what was flushed stays, what was not may be lost, and nothing is wrong."""
    dice, tally = random.Random(seed), Tally()
    cache = folder / "cache"
    options = world.begin(cache)
    where = f"{world.name}, power cut {seed}"
    was = finished(cache)
    fault = PowerCut(dice.randrange(world.num_operations), seed, folder / "stash")
    ended = run(preprocess, options, folder, fault).wait()
    tally.expect(ended.code == KILLED, f"{where}: exit code {ended.code} and {ended.err[-300:]!r}")
    tally.power_cuts += 1
    kept = finished(cache) if cache.exists() else {}
    check_promises(folder / "log", kept, tally, where)
    if cache.exists():
        check_kept(cache, tally, was, where)
        check_reading(cache, tally, world.start, world.end, where=where)
    expect_code(run(preprocess, options, folder).wait(), (world.code,), tally, where)
    check_end(cache, tally, world.end, kept, where)
    check_same_files(cache, tally, world.end, where)
    shutil.rmtree(folder)
    return tally


def check_promises(log: Path, kept: dict[str, tuple[Stamp, Stamp, int]], tally: Tally, where: str) -> None:
    """Every shard that was finished according to the log is there."""
    gone = {name for name in faults.promised(log) if name.removesuffix(".parquet") not in kept}
    tally.lost += len(gone)
    tally.expect(not gone, f"{where}: finished, but gone: {sorted(gone)[:3]}")


# Full disks


def enospc_trial(world: World, number: int, stays: bool, folder: Path) -> Tally:
    """The disk is full from operation `number` on."""
    tally = Tally(enospc=1)
    cache = folder / "cache"
    options = world.begin(cache)
    where = f"{world.name}, full at operation {number}, {'stays so' if stays else 'once'}"
    was = finished(cache)
    ended = run(preprocess, options, folder, Full(number, stays)).wait()
    check_full(ended, world, cache, tally, where)
    kept = finished(cache) if cache.exists() else {}
    check_kept(cache, tally, was, where)
    check_promises(folder / "log", kept, tally, where)
    expect_code(run(preprocess, options, folder).wait(), (world.code,), tally, where)
    check_end(cache, tally, world.end, kept, where)
    check_same_files(cache, tally, world.end, where)
    shutil.rmtree(folder)
    return tally


def check_full(ended: Ended, world: World, cache: Path, tally: Tally, where: str) -> None:
    """A run whose disk was full said so in one sentence and left no half of a file."""
    check_one_sentence(ended, "the disk is full: ", tally, where)
    if cache.exists():
        parts = [path.name for path in cache.rglob(f"*{atomic.PART}")]
        tally.expect(not parts, f"{where}: it leaves {parts}")
        check_reading(cache, tally, world.start, world.end, where=where)


def mounted_trial(world: World, seed: str, folder: Path) -> Tally:
    """A disk that is really full: a tmpfs with room for a part of what the run writes."""
    dice, tally = random.Random(seed), Tally()
    for _ in range(MAX_ROUNDS):
        with mounted(folder / "disk") as disk:
            cache = disk / "cache"
            options = world.begin(cache)
            where = f"{world.name}, full disk {seed}"
            was = finished(cache)
            free = int(dice.random() * _bytes_to_come(world))
            remount(disk, f"size={max(_used(disk) + free, 1 << 12)}")
            ended = run(preprocess, options, folder / "run", prepare=_hide_free_space).wait()
            if ended.code != EXIT_REFUSED:
                continue  # it just fitted
            tally.enospc += 1
            tally.notes["disks that were really full"] += 1
            check_full(ended, world, cache, tally, where)
            check_kept(cache, tally, was, where)
            kept = finished(cache)
            remount(disk, "size=256m")
            expect_code(run(preprocess, options, folder / "run").wait(), (world.code,), tally, where)
            check_end(cache, tally, world.end, kept, where)
            check_same_files(cache, tally, world.end, where)
            return tally
    tally.problems.append(f"{world.name}: everything fits each of {MAX_ROUNDS} small disks")
    return tally


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    try:
        with mounted(folder):
            return True
    except PermissionError:
        return False


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A tmpfs at `folder`. Raises `PermissionError` where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if _mount("-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)):
        raise PermissionError(f"{folder} cannot be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(disk: Path, option: str) -> None:
    """Change a mounted tmpfs: its size, or whether it may be written."""
    assert _mount("-o", f"remount,{option}", str(disk)) == 0


def _mount(*words: str) -> int:
    return subprocess.run(["mount", *words], check=False, stderr=subprocess.DEVNULL).returncode


def _used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _bytes_to_come(world: World) -> int:
    before = {} if world.start is None else world.start.files
    sizes = (os.path.getsize(world.end.path / name) for name in world.end.files if name not in before)
    return sum(-(-size // 4096) * 4096 for size in sizes)


def _hide_free_space() -> None:
    """Let the check before the start find room enough: somebody else fills the disk afterwards."""
    usage = shutil.disk_usage

    def plenty(path: Any) -> Any:
        return usage(path)._replace(free=1 << 50)

    shutil.disk_usage = plenty


# Damaged files


def flip(path: Path, dice: random.Random) -> int:
    """Flip one random bit; which byte it was."""
    with open(path, "r+b") as file:
        position = dice.randrange(os.path.getsize(path))
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << dice.randrange(8)]))
    return position


def cut(path: Path, dice: random.Random) -> int:
    """Cut a file off at a random byte, which comes back."""
    position = dice.randrange(os.path.getsize(path))
    os.truncate(path, position)
    return position


class Member(NamedTuple):
    """A member of a shard of the undisturbed cache."""

    key: str
    first: int
    after: int
    """Of its data, in bytes."""
    wanted: bool
    """Whether a reader looks at it; a row of an earlier state of the data set stays in its shard unread."""


def members(world: World, name: str) -> list[Member]:
    """The members that a shard of the undisturbed cache has in its tar; `name` is its tar or its index."""
    wanted = _wanted(world, name)
    return [
        Member(row["key"], row["offset"], row["offset"] + row["length"], wanted.get(row["key"]) == row["input"])
        for row in _index(world, name)
        if row["status"] == "ok"
    ]


def num_failed(world: World, name: str) -> int:
    """The wanted rows of a shard that an encoder had nothing for. Only its index knows why."""
    wanted = _wanted(world, name)
    return sum(row["status"] == "error" and wanted.get(row["key"]) == row["input"] for row in _index(world, name))


def _index(world: World, name: str) -> list[dict[str, Any]]:
    return pq.ParquetFile((world.end.path / name).with_suffix(".parquet")).read(use_threads=False).to_pylist()


def _wanted(world: World, name: str) -> dict[str, str]:
    cache = Cache(world.end.path)
    summaries = (cache.summary(layer) for layer in cache.layer_names)
    return cache.wanted(next(summary.reads for summary in summaries if name.startswith(f"{summary.folder}/")))


def damage_trial(world: World, seed: str, kind: Callable[[Path, random.Random], int], folder: Path) -> Tally:
    """Damage one file of a finished cache, by `flip` or `cut`.

    `verify` names it, and of a shard exactly the rows that are hit; a reader refuses them and nothing that is wrong
    comes out; `repair` makes those rows again and no other. Where none is hit, every byte is afterwards as it was.
    """
    dice, tally = random.Random(seed), Tally()
    cache = folder / "cache"
    shutil.copytree(world.end.path, cache)
    options = replace(world.options, cache=str(cache))
    name = dice.choice(sorted(world.end.files))
    position = kind(cache / name, dice)
    tally.flips, tally.truncations = int(kind is flip), int(kind is cut)
    tally.notes[f"damage in {_sort(name)}"] += 1
    where = f"{world.name}, {name} {'cut' if kind is cut else 'flipped'} at byte {position}"
    inside = members(world, name) if name.endswith(".tar") else []
    end = os.path.getsize(world.end.path / name) if kind is cut else position + 1
    hit = [member for member in inside if member.first < end and position < member.after]
    to_make = len({member.key for member in hit if member.wanted})
    # With an index the reasons of its failed rows may be lost, which are then tried again.
    to_try = num_failed(world, name) if _sort(name) == "indexes of shards" else 0

    memory = _sort(name) == "scans"
    problems = [problem for problem in verify(cache).problems if str(cache / name) in problem]
    tally.expect(memory or bool(problems), f"{where}: verify does not name it")
    says = {member.key for member in inside if any(member.key in problem for problem in problems)}
    right = says == {member.key for member in hit}
    tally.expect(right, f"{where}: verify names {sorted(says)}, but it hit {[member.key for member in hit]}")
    found, refused = read(cache)
    wrong = [key for key, value in found.items() if world.end.rows.get(key) != value]
    tally.expect(not wrong, f"{where}: read as right, though wrong: {wrong[:3]}")
    # The archive around the data is not read, and a shard's index only where one of its rows is wanted.
    noticed = bool(refused) or (_sort(name) != "lists" and not to_make)
    tally.expect(noticed, f"{where}: a reader refuses nothing")
    tally.undetected += not ((problems or memory) and right and noticed and not wrong)

    kept = _others(finished(cache), name)
    ended = run(preprocess if memory else repair, options, folder).wait()
    expect_code(ended, (0, world.code), tally, where)
    check_end(cache, tally, world.end, kept, where)
    if not hit and not to_try and world.start is None:  # else rows of an earlier state, wanted no more, may be gone
        check_same_files(cache, tally, world.end, where)
    made = num_made(ended.out)
    tally.notes["rows that were hit"] += to_make
    tally.notes["rows that repair made again"] += made
    tally.expect(made <= to_make + to_try, f"{where}: repair made {made} rows again, but {to_make} were hit")
    shutil.rmtree(folder)
    return tally


def _others(shards: dict[str, tuple[Stamp, Stamp, int]], *damaged: str) -> dict[str, tuple[Stamp, Stamp, int]]:
    """The shards but for those of damaged files."""
    stems = {name.rsplit(".", 1)[0] for name in damaged}
    return {name: stamps for name, stamps in shards.items() if name not in stems}


def _sort(name: str) -> str:
    if name.startswith(f"{schema.SCAN}/"):
        return "scans"  # stage 1's own memory: nothing refers to it, its next run compares it with its checksum
    if name == schema.OPTIONS:
        return "options"  # which no reader reads
    if re.search(r"/\d{5}\.", name):
        return "tars" if name.endswith(".tar") else "indexes of shards"
    return "lists"


def num_made(out: str) -> int:
    """Rows that a run made, from its report."""
    rows = re.findall(r"^\w+-[0-9a-f]{8} +[0-9,]+ +([0-9,]+) +[0-9,]+ ", out, flags=re.MULTILINE)
    return sum(int(made.replace(",", "")) for made in rows)
