"""The command that mends a cache: only the damaged rows are encoded again, and it says which."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess import repair as command
from preprocess.config import PreprocessConfig
from preprocess.repair import repair
from shared import atomic
from shared.cache import schema
from shared.cache.reader import Cache
from shared.cache.verify import verify
from shared.errors import UserError
from tests.conftest import preprocess_options
from tests.preprocess.runs import contents, rows
from tests.shared.small_cache import flip


@pytest.fixture
def options(tiny_cache: Path, tiny_data: Path, tiny_model: Path, tmp_path: Path) -> PreprocessConfig:
    shutil.copytree(tiny_cache, tmp_path / "cache")
    return preprocess_options(tiny_data, tmp_path / "cache", tiny_model)


def damage(cache: Path, layer: str) -> tuple[str, Path]:
    """Flip a bit of the layer's first row; its key and the file."""
    opened = Cache(cache).layer(layer)
    place = opened.places.place(0)
    tar = opened.folder / f"{place.shard}.tar"
    flip(tar, place.offset + place.length // 2)
    return Cache(cache).index.key(0), tar


def test_only_the_damaged_row_is_encoded_again_and_every_row_is_as_before(
    options: PreprocessConfig, tiny_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Path(options.cache)
    key, tar = damage(cache, "latents")
    assert repair(options) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if tar.name in line and tar.parent.name in line]
    assert line.split() == [f"{tar.parent.name}/{tar.name}", "altered", key, "3", "1"]
    made = {line.split()[0].split("-")[0]: line.split()[2] for line in out.splitlines() if "-" in line.split(" ")[0]}
    assert {layer for layer, count in made.items() if count == "1"} == {"latents"}
    assert rows(cache) == rows(tiny_cache)
    assert verify(cache).sound


def test_a_sound_cache_is_left_alone_without_any_run(
    options: PreprocessConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(Path(options.cache))
    assert repair(replace(options, data="no such folder")) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert contents(Path(options.cache)) == before


def test_what_holds_no_row_is_mended_to_the_same_bytes(options: PreprocessConfig, tiny_cache: Path) -> None:
    cache = Path(options.cache)
    for name in (schema.SAMPLES, "index/t5.arrow", f"{Cache(cache).layer('clip').folder.name}/{schema.LAYER}"):
        flip(cache / name, 100)
    (Cache(cache).layer("canny").folder / "00000.parquet").unlink()
    assert repair(options) == 0
    assert contents(cache) == contents(tiny_cache)


def test_a_manifest_and_a_note_of_the_options_that_are_damaged_are_written_anew(
    options: PreprocessConfig, tiny_cache: Path
) -> None:
    cache = Path(options.cache)
    for name in (schema.MANIFEST, schema.OPTIONS):
        flip(cache / name, 40)
    assert repair(options) == 0
    assert contents(cache) == contents(tiny_cache)
    assert schema.read_sealed(cache / schema.OPTIONS)["data"] == options.data


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["repair", *words])
    return command.main()


def test_the_command_needs_no_words_but_the_cache(
    options: PreprocessConfig, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(Path(options.cache), "canny_latents")
    assert run(monkeypatch, "--cache", options.cache, "--device", "cpu", "--encode.image-batch", "3") == 0
    assert rows(Path(options.cache)) == rows(tiny_cache)


def test_where_the_cache_does_not_say_what_it_was_made_with_the_options_are_asked_for(
    options: PreprocessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(Path(options.cache) / schema.OPTIONS, 40)
    with pytest.raises(UserError, match=r"options\.json, .* is missing or damaged; give the options of its last run"):
        run(monkeypatch, "--cache", options.cache)


def test_what_cannot_be_repaired_is_refused_in_one_sentence(options: PreprocessConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no such cache: {tmp_path / 'nowhere'}"):
        repair(replace(options, cache=str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="copy it to a folder, repair it, copy it back"):
        repair(replace(options, cache="s3://bucket/cache"))
    with (
        atomic.alone(Path(options.cache), "preprocessing into"),
        pytest.raises(UserError, match="another process is preprocessing into"),
    ):
        repair(options)
