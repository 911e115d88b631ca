"""Tars of WebDataset: which members make a sample, where their bytes are, and what becomes of tars that are broken."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from preprocess.images import MAX_BYTES, ImageError
from preprocess.sources import Record, SourceOptions, open_source, read
from shared.errors import UserError
from tests.preprocess.data_sets import Picture, as_tars, members, pictures, png, records, write_tar


def one(path: Path, **options: Any) -> Record:
    """The only record of a tar."""
    (record,) = records(path, **options).values()
    return record


def sound(path: Path | str, **options: Any) -> dict[str, Record]:
    return {name: record for name, record in records(path, **options).items() if record.error is None}


def errors(path: Path | str, **options: Any) -> dict[str, str]:
    return {name: record.error for name, record in records(path, **options).items() if record.error is not None}


def refusal(data: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read(data, SourceOptions(**options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which tars ---


def test_braces_wildcards_and_folders_name_the_same_samples(tmp_path: Path) -> None:
    made = pictures(7)
    pattern = as_tars(tmp_path / "laion", made, num_tars=3)
    assert pattern.endswith("laion/{00000..00002}.tar")
    found = records(pattern)
    assert list(found) == [f"0000{i // 3}.tar/{i:06d}.png" for i in range(7)]
    assert [record.image.read() for record in found.values()] == [picture.image for picture in made]
    assert [record.captions for record in found.values()] == [(f"number {i}",) for i in range(7)]
    for other in (f"{tmp_path}/laion/*.tar", f"{tmp_path}/laion/0000[0-2].tar", tmp_path / "laion"):
        assert records(other) == found
    assert list(records(f"{tmp_path}/laion/{{00000,00002}}.tar")) == [n for n in found if not n.startswith("00001")]


def test_names_do_not_change_when_a_pattern_comes_to_match_more(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/0.tar", members(pictures(1)))
    before = list(records(f"{tmp_path}/{{a,b}}/*.tar"))
    write_tar(tmp_path / "b/0.tar", members(pictures(1)))
    after = list(records(f"{tmp_path}/{{a,b}}/*.tar"))
    assert before == ["a/0.tar/000000.png"]
    assert after == ["a/0.tar/000000.png", "b/0.tar/000000.png"]


def test_a_tar_that_a_pattern_names_and_that_is_missing_is_refused(tmp_path: Path) -> None:
    as_tars(tmp_path, pictures(4))
    assert "2 of the 4 files that" in refusal(f"{tmp_path}/{{00000..00003}}.tar")
    assert "00002.tar" in refusal(f"{tmp_path}/{{00000..00003}}.tar")
    assert "matches no .tar file" in refusal(f"{tmp_path}/none*.tar")


def test_unbalanced_braces_and_commands_are_refused(tmp_path: Path) -> None:
    assert "write {00000..00010}" in refusal(f"{tmp_path}/{{00000..00003.tar")
    assert "commands are not run" in refusal("pipe:curl -s https://example.org/00000.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "{0..3}.tar.xz"])
def test_a_compressed_tar_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    assert "is compressed, so that no image in it can be read without all before it" in refusal(tmp_path / name)


def test_a_compressed_tar_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(pictures(1)))
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert "is compressed" in refusal(tmp_path / "a.tar")


def test_splits_are_told_by_folders_and_names_of_tars(tmp_path: Path) -> None:
    for name in ("train/0", "validation/0", "test/0"):
        write_tar(tmp_path / f"by folder/{name}.tar", members(pictures(1)))
        write_tar(tmp_path / f"by name/{name.replace('/', '-')}.tar", members(pictures(1)))
        write_tar(tmp_path / "one/train-0.tar", members(pictures(1)))
    for folder in ("by folder", "by name"):
        splits = {name.split(".")[0]: record.split for name, record in records(tmp_path / folder).items()}
        assert list(splits.values()) == ["train" if name.startswith("train") else "validation" for name in splits]
    assert one(tmp_path / "one/train-0.tar").split is None  # nothing is said about what to hold out


# --- which members are a sample ---


def test_keys_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    names = [
        "a.png", "a.txt", "b.x.png", "b.png", "b.txt", "deep.er/c.png", "deep.er/c.txt", "deep.er/a.png",
        "deep.er/a.txt", "UPPER.PNG", "UPPER.TXT", "z.tar.png", "z.txt",
    ]  # fmt: skip
    content = {name: png(i) if name.lower().endswith("png") else name.encode() for i, name in enumerate(names)}
    path = write_tar(tmp_path / "a.tar", content.items())
    theirs = {
        sample["__key__"]: next(sample[ending] for ending in ("png", "tar.png") if ending in sample)
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    }
    ours = {record.name.removeprefix("a.tar/"): record for record in records(path).values()}
    assert {name.rpartition("/")[0] + "/" + name.rpartition("/")[2].partition(".")[0] for name in ours} == {
        key if "/" in key else f"/{key}" for key in theirs
    }
    assert [r.image.read() for r in ours.values() if r.error is None] == [
        image
        for key, image in theirs.items()
        if key != "z"  # tar.png is no customary image
    ]
    assert ours["b.png"].image.read() == content["b.png"]  # what b.x.png is, nobody says
    assert "it has no image; its members: .tar.png, .txt" in str(ours["z"].error)


def test_a_leading_dot_of_a_tar_of_a_folder_is_no_part_of_names(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tmp_path / "folder/sub"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(png(1))
        (folder / "a.txt").write_text("a")
        tar.add(tmp_path / "folder", arcname=".")
    assert list(records(path)) == ["a.tar/sub/a.png"]
    assert one(path).image.read() == png(1)


@pytest.mark.parametrize(
    ("texts", "captions", "weights"),
    [
        ({"txt": " a fox\n"}, ("a fox",), (1.0,)),
        ({"caption": "\ufeffein Füchslein"}, ("ein Füchslein",), (1.0,)),
        ({"json": json.dumps({"caption": "a fox", "url": "https://example.org"})}, ("a fox",), (1.0,)),
        ({"json": json.dumps({"text": ["one", " ", "two"]})}, ("one", "two"), (1.0, 1.0)),
        ({"json": json.dumps({"text": [{"text": "one", "weight": 3}, "two"]})}, ("one", "two"), (3.0, 1.0)),
        ({"json": json.dumps({"caption": "of the json"}), "txt": "of the txt"}, ("of the txt",), (1.0,)),
        ({"txt": " ", "json": json.dumps({"caption": "of the json"})}, ("of the json",), (1.0,)),
        ({"captions.json": json.dumps(["one", "two"])}, ("one", "two"), (1.0, 1.0)),
    ],
)
def test_captions_are_read_from_text_and_json_members(
    tmp_path: Path, texts: dict[str, str], captions: tuple[str, ...], weights: tuple[float, ...]
) -> None:
    path = write_tar(
        tmp_path / "a.tar", [("0.jpg", b"x"), *((f"0.{end}", text.encode()) for end, text in texts.items())]
    )
    record = one(path)
    assert (record.captions, record.weights, record.error) == (captions, weights, None)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({}, "no caption: it has no member .txt, .caption or .json"),
        ({"txt": b" \n"}, "no caption: its member .txt is blank"),
        ({"json": b'{"url": "x"}'}, "no caption: its member .json has no 'caption'"),
        ({"json": b"{"}, "its member .json is not JSON"),
        ({"json": b"[1]"}, "its member .json is not an object"),
        ({"json": b'{"caption": 7}'}, "must be a string, a list of strings"),
        ({"json": b'{"caption": [{"text": "a", "weight": 0}]}'}, "weight must be a number above 0, but is 0"),
        ({"json": b'{"caption": "\\ud800"}'}, "holds half a character"),
        ({"txt": b"\xff"}, "its member .txt is not UTF-8"),
    ],
)
def test_a_sample_without_a_sound_caption_is_reported_and_its_neighbours_are_not(
    tmp_path: Path, texts: dict[str, bytes], reason: str
) -> None:
    broken = [("1.png", png(1)), *((f"1.{ending}", text) for ending, text in texts.items())]
    path = write_tar(tmp_path / "a.tar", [*members(pictures(1)), *broken, ("2.png", png(2)), ("2.txt", b"two")])
    assert list(sound(path)) == ["a.tar/000000.png", "a.tar/2.png"]
    (name, said) = next(iter(errors(path).items()))
    assert name == "a.tar/1.png"
    assert reason in said


def test_missing_captions_can_be_empty_ones(tmp_path: Path) -> None:
    record = one(write_tar(tmp_path / "a.tar", [("0.png", png(0))]), missing_caption="empty")
    assert (record.captions, record.weights, record.error) == (("",), (1.0,), None)


@pytest.mark.parametrize(
    ("image", "drawing", "options"),
    [
        ("jpg", "conditioning", {}),
        ("png", "cond.png", {}),
        ("webp", "conditioning_image.png", {}),
        ("png", "conditioning.jpg", {}),
        ("target.png", "source.png", {}),  # as fill50k has it
        ("image.jpg", "hint.jpg", {}),
        ("jpg", "sketch.png", {"conditioning_column": "sketch"}),
        ("photo.png", "png", {"image_column": "photo", "conditioning_column": "png"}),
    ],
)
def test_the_drawing_that_comes_with_an_image_is_told_by_its_ending(
    tmp_path: Path, image: str, drawing: str, options: dict[str, str]
) -> None:
    content = [(f"0.{drawing}", b"drawing"), (f"0.{image}", b"image"), ("0.txt", b"a")]
    record = one(write_tar(tmp_path / "a.tar", content), **options)
    assert record.error is None
    assert record.name == f"a.tar/0.{image}"
    assert record.image.read() == b"image"
    assert record.conditioning_name == f"a.tar/0.{drawing}"
    assert record.conditioning is not None
    assert record.conditioning.read() == b"drawing"


def test_a_caption_can_be_chosen_by_its_ending_or_key(tmp_path: Path) -> None:
    content = [("0.png", b"x"), ("0.txt", b"short"), ("0.long", b"long"), ("0.json", b'{"blip": "by BLIP"}')]
    path = write_tar(tmp_path / "a.tar", content)
    assert one(path).captions == ("short",)
    assert one(path, caption_column="long").captions == ("long",)
    assert one(path, caption_column="blip").captions == ("by BLIP",)


def test_what_cannot_be_a_sample_is_named_and_what_is_none_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in [
            ("README", b"words"), ("meta.pickle", b"x"), (".hidden.png", png(5)), ("1.txt", b"no image"),
            ("2.jpg", b"j"), ("2.png", b"p"), ("2.txt", b"two"), ("3.png", b"a"), ("3.PNG", b"b"), ("3.txt", b"three"),
            ("4.png", b"first"), ("4.txt", b"four"), ("5.png", b"x"), ("5.txt", b"five"), ("4.png", b"second"),
            ("4.txt", b"four"), (b"\xff.png".decode(errors="surrogateescape"), b"x"),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("6.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(sound(path)) == ["a.tar/4.png", "a.tar/5.png"]
    assert sound(path)["a.tar/4.png"].image.read() == b"first"
    said = errors(path)
    assert said["a.tar/1"] == "it has no image; its members: .txt"
    assert said["a.tar/2.jpg"] == "it has several images (.jpg, .png); say which with source.image_column"
    assert said["a.tar/3.PNG"] == "two of its members end in .png"
    assert "a.tar/\\udcff.png" in said
    (twice,) = (name for name in said if name.startswith("a.tar/4.png at byte"))
    assert said[twice] == "its key comes twice in this tar"
    assert len(said) == 5


# --- tars that are not whole ---


def whole_and_cut(tmp_path: Path, made: list[Picture], step: int) -> Iterator[tuple[dict[str, Record], bytes, int]]:
    """The records of a tar, its bytes, and where it is cut: the file is then this long."""
    path = write_tar(tmp_path / "a.tar", members(made))
    whole, content = records(path), path.read_bytes()
    end = len(content.rstrip(b"\0"))
    for at in [*range(0, end, step), end]:
        path.write_bytes(content[:at])
        yield whole, content, at


def test_of_a_tar_that_is_cut_off_anywhere_all_before_is_used_and_the_rest_is_named(tmp_path: Path) -> None:
    num_sound = []
    for whole, content, at in whole_and_cut(tmp_path, pictures(4, drawings=True), step=100):
        found = records(tmp_path / "a.tar")
        sound = {name: record for name, record in found.items() if record.error is None}
        # Every sound one is as in the whole tar, down to its bytes, and they are the first ones.
        assert list(sound) == list(whole)[: len(sound)]
        for name, record in sound.items():
            drawing = whole[name].conditioning
            assert drawing is not None
            assert record == whole[name]
            assert record.image.read() == content[record.image.offset : record.image.offset + record.image.length]  # type: ignore[attr-defined]
        assert "a.tar" in found, at
        assert str(found["a.tar"].error).startswith("the tar ")
        num_sound.append(len(sound))
    assert num_sound == sorted(num_sound)
    assert set(num_sound) == {0, 1, 2, 3, 4}


def test_a_tar_without_its_end_mark_gives_all_samples_and_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members(pictures(3)))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 512])
    assert len(sound(path)) == 3
    assert errors(path) == {"a.tar": "the tar has no end mark and may be cut off: what follows is lost"}


def test_tars_that_were_put_into_one_file_are_told_from_one_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members(pictures(2)))
    path.write_bytes(path.read_bytes() + write_tar(tmp_path / "b.tar", members(pictures(2), first=2)).read_bytes())
    assert list(sound(path)) == ["a.tar/000000.png", "a.tar/000001.png"]
    assert "has more after its end mark at byte" in errors(path)["a.tar"]


def test_a_damaged_header_ends_a_tar_and_the_next_tar_is_read(tmp_path: Path) -> None:
    pattern = as_tars(tmp_path, pictures(8), num_tars=2)
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[third + 100] ^= 1
    path.write_bytes(content)
    assert len(sound(pattern)) == 2 + 4
    assert errors(pattern)["00000.tar"].startswith(f"the tar is damaged at byte {third}")


def test_what_is_no_tar_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    pattern = as_tars(tmp_path, pictures(2), num_tars=1).replace("..00000", "..00002")
    (tmp_path / "00001.tar").write_text("<html>404: not found</html>" * 50)
    (tmp_path / "00002.tar").write_bytes(b"")
    assert len(sound(pattern)) == 2
    said = errors(pattern)
    assert said["00001.tar"].startswith("the tar is no tar")
    assert said["00002.tar"] == "the tar is empty: what follows is lost"


def test_a_tar_without_images_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.npy", b"x"), ("0.cls", b"7"), ("1.npy", b"x"), ("1.cls", b"8")])
    write_tar(tmp_path / "1.tar", members(pictures(1)))
    assert errors(tmp_path) == {"0.tar": "the tar holds no images; its members: .npy, .cls"}
    assert len(sound(tmp_path)) == 1


def test_a_tar_that_is_gone_when_it_is_read_is_named(tmp_path: Path) -> None:
    source = open_source(as_tars(tmp_path, pictures(2), num_tars=2), SourceOptions())
    (tmp_path / "00000.tar").unlink()
    assert [record.error for record in source] == ["it cannot be read (No such file or directory)", None]


def test_flipped_bits_anywhere_in_a_tar_are_reasons_or_other_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members(pictures(6, drawings=True)))
    content = path.read_bytes()
    flips = random.Random(0)
    for _ in range(300):
        altered = bytearray(content)
        altered[flips.randrange(len(content))] ^= 1 << flips.randrange(8)
        path.write_bytes(altered)
        for record in sound(path).values():
            record.image.read()


def test_a_member_that_is_too_large_to_be_an_image_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # a hole in it: it takes no space
        info = tarfile.TarInfo("0.png")
        info.size = MAX_BYTES + 1
        file.write(info.tobuf())
        file.seek(-(-info.size // 512) * 512, io.SEEK_CUR)
        text = tarfile.TarInfo("0.txt")
        text.size = 1
        file.write(text.tobuf() + b"a".ljust(512, b"\0") + bytes(1024))
    record = one(path)
    assert record.captions == ("a",)
    with pytest.raises(ImageError, match="bytes is larger than any image within the limit"):
        record.image.read()
