"""Where samples come from: the images that a folder holds, each with its captions.

A folder is read in one of two ways: by its `metadata.jsonl` where it has one, else by the `.txt` files beside its
images. Images are named here and opened later, one by one: what is broken about the folder stops the run at once, what
is broken about one image is that image's `Record.error` and stops nothing.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from shared.errors import UserError

METADATA = "metadata.jsonl"
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""What makes a file a sample where no metadata names it, in lower case. What it really is, its content decides."""

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class SourceOptions:
    """How the images' folder is read."""

    missing_caption: Literal["report", "empty"] = "report"
    """What becomes of an image without a caption: `report` leaves it out and names it in the report; `empty` keeps it
    with the empty caption. Touch it for images that were never meant to have captions."""

    def check(self) -> None:
        """The types rule out all that is wrong."""


@dataclass(frozen=True)
class Record:
    """One sample as its source tells it, before anyone has opened the image."""

    name: str
    """The image's path relative to the data folder, with forward slashes; unique."""
    image: Path
    captions: tuple[str, ...]
    """Stripped and never blank, save for the one empty caption of `missing_caption="empty"`."""
    conditioning: Path | None
    """A drawing that came with the image; only the `precomputed` condition reads it."""
    split: Split | None
    """None: the source does not say."""
    error: str | None
    """Why this sample cannot be used, in plain words, where that is known already; else None."""


def read(data: Path, options: SourceOptions) -> Iterator[Record]:
    """The samples of the folder `data`, sorted by name; the same files give the same records.

    Hidden files and folders (`.name`) are no samples; links to folders are followed. All is read before the first
    record comes out, so that this very call raises `UserError`: no such folder, not a folder, no images, no captions at
    all, a malformed metadata.jsonl (with the line), a path that leaves the folder, text that is not UTF-8.
    """
    if not data.exists():
        raise UserError(f"no such folder: {data}; give the folder that holds the images")
    if not data.is_dir():
        raise UserError(f"{data} is a file; give the folder that holds the images and their captions")
    records = _from_metadata(data, options) if (data / METADATA).is_file() else _from_text_files(data, options)
    if not any(record.captions for record in records):
        raise UserError(
            f"none of the {len(records)} images in {data} has a caption; put NAME.txt beside each NAME.png, or write "
            f"{METADATA} with 'file_name' and 'text', or set missing_caption=empty"
        )
    return iter(sorted(records, key=lambda record: record.name))


def num_unmentioned_images(data: Path, records: Iterable[Record]) -> int:
    """How many image files below `data` no record names, as its image or its conditioning image.

    Only a metadata.jsonl leaves images out; the number belongs into a warning.
    """
    mentioned: set[str] = set()
    for record in records:
        mentioned.add(record.name)
        if record.conditioning is not None:
            mentioned.add(record.conditioning.relative_to(data).as_posix())
    return sum(_has_image_ending(name) and name not in mentioned for name in _walk(data))


# --- metadata.jsonl: one JSON object per line ---


def _from_metadata(data: Path, options: SourceOptions) -> list[Record]:
    path = data / METADATA
    records: list[Record] = []
    line_of: dict[str, int] = {}
    for number, raw in enumerate(_read_bytes(path).split(b"\n"), start=1):
        where = f"{path}, line {number}"
        line = _decode(raw, where).strip()
        if not line:
            continue
        record = _from_line(line, where, data, options)
        if record.name in line_of:
            raise UserError(
                f"{where}: file_name '{record.name}' is already on line {line_of[record.name]}; "
                "give an image one line and its captions as a list in 'text'"
            )
        line_of[record.name] = number
        records.append(record)
    if not records:
        raise UserError(f"{path} names no images; give each image a line with 'file_name' and 'text'")
    if not any(record.image.is_file() for record in records):
        raise UserError(
            f"{data} holds none of the {len(records)} images that its {METADATA} names, as '{records[0].name}'; "
            "'file_name' is relative to that folder"
        )
    return records


