"""Depth by transformers' depth estimators, Depth Anything V2 unless chosen otherwise (Yang et al. 2024)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from preprocess.conditions import detection, weights
from preprocess.conditions.base import Condition, Drawer
from shared.errors import UserError

_DEFAULT: Final = "depth-anything/Depth-Anything-V2-Small-hf"
_WEIGHTS: Final = "model.safetensors"
_FILES: Final = ("config.json", "preprocessor_config.json", _WEIGHTS)
_MODEL_TYPES: Final = ("depth_anything", "dpt")
"""Models whose larger numbers are nearer: they give inverse depth, up to a shift and a scale."""


@dataclass(frozen=True)
class DepthOptions:
    """Which model estimates the depth."""

    weights: str = _DEFAULT
    """A Hugging Face repository, or a local folder, of a Depth Anything or DPT model: config.json,
    preprocessor_config.json, model.safetensors. The larger ones (Base, Large) are finer, and under another licence."""

    def check(self) -> None:
        """The types rule out all that is wrong."""


@final
class Depth(Condition[DepthOptions]):
    """How near everything is, from the nearest (white) to the farthest (black) of each image."""

    name = "depth"
    Options = DepthOptions
    reads = "image"
    png_bytes_per_pixel = 0.5  # grey everywhere
    lines = False

    def recipe(self) -> dict[str, Any]:
        self._check_model()
        return {
            "detector": "transformers.AutoModelForDepthEstimation",
            "files_sha256": {name: weights.sha256(self._folder / name) for name in _FILES},
            "precision": "fp32",
        }

    def open(self, device: str) -> Drawer:
        import torch
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        self._check_model()
        with weights.loading(self.name, self._folder / _WEIGHTS, _DEFAULT):
            processor = AutoImageProcessor.from_pretrained(self._folder)
            model, info = AutoModelForDepthEstimation.from_pretrained(
                self._folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):  # they would be left at random without a word
                raise ValueError(f"{len(missing)} tensors are not there, as {missing[0]}")
            weights.assert_finite(model)
        return DepthDrawer(model.requires_grad_(False).eval().to(device), processor)

    @cached_property
    def _folder(self) -> Path:
        """The folder on this machine that holds the files."""
        return weights.find(self.name, self.options.weights, _FILES, _DEFAULT)

    def _check_model(self) -> None:
        """Refuse models of other kinds, whose larger numbers may be farther."""
        path = self._folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"depth: {path} is not JSON ({error}); fetch it again") from error
        kind = config.get("model_type")
        if kind not in _MODEL_TYPES:
            raise UserError(
                f"depth: {path} is of a '{kind}' model, where {' or '.join(_MODEL_TYPES)} is needed; use one as "
                f"{_DEFAULT}"
            )
        if config.get("depth_estimation_type") == "metric":
            raise UserError(
                f"depth: {path} is of a metric model, which measures distances and not nearness; use one as {_DEFAULT}"
            )


class DepthDrawer(detection.NetworkDrawer):
    num_drawings = 1

    def __init__(self, network: Any, processor: Any) -> None:
        super().__init__(network)
        self._processor = processor

    def _draw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import torch

        H, W = images.shape[1:3]
        pixels = self._processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
        # cuDNN's default for fp32 convolutions is TF32, with 10 bits of mantissa: then GPUs would draw unlike CPUs
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self.network(pixels["pixel_values"].to(self.device))
            estimates = self._processor.post_process_depth_estimation(outputs, target_sizes=[(H, W)] * len(images))
        nearness = np.stack([estimate["predicted_depth"].cpu().numpy() for estimate in estimates])  # (B, H, W)
        low, high = (bound(nearness, axis=(1, 2), keepdims=True) for bound in (np.min, np.max))
        scale = np.where(high > low, high - low, np.inf)  # nothing is nearer than anything else: all black
        return np.repeat(detection.to_bytes((nearness - low) / scale * 255)[:, None, :, :, None], 3, axis=4)
