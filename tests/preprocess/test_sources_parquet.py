"""Parquet files with images in a column: which columns, which bytes, how often they are decoded, and damaged files."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.lookahead import mapped
from preprocess.sources import Record, SourceOptions, cells, open_source, read
from preprocess.sources.blobs import Cell
from shared.errors import UserError
from tests.preprocess.data_sets import Picture, as_parquet, columns_of, pictures, png, records


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def one(path: Path, **options: Any) -> Record:
    (record,) = records(path, **options).values()
    return record


def refusal(data: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read(data, SourceOptions(**options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the files that are opened from now on."""
    opened: list[str] = []
    open_file = cells.open_file

    def counted(path: str) -> Any:
        opened.append(path)
        return open_file(path)

    monkeypatch.setattr(cells, "open_file", counted)
    return opened


# --- which files, which columns ---


def test_files_folders_and_patterns_name_the_same_samples(tmp_path: Path) -> None:
    made = pictures(10, drawings=True)
    folder = as_parquet(tmp_path / "data", made)
    found = records(folder)
    assert list(found) == [f"train-0000{i // 5}-of-00002.parquet/{i % 5:08d}" for i in range(10)]
    for record, picture in zip(found.values(), made, strict=True):
        assert record.captions == tuple(picture.texts)
        assert record.error is None
        assert record.conditioning is not None
        assert record.conditioning_name == f"{record.name}.conditioning_image"
        for blob in (record.image, record.image.at_rest()):
            assert blob.read() == picture.image
        for blob in (record.conditioning, record.conditioning.at_rest()):
            assert blob.read() == picture.drawing
    assert records(f"{folder}/*.parquet") == found
    assert records(f"{folder}/train-{{00000..00001}}-of-00002.parquet") == found
    (tmp_path / "hub").mkdir()
    folder.rename(tmp_path / "hub/data")
    assert [name.removeprefix("data/") for name in records(tmp_path / "hub")] == list(found)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize(("image", "caption", "drawing"), [
    ("image", "text", "conditioning_image"), ("jpg", "caption", "cond"), ("target", "prompt", "source"),
    ("picture", "captions", "hint"),
])  # fmt: skip
def test_customary_columns_are_found(tmp_path: Path, kind: Any, image: str, caption: str, drawing: str) -> None:
    columns = {
        "id": pa.array([7]), image: pa.array([b"i"], kind), drawing: pa.array([b"d"], kind), caption: pa.array(["a"]),
    }  # fmt: skip
    record = one(write(tmp_path / "a.parquet", columns))
    assert (record.image.read(), record.captions) == (b"i", ("a",))
    assert record.conditioning is not None
    assert record.conditioning.read() == b"d"
    assert record.image.at_rest() == Cell(str(tmp_path / "a.parquet"), 0, 0, image)


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    columns = {"one": [b"1"], "two": [b"2"], "three": [b"3"], "long": ["l"], "text": ["t"]}
    path = write(tmp_path / "a.parquet", columns)
    assert "has 3 columns of images; choose one: source.image_column; its columns: one, two, three" in refusal(path)
    record = one(path, image_column="two", conditioning_column="three", caption_column="long")
    assert (record.image.read(), record.captions) == (b"2", ("l",))
    assert record.conditioning is not None
    assert record.conditioning.read() == b"3"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "pixels"}, "has no column 'pixels' (source.image_column); its columns: image, text, id"),
        ({"caption_column": "txt"}, "has no column 'txt' (source.caption_column); its columns: image, text, id"),
        ({"conditioning_column": "c"}, "has no column 'c' (source.conditioning_column)"),
        ({"image_column": "text"}, "column 'text' is string, not images' bytes; image is"),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, options: dict[str, str], words: str
) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"i"], "text": ["a"], "id": [1]})
    assert words in refusal(path, **options)


def test_a_table_without_images_is_refused_with_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"url": ["https://example.org/a.png"], "text": ["a"]})
    assert "has no column that holds images (binary, or a struct with bytes): url (string), text (string)" in refusal(
        path
    )


def test_captions_may_be_lists_with_weights(tmp_path: Path) -> None:
    weighted = [[{"text": "one", "weight": 3.0}, {"text": "two", "weight": 1.0}], [{"text": "x", "weight": -1.0}]]
    found = records(write(tmp_path / "a.parquet", {"image": [b"i", b"j"], "text": weighted}))
    first, second = found.values()
    assert (first.captions, first.weights) == (("one", "two"), (3.0, 1.0))
    assert "'text': a caption's weight must be a number above 0, but is -1.0" in str(second.error)
    path = write(tmp_path / "b.parquet", {"image": [b"i"], "text": [["one", "two"]]})
    assert one(path).captions == ("one", "two")


