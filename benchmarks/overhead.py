"""What preprocessing costs beside its encoders: the wall time of a whole run over the encoders' own time.

The encoders have random weights and are large enough to dominate on a CPU: a VAE of FLUX's own channels, a T5 of
several wide layers. Their own time is that of the same batches, already decoded and in memory, through the same
callables that preprocessing opens, loaded beforehand. The run includes all else: reading and hashing the weights,
decoding, cropping and drawing, writing shards to the disk, publishing.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import stages
from benchmarks.flux_cache import FAMILY
from preprocess import conditions
from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from shared.cache.reader import Cache
from shared.cache.writer import bytes_on_disk
from shared.families.base import LayerKind
from shared.model_folder import ModelFolder, resolve
from shared.report import table

T = TypeVar("T")
BATCH = 8
CONDITION = "canny"


@dataclass(frozen=True)
class Encoders:
    """How large the encoders are, and what they are given."""

    vae_channels: tuple[int, int, int, int] = (128, 256, 512, 512)
    """FLUX.1's own."""
    t5_width: int = 1024
    t5_layers: int = 6
    text_length: int = 512
    resolution: int = 256
    count: int = 15
    """Pictures, each with a caption of its own; with the empty one, captions fill their batches."""


@dataclass(frozen=True)
class Figures:
    """Seconds, by round."""

    encoders: Encoders
    own: list[dict[str, float]]
    """Of the encoders by layer, before each run and after the last."""
    wall: list[float]
    """Of the runs."""
    drawings_bytes: float
    """Of a sample's drawings on disk."""

    @property
    def overhead(self) -> float:
        """Wall time over the encoders' own, of the measurements before and after it; the median of the rounds."""
        own = [sum(layers.values()) for layers in self.own]
        return statistics.median(
            wall / ((before + after) / 2) for wall, before, after in zip(self.wall, own[:-1], own[1:], strict=True)
        )

    def closing_line(self) -> str:
        """`preprocess overhead=...`."""
        return f"preprocess overhead={self.overhead:.3f}"


