"""Line art by controlnet-aux's `LineartDetector` (Chan, Durand, Isola 2022, "Learning to generate line drawings").

The detector takes one image at a time; its network takes a batch, and its only normalization is per image, so that the
drawing is the same. What is around the network is written again here, batched, and tested to equal the detector.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions.base import Condition, Drawer
from shared.errors import UserError

if TYPE_CHECKING:
    import torch

FINE: Final = "sk_model.pth"
COARSE: Final = "sk_model2.pth"
_SIDE_MULTIPLE: Final = 64
"""The detector works on sides that are multiples of this."""

_IMPORT_WARNINGS: Final = (
    r"The module 'mediapipe' is not installed",
    r"Importing from timm\.models\.(layers|registry) is deprecated",
    r"Overwriting tiny_vit_\w+ in registry",
    r"Please import `gaussian_filter` from the `scipy\.ndimage` namespace",
    r"`torch\.jit\.script` is deprecated",
)
"""What `import controlnet_aux` prints about detectors that are not used here."""


@dataclass(frozen=True)
class LineartOptions:
    """Which lines are drawn, and from how fine a look at the image."""

    weights: str = "lllyasviel/Annotators"
    """A Hugging Face repository, or a local folder, that holds sk_model.pth and sk_model2.pth."""
    detect_resolutions: tuple[int, ...] = (512,)
    """Short side, in pixels, at which the detector looks at the image: one drawing for each. A model trained on
    128 256 384 512 draws from coarse to fine sketches; each drawing adds to the cache."""
    coarse: bool = False
    """Draw fewer, bolder lines (sk_model2.pth)."""

    def check(self) -> None:
        if not self.detect_resolutions:
            raise UserError("lineart: detect_resolutions is empty; give at least one, as 512")
        for resolution in self.detect_resolutions:
            if resolution < _SIDE_MULTIPLE or resolution % _SIDE_MULTIPLE:
                raise UserError(
                    f"lineart: detect_resolutions has {resolution}, but the detector works in multiples of "
                    f"{_SIDE_MULTIPLE}; use 128, 256, 384 or 512"
                )
        if len(set(self.detect_resolutions)) < len(self.detect_resolutions):
            raise UserError(
                f"lineart: detect_resolutions has a number twice: {self.detect_resolutions}; name each once"
            )


@final
class Lineart(Condition[LineartOptions]):
    """Soft lines of contours and folds, white on black, one drawing for each detect resolution, in their order."""

    name = "lineart"
    Options = LineartOptions
    reads = "image"

    @property
    def num_drawings(self) -> int:
        return len(self.options.detect_resolutions)

    def recipe(self) -> dict[str, Any]:
        weights = self._folder / (COARSE if self.options.coarse else FINE)
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "detector": "controlnet_aux.LineartDetector",
            "weights_sha256": sha256,
            "detect_resolutions": list(self.options.detect_resolutions),
            "coarse": self.options.coarse,
            "precision": "fp32",
        }

    def open(self, device: str) -> Drawer:
        with warnings.catch_warnings():
            for message in _IMPORT_WARNINGS:
                warnings.filterwarnings("ignore", message)
            from controlnet_aux.lineart import LineartDetector

        try:
            # reads with torch.load, which since torch 2.6 loads tensors only and runs no code from the file
            detector = LineartDetector.from_pretrained(str(self._folder))
        except MemoryError:
            raise
        except Exception as error:  # whatever torch trips over in a file that is not what its name says
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the lineart weights in {self._folder} cannot be loaded ({reason[:200]}); "
                f"remove {FINE} and {COARSE} there and fetch them again from {LineartOptions.weights}"
            ) from error
        model = detector.model_coarse if self.options.coarse else detector.model
        return LineartDrawer(model.requires_grad_(False).to(device), self.options.detect_resolutions)

    @cached_property
    def _folder(self) -> Path:
        """The folder on this machine that holds both files, fetched where need be."""
        return _weights_folder(self.options.weights)


class LineartDrawer(Drawer):
    """The network on its device."""

    def __init__(self, model: torch.nn.Module, detect_resolutions: tuple[int, ...]) -> None:
        self._model: torch.nn.Module | None = model
        self._detect_resolutions = detect_resolutions
        self.num_drawings = len(detect_resolutions)

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.stack([self._draw_at(resolution, images) for resolution in self._detect_resolutions], axis=1)

    def _draw_at(self, resolution: int, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3) -> uint8 (B, H, W, 3), seen with a short side of `resolution` pixels."""
        import cv2
        import torch

        assert self._model is not None, "the drawer is closed"
        device = next(self._model.parameters()).device
        H, W = images.shape[1:3]
        seen = np.stack([_resize_for_detection(image, resolution) for image in images])  # (B, h, w, 3)
        # cuDNN's default for fp32 convolutions is TF32, with 10 bits of mantissa: then GPUs would draw unlike CPUs
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = torch.from_numpy(seen).to(device).permute(0, 3, 1, 2).float() / 255
            lines = self._model(x)[:, 0]  # (B, h, w), black on white, 0..1
            lines = (lines * 255).clamp(0, 255).byte().cpu().numpy()
        drawings = np.stack([255 - cv2.resize(line, (W, H), interpolation=cv2.INTER_LINEAR) for line in lines])
        return np.repeat(drawings[..., None], 3, axis=3)

    def close(self) -> None:
        import torch

        self._model = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _resize_for_detection(image: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (h, w, 3): the short side becomes `resolution`, both sides round to multiples of 64, as upstream."""
    import cv2

    H, W = image.shape[:2]
    scale = resolution / min(H, W)
    h, w = (round(side * scale / _SIDE_MULTIPLE) * _SIDE_MULTIPLE for side in (H, W))
    resized: NDArray[np.uint8] = cv2.resize(
        image, (w, h), interpolation=cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA
    )
    return resized


def _weights_folder(weights: str) -> Path:
    """The local folder for `weights`, with both files in it; a repository is downloaded, or found in its cache."""
    folder = Path(weights).expanduser()
    if folder.is_dir():
        missing = [name for name in (FINE, COARSE) if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"lineart: the folder {folder} does not hold {' and '.join(missing)}; "
                f"copy them there from huggingface.co/{LineartOptions.weights}"
            )
        return folder
    if weights.startswith((".", "/", "~")) or weights.count("/") != 1:
        raise UserError(
            f"lineart: weights='{weights}' is no folder; give one that holds {FINE} and {COARSE}, or a Hugging Face "
            f"repository as {LineartOptions.weights}"
        )
    return _download(weights)


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    needed = f"lineart needs {FINE} and {COARSE} of {repository}"
    by_hand = "or put both files into a folder and give that as the lineart weights"
    try:
        files = [Path(hf_hub_download(repository, name)) for name in (FINE, COARSE)]
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
            f"{needed}, which are not on this machine, and huggingface.co cannot be reached (no network, or "
            f"HF_HUB_OFFLINE is set): run once with a network, {by_hand}"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{needed}, but that repository does not hold them: use {LineartOptions.weights}, {by_hand}"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{needed}, but huggingface.co refuses ({reason}): try again, {by_hand}") from error
    assert files[0].parent == files[1].parent, files
    return files[0].parent