def test_rows_without_image_or_caption_are_reported_with_their_reason(tmp_path: Path) -> None:
    image = pa.array(
        [{"bytes": b"i", "path": None}, None, {"bytes": None, "path": "gone.png"}, {"bytes": None, "path": "here.png"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    (tmp_path / "here.png").write_bytes(b"a file")
    found = list(records(write(tmp_path / "a.parquet", {"image": image, "text": [None, "b", "c", "d"]})).values())
    assert [record.error for record in found] == [
        "no caption: its 'text' is empty",
        "its 'image' is empty",
        "its 'image' holds no bytes, only the path gone.png, which is not on this machine",
        None,
    ]
    assert found[3].image.read() == b"a file"


def test_a_row_without_a_drawing_is_a_sample_without_a_drawing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet", {"image": [b"i", b"j"], "text": ["a", "b"], "conditioning_image": [None, b"d"]}
    )
    first, second = records(path).values()
    assert (first.error, first.conditioning, first.conditioning_name) == (None, None, None)
    assert second.conditioning_name == "a.parquet/00000001.conditioning_image"


def test_splits_are_told_by_the_names_of_files(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation_0"):
        write(tmp_path / f"data/{name}.parquet", {"image": [b"i"], "text": ["a"]})
    assert {name.split("/")[0]: r.split for name, r in records(tmp_path / "data").items()} == {
        "train-00000-of-00001.parquet": "train",
        "test-00000-of-00001.parquet": "validation",
        "validation_0.parquet": "validation",
    }
    only = records(tmp_path / "data/train-00000-of-00001.parquet")
    assert [record.split for record in only.values()] == [None]


def test_whether_drawings_come_with_the_images_is_known_before_they_are_read(tmp_path: Path) -> None:
    for drawings in (True, False):
        folder = as_parquet(tmp_path / str(drawings), pictures(4, drawings))
        assert open_source(folder, SourceOptions()).conditioned is drawings


# --- one row at a time ---


def test_rows_that_are_read_in_order_by_many_threads_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Picture(png(i) + bytes(1000), ["a"]) for i in range(60)]
    folder = as_parquet(tmp_path / "data", made, num_files=2, row_group=10)
    blobs = [record.image.at_rest() for record in read(folder, SourceOptions())]
    opened = count_opened(monkeypatch)
    assert list(mapped(lambda blob: blob.read(), blobs, workers=4, ahead=8)) == [picture.image for picture in made]
    assert len(opened) == 6  # once for each row group


def test_a_large_row_group_is_decoded_in_slices_and_a_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Picture(bytes([i]) * 1000, ["a"]) for i in range(100)]
    folder = as_parquet(tmp_path / "data", made, num_files=1, row_group=100)
    monkeypatch.setattr(cells, "SLICE_BYTES", 5000)
    found = list(read(folder, SourceOptions()))
    assert [record.image.read() for record in found] == [picture.image for picture in made]
    opened = count_opened(monkeypatch)
    blobs = [record.image.at_rest() for record in found]
    assert list(mapped(lambda blob: blob.read(), blobs, workers=4, ahead=8)) == [picture.image for picture in made]
    assert len(opened) == 1
    (group,) = (group for key, group in cells._row_groups.items() if key[0].startswith(str(folder)))
    assert sum(len(column) for _, column in group._slices) <= 4 * 6
    assert found[0].image.at_rest().read() == made[0].image  # from the beginning once more
    assert len(opened) == 2


@pytest.mark.parametrize("order", [reversed, lambda rows: [*rows[::3], *rows[1::3], *rows[2::3]]])
def test_rows_can_be_read_in_any_order(tmp_path: Path, order: Callable[[list[Any]], Any]) -> None:
    made = pictures(30)
    folder = as_parquet(tmp_path / "data", made, num_files=3, row_group=4)
    rows = [
        (record.image.at_rest(), picture.image)
        for record, picture in zip(read(folder, SourceOptions()), made, strict=True)
    ]
    for blob, image in order(rows):
        assert blob.read() == image


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    for value in (1, 2):
        path = write(tmp_path / "a.parquet", {"image": [png(value)], "text": ["a"]})
        assert one(path).image.at_rest().read() == png(value)


# --- files that are not whole ---


def test_a_file_that_is_cut_off_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    folder = as_parquet(tmp_path / "data", pictures(9), num_files=3)
    path = folder / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    found = records(folder)
    assert len([record for record in found.values() if record.error is None]) == 6
    assert str(found[path.name].error).startswith("it is no whole Parquet file (")
    (folder / "train-00000-of-00003.parquet").write_bytes(b"")
    assert len([record for record in records(folder).values() if record.error is None]) == 3


def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    columns = dict(columns_of([Picture(bytes([i]) * 500, ["a"]) for i in range(9)]))
    path = write(
        tmp_path / "a.parquet", columns, row_group_size=3, write_page_checksum=True, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    content[content.index(bytes([4]) * 500) + 250] ^= 1
    path.write_bytes(content)
    found = records(path)
    assert [name for name, record in found.items() if record.error is None] == [
        f"a.parquet/{i:08d}" for i in (0, 1, 2, 6, 7, 8)
    ]
    assert str(found["a.parquet row group 1"].error).startswith("row group 1 is damaged (")
    with pytest.raises(OSError, match="not a sound Parquet file"):
        Cell(str(path), 1, 1, "image.bytes").read()


def test_a_file_with_other_columns_is_named(tmp_path: Path) -> None:
    write(tmp_path / "data/0.parquet", {"image": [b"i"], "text": ["a"]})
    write(tmp_path / "data/1.parquet", {"image": [b"i"], "label": [3]})
    found = records(tmp_path / "data")
    assert found["1.parquet"].error == "it has no column 'text', but image, label: rows are lost"
    assert found["0.parquet/00000000"].error is None


def test_data_of_which_no_file_can_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "none of the 1 Parquet files of" in refusal(tmp_path / "a.parquet")


def test_flipped_bits_anywhere_in_a_file_are_reasons_or_other_bytes_and_never_end_the_process(tmp_path: Path) -> None:
    as_parquet(tmp_path / "data", pictures(20, drawings=True), num_files=1)
    (path,) = (tmp_path / "data").iterdir()
    content = path.read_bytes()
    flips = random.Random(0)
    for _ in range(300):
        altered = bytearray(content)
        altered[flips.randrange(len(content))] ^= 1 << flips.randrange(8)
        path.write_bytes(altered)
        with suppress(UserError):
            for record in records(path).values():
                if record.error is None:
                    with suppress(OSError):
                        record.image.at_rest().read()