def _from_line(line: str, where: str, data: Path, options: SourceOptions) -> Record:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); write one JSON object per line") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} is not an object; write one {{'file_name': ..., 'text': ...}} per line")
    if content.get("file_name") is None:
        raise UserError(f"{where} has no 'file_name'; name the image, relative to {data}")
    name = _inside(content["file_name"], "file_name", where)
    captions, problem = _or_missing(_captions(content.get("text"), where), f"no 'text' in {where}", options)
    split = content.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: 'split' is {split!r}; use one of {', '.join(SPLITS)}, or leave it out")
    conditioning: Path | None = None
    if content.get("conditioning_image") is not None:
        conditioning = data / _inside(content["conditioning_image"], "conditioning_image", where)
        if not conditioning.is_file():
            problem = f"no such conditioning image: {conditioning} (named by {where})"
    if not (data / name).is_file():
        problem = f"no such file (named by {where})"
    return Record(name, data / name, captions, conditioning, split, problem)


def _inside(name: Any, key: str, where: str) -> str:
    """The path `name` of `key`, normalized, or a `UserError` where it is none that stays in the folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: '{key}' must be a path, but is {json.dumps(name)}")
    _refuse_lone_surrogates(name, key, where)
    normal = posixpath.normpath(name)
    if normal.startswith("/") or normal in (".", "..") or normal.startswith("../"):
        raise UserError(f"{where}: '{key}' is '{name}', which is outside the folder; use a path relative to it")
    return normal


def _captions(text: Any, where: str) -> tuple[str, ...]:
    """The captions in a line's `text`, stripped. A blank one is none: it holds nothing to learn from."""
    texts = text if isinstance(text, list) else [] if text is None else [text]
    if not all(isinstance(item, str) for item in texts):
        raise UserError(f"{where}: 'text' must be a string or a list of strings, but is {json.dumps(text)[:80]}")
    for item in texts:
        _refuse_lone_surrogates(item, "text", where)
    return tuple(item.strip() for item in texts if item.strip())


def _refuse_lone_surrogates(text: str, key: str, where: str) -> None:
    """JSON can spell half a character (`\\ud800`), which no tokenizer and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{key}' holds half a character ({error.reason}); write it as UTF-8") from error


# --- images with .txt beside them ---


def _from_text_files(data: Path, options: SourceOptions) -> list[Record]:
    files = frozenset(_walk(data))
    names = [name for name in files if _has_image_ending(name)]
    if not names:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise UserError(f"no images in {data}; put some there ({endings}), in subfolders too, or a {METADATA}")
    records: list[Record] = []
    for name in names:
        text = posixpath.splitext(name)[0] + ".txt"
        caption = _decode(_read_bytes(data / text), str(data / text)).strip() if text in files else ""
        why = f"its caption file {text} is blank" if text in files else f"no caption file {text}"
        captions, error = _or_missing((caption,) if caption else (), why, options)
        records.append(Record(name, data / name, captions, None, None, error))
    return records


# --- what both ways share ---


def _or_missing(captions: tuple[str, ...], why_none: str, options: SourceOptions) -> tuple[tuple[str, ...], str | None]:
    """The captions and the error of a sample, after `missing_caption` has had its say."""
    if captions:
        return captions, None
    if options.missing_caption == "empty":
        return ("",), None
    return (), f"no caption: {why_none}"


def _has_image_ending(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_ENDINGS


def _walk(data: Path) -> Iterator[str]:
    """The names of all files below `data`, relative to it, without hidden ones; every folder once, links or not."""
    visited = {_identity(data)}
    for folder, subfolders, files in os.walk(data, followlinks=True, onerror=_refuse_to_read):
        entered: list[str] = []
        for subfolder in sorted(subfolders):
            identity = _identity(Path(folder, subfolder))
            if not subfolder.startswith(".") and identity not in visited:
                visited.add(identity)
                entered.append(subfolder)
        subfolders[:] = entered
        for file in files:
            if file.startswith("."):
                continue
            name = Path(folder, file).relative_to(data).as_posix()
            if not name.isascii():
                _refuse_other_encodings(name, data)
            yield name


def _identity(folder: Path) -> tuple[int, int]:
    """What two paths to one folder have in common: without it, a link to a parent would be walked forever."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _refuse_other_encodings(name: str, data: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {os.fsencode(name)!r} in {data} is not UTF-8; rename the file") from error


def _refuse_to_read(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse_to_read(error)


def _decode(content: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark, which Windows editors put in front."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
