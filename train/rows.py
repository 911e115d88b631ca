"""Rows of a cache's layers -> tensors of a batch: one copy, from the page cache to memory that is used again.

A row is one safetensors member of a tar: 8 bytes, a JSON header, then the tensors' bytes. `preadv` scatters it: the
header into a scratch buffer, where it is compared with the one that is known, each tensor to its place in the batch.
Copying from a memory map takes 1.1 to 1.3 times as long (measured warm, rows of 4 MB): the kernel has the file in
larger pages than a map has. And where a file is cut off under a map, the process dies without a word.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from shared.cache import schema
from shared.cache.reader import CacheError, Layer, safetensors_layout

OPEN_TARS = 48
"""Files that stay open, for each layer."""
PART_BYTES = 1 << 20
"""What a thread reads at least before it looks for more to do."""
HEADER_BYTES = 4096
"""The most that a header of the cache's own takes. Rows with a longer one are read the slow way."""
IDLE_BUFFERS = 8
"""Buffers of one size that are kept while nobody uses them."""


class Buffers:
    """Memory for batches, used again as soon as no tensor refers to it.

    Fresh memory would cost a page fault for every page that is written: with rows of 4 MB more than the copy itself.
    What was given back last is given out first, since it is likeliest to be in the processor's caches.
    """

    def __init__(self, *, pinned: bool) -> None:
        """`pinned`: page-locked, so that copies to the GPU do not wait; torch's own allocator uses it again."""
        self.pinned = pinned
        self._idle: dict[int, deque[np.ndarray]] = {}

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 (num_bytes,), whatever was in it. It is used again once this tensor and all its views are gone."""
        if self.pinned:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        # Whole powers of two, so that the buckets' shapes share buffers; pages that nobody writes to cost nothing.
        size = 1 << max(num_bytes - 1, 4095).bit_length()
        idle = self._idle.setdefault(size, deque(maxlen=IDLE_BUFFERS))
        try:
            whole = idle.pop()
        except IndexError:
            whole = np.empty(size, np.uint8)
        lent = whole[:num_bytes]
        # The tensor holds on to `lent`, and so does every view of the tensor.
        weakref.finalize(lent, idle.append, whole).atexit = False
        return torch.from_numpy(lent)


class Kind(NamedTuple):
    """What one field of a row is."""

    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def one_drawing(self) -> Kind:
        """Without the axis that counts drawings."""
        return Kind(self.field, self.dtype, self.shape[1:])


@dataclass(frozen=True)
class Form:
    """How the members that begin with one header are laid out."""

    header: bytes
    """Up to the first tensor."""
    stored: tuple[Kind, ...]
    """In the order of their bytes, which fill the rest of the member."""
    taken: tuple[Kind, ...]
    """What of them goes into a batch: of several drawings, one."""

    @classmethod
    def of(cls, member: memoryview, *, drawings: bool) -> Form:
        """The form of a member that is in memory."""
        extents = sorted(safetensors_layout(member).items(), key=lambda item: item[1].begin)
        begins = [extent.begin for _, extent in extents]
        assert [extent.end for _, extent in extents] == [*begins[1:], len(member)], "safetensors leaves no holes"
        stored = tuple(Kind(field, extent.dtype, extent.shape) for field, extent in extents)
        taken = tuple(kind.one_drawing for kind in stored) if drawings else stored
        return cls(bytes(member[: begins[0]]), stored, taken)

    @property
    def num_drawings(self) -> int:
        """R where the first axis counts drawings."""
        return self.stored[0].shape[0]


class Rows:
    """The rows of one layer, as a batch takes them. Threads may share it."""

    def __init__(self, layer: Layer, *, drawings: bool) -> None:
        """`drawings`: the first axis of every field counts a sample's drawings, of which a batch takes one."""
        self.layer, self.drawings = layer, drawings
        self._forms: dict[bytes, Form] = {}
        """By header: one for each shape."""
        self._files: dict[int, tuple[int, int]] = {}
        """Which file each shard's tar was when it was first opened."""
        self._opened = lru_cache(maxsize=OPEN_TARS)(self._open)

    def form(self, number: int) -> Form:
        """How a row is laid out. Raises `CacheError` as `read`."""
        begin = bytearray(min(HEADER_BYTES, int(self.layer.places.length[number])))
        self._fill(number, [begin], int(self.layer.places.offset[number]))
        header = bytes(begin[: 8 + int.from_bytes(begin[:8], "little")])
        if header not in self._forms:  # nor is it known to be sound
            form = Form.of(self._whole(number), drawings=self.drawings)
            self._forms[form.header] = form
            return form
        return self._forms[header]

    def read(
        self, number: int, kinds: tuple[Kind, ...], form: Form | None, targets: Sequence[memoryview], drawing: float
    ) -> None:
        """Read a row into `targets`, one for each of `kinds`; of several drawings the one at `drawing` from 0 to 1.
        Where it has the form that is given, of these kinds in this order, it is copied once.

        The first time in this process, the whole member is compared with its checksum. Raises `CacheError` where it
        is not what was written, cannot be read, or is not of these kinds.
        """
        if form is None or not self._scatter(number, form, targets, drawing):
            self._copy(number, kinds, targets, drawing)

    def _scatter(self, number: int, form: Form, targets: Sequence[memoryview], drawing: float) -> bool:
        """Read a row's bytes to where they belong; False where it has another form, or is not yet verified and more
        must be read for that than is wanted of it."""
        offset, header = int(self.layer.places.offset[number]), bytearray(len(form.header))
        if not self.drawings or form.num_drawings == 1:
            self._fill(number, [header, *targets], offset)
            if header == form.header and not self.layer.verified[number]:
                self._verify(number, [header, *targets])
        elif self.layer.verified[number]:
            self._fill(number, [header], offset)
            offset += len(header)
            for kind, target in zip(form.stored, targets, strict=True):
                self._fill(number, [target], offset + int(drawing * form.num_drawings) * len(target))
                offset += kind.num_bytes
        return header == form.header

    def _copy(self, number: int, kinds: tuple[Kind, ...], targets: Sequence[memoryview], drawing: float) -> None:
        """`read` by way of a copy of the member, whatever its header."""
        member = self._whole(number)
        form = Form.of(member, drawings=self.drawings)
        if {*form.taken} != {*kinds}:
            where = f"{self._name(int(self.layer.places.shard[number]))} at byte {self.layer.places.offset[number]}"
            raise CacheError(
                f"{where} has another shape or dtype than the other samples of its batch: layers that were made with "
                "different options cannot be mixed; run `make preprocess` once for all conditions"
            )
        begin, at = len(form.header), {}
        for stored, taken in zip(form.stored, form.taken, strict=True):
            at[taken] = begin + (int(drawing * form.num_drawings) * taken.num_bytes if self.drawings else 0)
            begin += stored.num_bytes
        for kind, target in zip(kinds, targets, strict=True):
            target[:] = member[at[kind] : at[kind] + len(target)]

    def _whole(self, number: int) -> memoryview:
        """A copy of a row's member, which has its checksum."""
        member = memoryview(bytearray(int(self.layer.places.length[number])))
        self._fill(number, [member], int(self.layer.places.offset[number]))
        self._verify(number, [member])
        return member

    def _verify(self, number: int, pieces: Sequence[bytearray | memoryview]) -> None:
        running = xxhash.xxh3_128()
        for piece in pieces:
            running.update(piece)
        if running.digest() != self.layer.places.checksums[number].tobytes():
            raise self.layer.altered(number)
        self.layer.verified[number] = True

    def _fill(self, number: int, targets: Sequence[bytearray | memoryview], offset: int) -> None:
        """Read consecutive bytes of a row's tar into the targets, all of them."""
        shard = int(self.layer.places.shard[number])
        # Of a remote cache the file may be removed as soon as it is closed, so it is not kept open.
        tar = self._open(shard) if self.layer.storage.remote else self._opened(shard)
        wanted = sum(map(len, targets))
        try:
            read = os.preadv(tar.handle, targets, offset)
            while read < wanted:  # the file ends here, or a signal came
                more = os.preadv(tar.handle, _after(targets, read), offset + read)
                if not more:
                    raise CacheError(f"{self._name(shard)} ends at byte {offset + read}; {schema.MEND}")
                read += more
        except OSError as error:
            raise CacheError(f"{self._name(shard)} cannot be read ({error.strerror})") from error

    def _open(self, shard: int) -> _Tar:
        with self.layer.storage.using(self.layer.tar(shard)) as path:
            try:
                tar = _Tar(os.open(path, os.O_RDONLY))
            except FileNotFoundError as error:
                raise CacheError(f"{self._name(shard)} is missing; {schema.MEND}") from error
            except OSError as error:
                raise CacheError(f"{self._name(shard)} cannot be read ({error.strerror})") from error
        # What was verified of one file says nothing of another. (A remote cache's arrives compared with its checksum.)
        if not self.layer.storage.remote and self._files.setdefault(shard, tar.file) != tar.file:
            raise CacheError(
                f"{self._name(shard)} was written anew while it was being read (`make repair` does so); start again: "
                "the cache is opened as it is now"
            )
        return tar

    def _name(self, shard: int) -> str:
        return f"{self.layer.storage.url}/{self.layer.tar(shard).name}"


