"""A pretrained pipeline in diffusers' folder layout, local or on the hub: where its parts are, what they hash to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from shared.errors import UserError

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")
"""What a component folder may hold that we load: never a pickle."""
_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.non_ema.*")
"""The same weights again in another precision, or before they were averaged: Stable Diffusion's repositories have them
beside the ones that diffusers loads."""


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline's folder on this machine: `path/vae`, `path/transformer`, ..."""

    name: str
    """As the user gave it: a local path or a hub id."""
    revision: str | None
    """The hub's commit; None for a local folder."""
    path: Path

    def component(self, name: str, *files: str) -> Path:
        """The folder of a component, with these files in it. Raises `UserError` naming what is missing."""
        folder = self.path / name
        missing = [file for file in ("config.json", *files) if not (folder / file).is_file()]
        if not folder.is_dir():
            there = ", ".join(sorted(child.name for child in self.path.iterdir() if child.is_dir())) or "nothing"
            raise UserError(f"model {self.name} has no folder '{name}' (it has: {there}); expected diffusers' layout")
        if missing and not name.startswith("tokenizer"):
            raise UserError(f"model {self.name}: {folder} lacks {', '.join(missing)}")
        return folder

    def has(self, name: str) -> bool:
        """Whether the component's folder is there with something in it."""
        return (self.path / name).is_dir() and any((self.path / name).iterdir())

    def config(self, name: str) -> dict[str, Any]:
        """The component's `config.json`."""
        return _read_json(self.component(name) / "config.json")

    def index(self) -> dict[str, Any]:
        """`model_index.json`: the pipeline's class and parts, those that are not on this machine, too. Empty where
        there is none."""
        path = self.path / "model_index.json"
        return _read_json(path) if path.is_file() else {}

    def weights(self, name: str) -> list[Path]:
        """The safetensors files of a component; of several variants (`model.fp16.safetensors` beside
        `model.safetensors`) the one without a name, as diffusers loads it. Raises `UserError` where there are none."""
        files = sorted(self.component(name).glob("*.safetensors"))
        plain = [file for file in files if "." not in file.stem]
        if files and not plain:
            raise UserError(
                f"model {self.name}: {self.path / name} holds its weights as a variant alone ({files[0].name}), which "
                f"is not what is loaded; rename it to {files[0].name.split('.')[0]}.safetensors, or download the model "
                "without a variant"
            )
        if not files:
            raise UserError(
                f"model {self.name}: {self.path / name} holds no .safetensors file; weights in other formats "
                "(.bin, .ckpt) are not read, since loading them can run code"
            )
        return plain

    def sha256(self, name: str, digest: Callable[[Path], str] | None = None) -> str:
        """Digest of all that a component computes with: its configuration, vocabulary and weights, by content.
        `digest` is asked for that of a file; default: `file_sha256`.

        What a library notes in `config.json` about a saving (its version, the folder it was loaded from) is left out:
        a model that is loaded and saved again computes the same.
        """
        folder = self.component(name) if not name.startswith("tokenizer") else self.path / name
        if not folder.is_dir():
            raise UserError(f"model {self.name} has no folder '{name}'")
        running = hashlib.sha256()
        plain = any("." not in file.stem for file in folder.glob("*.safetensors"))
        for file in sorted(folder.iterdir()):
            if plain and any(file.match(pattern) for pattern in _VARIANTS):
                continue  # not what is computed with
            if any(file.match(pattern) for pattern in _PATTERNS):
                content = self._settings_sha256(name) if file.name == "config.json" else (digest or file_sha256)(file)
                running.update(f"{file.name}\0{content}\n".encode())
        return running.hexdigest()

    def _settings_sha256(self, name: str) -> str:
        notes = ("_name_or_path", "_diffusers_version", "transformers_version")
        settings = {key: value for key, value in self.config(name).items() if key not in notes}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def tensor_names(self, name: str) -> list[str]:
        """The tensors in a component's weights, sorted."""
        return sorted(key for file in self.weights(name) for key in open_weights(file).keys())  # noqa: SIM118

    def tensors(self, name: str, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of a component's weights that begin with `prefix`, one at a time, sorted within each file."""
        for file in self.weights(name):
            with open_weights(file) as opened:
                for key in sorted(opened.keys()):
                    if key.startswith(prefix):
                        yield key, opened.get_tensor(key)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download the model again") from error


def open_weights(file: Path) -> Any:
    """A safetensors file, mapped. Raises `UserError` where it is none."""
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own Rust error class, which has no public name
        raise UserError(f"{file} cannot be read ({error}); download the model again") from error


def stated_sha256(path: Path) -> str | None:
    """SHA-256 of a file of the hub's local cache, which carries it as its name; None of any other."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name) else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read only where its name does not tell it."""
    if (stated := stated_sha256(path)) is not None:
        return stated
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    """Digest of named tensors: names, dtypes, shapes, bytes."""
    running = hashlib.sha256()
    for name, tensor in tensors:
        running.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        running.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()


def resolve(
    name: str,
    components: Sequence[str],
    revision: str | None = None,
    extra: Sequence[str] = ("model_index.json",),
    *,
    local_only: bool = False,
) -> ModelFolder:
    """Find a model: a local folder as it is, a hub id through its local cache, downloading only these components
    (and the `extra` file patterns). With `local_only` nothing is downloaded: what the local cache has is the model.

    Raises `UserError` for a folder that is none, an unknown or gated repository, or no network.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFolder(name=name, revision=None, path=path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"no such model: '{name}' is neither a folder on this machine nor a hub id like owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*extra, *(f"{part}/{pattern}" for part in components for pattern in _PATTERNS)]
    try:
        local = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_VARIANTS),
                local_files_only=local_only,
            )
        )  # fmt: skip
    except GatedRepoError as error:
        raise UserError(
            f"model {name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model {name} is not on the hub, or is private: run `hf auth login`, or check the name"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {name} has no revision '{revision}' on the hub") from error
    except HFValidationError as error:
        raise UserError(f"'{name}' is neither a folder on this machine nor a hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if local_only:
            raise UserError(f"model {name} is not on this machine") from error
        raise UserError(
            f"model {name} is neither a folder here nor can it be fetched from the hub (is there a network?): "
            f"{str(error).splitlines()[0]}"
        ) from error
    return ModelFolder(name=name, revision=local.name, path=local)
