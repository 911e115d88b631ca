"""Pruning: what nothing refers to is named, then removed; all else stays, and so does every row."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shared.cache import prune, writer
from shared.cache.reader import Cache
from shared.cache.verify import verify
from shared.errors import UserError
from tests.shared import small_cache
from tests.shared.small_cache import CAPTIONS, SAMPLES, content, files, flip, folder_of, make, sample


def pruned(cache: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["prune", str(cache), *flags])
    assert prune.main() == 0


def cluttered(cache: Path) -> Path:
    """Repainted samples, an old layer, a killed run's part, a finished shard that no list names, and a note."""
    make(cache)
    make(cache, [sample(s.key, "a box", content="painted over") for s in SAMPLES[:2]] + SAMPLES[2:])
    shutil.copytree(folder_of(cache, "latents"), cache / "latents-00000000")
    (folder_of(cache, "text") / "00044.tar.part").write_bytes(b"half")
    small_cache.write_layer(cache, "edges", [*SAMPLES, sample("s9", "a box")], CAPTIONS)
    (cache / "notes.txt").write_text("mine")
    return cache


def test_it_names_what_it_would_remove_and_removes_nothing_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(cluttered(tmp_path))
    pruned(tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert files(tmp_path) == before
    assert "remove latents-00000000/ (" in out
    assert "made with other settings than latents-" in out
    assert "00000.tar (0.0 MB; no row wanted: all of its samples or captions have changed)" in out
    assert "00044.tar.part (0.0 MB; left by a killed run)" in out
    assert "keep   notes.txt (0.0 MB; not of this cache)" in out
    assert "; unfinished: a run that made it did not come to its end)" in out
    assert f"nothing was. To remove them: make prune CACHE={tmp_path} YES=1" in out


def test_what_is_left_is_a_sound_cache_with_every_row_and_nothing_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(cluttered(tmp_path))
    kept = {name for name in files(tmp_path) if name.endswith(".tar")}
    pruned(tmp_path, monkeypatch, "--yes")
    assert content(tmp_path) == before
    assert verify(tmp_path).sound
    left = {name for name in files(tmp_path) if name.endswith(".tar")}
    gone = kept - left
    assert {f"{folder_of(tmp_path, name).name}/00000.tar" for name in ("latents", "edges")} <= gone
    assert not (tmp_path / "latents-00000000").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    unfinished = {folder.name for folder in tmp_path.iterdir()}
    pruned(tmp_path, monkeypatch, "--yes", "--unfinished")
    assert content(tmp_path) == before
    assert {folder.name for folder in tmp_path.iterdir()} == unfinished
    capsys.readouterr()
    pruned(tmp_path, monkeypatch, "--yes", "--unfinished")
    assert "there is nothing to remove" in capsys.readouterr().out


def test_killed_at_any_removal_the_cache_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(cluttered(tmp_path / "start"))
    real, removals = os.unlink, 0
    for last in range(100):
        cache = Path(shutil.copytree(tmp_path / "start", tmp_path / f"killed {last}"))
        done = 0

        def unlink(path: str, *more: object, allowed: int = last, **options: object) -> None:
            nonlocal done
            if done == allowed:
                raise SystemExit  # as if the process ended here
            done += 1
            real(path, *more, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", unlink)
            try:
                pruned(cache, patched, "--yes")
                finished = True
            except SystemExit:
                finished = False
        assert content(cache) == before
        pruned(cache, monkeypatch, "--yes", "--unfinished")
        assert content(cache) == before
        if finished:
            break
        removals += 1
    assert removals > 5


def test_nothing_is_removed_from_a_damaged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluttered(tmp_path)
    flip(folder_of(tmp_path, "edges") / "layer.json", 30)
    before = files(tmp_path)
    with pytest.raises(UserError, match="Nothing is removed from a damaged cache"):
        pruned(tmp_path, monkeypatch, "--yes")
    assert files(tmp_path) == before


def test_a_shard_with_one_row_that_is_wanted_stays(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, [sample("s0", "a box", content="painted over"), *SAMPLES[1:]])
    assert [left for left in prune.leftovers(Cache(tmp_path)) if left.why == "no row wanted"] == []
    assert {shard.name for shard, _ in writer.finished_shards(folder_of(tmp_path, "latents"))} > {"00000", "00003"}
