"""Soft edges by controlnet-aux's `HEDdetector` (Xie, Tu 2015, "Holistically-nested edge detection") or its
`PidiNetDetector` (Su et al. 2021, "Pixel difference networks")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions import detection, weights
from preprocess.conditions.base import Condition, Drawer

_FILES: Final = {"hed": "ControlNetHED.pth", "pidinet": "table5_pidinet.pth"}
_DETECTORS: Final = {"hed": "controlnet_aux.HEDdetector", "pidinet": "controlnet_aux.PidiNetDetector"}


@dataclass(frozen=True)
class SoftedgeOptions:
    """Which network draws, and from how fine a look at the image."""

    detector: Literal["hed", "pidinet"] = "hed"
    """hed: broad soft edges with much detail; pidinet: thinner, cleaner ones, from a far smaller network."""
    weights: str = weights.ANNOTATORS
    """A Hugging Face repository, or a local folder, that holds ControlNetHED.pth (hed) or table5_pidinet.pth
    (pidinet)."""
    detect_resolutions: tuple[int, ...] = (512,)
    """Short side, in pixels, at which the detector looks at the image: one drawing for each. Several, as 256 512, draw
    from coarse to fine edges; each drawing adds to the cache."""

    def check(self) -> None:
        detection.check_resolutions("softedge", self.detect_resolutions)


@final
class Softedge(Condition[SoftedgeOptions]):
    """Edges that are the brighter the surer, white on black, one drawing for each detect resolution, in their order."""

    name = "softedge"
    Options = SoftedgeOptions
    reads = "image"
    png_bytes_per_pixel = 0.5  # grey everywhere

    @property
    def num_drawings(self) -> int:
        return len(self.options.detect_resolutions)

    def recipe(self) -> dict[str, Any]:
        return {
            "detector": _DETECTORS[self.options.detector],
            "weights_sha256": weights.sha256(self._file),
            "detect_resolutions": list(self.options.detect_resolutions),
            "precision": "fp32",
        }

    def open(self, device: str) -> Drawer:
        if self.options.detector == "hed":
            with detection.quiet_import():
                from controlnet_aux.hed import ControlNetHED_Apache2

            network = weights.load(self.name, ControlNetHED_Apache2(), self._file, weights.ANNOTATORS)
            return HedDrawer(network.to(device), self.options.detect_resolutions)
        with detection.quiet_import():
            from controlnet_aux.pidi import pidinet

        network = weights.load(self.name, pidinet(), self._file, weights.ANNOTATORS)
        return PidiNetDrawer(network.to(device), self.options.detect_resolutions)

    @cached_property
    def _file(self) -> Path:
        """The weights of the chosen detector, on this machine."""
        file = _FILES[self.options.detector]
        return weights.find(self.name, self.options.weights, (file,), weights.ANNOTATORS) / file


class HedDrawer(detection.DetectorDrawer):
    black_on_white = False

    def _detect(self, seen: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        x = torch.from_numpy(seen).to(self.device).permute(0, 3, 1, 2).float()
        sides = [  # five looks, the later the coarser; bilinear between pixel centres, as OpenCV enlarges
            torch.nn.functional.interpolate(side, seen.shape[1:3], mode="bilinear", align_corners=False)
            for side in self.network(x)
        ]
        edges: NDArray[np.float32] = (torch.cat(sides, dim=1).mean(dim=1).sigmoid() * 255).cpu().numpy()
        return edges


class PidiNetDrawer(detection.DetectorDrawer):
    black_on_white = False

    def _detect(self, seen: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        bgr = np.ascontiguousarray(seen[..., ::-1])  # as the network was trained
        x = torch.from_numpy(bgr).to(self.device).permute(0, 3, 1, 2).float() / 255
        edges: NDArray[np.float32] = (self.network(x)[-1][:, 0] * 255).cpu().numpy()  # the last of five is the whole
        return edges