def measure(folder: Path, encoders: Encoders, rounds: int) -> Figures:
    """Make the model and the pictures below `folder`; encode alone and preprocess in turn."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = write_model(folder / "model", encoders)
    data = write_pictures(folder / "pictures", encoders)
    resolved = resolve(str(model), sorted({part for kind in FAMILY.layers for part in kind.components}))
    batches = {kind.name: list(batches_of(kind, data, encoders)) for kind in FAMILY.layers}
    stages.run(
        preprocess, preprocess_options(model, data, folder / "warm-up", encoders)
    )  # what is imported and allocated once in a process
    own, wall = [own_seconds(resolved, batches, encoders)], []
    for turn in range(rounds):
        cache = folder / f"cache-{turn}"
        began = time.perf_counter()
        stages.run(preprocess, preprocess_options(model, data, cache, encoders))
        wall.append(time.perf_counter() - began)
        own.append(own_seconds(resolved, batches, encoders))
    drawings = bytes_on_disk(cache / Cache(cache).summary(CONDITION).folder) / encoders.count
    return Figures(encoders, own, wall, drawings)


def preprocess_options(model: Path, data: Path, cache: Path, encoders: Encoders) -> PreprocessConfig:
    """A run of these encoders over the pictures."""
    return PreprocessConfig(
        data=str(data), cache=str(cache), model=str(model), condition=(CONDITION,), text_length=encoders.text_length,
        device="cpu", geometry=GeometryOptions(resolution=encoders.resolution),
        encode=EncodeOptions(image_batch=BATCH, text_batch=BATCH),
    )  # fmt: skip


def own_seconds(model: ModelFolder, batches: dict[str, list[Any]], encoders: Encoders) -> dict[str, float]:
    """Layer to the seconds that its encoder takes for all batches, one after the other, loading aside."""
    seconds = {}
    for kind in FAMILY.layers:
        encode = FAMILY.open_encoder(kind, model, "cpu", torch.bfloat16, encoders.text_length)
        began = time.perf_counter()
        for batch in batches[kind.name]:
            encode(batch)
        seconds[kind.name] = time.perf_counter() - began
    return seconds


def write_model(folder: Path, encoders: Encoders) -> Path:
    """A pipeline's folder with these encoders, random weights in bf16; all else is the family's tiny one."""
    from diffusers import AutoencoderKL
    from transformers import T5Config, T5EncoderModel

    FAMILY.tiny(folder)
    vae_config = json.loads((folder / "vae" / "config.json").read_text())
    text_config = json.loads((folder / "text_encoder_2" / "config.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL.from_config({
            **vae_config, "block_out_channels": encoders.vae_channels, "layers_per_block": 2,
            "norm_num_groups": min(32, encoders.vae_channels[0] // 4),
        })  # fmt: skip
        t5 = T5EncoderModel(T5Config(
            vocab_size=text_config["vocab_size"], d_model=encoders.t5_width, d_ff=5 * encoders.t5_width // 2, d_kv=64,
            num_heads=max(1, encoders.t5_width // 64), num_layers=encoders.t5_layers, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False, use_cache=False,
        ))  # fmt: skip
    for part, component in ((vae, "vae"), (t5, "text_encoder_2")):
        shutil.rmtree(folder / component)
        part.to(torch.bfloat16).save_pretrained(folder / component)
    return folder


def write_pictures(folder: Path, encoders: Encoders) -> Path:
    """JPEGs of twice the resolution with a soft texture, each with its caption in metadata.jsonl."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for i in range(encoders.count):
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (2 * encoders.resolution,) * 2, interpolation=cv2.INTER_CUBIC)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=92)
        lines.append(json.dumps({"file_name": f"{i:03d}.jpg", "text": f"soft spots number {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def batches_of(kind: LayerKind, data: Path, encoders: Encoders) -> Iterator[Any]:
    """What preprocessing gives to a layer's encoder, its last batch filled up by the last one: captions, the empty one
    first; or uint8 (B, H, W, 3); or drawings, uint8 (B, R, H, W, 3)."""
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    if kind.reads == "caption":
        captions = ["", *(line["text"] for line in lines)]
        yield from _filled(captions)
        return
    side = encoders.resolution
    images = [np.asarray(Image.open(data / line["file_name"]).resize((side, side))) for line in lines]
    for some in _filled(images):
        batch = np.stack(some)
        yield _drawn(batch) if kind.reads == "condition" else batch


def _filled(items: Sequence[T]) -> Iterator[list[T]]:
    for i in range(0, len(items), BATCH):
        batch = list(items[i : i + BATCH])
        yield batch + batch[-1:] * (BATCH - len(batch))


def _drawn(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    condition = conditions.get(CONDITION)
    with condition(condition.Options()).open("cpu") as draw:
        return draw(images)


def report(figures: Figures) -> str:
    """The table."""
    e = figures.encoders
    rows = [(layer, *(f"{seconds[layer]:.2f}" for seconds in figures.own)) for layer in figures.own[0]] + [
        ("the encoders' own, s", *(f"{sum(seconds.values()):.2f}" for seconds in figures.own))
    ]
    rows.append(("preprocess after it, s", *(f"{wall:.2f}" for wall in figures.wall), ""))
    head = ("seconds", *(f"round {i}" for i in range(len(figures.own))))
    return (
        f"{e.count} pictures of {e.resolution} px in batches of {BATCH}, {CONDITION}; VAE {e.vae_channels}, T5 of "
        f"{e.t5_layers} layers {e.t5_width} wide at {e.text_length} tokens; bf16, {torch.get_num_threads()} threads\n"
        f"{table(head, rows, right=1)}\n"
        f"drawings, which no training reads, take {figures.drawings_bytes:,.0f} bytes a sample"
    )
