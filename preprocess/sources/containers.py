"""The files that a data set of many images each is made of: from a path, a pattern, a folder or URLs of either."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from preprocess.sources import listing, remote
from shared.errors import UserError

_ENDINGS = {"webdataset": ".tar", "parquet": ".parquet"}
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma)|tgz|tbz2?|txz)$", re.IGNORECASE)


@dataclass(frozen=True)
class Container:
    """One file that holds many images."""

    path: str
    """A path of this machine or a URL."""
    name: str
    """Relative to what its pattern does not vary, or to its folder: the same when the pattern comes to match more."""
    num_bytes: int
    version: str | None
    """What the store says of its state; None for files of this machine, which are read again each time."""


def local(data: str) -> str:
    """`data` with `~` replaced and `file://` gone."""
    return os.path.expanduser(data.removeprefix("file://"))


def kind_of_name(data: str) -> str | None:
    """The kind of source that a path's, pattern's or URL's ending tells; None for folders. Refuses compressed tars."""
    name = _without_query(data)
    if _COMPRESSED.search(name):
        raise UserError(
            f"{data} is compressed, so that no image in it can be read without all before it; unpack it to .tar "
            "(gunzip, or `zstd -d`): pictures do not become smaller by it"
        )
    if os.path.isdir(data):
        return None
    return next((kind for kind, ending in _ENDINGS.items() if name.lower().endswith((ending, ending + "}"))), None)


def kind_of_listing(data: str, files: Sequence[str]) -> str:
    """The kind of source that a remote folder's files make."""
    for kind, ending in _ENDINGS.items():
        if any(name.lower().endswith(ending) for name in files):
            return kind
    if not files:
        raise UserError(
            f"{data}: there is nothing, or the server does not list it; give the files by a pattern, as "
            f"{data.rstrip('/')}/{{00000..00010}}.tar"
        )
    raise UserError(
        f"{data} holds neither .tar nor .parquet files; a folder of images is read where it is on this machine"
    )


def kind_of_folder(folder: Path) -> str:
    """The kind of source that a folder of this machine is; `folder` where nothing speaks for another."""
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return "huggingface"
    if not folder.is_dir():
        return "folder"
    endings: Counter[str] = Counter()
    for name in listing.walk(folder):
        if posixpath.basename(name) in listing.METADATA:
            return "folder"
        endings[posixpath.splitext(name)[1].lower()] += 1
    found = [kind for kind, ending in _ENDINGS.items() if endings[ending]]
    if any(endings[ending] for ending in listing.IMAGE_ENDINGS):
        found.append("folder")
    if len(found) > 1:
        known = sorted(listing.IMAGE_ENDINGS | set(_ENDINGS.values()))
        listed = ", ".join(f"{endings[ending]} {ending}" for ending in known if endings[ending])
        raise UserError(
            f"{folder} holds {listed} files; say which are the data set with source.kind={' or '.join(found)}"
        )
    return found[0] if found else "folder"


def find(data: str, kind: str) -> list[Container]:
    """The files of `kind` that `data` means, in the order of their names.

    Raises `UserError` where there are none, where one that is named is missing, and where a store does not answer.
    """
    ending = _ENDINGS[kind]
    named = kind_of_name(data)  # refuses what is compressed
    if is_folder := os.path.isdir(data):
        paths = [os.path.join(data, name) for name in sorted(listing.walk(Path(data))) if name.lower().endswith(ending)]
    else:
        paths = _expand(data)
        if is_folder := remote.is_remote(data) and named is None and paths == [data]:
            paths = [path for path in remote.files_below(data) if path.lower().endswith(ending)]
    if not paths:
        raise UserError(f"{data} matches no {ending} file; check the pattern")
    root = data.rstrip("/") + "/" if is_folder else _fixed_part(data)
    with ThreadPoolExecutor(16) as pool:
        states = list(pool.map(_state, paths))
    if missing := [path for path, state in zip(paths, states, strict=True) if state is None]:
        raise UserError(
            f"{len(missing)} of the {len(paths)} files that {data} names are not there, as {missing[0]}; "
            "name those that are"
        )
    found = []
    for path, state in zip(paths, states, strict=True):
        assert state is not None
        name = _without_query(path)
        name = name[len(root) :] if name.startswith(root) else posixpath.basename(name)
        found.append(Container(path, name, *state))
    assert len({container.name for container in found}) == len(found), "names are unique"
    return found


def _state(path: str) -> tuple[int, str | None] | None:
    """Size in bytes and version of a file; None where it is not there."""
    if not remote.is_remote(path):
        return (os.stat(path).st_size, None) if os.path.isfile(path) else None
    found = remote.info(path)
    if found is None:
        return None
    changed = None if found.changed is None else f"changed {found.changed}"
    version = found.version or changed
    return found.num_bytes, None if version is None else f"{found.num_bytes} bytes, {version}"


def _without_query(data: str) -> str:
    """A path as it is, the URL of a web server without what follows the name."""
    return re.sub(r"[?#].*$", "", data) if data.startswith(("http://", "https://")) else data


def _fixed_part(pattern: str) -> str:
    """The folder before the first sign that stands for several."""
    return re.sub(r"[^/]*$", "", re.split(r"[{*?\[]", _without_query(pattern))[0])


def _expand(data: str) -> list[str]:
    """All paths that a pattern means: first braces as in a shell and in WebDataset, then `*`, `?` and `[...]`."""
    import braceexpand

    try:
        patterns = list(braceexpand.braceexpand(data))
    except ValueError as error:
        raise UserError(f"{data}: {error}; write {{00000..00010}}") from error
    paths: dict[str, None] = {}
    for pattern in patterns:
        if not re.search(r"[*?\[]", _without_query(pattern)) or (
            not remote.is_remote(pattern) and os.path.exists(pattern)
        ):
            paths[pattern] = None
        else:
            found = remote.glob(pattern) if remote.is_remote(pattern) else sorted(glob.glob(pattern, recursive=True))
            paths.update(dict.fromkeys(found))
    return list(paths)
