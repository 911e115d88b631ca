"""`verify` finds every altered bit of every file, names whose it was, and tells damage from what is merely unlisted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.cache import schema, verify, writer
from shared.cache.reader import Cache, CacheError
from shared.cache.repair import mend
from shared.cache.schema import Caption
from shared.errors import UserError
from tests.shared import small_cache
from tests.shared.small_cache import content, files, flip, flipped_everywhere, folder_of, make


def problems(cache: Path) -> list[str]:
    return verify.verify(cache).problems


def test_a_sound_cache_is_sound_to_its_last_byte(tmp_path: Path) -> None:
    verdict = verify.verify(make(tmp_path))
    assert verdict.sound
    assert verdict.unlisted == []
    assert verdict.num_bytes == sum(len(data) for data in files(tmp_path).values())


@pytest.mark.parametrize("name", [schema.MANIFEST, schema.SAMPLES, schema.CAPTIONS, "layer.json", "00000.parquet"])
def test_a_flipped_bit_in_any_byte_of_a_list_is_found(tmp_path: Path, name: str) -> None:
    make(tmp_path, layers=("text",))
    path = tmp_path / name if (tmp_path / name).exists() else folder_of(tmp_path, "text") / name
    found = 0
    for position in flipped_everywhere(path, step=1 if path.suffix == ".json" else 7):
        assert any(str(path) in problem for problem in problems(tmp_path)), position
        found += 1
    assert found > 100
    assert problems(tmp_path) == []


def test_a_caption_is_named_by_its_text_too(tmp_path: Path) -> None:
    make(tmp_path)
    caption = Caption.of("a box")
    place = Cache(tmp_path).layer("text").members(caption.id)["safetensors"]
    flip(folder_of(tmp_path, "text") / f"{place.shard}.tar", place.offset)
    (problem,) = problems(tmp_path)
    assert problem.endswith(f'was altered: {caption.id}.safetensors ("a box")')
    flip(tmp_path / schema.CAPTIONS, 60)
    assert any(problem.endswith(f"was altered: {caption.id}.safetensors") for problem in problems(tmp_path))


def test_a_flipped_bit_in_any_region_of_a_tar_is_found_and_says_whose_it_was(tmp_path: Path) -> None:
    make(tmp_path, layers=("latents",))
    tar = folder_of(tmp_path, "latents") / "00000.tar"
    place = Cache(tmp_path).layer("latents").members("s1")["safetensors"]
    end = place.offset + place.length
    assert end % 512, "the test wants padding after the data"
    regions = {
        "its header": (place.offset - 512, place.offset, "no sample's data, only the archive around it"),
        "its data": (place.offset, end, "s1.safetensors"),
        "its padding": (end, end + 512 - end % 512, "no sample's data, only the archive around it"),
        "the archive's end": (tar.stat().st_size - 1024, tar.stat().st_size, "no sample's data"),
    }
    for region, (first, last, whose) in regions.items():
        for position in [*range(first, last, 13), last - 1]:
            flip(tar, position, position % 8)
            (problem,) = problems(tmp_path)
            assert str(tar) in problem, region
            assert "(layer latents) was altered" in problem, region
            assert whose in problem, region
            flip(tar, position, position % 8)
    assert problems(tmp_path) == []


def test_a_truncated_tar_is_found_with_the_samples_that_it_lost(tmp_path: Path) -> None:
    make(tmp_path)
    tar = folder_of(tmp_path, "latents") / "00000.tar"
    whole = tar.read_bytes()
    place = Cache(tmp_path).layer("latents").members("s1")["safetensors"]
    tar.write_bytes(whole[: place.offset + 10])
    (problem,) = problems(tmp_path)
    assert f"has {place.offset + 10} bytes instead of {len(whole)}: s1.safetensors" in problem
    assert "s0" not in problem


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    tar = folder_of(tmp_path, "latents") / "00001.tar"
    tar.unlink()
    assert problems(tmp_path) == [f"{tar} (layer latents) is missing, with all its 2 rows"]


def test_a_missing_index_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    index = folder_of(tmp_path, "latents") / "00001.parquet"
    index.unlink()
    assert problems(tmp_path) == [f"{index} is missing; {schema.MEND}"]


def test_damage_in_one_layer_does_not_hide_damage_in_another(tmp_path: Path) -> None:
    make(tmp_path)
    (folder_of(tmp_path, "latents") / schema.LAYER).unlink()
    flip(folder_of(tmp_path, "edges") / "00000.tar", 700)
    flip(folder_of(tmp_path, "text") / "00002.parquet", 700)
    assert len(problems(tmp_path)) == 3


def test_rows_that_no_shard_holds_are_found(tmp_path: Path) -> None:
    make(tmp_path)
    extra = [*small_cache.SAMPLES, small_cache.sample("s7", "a box")]
    small_cache.publish(tmp_path, extra)
    assert any("nothing for 1 of 6 rows (first: s7)" in problem for problem in problems(tmp_path))


def test_what_no_list_names_is_unlisted_and_no_damage(tmp_path: Path) -> None:
    make(tmp_path, layers=("edges",))
    old = tmp_path / "edges-00000000"
    with writer.ShardWriter(old, 0) as shard:
        shard.add("a", "input", {"x": b"1"})
    folder = folder_of(tmp_path, "edges")
    (folder / "00007.tar.part").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    verdict = verify.verify(tmp_path)
    assert verdict.sound
    assert verdict.unlisted == sorted(["edges-00000000/", f"{folder.name}/00007.tar.part", "notes.txt"])


def test_no_cache_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such cache"):
        verify.verify(tmp_path / "nothing")


def test_verify_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    flip(folder_of(tmp_path, "edges") / "00000.tar", 700)
    before = files(tmp_path)
    verify.verify(tmp_path)
    assert files(tmp_path) == before


def test_what_the_command_line_says_mends_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = content(make(tmp_path))
    monkeypatch.setattr("sys.argv", ["verify", str(tmp_path)])
    assert verify.main() == 0
    num_bytes = sum(map(len, files(tmp_path).values()))
    assert capsys.readouterr().out == f"sound: {tmp_path}, {num_bytes / 1e6:.1f} MB compared\n"
    (tmp_path / "notes.txt").write_text("mine")
    assert verify.main() == 0
    assert f"unlisted {tmp_path / 'notes.txt'} (harmless" in capsys.readouterr().out
    (tmp_path / "notes.txt").unlink()
    tar = folder_of(tmp_path, "edges") / "00000.tar"
    flip(tar, 700)
    flip(folder_of(tmp_path, "text") / "00001.parquet", 30)  # in the keys
    (folder_of(tmp_path, "latents") / "00002.tar").unlink()
    assert verify.main() == 1
    out = capsys.readouterr().out
    assert out.count("DAMAGED") == 3
    assert f"3 problem(s). To mend, which encodes only what is damaged: make repair CACHE={tmp_path}" in out
    mend(tmp_path)
    assert content(make(tmp_path)) == whole
    assert verify.main() == 0


@pytest.mark.parametrize("arguments", [[], ["--help"], ["one", "two"]])
def test_the_command_line_takes_one_folder(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["verify", *arguments])
    with pytest.raises(UserError, match="takes one folder"):
        verify.main()


def test_a_damaged_cache_ends_the_command_with_code_1(tmp_path: Path) -> None:
    make(tmp_path)
    flip(tmp_path / schema.MANIFEST, 40)
    done = subprocess.run(
        [sys.executable, "-m", "shared.cache.verify", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "DAMAGED" in done.stdout
    assert done.stderr == ""
