"""Where a condition's weights are found, what they hash to, and how they are read: tensors only, whole, finite.

Weights lie in a folder on this machine, or in a repository of the Hugging Face hub, from which the files that are
needed are fetched once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shared.errors import UserError

if TYPE_CHECKING:
    import torch

ANNOTATORS: Final = "lllyasviel/Annotators"
"""The repository that holds the weights of controlnet-aux's detectors."""


def find(condition: str, weights: str, files: Sequence[str], default: str) -> Path:
    """The folder on this machine that `weights` names, with `files` in it; a repository's are downloaded, or found in
    the hub's cache.

    `default` is the repository that messages send people to. Raises `UserError`: no such folder, a file is missing,
    and all that the hub may answer.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{condition}: the folder {folder} does not hold {listed(missing)}; "
                f"copy {'it' if len(missing) == 1 else 'them'} there from huggingface.co/{default}"
            )
        return folder
    if weights.startswith((".", "/", "~")) or weights.count("/") != 1:
        raise UserError(
            f"{condition}: weights='{weights}' is no folder; give one that holds {listed(files)}, or a Hugging Face "
            f"repository as {default}"
        )
    return _download(condition, weights, files, default)


def sha256(file: Path) -> str:
    """Digest of a file's bytes."""
    from shared.model_folder import file_sha256  # it imports torch

    return file_sha256(file)


@contextmanager
def loading(condition: str, file: Path, default: str) -> Iterator[None]:
    """Inside, whatever a library trips over in a file that is not what its name says is a `UserError` that names it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
        raise UserError(
            f"{condition}: the weights in {file} cannot be loaded ({reason[:200]}); remove the file and fetch it again "
            f"from huggingface.co/{default}"
        ) from error


def load(condition: str, network: torch.nn.Module, file: Path, default: str) -> torch.nn.Module:
    """`network` with the tensors of a PyTorch checkpoint, every one of them, on the CPU, ready to be run.

    Checkpoints are read as in training they were written: at the top or under `state_dict`, with or without the
    `module.` of a network that was trained on several GPUs. A checkpoint that holds anything but tensors, lacks one or
    has one too many, or holds a value that is not finite is a `UserError`.
    """
    import torch

    with loading(condition, file, default):
        # weights_only: nothing in the file is run
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        tensors = checkpoint.get("state_dict", checkpoint)
        network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in tensors.items()})
        assert_finite(network)
    return network.requires_grad_(False).eval()


def assert_finite(network: torch.nn.Module) -> None:
    """Raise `ValueError` where a weight is not finite: drawings are bytes, and bytes cannot be NaN."""
    import torch

    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")


def listed(names: Sequence[str]) -> str:
    """The names as in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _download(condition: str, repository: str, files: Sequence[str], default: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    needed = f"{condition} needs {listed(files)} of {repository}"
    them = "it" if len(files) == 1 else "them"
    by_hand = f"or put {them} into a folder and give that as the {condition} weights"
    try:
        found = [Path(hf_hub_download(repository, name)) for name in files]
    except GatedRepoError as error:
        raise UserError(
            f"{needed}, which is gated: accept its terms on huggingface.co/{repository}, run `hf auth login`, {by_hand}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{needed}, but that repository does not exist or is private: mend its name, run `hf auth login`, {by_hand}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{needed}, not all of which is on this machine, and huggingface.co cannot be reached (no network, or "
            f"HF_HUB_OFFLINE is set): run once with a network, {by_hand}"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"{needed}, but that repository does not hold {them}: use {default}, {by_hand}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{needed}, but huggingface.co refuses ({reason}): try again, {by_hand}") from error
    assert len({file.parent for file in found}) == 1, found
    return found[0].parent
