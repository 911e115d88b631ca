"""WebDataset tars: members of one key are a sample, `000123.jpg` and `000123.txt`. Here or at URLs, one or many.

A tar is gone through once, from its beginning to its end; later each image is read by its place in it. What a member
is, its ending says:

    jpg, png, webp, ...               the image (also image.png, target.jpg)
    txt, text, caption                the caption; or json, with a key caption or text
    conditioning.png, cond.png, ...   the drawing that comes with the image (also source.png beside target.jpg)
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

from preprocess.images import MAX_BYTES
from preprocess.sources import columns, containers, remote
from preprocess.sources.base import Part, Record, Source, SourceOptions, Split, captions_of, or_missing, splits_of
from preprocess.sources.blobs import Blob, InHand, Missing, Range
from preprocess.sources.containers import Container
from preprocess.sources.listing import IMAGE_ENDINGS
from shared.errors import UserError

_BLOCK: Final = tarfile.BLOCKSIZE
_LONGEST_TEXT_BYTES: Final = 1 << 24
_SIGNS_OF_COMPRESSION: Final = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and zstd begin."""
_ENDINGS: Final = frozenset(ending[1:] for ending in IMAGE_ENDINGS)
_KEY: Final = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
"""A member's key and ending, as WebDataset has it: up to the first dot of the base name, folders included."""


def open_source(data: str, options: SourceOptions) -> Tars:
    """The tars that `data` means. Raises `UserError` where one is missing or compressed."""
    return Tars(containers.find(data, "webdataset"), options)


class Tars(Source):
    """The samples of tars, tar by tar."""

    conditioning_advice = "each sample a member KEY.conditioning.png beside its KEY.jpg"

    def __init__(self, found: Sequence[Container], options: SourceOptions) -> None:
        splits = splits_of([container.name for container in found])
        self._parts = [TarPart(container, split, options) for container, split in zip(found, splits, strict=True)]

    @property
    def parts(self) -> Sequence[Part]:
        """The tars."""
        return self._parts


