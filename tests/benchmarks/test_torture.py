"""The torture finds nothing amiss in a small dose, and its counts and faults are real: what is amiss, it finds."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.torture import __main__ as command
from benchmarks.torture import faults
from benchmarks.torture.children import KILLED, Child
from benchmarks.torture.doses import Dose, torture
from benchmarks.torture.faults import Full, Kill, PowerCut, install, promised
from benchmarks.torture.trials import Tally, check_end, check_kept, check_reading, finished, num_duplicates
from benchmarks.torture.worlds import read, reference
from shared import atomic
from shared.cache import writer
from tests import forked
from tests.shared import small_cache
from tests.shared.small_cache import CAPTIONS, SAMPLES, flip, folder_of, make, sample

SMALL = Dose(kills=6, kills_of_others=2, power_cuts=2, enospc=5, flips=6, truncations=2, worlds=1, others=1)


def test_a_small_dose_loses_nothing_doubles_nothing_and_overlooks_nothing(tmp_path: Path) -> None:
    forked.context()  # one server, with the imports of all tests
    tally = torture(SMALL, seed=1, jobs=2, folder=tmp_path)
    assert tally.problems == []
    counted = (tally.kills, tally.kills_of_others, tally.power_cuts, tally.enospc, tally.flips, tally.truncations)
    assert counted == (
        SMALL.kills,
        SMALL.kills_of_others,
        SMALL.power_cuts,
        SMALL.enospc,
        SMALL.flips,
        SMALL.truncations,
    )
    assert (tally.lost, tally.duplicated, tally.undetected) == (0, 0, 0)


@pytest.mark.parametrize(
    ("tally", "code"),
    [(Tally(), 0), (Tally(lost=1), 1), (Tally(duplicated=1), 1), (Tally(undetected=1), 1), (Tally(problems=["x"]), 1)],
)
def test_the_last_line_counts_and_the_exit_code_tells(
    tally: Tally, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tally.kills, tally.enospc, tally.flips, tally.truncations = 200, 50, 500, 20
    monkeypatch.setattr(command, "torture", lambda *arguments: tally)
    monkeypatch.setattr(sys, "argv", ["torture", "--seed", "7"])
    assert command.main() == code
    out = capsys.readouterr().out
    assert "seed 7" in out
    assert out.splitlines()[-1] == (
        f"torture kills=200 enospc=50 flips=500 truncations=20 lost={tally.lost} duplicated={tally.duplicated} "
        f"undetected={tally.undetected}"
    )


# --- what is amiss is counted ---


def test_a_row_that_is_not_there_is_lost(tmp_path: Path) -> None:
    end, tally = reference(make(tmp_path / "end")), Tally()
    check_end(make(tmp_path / "less", SAMPLES[:4]), tally, end, {}, "here")
    gone = {(layer, SAMPLES[4].key) for layer in ("samples", "latents", "edges")}
    assert (tally.lost, tally.undetected) == (len(gone), 0)


def test_bytes_that_are_not_the_right_ones_are_undetected(tmp_path: Path) -> None:
    end, tally = reference(make(tmp_path / "end")), Tally()
    other = make(tmp_path / "other", [sample("s0", "number 0", "a box", content="painted over"), *SAMPLES[1:]])
    check_reading(other, tally, end, where="here")
    # The sample's own row, its latents by number and by key, its two drawings and the first by number; and the whole.
    assert tally.undetected == 1 + 2 + 3 + 1
    assert tally.problems


def test_a_mixture_of_two_states_is_undetected(tmp_path: Path) -> None:
    end, tally = reference(make(tmp_path / "end")), Tally()
    assert check_reading(tmp_path / "end", tally, end, where="here") == []
    assert tally.undetected == 0
    check_reading(make(tmp_path / "less", SAMPLES[:4]), tally, end, where="here")
    assert tally.undetected == 1


def test_a_row_that_two_shards_hold_is_duplicated(tmp_path: Path) -> None:
    make(tmp_path)
    assert num_duplicates(tmp_path) == 0
    with writer.ShardWriter(folder_of(tmp_path, "edges"), 9) as shard:
        digest = SAMPLES[0].input("image")
        shard.add("s0", digest, small_cache.members("edges", "s0", digest))
    small_cache.publish(tmp_path)
    assert num_duplicates(tmp_path) == 2


def test_a_finished_shard_that_is_made_again_or_gone_is_lost(tmp_path: Path) -> None:
    kept, tally = finished(make(tmp_path)), Tally()
    check_kept(tmp_path, tally, kept, "here")
    assert tally.lost == 0
    for ending in ("tar", "parquet"):
        (folder_of(tmp_path, "latents") / f"00001.{ending}").unlink()
    small_cache.write_layer(tmp_path, "latents", SAMPLES, CAPTIONS)
    check_kept(tmp_path, tally, kept, "here")
    assert tally.lost == 2
    shutil.rmtree(folder_of(tmp_path, "latents"))
    check_kept(tmp_path, tally, kept, "here")
    assert tally.lost == 2 + 5


def test_a_shard_with_an_altered_byte_is_not_finished(tmp_path: Path) -> None:
    make(tmp_path)
    flip(folder_of(tmp_path, "latents") / "00001.tar", 3)
    assert f"{folder_of(tmp_path, 'latents').name}/00001" not in finished(tmp_path)


def test_what_a_reader_refuses_is_told_from_what_it_finds(tmp_path: Path) -> None:
    end = reference(make(tmp_path))
    flip(folder_of(tmp_path, "text") / "00000.tar", 600)
    found, refused = read(tmp_path)
    assert end.rows.items() > found.items()
    assert {layer for layer, _, _ in end.rows.keys() - found.keys()} == {"text"}
    assert all("was altered on disk" in sentence for sentence in refused)


# --- faults happen ---


def ended(work: Callable[[], object], folder: Path, fault: faults.Fault) -> int:
    """The exit code of `work` in a child in which `fault` strikes what it does in `folder / "here"`."""

    def command() -> int:
        work()
        return 0

    return Child(command, folder, lambda: install(folder / "here", fault, folder / "log")).wait().code


def test_every_change_is_an_operation(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    assert ended(lambda: atomic.write_bytes(here / "file", b"all"), tmp_path, faults.Nothing()) == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        "create file.part", "write file.part", "fsync file.part", "rename file", "fsync .",
    ]  # fmt: skip


@pytest.mark.parametrize(("when", "left"), [("before", b""), ("half", b"ha"), ("after", b"half")])
def test_a_process_is_killed_before_amid_or_after_an_operation(tmp_path: Path, when: faults.When, left: bytes) -> None:
    here = tmp_path / "here"
    here.mkdir()
    assert ended(lambda: atomic.write_bytes(here / "file", b"half"), tmp_path, Kill(1, when)) == KILLED
    assert small_cache.files(here) == {"file.part": left}


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("stays", [True, False])
def test_a_full_disk_fails_an_operation_of_every_kind(tmp_path: Path, number: int, stays: bool) -> None:
    here = tmp_path / "here"
    here.mkdir()
    assert ended(lambda: atomic.write_bytes(here / "file", b"all"), tmp_path, Full(number, stays)) == 2
    assert "the disk is full" in (tmp_path / "err").read_text()
    assert set(small_cache.files(here)) <= {"file"}


def careless(path: Path) -> None:
    """Replace a file and flush nothing."""
    with open(path.with_name("new"), "wb") as file:
        file.write(b"new" * 1000)
    os.replace(path.with_name("new"), path)
    (path.parent / "folder").mkdir()


@pytest.mark.parametrize("write", [careless, lambda path: atomic.write_bytes(path, b"new" * 1000)])
def test_what_was_not_flushed_is_lost_with_the_power_and_what_was_is_not(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    found = set()
    for seed in range(20):
        here = tmp_path / str(seed) / "here"
        here.mkdir(parents=True)
        (here / "file").write_bytes(b"old")

        def work(here: Path = here) -> None:
            write(here / "file")
            (here / "last").write_bytes(b"")  # the power is cut before this

        cut = PowerCut(4 if write is careless else 5, str(seed), here.parent / "stash")
        assert ended(work, here.parent, cut) == KILLED
        found.add((here / "file").read_bytes())
        assert not (here / "last").exists()
    if write is careless:
        assert b"old" in found, "the rename was lost"
        assert any(data not in (b"old", b"new" * 1000) for data in found), "the bytes were lost"
    else:
        assert found == {b"new" * 1000}


def test_a_shard_is_promised_when_its_index_has_its_name_and_its_folder_is_flushed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("rename a/00000.tar\nfsync a\nrename a/00000.parquet\nfsync b\nrename samples.parquet\nfsync .\n")
    assert promised(log) == set()
    log.write_text(log.read_text() + "fsync a\n")
    assert promised(log) == {"a/00000.parquet"}
    log.write_text(log.read_text() + "unlink a/00000.parquet\n")
    assert promised(log) == set()


def test_a_child_that_is_killed_before_it_begins_is_a_killed_child(tmp_path: Path) -> None:
    child = Child(signal.pause, tmp_path)
    child.kill()
    assert child.wait().code == KILLED
