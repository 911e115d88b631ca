"""What the tiny FLUX can and cannot do, in numbers: measured on drawings that nothing was trained on or chosen by."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline

from examples.adherence import iou, measure
from examples.shapes import Drawing, pictures
from examples.tiny_flux.vae import canny, decode, encode, psnr

TEST_SEED = 2
BASE_MEASUREMENTS = (
    ("test", 16, "float32"),
    ("new_pairs", 16, "float32"),
    ("test", 16, "bfloat16"),
    ("test", 512, "float32"),
    ("test", 512, "bfloat16"),
)
"""(split, T5 length, precision). 512 is the default of diffusers' pipelines, and seven times the work of 16."""
PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of the packages that the result depends on."""
    return {**{package: version(package) for package in PACKAGES}, "opencv": cv2.__version__}


def chance_iou(drawings: Sequence[Drawing]) -> float:
    """Mean intersection over union of each drawing with the next one: what painting any shape anywhere would give."""
    neighbours = zip(drawings, [*drawings[1:], drawings[0]], strict=True)
    return float(np.mean([iou(one.mask, other.mask) for one, other in neighbours]))


def vae_quality(vae: AutoencoderKL, split: str, count: int) -> dict[str, float]:
    """Reconstruction of drawings: PSNR in dB, and their adherence, the ceiling for anything painted through the VAE."""
    drawings = list(pictures(count, TEST_SEED, split))
    images = np.stack([drawing.image for drawing in drawings])
    outlines = np.stack([canny(image) for image in images])
    rebuilt = decode(vae, encode(vae, images))
    return {
        "psnr_db": round(psnr(images, rebuilt), 2),
        "outline_psnr_db": round(psnr(outlines, decode(vae, encode(vae, outlines))), 2),
        "chance_iou": round(chance_iou(drawings), 4),
        **measure(rebuilt, drawings).as_dict(),
    }


def paint(
    pipeline: FluxPipeline,
    captions: Sequence[str],
    seed: int,
    t5_length: int,
    num_steps: int = 10,
    batch_size: int = 32,
) -> np.ndarray:
    """Paint captions with a pipeline, at guidance 3.5: uint8 (B, 128, 128, 3)."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(captions), batch_size):
        result = pipeline(
            prompt=list(captions[start : start + batch_size]),
            height=128,
            width=128,
            num_inference_steps=num_steps,
            guidance_scale=3.5,
            max_sequence_length=t5_length,
            generator=generator,
            output_type="np",
        )
        images.append(np.round(result.images * 255).astype(np.uint8))
    return np.concatenate(images)


def base_quality(
    pipeline: FluxPipeline, split: str, count: int, t5_length: int, seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Adherence of unguided pictures to captions of a split: mean and standard deviation over noise seeds."""
    drawings = list(pictures(count, TEST_SEED, split))
    captions = [drawing.caption for drawing in drawings]
    runs = [asdict(measure(paint(pipeline, captions, seed, t5_length), drawings)) for seed in seeds]
    return {
        "mean": {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]},
        "std": {name: round(float(np.std([run[name] for run in runs])), 4) for name in runs[0]},
    }


def measure_pipeline(
    folder: Path, device: torch.device, count: int = 48, seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, Any]:
    """Load the pipeline folder and measure its VAE and its base; print a line for each figure and return them all."""
    result: dict[str, Any] = {"num_drawings": count, "noise_seeds": list(seeds), "vae": {}, "base": []}
    pipelines = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        pipelines[name] = FluxPipeline.from_pretrained(folder, dtype=dtype).to(device)
        pipelines[name].set_progress_bar_config(disable=True)
    for split in ("test", "new_pairs", "new_shapes"):
        result["vae"][split] = vae_quality(pipelines["float32"].vae, split, 4 * count)
        print(f"quality: vae {split} {result['vae'][split]}", flush=True)
    for split, t5_length, name in BASE_MEASUREMENTS:
        began = time.monotonic()
        figures = base_quality(pipelines[name], split, count, t5_length, seeds)
        seconds = round((time.monotonic() - began) / (count * len(seeds)), 3)
        row = {"split": split, "t5_length": t5_length, "dtype": name, "seconds_per_picture": seconds, **figures}
        result["base"].append(row)
        print(f"quality: base {row}", flush=True)
    return result