@dataclass(frozen=True)
class _Member:
    """A file in a tar."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class _Broken:
    """Where a tar cannot be read any further, and why."""

    reason: str
    member: str | None = None
    """The file that it breaks off in, where its name is known."""
    at_end: bool = False
    """Whether the tar ended before it, so that all samples are whole."""


@dataclass
class _Group:
    """Members that follow each other and have one key."""

    key: str
    members: dict[str, _Member] = field(default_factory=dict)
    """By ending, in lower case."""
    texts: dict[str, bytes] = field(default_factory=dict)
    images: dict[str, Blob] = field(default_factory=dict)
    error: str | None = None


class TarPart(Part):
    """One tar."""

    def __init__(self, container: Container, split: Split | None, options: SourceOptions) -> None:
        self.name, self.version = container.name, container.version
        self._path, self._num_bytes, self._split, self._options = container.path, container.num_bytes, split, options

    def blob(self, place: list[Any]) -> Blob:
        """The bytes at a place of this tar."""
        return Range(self._path, *place) if place else Missing(self._path, "it was missing before")

    def records(self) -> Iterator[Record]:
        """Its samples, in order; where it breaks off, a last record with the tar's own name says so."""
        names: set[str] = set()
        others: dict[str, None] = {}
        for group in self._groups():
            if isinstance(group, _Broken):
                names.add(self.name)
                yield self._error(self.name, group.reason)
                continue
            record = self._record(group)
            if record is None:
                others.update(dict.fromkeys(group.members))
                continue
            if record.name in names:
                offset = next(iter(group.members.values())).offset
                record = self._error(f"{record.name} at byte {offset}", "its key comes twice in this tar")
            names.add(record.name)
            yield record
        if others and not names:
            listed = ", ".join(f".{ending}" for ending in list(others)[:8])
            yield self._error(self.name, f"the tar holds no images; its members: {listed}")

    def _error(self, name: str, reason: str) -> Record:
        return Record(name, Missing(self._path, reason), (), (), None, None, self._split, reason)

    def _groups(self) -> Iterator[_Group | _Broken]:
        is_remote = remote.is_remote(self._path)
        try:
            file: Any = remote.RemoteFile(self._path) if is_remote else open(self._path, "rb")  # noqa: SIM115
        except OSError as error:
            yield _Broken(f"it cannot be read ({error.strerror})")
            return
        group: _Group | None = None
        endings: frozenset[str] = frozenset()  # of the group before
        with file:
            num_bytes = self._num_bytes if is_remote else os.fstat(file.fileno()).st_size
            for member in _members(file, num_bytes, self._path):
                if isinstance(member, _Broken):
                    if group is not None:
                        in_next = member.member is not None and _key_and_ending(member.member)[0] != group.key
                        # With all that the sample before had, it lacks nothing.
                        if not (member.at_end or in_next or (endings and endings <= group.members.keys())):
                            group.error = f"the tar {member.reason}, within or after this sample"
                        yield group
                    yield _Broken(f"the tar {member.reason}: what follows is lost")
                    return
                key, ending = _key_and_ending(member.name)
                if key is None:
                    continue  # a file that WebDataset does not see either
                if group is None or group.key != key:
                    if group is not None:
                        endings = frozenset(group.members)
                        yield group
                    group = _Group(key)
                self._take(group, ending, member, file, in_hand=is_remote)
        if group is not None:
            yield group

    def _take(self, group: _Group, ending: str, member: _Member, file: IO[bytes], in_hand: bool) -> None:
        """Add a member, with what must be read of it while the tar passes by."""
        if ending in group.members:
            group.error = f"two of its members end in .{ending}"
        group.members[ending] = member
        if ending.rpartition(".")[2] in _ENDINGS or ending in columns.CONDITIONING:
            place = Range(self._path, member.offset, member.num_bytes)
            if in_hand and member.num_bytes <= MAX_BYTES:
                file.seek(member.offset)
                group.images[ending] = InHand(place, file.read(member.num_bytes))
            else:
                group.images[ending] = place
        elif self._is_text(ending):
            if member.num_bytes > _LONGEST_TEXT_BYTES:
                group.error = f"its member .{ending} has {member.num_bytes} bytes, too many for a text"
                return
            file.seek(member.offset)
            group.texts[ending] = file.read(member.num_bytes)

    def _is_text(self, ending: str) -> bool:
        words = {*columns.CAPTION, "json", self._options.caption_column}
        return ending in words or ending.partition(".")[0] in words

    # A group becomes a record

    def _record(self, group: _Group) -> Record | None:
        """The record of a group; None where it is none of a data set of images: neither an image nor a text."""
        if not group.images and not group.texts:
            return None
        image, conditioning, problem = self._choose(group)
        if image is None:
            listed = ", ".join(f".{ending}" for ending in group.members)
            return self._error(self._name_of(group.key), f"{problem or 'it has no image'}; its members: {listed}")
        error = group.error or problem
        captions: tuple[str, ...] = ()
        weights: tuple[float, ...] = ()
        try:
            found, why = self._captions(group)
            captions, weights, no_caption = or_missing(found, why, self._options)
            error = error or no_caption
        except UserError as problem_of_text:
            error = error or str(problem_of_text)
        drawing = None if conditioning is None else group.members[conditioning]
        return Record(
            name=self._name_of(group.members[image].name),
            image=group.images[image],
            captions=captions,
            weights=weights,
            conditioning_name=None if drawing is None else self._name_of(drawing.name),
            conditioning=None if conditioning is None else group.images[conditioning],
            split=self._split,
            error=error,
        )

    def _name_of(self, member: str) -> str:
        # A name that is not UTF-8 comes with lone surrogates, which no file can hold.
        return f"{self.name}/{member.encode(errors='backslashreplace').decode()}"

    def _choose(self, group: _Group) -> tuple[str | None, str | None, str | None]:
        """The endings of the image and of its drawing, and what is wrong."""
        options = self._options
        stems = {ending: ending.rpartition(".")[0] if "." in ending else "" for ending in group.images}
        # `cond.png` has the stem `cond`; `png` has none; `conditioning` alone is its own.
        stems |= {ending: ending for ending in group.images if ending in columns.CONDITIONING}

        def named(name: str) -> list[str]:
            return [ending for ending in group.images if name.lower() in (ending, stems[ending])]

        drawings = [ending for word in columns.CONDITIONING for ending in named(word)]
        if options.conditioning_column is not None:
            drawings = named(options.conditioning_column)
        images = [ending for ending, stem in stems.items() if ending not in drawings and stem in ("", *columns.IMAGE)]
        if options.image_column is not None:
            images = named(options.image_column)
        if not images:
            return None, None, None if options.image_column is None else f"it has no image .{options.image_column}"
        problem = None
        if len(images) > 1:
            listed = ", ".join(f".{ending}" for ending in images)
            problem = f"it has several images ({listed}); say which with source.image_column"
        if not drawings and options.conditioning_column is None and stems[images[0]] == "target":
            drawings = named("source")
        drawings = [ending for ending in drawings if ending != images[0]]
        return images[0], next(iter(drawings), None), problem

    def _captions(self, group: _Group) -> tuple[tuple[tuple[str, ...], tuple[float, ...]], str]:
        """The captions with their weights, and why there are none. Raises `UserError` where a text is malformed."""
        wanted = self._options.caption_column
        why = "it has no member .txt, .caption or .json"
        for ending in sorted(group.texts, key=lambda ending: ending.rpartition(".")[2] == "json"):
            stem = ending.partition(".")[0]
            if wanted is not None and stem not in (wanted.lower(), "json"):
                continue
            try:
                text = group.texts[ending].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"its member .{ending} is not UTF-8 (byte {error.start})") from error
            content: Any = text
            why = f"its member .{ending} is blank"
            if ending.rpartition(".")[2] == "json":
                try:
                    content = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"its member .{ending} is not JSON ({error})") from error
                if stem == "json":
                    if not isinstance(content, dict):
                        raise UserError(f"its member .{ending} is not an object")
                    keys = columns.CAPTION if wanted is None else (wanted,)
                    key = next((key for key in keys if key in content), None)
                    why = f"its member .{ending} has no '{wanted or 'caption'}'"
                    content = None if key is None else content[key]
            found = captions_of(content, f"its member .{ending}")
            if found[0]:
                return found, ""
        return ((), ()), why