class _Tar:
    """An open file, closed when nobody reads it any more: another thread may, when it leaves the list of open ones."""

    def __init__(self, handle: int) -> None:
        self.handle, status = handle, os.fstat(handle)
        self.file = status.st_size, status.st_mtime_ns
        """Tells which file of this name it is. Not by its inode, which some network file systems make up anew."""

    def __del__(self) -> None:
        os.close(self.handle)


def _after(targets: Sequence[bytearray | memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the targets after their first bytes."""
    rest = []
    for target in targets:
        if num_bytes < len(target):
            rest.append(memoryview(target)[num_bytes:])
        num_bytes = max(num_bytes - len(target), 0)
    return rest


class Taken(NamedTuple):
    """A row that goes into a batch."""

    rows: Rows
    number: int
    drawing: float = 0.0
    """Which of several: 0 is the first, just below 1 the last."""


class _Pile:
    """Rows of one layer, one below the other."""

    def __init__(self, taken: Sequence[Taken], buffers: Buffers) -> None:
        self.taken, self._buffers = taken, buffers
        one_of_each = {row.rows: row.number for row in taken}
        forms = {rows: rows.form(number) for rows, number in one_of_each.items()}
        self.kinds = forms[taken[0].rows].taken
        self._forms = {rows: form for rows, form in forms.items() if form.taken == self.kinds}
        self.row_bytes = [kind.num_bytes for kind in self.kinds]
        self._lock = threading.Lock()
        self._flat: list[torch.Tensor] = []
        self._memory: list[memoryview] = []

    def parts(self) -> list[range]:
        """The rows in parts that are worth a thread's while."""
        count = -(-PART_BYTES // max(sum(self.row_bytes), 1))
        return [range(i, min(i + count, len(self.taken))) for i in range(0, len(self.taken), count)]

    def read(self, part: range) -> None:
        """Read some of the rows."""
        with self._lock:
            if not self._flat:
                self._flat = [self._buffers.take(len(self.taken) * size) for size in self.row_bytes]
                self._memory = [tensor.numpy().data for tensor in self._flat]
        for place in part:
            self._read_row(place)

    def _read_row(self, place: int) -> None:
        targets = [
            memory[place * size : (place + 1) * size] for memory, size in zip(self._memory, self.row_bytes, strict=True)
        ]
        rows, number, drawing = self.taken[place]
        rows.read(number, self.kinds, self._forms.get(rows), targets, drawing)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field -> (B, ...), when all rows are read."""
        return {
            kind.field: flat.view(kind.dtype).view(len(self.taken), *kind.shape)
            for kind, flat in zip(self.kinds, self._flat, strict=True)
        }


class Stacking:
    """Rows on their way into the tensors of one batch. Whichever threads have time read them, part by part.

    Layers with large rows come last, and memory is taken when the first row of a layer is read. So most of a batch's
    memory is asked for when the batch before has been let go, if somebody is waiting: the same memory serves again
    while it is still in the processor's caches (measured with 34 MB of T5: a tenth faster).
    """

    def __init__(self, taken: Mapping[str, Sequence[Taken]], buffers: Buffers) -> None:
        """By the layer's name, the rows of the batch. Nothing is read yet but a row of each layer to learn what its
        fields are. Raises `CacheError` where that is not what was written."""
        self._piles = {name: _Pile(rows, buffers) for name, rows in taken.items()}
        piles = sorted(self._piles.values(), key=lambda pile: sum(pile.row_bytes))
        self._waiting = deque(enumerate((pile, part) for pile in piles for part in pile.parts()))
        self._lock, self._unfinished, self._finished = threading.Lock(), len(self._waiting), threading.Event()
        self._errors: dict[int, BaseException] = {}

    def help(self) -> None:
        """Read rows until every one is read or another thread is at it."""
        while True:
            try:
                number, (pile, part) = self._waiting.popleft()
            except IndexError:
                return
            try:
                pile.read(part)
            except BaseException as error:
                self._errors[number] = error
                with self._lock, suppress(IndexError):
                    while True:  # nobody has begun these, and now nobody will
                        self._waiting.pop()
                        self._unfinished -= 1
                if not isinstance(error, Exception):
                    raise  # Ctrl-C is the training thread's own
            finally:
                with self._lock:
                    self._unfinished -= 1
                    if not self._unfinished:
                        self._finished.set()

    def finish(self) -> dict[str, torch.Tensor]:
        """ "layer.field" -> (B, ...), when all rows are read. Raises `CacheError`, of several the first row's, where
        one is not what was written."""
        self.help()
        self._finished.wait()
        if self._errors:
            raise self._errors[min(self._errors)]
        return {f"{name}.{field}": t for name, pile in self._piles.items() for field, t in pile.tensors().items()}
