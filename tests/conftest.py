"""What many tests stand on: a FLUX of the real classes with a few thousand random weights, a small data set, a cache.

All of it is made once per test process, and no test changes it: one that must, copies it first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before torch is imported: several test processes share few cores, and spinning threads would starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
from PIL import Image

from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.geometry import GeometryOptions
from shared import atomic

# Tests that call make mean it as somebody would: without what `make test ARGS=...` was told.
for told in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"):
    os.environ.pop(told, None)

TEXT_LENGTH = 24


def write_data(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 48))) -> Path:
    """`count` pictures of a bright box on a dark ground with captions in metadata.jsonl; sizes (width, height) in turn.

    Two captions for each, of which one is shared by all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(count)
    lines = []
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        picture = np.full((height, width, 3), random.integers(0, 90, 3), np.uint8)
        left, top = int(random.integers(4, width // 2)), int(random.integers(4, height // 2))
        picture[top : top + height // 3, left : left + width // 3] = random.integers(160, 255, 3)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": [f"box number {i}", "a box"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def preprocess_options(data: Path, cache: Path, model: Path, **changes: object) -> PreprocessConfig:
    """Small and exact: 64 px, fp32, canny, 24 T5 tokens, shards of 4 rows. `changes` replace fields."""
    fields: dict[str, object] = {
        "data": str(data),
        "cache": str(cache),
        "model": str(model),
        "condition": ("canny",),
        "text_length": TEXT_LENGTH,
        "precision": "fp32",
        "device": "cpu",
        "validation_fraction": 0.25,
        "geometry": GeometryOptions(resolution=64),
        "encode": EncodeOptions(image_batch=3, text_batch=4, workers=2, shard_rows=4),
        **changes,
    }
    return PreprocessConfig(**fields)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _own_name_while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that a test starts in this process names what it writes after itself; the next test does not."""
    monkeypatch.setattr(atomic, "_writer", "")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in FLUX.1-dev's layout: the real classes, tiny, random."""
    from shared import families
    from shared.report import quiet_libraries

    quiet_libraries()
    return families.get("flux").tiny(tmp_path_factory.mktemp("model") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of two shapes."""
    return write_data(tmp_path_factory.mktemp("data") / "boxes", 12)


@pytest.fixture(scope="session")
def tiny_cache(tiny_data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of `tiny_data`: canny, fp32."""
    from preprocess.pipeline import preprocess

    cache = tmp_path_factory.mktemp("cache") / "boxes"
    assert preprocess(preprocess_options(tiny_data, cache, tiny_model)) == 0
    return cache
