"""A folder becomes records: what is read, in which order, and what is refused in which words."""

from __future__ import annotations

import json
import os
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.sources import File, Record, SourceOptions, open_source, read
from shared.errors import UserError

PIXELS = b"sources never look inside an image"


def touch(data: Path, *names: str) -> None:
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(PIXELS)


def write_metadata(data: Path, *lines: dict[str, Any] | str) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (data / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def records(data: Path, options: SourceOptions | None = None) -> dict[str, Record]:
    return {record.name: record for record in read(data, options or SourceOptions())}


def refusal(data: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(data, SourceOptions())
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- .txt beside the images ---


def test_text_files_beside_images_are_captions_in_subfolders_too(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.JPG", "deep/er/c.webp", "notes.md", "README.txt")
    (tmp_path / "b.txt").write_text("\n  a red fox,\nasleep \n")
    (tmp_path / "a.txt").write_text("\ufeffein Füchslein", encoding="utf-8")
    (tmp_path / "deep/er/c.txt").write_text("c")
    found = list(read(tmp_path, SourceOptions()))
    assert [record.name for record in found] == ["a.JPG", "b.png", "deep/er/c.webp"]
    assert [record.captions for record in found] == [("ein Füchslein",), ("a red fox,\nasleep",), ("c",)]
    assert found[2].image.where == str(tmp_path / "deep/er/c.webp")
    assert all((r.conditioning, r.split, r.error) == (None, None, None) for r in found)


def test_every_common_image_ending_makes_a_sample_in_either_case(tmp_path: Path) -> None:
    endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".PNG", ".Jpeg")
    names = [f"{i}{ending}" for i, ending in enumerate(endings)]
    touch(tmp_path, *names)
    assert sorted(records(tmp_path, SourceOptions(missing_caption="empty"))) == sorted(names)


def test_hidden_files_and_folders_are_no_samples(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a.png")
    (tmp_path / "a.txt").write_text("a")
    assert list(records(tmp_path)) == ["a.png"]


def test_a_linked_folder_is_read_once_and_a_loop_ends(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.png")
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(data)
    assert list(records(data, SourceOptions(missing_caption="empty"))) == ["images/a.png"]


def test_an_image_without_a_caption_among_others_is_reported_with_its_reason(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.txt").write_text(" \n")
    found = records(tmp_path)
    assert found["a.png"].error is None
    assert (found["b.png"].captions, found["b.png"].error) == ((), "no caption: no caption file b.txt")
    assert (found["c.png"].captions, found["c.png"].error) == ((), "no caption: its caption file c.txt is blank")


def test_missing_captions_can_be_empty_ones(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    record = records(tmp_path, SourceOptions(missing_caption="empty"))["a.png"]
    assert (record.captions, record.error) == (("",), None)


def test_missing_captions_can_be_one_prompt_and_those_that_are_there_stay(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_text("a dog asleep")
    found = records(tmp_path, SourceOptions(caption=" a photo of sks dog "))
    assert [(found[name].captions, found[name].error) for name in ("a.png", "b.png")] == [
        (("a photo of sks dog",), None),
        (("a dog asleep",), None),
    ]
    with pytest.raises(UserError, match=r"source\.caption is blank"):
        SourceOptions(caption=" ").check()


def test_no_caption_at_all_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    assert "none of the 2 images" in refusal(tmp_path)
    write_metadata(tmp_path, {"file_name": "a.png"}, {"file_name": "b.png", "text": [" "]})
    assert "none of the 2 images" in refusal(tmp_path)


# --- metadata.jsonl ---


def test_metadata_gives_captions_conditioning_and_split_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "b.bin", "drawings/a.png")
    write_metadata(
        tmp_path,
        {"file_name": "x/a.png", "text": " a fox ", "conditioning_image": "drawings/a.png", "split": "validation"},
        "",
        {"file_name": "./b.bin", "text": ["one", " ", "two "], "split": None, "width": 3, "conditioning_image": None},
    )
    found = records(tmp_path)
    drawing = File(str(tmp_path), "drawings/a.png")
    a = Record(
        "x/a.png", File(str(tmp_path), "x/a.png"), ("a fox",), (1.0,), "drawings/a.png", drawing, "validation", None
    )
    b = Record("b.bin", File(str(tmp_path), "b.bin"), ("one", "two"), (1.0, 1.0), None, None, None, None)
    assert found == {"x/a.png": a, "b.bin": b}


def test_records_are_sorted_by_name_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c/a.png")
    lines = [{"file_name": name, "text": name} for name in ("c/a.png", "a.png", "b.png")]
    write_metadata(tmp_path, *lines)
    first = list(read(tmp_path, SourceOptions()))
    write_metadata(tmp_path, *lines[::-1])
    assert [record.name for record in first] == ["a.png", "b.png", "c/a.png"]
    assert [record.captions for record in read(tmp_path, SourceOptions())] == [record.captions for record in first]


def test_a_line_separator_inside_a_caption_does_not_end_the_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('\ufeff{"file_name": "a.png", "text": "a\u2028b"}\r\n', encoding="utf-8")
    assert records(tmp_path)["a.png"].captions == ("a\u2028b",)


def test_images_that_metadata_does_not_mention_are_counted_and_not_samples(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "drawing.png", "left.png", "deep/out.jpg", "notes.md")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a", "conditioning_image": "drawing.png"})
    source = open_source(tmp_path, SourceOptions())
    assert [record.name for record in source] == ["a.png"]
    assert source.remarks() == [
        f"2 image file(s) in {tmp_path} are not named by its metadata.jsonl: they are no samples"
    ]


def test_files_named_in_metadata_but_missing_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": "a"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "b.png", "text": "b", "conditioning_image": "drawings/gone.png"},
    )
    found = records(tmp_path)
    assert found["a.png"].error is None
    assert "no such file" in str(found["gone.png"].error)
    assert "line 2" in str(found["gone.png"].error)
    assert found["b.png"].error is None  # a matter of the condition that reads it
    with pytest.raises(OSError, match=r"drawings/gone\.png"):
        found["b.png"].conditioning.read()  # type: ignore[union-attr]


def test_records_survive_pickling_to_another_process(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    record = records(tmp_path, SourceOptions(missing_caption="empty"))["a.png"]
    here, there = Pipe()
    here.send(record)
    assert there.recv() == record


# --- refusals ---


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")


def test_a_file_as_data_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    assert "is a file" in refusal(tmp_path / "a.png")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "readme.md")
    assert "no images in" in refusal(tmp_path)
    write_metadata(tmp_path, "")
    assert "names no images" in refusal(tmp_path)


def test_metadata_of_which_no_image_exists_is_refused(tmp_path: Path) -> None:
    write_metadata(tmp_path, {"file_name": "images/a.png", "text": "a"})
    assert "holds none of the 1 images" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{file_name: a}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a.png", "a"]', "is not an object"),
        ({"text": "a"}, "has no 'file_name'"),
        ({"file_name": 3, "text": "a"}, "'file_name' must be a path"),
        ({"file_name": "", "text": "a"}, "'file_name' must be a path"),
        ({"file_name": "a.png", "text": 3}, "'text' must be a string, a list of strings, or a list of"),
        ({"file_name": "a.png", "text": ["a", None]}, "'text' must be a string, a list of strings, or a list of"),
        ({"file_name": "a.png", "text": {"en": "a"}}, "'text' must be a string, a list of strings, or a list of"),
        ({"file_name": "a.png", "text": "\ud800"}, "'text' holds half a character"),
        ({"file_name": "\udfff.png", "text": "a"}, "'file_name' holds half a character"),
        ({"file_name": "../a.png", "text": "a"}, "outside the folder"),
        ({"file_name": "x/../../a.png", "text": "a"}, "outside the folder"),
        ({"file_name": "/etc/a.png", "text": "a"}, "outside the folder"),
        ({"file_name": ".", "text": "a"}, "outside the folder"),
        ({"file_name": "a.png", "text": "a", "conditioning_image": "../b.png"}, "'conditioning_image' is"),
        ({"file_name": "a.png", "text": "a", "conditioning_image": 1}, "'conditioning_image' must be a path"),
        ({"file_name": "a.png", "text": "a", "split": "test"}, "'split' is 'test'; use one of train, validation"),
        ({"file_name": "./ok.png", "text": "again"}, "is already on line 1"),
    ],
)
def test_a_malformed_metadata_line_is_refused_with_its_number(
    tmp_path: Path, line: dict[str, Any] | str, words: str
) -> None:
    touch(tmp_path, "ok.png", "a.png")
    write_metadata(tmp_path, {"file_name": "ok.png", "text": "ok"}, line)
    message = refusal(tmp_path)
    assert words in message
    assert "metadata.jsonl, line 2" in message


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("Füchslein".encode("latin-1"))
    assert f"{tmp_path / 'a.txt'} is not UTF-8" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    assert "metadata.jsonl, line 1 is not UTF-8" in refusal(tmp_path)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(PIXELS)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert "is not UTF-8; rename the file" in refusal(tmp_path)


# --- the hub's imagefolder layout, and other metadata ---


def test_metadata_may_be_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "drawings/a.png")
    (tmp_path / "metadata.csv").write_text(
        "\ufefffile_name,text,conditioning_image\n"
        'a.png,"a fox, ""asleep""\non two lines",drawings/a.png\n'
        "b.png, a hen ,\n",
        encoding="utf-8",
    )
    found = records(tmp_path)
    assert found["a.png"].captions == ('a fox, "asleep"\non two lines',)
    assert found["a.png"].conditioning_name == "drawings/a.png"
    assert (found["b.png"].captions, found["b.png"].conditioning) == (("a hen",), None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,text\na.png,a,b\n", "line 2 has not as many values"),
        ("file_name,text\na.png\n", "line 2 has not as many values"),
        ('file_name,text\na.png,"a\n', "line 2 is not CSV"),
        ("file_name,text\n,a\n", "line 2 has no 'file_name'"),
        ("file_name,text\n../a.png,a\n", "outside the folder"),
        ("path,text\n", "names no images"),
    ],
)
def test_malformed_csv_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    assert words in refusal(tmp_path)


def test_csv_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    assert "metadata.csv is not UTF-8" in refusal(tmp_path)


def test_metadata_may_be_parquet(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    texts = [["one", "two"], ["three"]]
    pq.write_table(pa.table({"file_name": ["a.png", "b.png"], "text": texts}), tmp_path / "metadata.parquet")
    assert {name: r.captions for name, r in records(tmp_path).items()} == {"a.png": ("one", "two"), "b.png": ("three",)}
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    assert "metadata.parquet is no sound Parquet file" in refusal(tmp_path)


def test_split_folders_have_their_own_metadata_and_say_what_is_held_out(tmp_path: Path) -> None:
    for split in ("train", "test", "validation"):
        touch(tmp_path / split, "images/a.png", "drawings/a.png")
        (tmp_path / split / "metadata.csv").write_text(
            "image,caption,conditioning_image\nimages/a.png,a fox,drawings/a.png\n"
        )
    found = records(tmp_path)
    assert {name: (r.split, r.conditioning_name) for name, r in found.items()} == {
        "train/images/a.png": ("train", "train/drawings/a.png"),
        "test/images/a.png": ("validation", "test/drawings/a.png"),
        "validation/images/a.png": ("validation", "validation/drawings/a.png"),
    }
    assert [record.split for record in records(tmp_path / "train").values()] == [None]


def test_split_folders_of_images_with_text_files_say_what_is_held_out(tmp_path: Path) -> None:
    for name in ("train/a", "val/a"):
        touch(tmp_path, f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a")
    assert {name: record.split for name, record in records(tmp_path).items()} == {
        "train/a.png": "train", "val/a.png": "validation",
    }  # fmt: skip


@pytest.mark.parametrize(("file", "image", "drawing", "text"), [
    ("prompt.json", "target", "source", "prompt"),  # as ControlNet's authors have it
    ("train.jsonl", "image", "conditioning_image", "text"),  # as the hub has it
])  # fmt: skip
def test_fill50k_is_read_as_it_comes(file: str, image: str, drawing: str, text: str, tmp_path: Path) -> None:
    touch(tmp_path, f"{drawing}s/0.png", f"{image}s/0.png")
    line = {drawing: f"{drawing}s/0.png", image: f"{image}s/0.png", text: "pale golden rod circle"}
    (tmp_path / file).write_text(json.dumps(line) + "\n")
    for options in (SourceOptions(), SourceOptions(metadata=file)):
        found = records(tmp_path, options)
        assert list(found) == [f"{image}s/0.png"]
        [record] = found.values()
        assert (record.captions, record.conditioning_name) == (("pale golden rod circle",), f"{drawing}s/0.png")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"image": "none.png"}', '{"seed": 7, "text": "a\\u0000"}'])
def test_a_file_that_is_called_as_fill50k_s_but_names_nothing_is_no_metadata(content: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a circle")
    (tmp_path / "train.jsonl").write_text(content)
    assert list(records(tmp_path)) == ["a.png"]


def test_columns_of_metadata_can_be_chosen_and_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    write_metadata(tmp_path, {"id": 7, "left": "a.png", "right": "b.png", "words": "a", "text": "short"})
    assert (
        "has no 'file_name', which names the images; or say which column does: source.image_column; "
        "its columns: id, left, right, words, text" in refusal(tmp_path)
    )
    options = SourceOptions(image_column="left", conditioning_column="right", caption_column="words")
    (record,) = records(tmp_path, options).values()
    assert (record.name, record.conditioning_name, record.captions) == ("a.png", "b.png", ("a",))
    with pytest.raises(UserError, match=r"has no column 'up' \(source\.image_column\); its columns: id, left"):
        open_source(tmp_path, SourceOptions(image_column="up"))


def test_two_metadata_files_in_one_folder_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "of the jsonl"})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,of the csv\n")
    assert "has metadata.jsonl and metadata.csv; keep one" in refusal(tmp_path)
    assert records(tmp_path, SourceOptions(metadata="metadata.csv"))["a.png"].captions == ("of the csv",)
    with pytest.raises(UserError, match=r"has no other\.csv \(source\.metadata\)"):
        open_source(tmp_path, SourceOptions(metadata="other.csv"))


def test_an_image_that_two_metadata_files_name_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}')
    (tmp_path / "b/metadata.jsonl").write_text('{"file_name": "../a/1.png", "text": "again"}')
    assert "'a/1.png' is already on line 1 of a/metadata.jsonl" in refusal(tmp_path)


# --- captions with weights ---


def test_captions_may_have_weights(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    text = [{"text": " often ", "weight": 3}, {"text": "once"}, "also once", {"text": "once", "weight": 0.5}, " "]
    write_metadata(tmp_path, {"file_name": "a.png", "text": text})
    record = records(tmp_path)["a.png"]
    assert (record.captions, record.weights) == (("often", "once", "also once"), (3.0, 1.5, 1.0))


@pytest.mark.parametrize("weight", [0, -1, "1", True, None, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_above_0_is_refused(tmp_path: Path, weight: Any) -> None:
    touch(tmp_path, "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": [{"text": "a", "weight": weight}]})
    assert "line 1: 'text': a caption's weight must be a number above 0, but is" in refusal(tmp_path)