# --- what is in a tar ---


def _key_and_ending(name: str) -> tuple[str | None, str]:
    matched = _KEY.fullmatch(name)
    return (None, "") if matched is None else (matched[1], matched[2].lower())


def _members(file: Any, num_bytes: int, path: str) -> Iterator[_Member | _Broken]:
    """The regular files in a tar, in order; last, where it is not whole, why.

    `tarfile` itself takes a tar that breaks off for one that ends. Raises `UserError` where it is compressed.
    """
    offset = 0
    archive: tarfile.TarFile | None = None
    while True:
        try:
            file.seek(offset)
            block = file.read(_BLOCK)
            if offset == 0 and block.startswith(_SIGNS_OF_COMPRESSION):
                raise UserError(
                    f"{path} is compressed, so that no image in it can be read without all before it; unpack it to .tar"
                )
            if len(block) < _BLOCK:
                if block or num_bytes == 0:
                    yield _Broken("is cut off in a header" if block else "is empty")
                else:
                    yield _Broken("has no end mark and may be cut off")
                return
            if not any(block):
                if any(file.read(20 * 2 * _BLOCK)):  # tars are padded to 20 blocks
                    yield _Broken(f"has more after its end mark at byte {offset}", at_end=True)
                return
            file.seek(offset)
            if archive is None:
                archive = tarfile.TarFile(fileobj=file)  # reads the first header
                file.seek(offset)
            info = tarfile.TarInfo.fromtarfile(archive)
        except OSError as error:
            yield _Broken(f"cannot be read from byte {offset} ({error.strerror})")
            return
        except (tarfile.TarError, EOFError, ValueError) as error:
            what = "is no tar" if offset == 0 else f"is damaged at byte {offset}"
            yield _Broken(f"{what} ({error})")
            return
        end = info.offset_data + info.size
        name = re.sub(r"^(?:\./+)+", "", info.name)
        if info.isreg() and end > num_bytes:
            yield _Broken(f"is cut off in {name}", member=name)
            return
        if info.issparse():
            yield _Broken(f"holds a sparse file ({name}), whose bytes do not lie in a row; make it again")
            return
        if info.isreg():
            yield _Member(name, info.offset_data, info.size)
        offset = archive.offset
