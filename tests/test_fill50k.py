"""fill50k as it comes, through both stages by the README's words: images, conditioning images and captions become an
SD 1.5 ControlNet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from preprocess.config import PreprocessConfig
from preprocess.pipeline import preprocess
from shared import families
from shared.cache.reader import Cache
from shared.config import load
from train.config import TrainConfig
from train.trainer import train

COLOURS = ("gold", "navy", "tomato", "teal", "plum", "olive")
SIDE = 64
ROOT = Path(__file__).parent.parent


def fill50k(folder: Path) -> Path:
    """Filled circles, their outlines, and a sentence each, laid out as the hub has them."""
    lines = []
    for name in ("images", "conditioning_images"):
        (folder / name).mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        ground = COLOURS[i - 1]
        picture, outline = (Image.new("RGB", (SIDE, SIDE), of) for of in (ground, "black"))
        box = (8 + i, 8, 40 + 2 * i, 40 + i)
        ImageDraw.Draw(picture).ellipse(box, fill=colour)
        ImageDraw.Draw(outline).ellipse(box, outline="white", width=2)
        picture.save(folder / "images" / f"{i}.png")
        outline.save(folder / "conditioning_images" / f"{i}.png")
        text = f"{colour} circle with {ground} background"
        lines.append({"text": text, "image": f"images/{i}.png", "conditioning_image": f"conditioning_images/{i}.png"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_fill50k_becomes_an_sd15_controlnet(tmp_path: Path) -> None:
    data, cache = fill50k(tmp_path / "fill50k"), tmp_path / "cache"
    model = families.get("sd15").tiny(tmp_path / "model")
    options = load(PreprocessConfig, [
        "--recipe", str(ROOT / "preprocess/recipes/fill50k.yaml"), "--data", str(data), "--cache", str(cache),
        "--model", str(model), "--geometry.resolution", str(SIDE), "--precision", "fp32", "--device", "cpu",
        "--validation-fraction", "0",
    ], command="preprocess")  # fmt: skip
    assert options is not None
    assert preprocess(options) == 0

    made = Cache(cache)
    captions = made.captions
    assert len(made.samples) == len(COLOURS)
    for key, sample in made.samples.items():
        number = Path(sample.source).stem
        drawn = np.asarray(Image.open(data / "conditioning_images" / f"{number}.png"))
        cached = made.layer("precomputed_pixels").tensors(key)["pixels"][0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(cached, drawn)
        [caption] = sample.captions
        assert captions[caption].text.startswith(f"{COLOURS[int(number)]} circle with ")

    trained = load(TrainConfig, [
        "--recipe", str(ROOT / "train/recipes/sd15-16gb.yaml"), "--cache", str(cache), "--runs", str(tmp_path),
        "--name", "circles", "--steps", "2", "--loader.batch-size", "3", "--loader.accumulation", "1",
        "--optimizer.kind", "adamw", "--device", "cpu", "--tracker", "none",
    ], command="train")  # fmt: skip
    assert trained is not None
    assert train(trained) == 0
    weights = load_file(tmp_path / "circles" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert weights["controlnet_mid_block.weight"].any(), "what was zero has moved"
