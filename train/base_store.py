"""The frozen base, quantized once: read tensor by tensor from the model, kept on the disk, loaded straight into place.

    BASES/
      digests.json             SHA-256 of model files that were read before, with what tells whether they have changed
      flux-int8-1f3a9c02/      a base = family, weights, fingerprint
        base.json              what it was made from, and the finished files with their checksums
        rest.safetensors       what lies in no block
        block-000.safetensors  one file a block, in the order of execution: names as in the model
        ...

A fingerprint is all that the bytes depend on: the content of the model's weights, the precision, and whether the
modulation was left out. The whole model is never in memory unquantized: neither while it is made (one block's tensors
are), nor afterwards (files are mapped; what goes to a GPU goes file by file). Nothing is ever removed here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from shared import atomic
from shared.cache.schema import checksum, file_checksum
from shared.errors import UserError
from shared.families.base import Family, Tensors
from shared.model_folder import ModelFolder, file_sha256, stated_sha256
from shared.report import progress, say, versions, warn
from train.frozen_linear import quantized
from train.modulation import hoist as hoist_modulation
from train.quantize import BaseOptions, frozen, make_room, quantize_block

VERSION = 1
"""Of what the files hold. Another version is another fingerprint."""
BASE, DIGESTS = "base.json", "digests.json"
REST = "rest"


def open_base(
    family: Family,
    model: ModelFolder,
    options: BaseOptions,
    *,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    hoist: bool,
    quantize_on: torch.device | None = None,
) -> torch.nn.Module:
    """The frozen base on the device, held as `options.weights` says, everything else of it in `dtype`.

    `folder` is where quantized bases are kept (`BaseOptions.folder_beside`). With int8 the base is made there once, by
    one process while others wait; what an interrupted one has made is not made again, a file that is damaged is. With
    `hoist` the modulation's linears are `HoistedLinear`, and their weights are not read: `LinearsOnDisk` has them.
    `quantize_on`: where a base that is not there yet is quantized, if not on the device that it goes to.

    Raises `UserError` where the model's files do not fit its configuration or the folder cannot be written.
    """
    base = family.make_base(model).to(dtype)
    if hoist:
        hoist_modulation(family, base)
    source = Source(family, model, base, dtype)
    if options.weights == "int8":
        store = Store(source, folder / _name(source, folder, hoist), device, quantize_on or device)
        for block in family.blocks(base):
            make_room(block)
        store.make()
        for tensors in progress(store.load(), title="loading the base", unit="block", total=len(source.parts)):
            _assign(base, tensors)
    else:
        for part, block in progress(source.blocks.items(), title="loading the base", unit="block"):
            _assign(base, {name: tensor.to(device) for name, tensor in source.read(part)})
            if options.weights == "quanto" and block is not None:
                quantize_block(block, "quanto")
    empty = [name for name, tensor in base.state_dict().items() if tensor.is_meta]
    assert not empty, f"{empty[0]} has no numbers"
    return frozen(base)


class Source:
    """A model's own files, as parts: what lies in no block, and each block."""

    def __init__(self, family: Family, model: ModelFolder, base: torch.nn.Module, dtype: torch.dtype) -> None:
        """`base`: on the meta device, with what is wanted of it and no more."""
        self.family, self.model, self.dtype = family, model, dtype
        self.blocks: dict[str, torch.nn.Module | None] = {REST: None}
        self.blocks |= {f"block-{i:03d}": block for i, block in enumerate(family.blocks(base))}
        named = {module: name for name, module in base.named_modules()}
        prefixes = {part: f"{named[block]}." for part, block in self.blocks.items() if block is not None}
        self.linears = {
            f"{prefix}{name}"
            for part, prefix in prefixes.items()
            for name, module in base.get_submodule(prefix[:-1]).named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        """Qualified names of the linears that are to be quantized."""
        self._shapes: dict[str, dict[str, torch.Size]] = {part: {} for part in self.blocks}
        for name, tensor in base.state_dict().items():
            part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), REST)
            self._shapes[part][name] = tensor.shape
        self._prefixes = {part: [prefix] for part, prefix in prefixes.items()}
        self._prefixes[REST] = sorted({f"{name.split('.')[0]}." for name in self._shapes[REST]})

    @property
    def parts(self) -> list[str]:
        """Their names: the rest, then the blocks in order of execution."""
        return list(self.blocks)

    def read(self, part: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the CPU) of a part, one at a time. Raises `UserError` where one is missing or of another
        shape."""
        shapes, component = dict(self._shapes[part]), self.family.base_component
        for prefix in self._prefixes[part]:
            for name, tensor in self.model.tensors(component, prefix):
                if (shape := shapes.pop(name, None)) is None:
                    continue
                if tensor.shape != shape:
                    raise UserError(
                        f"model {self.model.name}: {name} has the shape {tuple(tensor.shape)}, but by the config.json "
                        f"of {component} it is {tuple(shape)}; download the model again"
                    )
                yield name, tensor.to(self.dtype)
        if shapes:
            raise UserError(
                f"model {self.model.name}: the weights of {component} are not whole: {len(shapes)} tensors are not "
                f"there (as {next(iter(shapes))}); download the model again"
            )


@dataclass
class Store:
    """A quantized base on the disk."""

    source: Source
    folder: Path
    device: torch.device
    """Where tensors go."""
    quantize_on: torch.device
    """Where they are quantized."""
    _warned: bool = False

    def make(self) -> None:
        """Make what is not there yet. One process does, others that want the same wait."""
        if not self._missing():
            return
        with self._alone():
            if not (missing := self._missing()):
                return  # another process was here first
            say(f"quantizing the base of {self.source.model.name}, once: {self.folder}")
            for part in progress(missing, title="quantizing the base", unit="block"):
                self._make(part)

    def load(self) -> Iterator[Tensors]:
        """Each part's tensors on the device, on the CPU mapped. A file that is missing or damaged is made again. While
        one part is put in its place, the next one is read and compared with its checksum."""
        parts = self.source.parts
        with ThreadPoolExecutor(1, "base") as ahead:
            sound = ahead.submit(self._is_sound, parts[0])
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                if not sound.result():
                    self._make_again(part)
                if following is not None:
                    sound = ahead.submit(self._is_sound, following)
                yield self._load(part)

    def _make_again(self, part: str) -> None:
        with self._alone():
            if not self._is_sound(part):  # else another process was here first
                warn(f"{self._path(part)} is missing or damaged: it is made again")
                self._make(part)

    def _load(self, part: str) -> Tensors:
        with safe_open(self._path(part), framework="pt") as file:
            return {name: file.get_tensor(name).to(self.device) for name in file.keys()}  # noqa: SIM118

    def _make(self, part: str) -> None:
        """Quantize one part, tensor by tensor on the device, and write it."""
        tensors: Tensors = {}
        for name, tensor in self.source.read(part):
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and layer in self.source.linears:
                integers, scale = quantized(tensor.to(self.quantize_on))
                tensors[f"{layer}.weight_int8"], tensors[f"{layer}.scale"] = integers.cpu(), scale.cpu()
            else:
                tensors[name] = tensor.contiguous()
        data = safetensors.torch.save(tensors)
        atomic.write_bytes(self._path(part), data)
        files = {**self._files(), part: {"num_bytes": len(data), "checksum": checksum(data)}}
        about = {"model": self.source.model.name, "revision": self.source.model.revision, "versions": versions()}
        files = {part: files[part] for part in self.source.parts if part in files}
        atomic.write_json(self.folder / BASE, {"version": VERSION, **about, "files": files})

    def _missing(self) -> list[str]:
        files = self._files()
        return [part for part in self.source.parts if part not in files]

    def _files(self) -> dict[str, Any]:
        """Of each finished part its bytes and checksum."""
        path = self.folder / BASE
        if not path.is_file():
            return {}
        try:
            files = json.loads(path.read_text())["files"].items()
            return {part: {key: stated[key] for key in ("num_bytes", "checksum")} for part, stated in files}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not self._warned:
                warn(f"{path} is damaged ({error}): the base is made again")
            self._warned = True
            return {}

    def _is_sound(self, part: str) -> bool:
        path, stated = self._path(part), self._files().get(part)
        return (
            stated is not None
            and path.is_file()
            and path.stat().st_size == stated["num_bytes"]
            and file_checksum(path) == stated["checksum"]
        )

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _alone(self) -> Any:
        try:
            atomic.make_directory(self.folder)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be made ({error.strerror}), where the quantized base is to be kept; name "
                "another folder with --base.folder"
            ) from error
        return atomic.alone(self.folder, "quantizing a base into", wait=True)


def _name(source: Source, folder: Path, hoist: bool) -> str:
    """The base's folder in `folder`: `flux-int8-1f3a9c02`."""
    family, model = source.family, source.model
    recipe = {
        "version": VERSION,
        "family": family.name,
        "weights": model.sha256(family.base_component, remembered_sha256(folder / DIGESTS)),
        "dtype": str(source.dtype),
        "hoisted": hoist,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{family.name}-int8-{digest[:8]}"


def remembered_sha256(memo: Path) -> Callable[[Path], str]:
    """`file_sha256` that notes in a JSON file what it has found: 24 GB are not read at each start to see that they are
    what they were. A file is taken for unchanged while its path, size, time of change and inode are. Of several
    processes one reads, the others wait; where the memo may not be written each reads for itself."""

    def digest(path: Path) -> str:
        if (stated := stated_sha256(path)) is not None:
            return stated
        state = path.stat()
        key, stamp = str(path.resolve()), [state.st_size, state.st_mtime_ns, state.st_ino]

        def known() -> str | None:
            entry = _memo(memo).get(key)
            return entry[3] if entry is not None and entry[:3] == stamp else None

        if (found := known()) is not None:
            return found
        if state.st_size >= 1_000_000_000:
            say(f"reading {path} ({state.st_size / 1e9:.1f} GB) once, to know it again")
        if not _may_write(memo.parent):
            return file_sha256(path)
        with atomic.alone(memo.parent, "reading a model for", wait=True):
            if (found := known()) is None:
                found = file_sha256(path)
                atomic.write_json(memo, {**_memo(memo), key: [*stamp, found]})
        return found

    return digest


def _may_write(folder: Path) -> bool:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return os.access(there, os.W_OK | os.X_OK)


def _memo(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        known = None
    if not isinstance(known, dict) or not all(isinstance(entry, list) and len(entry) == 4 for entry in known.values()):
        warn(f"{path} is damaged: the model's files are read again")
        return {}
    return known


def _assign(base: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the place of those with their names, which are on the meta device."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        owner = base.get_submodule(parent)
        place = getattr(owner, leaf)
        assert (place.shape, place.dtype) == (tensor.shape, tensor.dtype), f"{name}: {tensor.shape} {tensor.dtype}"
        parameter = isinstance(place, torch.nn.Parameter)
        setattr(owner, leaf, torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor)
