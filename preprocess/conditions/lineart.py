"""Line art by controlnet-aux's `LineartDetector` (Chan, Durand, Isola 2022, "Learning to generate line drawings")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions import detection, weights
from preprocess.conditions.base import Condition, Drawer

FINE: Final = "sk_model.pth"
COARSE: Final = "sk_model2.pth"


@dataclass(frozen=True)
class LineartOptions:
    """Which lines are drawn, and from how fine a look at the image."""

    weights: str = weights.ANNOTATORS
    """A Hugging Face repository, or a local folder, that holds sk_model.pth and sk_model2.pth."""
    detect_resolutions: tuple[int, ...] = (512,)
    """Short side, in pixels, at which the detector looks at the image: one drawing for each. A model trained on
    128 256 384 512 draws from coarse to fine sketches; each drawing adds to the cache."""
    coarse: bool = False
    """Draw fewer, bolder lines (sk_model2.pth)."""

    def check(self) -> None:
        detection.check_resolutions("lineart", self.detect_resolutions)


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
        return {
            "detector": "controlnet_aux.LineartDetector",
            "weights_sha256": weights.sha256(self._file),
            "detect_resolutions": list(self.options.detect_resolutions),
            "coarse": self.options.coarse,
            "precision": "fp32",
        }

    def open(self, device: str) -> Drawer:
        with detection.quiet_import():
            from controlnet_aux.lineart import Generator

        network = weights.load(self.name, Generator(3, 1, 3), self._file, weights.ANNOTATORS)
        return LineartDrawer(network.to(device), self.options.detect_resolutions)

    @cached_property
    def _file(self) -> Path:
        """The weights in use, on this machine; both files are fetched, as the detector's own `from_pretrained` does."""
        folder = weights.find(self.name, self.options.weights, (FINE, COARSE), weights.ANNOTATORS)
        return folder / (COARSE if self.options.coarse else FINE)


class LineartDrawer(detection.DetectorDrawer):
    black_on_white = True

    def _detect(self, seen: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        x = torch.from_numpy(seen).to(self.device).permute(0, 3, 1, 2).float() / 255
        lines: NDArray[np.float32] = (self.network(x)[:, 0] * 255).cpu().numpy()
        return lines
