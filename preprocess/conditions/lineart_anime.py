"""Line art of drawn pictures by controlnet-aux's `LineartAnimeDetector` (a pix2pix U-Net, Isola et al. 2017)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions import detection, weights
from preprocess.conditions.base import Condition, Drawer

_FILE: Final = "netG.pth"
_NETWORK_MULTIPLE: Final = 256
"""The U-Net halves its sides eight times."""


@dataclass(frozen=True)
class LineartAnimeOptions:
    """From how fine a look at the image lines are drawn."""

    weights: str = weights.ANNOTATORS
    """A Hugging Face repository, or a local folder, that holds netG.pth."""
    detect_resolutions: tuple[int, ...] = (512,)
    """Short side, in pixels, at which the detector looks at the image: one drawing for each. Several, as 256 512, draw
    from coarse to fine sketches; each drawing adds to the cache."""

    def check(self) -> None:
        detection.check_resolutions("lineart_anime", self.detect_resolutions)


@final
class LineartAnime(Condition[LineartAnimeOptions]):
    """The lines of a drawn picture (anime, comics), white on black, one drawing for each detect resolution, in their
    order."""

    name = "lineart_anime"
    Options = LineartAnimeOptions
    reads = "image"

    @property
    def num_drawings(self) -> int:
        return len(self.options.detect_resolutions)

    def recipe(self) -> dict[str, Any]:
        return {
            "detector": "controlnet_aux.LineartAnimeDetector",
            "weights_sha256": weights.sha256(self._file),
            "detect_resolutions": list(self.options.detect_resolutions),
            "precision": "fp32",
        }

    def open(self, device: str) -> Drawer:
        with detection.quiet_import():
            from controlnet_aux.lineart_anime import UnetGenerator
        import torch

        # as the detector's own `from_pretrained` makes it
        norm_layer = functools.partial(torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)
        network = UnetGenerator(3, 1, 8, 64, norm_layer=norm_layer, use_dropout=False)
        network = weights.load(self.name, network, self._file, weights.ANNOTATORS)
        return LineartAnimeDrawer(network.to(device), self.options.detect_resolutions)

    @cached_property
    def _file(self) -> Path:
        """The weights on this machine."""
        return weights.find(self.name, self.options.weights, (_FILE,), weights.ANNOTATORS) / _FILE


class LineartAnimeDrawer(detection.DetectorDrawer):
    black_on_white = True

    def _detect(self, seen: NDArray[np.uint8]) -> NDArray[np.float32]:
        import cv2
        import torch

        h, w = seen.shape[1:3]
        size = tuple(-(-side // _NETWORK_MULTIPLE) * _NETWORK_MULTIPLE for side in (w, h))
        stretched = np.stack([cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) for image in seen])
        x = torch.from_numpy(stretched).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        lines = (self.network(x)[:, 0] * 127.5 + 127.5).cpu().numpy()
        return np.stack([cv2.resize(line, (w, h), interpolation=cv2.INTER_CUBIC) for line in lines])
