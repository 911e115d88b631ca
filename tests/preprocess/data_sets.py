"""The same pictures in every kind of source: a folder, tars, Parquet files, a data set that was saved to disk."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from preprocess.sources import Record, SourceOptions, read


@dataclass(frozen=True)
class Picture:
    """An image file's bytes, its captions, and the drawing that comes with it."""

    image: bytes
    texts: list[Any]
    drawing: bytes | None = None


def png(value: int, width: int = 16, height: int = 16) -> bytes:
    """A picture of two greys, another one for each value."""
    pixels = np.full((height, width, 3), value % 256, np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 255 - value % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count: int, drawings: bool = False, width: int = 16, height: int = 16) -> list[Picture]:
    """`count` pictures, each with a caption of its own."""
    return [
        Picture(png(i, width, height), [f"number {i}"], png(200 - i, width, height) if drawings else None)
        for i in range(count)
    ]


def records(data: str | Path, **options: Any) -> dict[str, Record]:
    """What a source gives, by name; asserts that names are unique."""
    found = list(read(data, SourceOptions(**options)))
    by_name = {record.name: record for record in found}
    assert len(by_name) == len(found)
    return by_name


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(made: Sequence[Picture], first: int = 0) -> list[tuple[str, bytes]]:
    """The members of a tar of WebDataset: `000000.png`, `000000.json` or `.txt`, `000000.cond.png`."""
    found = []
    for i, picture in enumerate(made, start=first):
        found.append((f"{i:06d}.png", picture.image))
        if len(picture.texts) == 1 and isinstance(picture.texts[0], str):
            found.append((f"{i:06d}.txt", picture.texts[0].encode()))
        else:
            found.append((f"{i:06d}.json", json.dumps({"caption": picture.texts}).encode()))
        if picture.drawing is not None:
            found.append((f"{i:06d}.cond.png", picture.drawing))
    return found


def as_folder(folder: Path, made: Sequence[Picture]) -> Path:
    """A folder with metadata.jsonl."""
    (folder / "drawings").mkdir(parents=True)
    lines = []
    for i, picture in enumerate(made):
        (folder / f"{i:06d}.png").write_bytes(picture.image)
        line: dict[str, Any] = {"file_name": f"{i:06d}.png", "text": picture.texts}
        if picture.drawing is not None:
            (folder / "drawings" / f"{i:06d}.png").write_bytes(picture.drawing)
            line["conditioning_image"] = f"drawings/{i:06d}.png"
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def as_tars(folder: Path, made: Sequence[Picture], num_tars: int = 2) -> str:
    """Tars and the pattern that names them."""
    size = -(-len(made) // num_tars)
    for number in range(num_tars):
        write_tar(folder / f"{number:05d}.tar", members(made[number * size : (number + 1) * size], number * size))
    return f"{folder}/{{00000..{num_tars - 1:05d}}}.tar"


def columns_of(made: Sequence[Picture]) -> Mapping[str, pa.Array]:
    """The columns of the hub's tables: image and conditioning_image as struct of bytes and path, text."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts: list[Any] = [picture.texts for picture in made]
    found = {
        "image": pa.array([{"bytes": picture.image, "path": f"{i}.png"} for i, picture in enumerate(made)], image),
        "text": pa.array([text[0] for text in texts] if all(len(text) == 1 for text in texts) else texts),
    }
    if any(picture.drawing is not None for picture in made):
        drawings = [None if picture.drawing is None else {"bytes": picture.drawing, "path": None} for picture in made]
        found["conditioning_image"] = pa.array(drawings, image)
    return found


def as_parquet(folder: Path, made: Sequence[Picture], num_files: int = 2, row_group: int = 3) -> Path:
    """A folder of Parquet files."""
    folder.mkdir(parents=True)
    size = -(-len(made) // num_files)
    for number in range(num_files):
        table = pa.table(dict(columns_of(made[number * size : (number + 1) * size])))
        pq.write_table(table, folder / f"train-{number:05d}-of-{num_files:05d}.parquet", row_group_size=row_group)
    return folder


def as_saved(folder: Path, made: Sequence[Picture], num_files: int = 2) -> Path:
    """A data set that Hugging Face's own library saved to disk."""
    import datasets

    columns: dict[str, Any] = {
        "image": [{"bytes": picture.image, "path": None} for picture in made],
        "text": [text[0] if len(text) == 1 else text for text in (picture.texts for picture in made)],
    }
    features: dict[str, Any] = {"image": datasets.Image(), "text": datasets.Value("string")}
    if any(len(picture.texts) > 1 for picture in made):
        columns["text"] = [picture.texts for picture in made]
        features["text"] = datasets.List(datasets.Value("string"))
    if any(picture.drawing is not None for picture in made):
        columns["conditioning_image"] = [
            None if picture.drawing is None else {"bytes": picture.drawing, "path": None} for picture in made
        ]
        features["conditioning_image"] = datasets.Image()
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.save_to_disk(str(folder), num_shards=num_files)
    return folder
