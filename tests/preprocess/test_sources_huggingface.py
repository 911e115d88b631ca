"""Data sets as Hugging Face's own library saves them to disk, read without it."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from preprocess.sources import Record, SourceOptions, open_source, read
from preprocess.sources.blobs import Range
from shared.errors import UserError
from tests.preprocess.data_sets import Picture, as_saved, pictures, png, records


def save(folder: Path, columns: dict[str, list[Any]], **features: Any) -> Path:
    datasets.disable_progress_bars()
    known = datasets.Features(features) if features else None
    datasets.Dataset.from_dict(columns, features=known).save_to_disk(str(folder))
    return folder


def refusal(data: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read(data, SourceOptions(**options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reasons(found: dict[str, Record]) -> dict[str, str]:
    return {name: record.error for name, record in found.items() if record.error is not None}


def test_a_data_set_is_read_with_its_drawings_by_the_places_in_its_files(tmp_path: Path) -> None:
    made = pictures(7, drawings=True)
    found = records(as_saved(tmp_path / "data", made, num_files=2))
    assert list(found) == [f"data-0000{i // 4}-of-00002.arrow/{i % 4:08d}" for i in range(7)]
    for record, picture in zip(found.values(), made, strict=True):
        assert record.error is None
        assert record.captions == tuple(picture.texts)
        assert isinstance(record.image, Range)
        assert record.image.read() == picture.image
        assert record.conditioning is not None
        assert record.conditioning.read() == picture.drawing
        assert record.conditioning_name == f"{record.name}.conditioning_image"


def test_every_split_of_a_dict_of_data_sets_is_read(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(i), "path": None} for i in range(6)], "text": [f"number {i}" for i in range(6)]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    both = datasets.DatasetDict({"train": whole.select(range(4)), "test": whole.select([5, 4])})
    both.save_to_disk(str(tmp_path / "data"))
    found = records(tmp_path / "data")
    assert [(name.split("/")[0], r.split, r.captions[0]) for name, r in found.items()] == [
        *(("train", "train", f"number {i}") for i in range(4)),
        ("test", "validation", "number 5"),
        ("test", "validation", "number 4"),
    ]
    assert [record.image.read() for record in found.values()] == [png(i) for i in (0, 1, 2, 3, 5, 4)]
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "one"))
    assert {record.split for record in records(tmp_path / "one").values()} == {None}


def test_images_that_the_library_encoded_itself_are_read(tmp_path: Path) -> None:
    pixels = [np.full((8, 8, 3), i, np.uint8) for i in range(3)]
    folder = save(tmp_path / "data", {"image": [Image.fromarray(p) for p in pixels], "caption": ["a", "b", "c"]})
    read_back = [np.asarray(Image.open(io.BytesIO(r.image.read()))) for r in records(folder).values()]
    assert all(np.array_equal(a, b) for a, b in zip(read_back, pixels, strict=True))


def test_captions_may_be_lists_and_values_may_be_missing(tmp_path: Path) -> None:
    image, text = datasets.Image(), datasets.List(datasets.Value("string"))
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}, None],
        "prompt": [["one", "two"], [], ["three"]],
        "conditioning_image": [None, {"bytes": png(9), "path": None}, None],
    }
    found = records(save(tmp_path / "data", columns, image=image, prompt=text, conditioning_image=image))
    first, second, third = found.values()
    assert (first.captions, first.conditioning, first.error) == (("one", "two"), None, None)
    assert second.conditioning is not None
    assert second.conditioning.read() == png(9)
    assert second.error == "no caption: its 'prompt' is empty"
    assert third.error == "its 'image' is empty"


def test_columns_can_be_chosen_and_are_listed(tmp_path: Path) -> None:
    image = datasets.Image()
    value = {"bytes": png(0), "path": None}
    folder = save(
        tmp_path / "data", {"a": [value], "b": [value], "text": ["t"]},
        a=image, b=image, text=datasets.Value("string"),
    )  # fmt: skip
    assert "has 2 columns of images; choose one: source.image_column; its columns: a, b, text" in refusal(folder)
    (record,) = records(folder, image_column="b", conditioning_column="a").values()
    assert record.conditioning_name == "data-00000-of-00001.arrow/00000000.a"
    assert open_source(folder, SourceOptions(image_column="b")).conditioned is False
    nothing = save(tmp_path / "texts", {"text": ["t"]})
    assert "has no column that holds images (binary, or a struct with bytes): text (string)" in refusal(nothing)


def test_slices_of_a_batch_are_read_from_their_own_places(tmp_path: Path) -> None:
    # The library writes batches of a hundred rows: many of them.
    made = [Picture(i.to_bytes(4, "big") * 3, [f"number {i}"]) for i in range(2500)]
    found = records(as_saved(tmp_path / "data", made, num_files=1))
    assert [record.image.read() for record in found.values()] == [picture.image for picture in made]


def test_no_library_of_theirs_is_needed(tmp_path: Path) -> None:
    folder = as_saved(tmp_path / "data", pictures(2))
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import sys\nfrom preprocess.sources import SourceOptions, read\n"
            f"print(len(list(read({str(folder)!r}, SourceOptions()))), 'datasets' in sys.modules)",
        ],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "False"]


# --- what is not whole ---


def test_of_a_file_that_is_cut_off_all_before_is_used_and_the_rest_is_named(tmp_path: Path) -> None:
    made = [Picture(i.to_bytes(4, "big") * 100, [f"number {i}"]) for i in range(1500)]
    folder = as_saved(tmp_path / "data", made, num_files=1)
    whole = records(folder)
    path = folder / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    num_sound = set()
    for at in (*range(0, len(content), len(content) // 40), len(content) - 8, len(content) - 1):
        path.write_bytes(content[:at])
        if at < 1000:  # not even the columns are told
            assert "none of the 1 Arrow files of" in refusal(folder)
            continue
        found = records(folder)
        sound = [name for name in found if name not in reasons(found)]
        assert sound == list(whole)[: len(sound)]
        assert list(reasons(found)) == ["data-00000-of-00001.arrow"]
        assert all(found[name].image.read() == whole[name].image.read() for name in sound[::100])
        num_sound.add(len(sound))
    assert {0, 1500} < num_sound


def test_flipped_bits_anywhere_in_a_file_are_reasons_or_other_bytes_and_never_end_the_process(tmp_path: Path) -> None:
    folder = as_saved(tmp_path / "data", pictures(20, drawings=True), num_files=1)
    path = folder / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    flips = random.Random(0)
    for _ in range(150):
        altered = bytearray(content)
        altered[flips.randrange(len(content))] ^= 1 << flips.randrange(8)
        path.write_bytes(altered)
        with suppress(UserError):
            for record in records(folder).values():
                if record.error is None:
                    with suppress(OSError):
                        record.image.read()


def test_a_missing_file_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    folder = as_saved(tmp_path / "data", pictures(6), num_files=3)
    (folder / "data-00000-of-00003.arrow").unlink()
    found = records(folder)
    assert len(found) == 4 + 1
    assert list(reasons(found)) == ["data-00000-of-00003.arrow"]


def test_compressed_buffers_are_named(tmp_path: Path) -> None:
    folder = as_saved(tmp_path / "data", pictures(3), num_files=1)
    path = folder / "data-00000-of-00001.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.concat_tables([table] * 50).combine_chunks())
    assert "column image.bytes is compressed; save the data set again" in str(reasons(records(folder)))


def test_a_list_of_rows_beside_the_data_is_refused(tmp_path: Path) -> None:
    folder = as_saved(tmp_path / "data", pictures(2))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert "flatten_indices()" in refusal(folder)
    (folder / "state.json").write_text("{")
    assert "state.json cannot be read" in refusal(folder)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none", kind="huggingface")
    (tmp_path / "state.json").write_text("{}")
    assert "holds no .arrow files" in refusal(tmp_path)
