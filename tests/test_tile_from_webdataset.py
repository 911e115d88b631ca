"""A tile ControlNet's data, from tars to batches: three members are corrupt, and every sound sample comes once in every
epoch."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from preprocess.conditions.tile import Tile, TileOptions
from preprocess.config import PreprocessConfig
from preprocess.pipeline import preprocess
from shared import families
from shared.cache.reader import Cache
from shared.config import load
from shared.families.base import Batch
from tests.preprocess.data_sets import write_tar
from train.config import TrainConfig
from train.loader import Loader, LoaderOptions
from train.samples import CachedSamples
from train.step import Step
from train.trainer import train

NUM_SHARDS, OF_SHARD, SIDE, SMALL = 20, 6, 64, 16
CORRUPT = {"00003.tar/000020.jpg", "00011.tar/000069.jpg", "00019.tar/000114.jpg"}
"""Cut off in the middle, another kind of file, and a sound image whose caption is no text."""


TILE = TileOptions(sizes=(SMALL,), reduce=("area", "bicubic"), blur=1.5, noise=8.0, jpeg=50, vary=True)
"""As in the recipe."""
ROOT = Path(__file__).parent.parent


def picture(number: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2).astype(np.uint8)


def jpeg(number: int) -> bytes:
    coded = io.BytesIO()
    Image.fromarray(picture(number)).save(coded, "JPEG", quality=90)
    return coded.getvalue()


def name_of(number: int) -> str:
    return f"{number // OF_SHARD:05d}.tar/{number:06d}.jpg"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("laion")
    for shard in range(NUM_SHARDS):
        members = []
        for number in range(shard * OF_SHARD, (shard + 1) * OF_SHARD):
            image, text = jpeg(number), f"picture number {number}".encode()
            if number == 20:
                image = image[: len(image) // 2]
            if number == 69:
                image = b"<html><h1>403 Forbidden</h1></html>" * 10
            if number == 114:
                text = b"\xff\xfe\x00caption"
            members += [(f"{number:06d}.jpg", image), (f"{number:06d}.txt", text)]
            members.append((f"{number:06d}.json", json.dumps({"width": SIDE}).encode()))  # what others leave there
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"{folder}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def cache(shards: str, said: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the recipe, a quarter as large; nothing is held out, so that every sound sample is trained on."""
    folder = tmp_path_factory.mktemp("cache") / "tile"
    model = families.get("sd15").tiny(tmp_path_factory.mktemp("model") / "sd15")
    options = load(PreprocessConfig, [
        "--recipe", str(ROOT / "preprocess/recipes/tile.yaml"), "--data", shards, "--cache", str(folder),
        "--model", str(model), "--geometry.resolution", str(SIDE), "--conditions.tile.sizes", str(SMALL),
        "--precision", "fp32", "--device", "cpu", "--validation-fraction", "0", "--encode.shard-rows", "16",
    ], command="preprocess")  # fmt: skip
    assert options is not None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("preprocess.pipeline.warn", said.append)
        assert preprocess(options) == 3
    return folder


@pytest.fixture(scope="module")
def samples(cache: Path) -> CachedSamples:
    return CachedSamples(Cache(cache), families.get("sd15"), "tile", "train")


def test_the_three_corrupt_members_are_named_with_their_reasons_and_counted(cache: Path, said: list[str]) -> None:
    assert "3 sample(s) were left out:" in said
    named = {line.split(":")[0].strip(): line for line in said if ".tar/" in line}
    assert named.keys() == CORRUPT
    assert all(len(line.split(": ", 1)[1]) > 10 for line in named.values()), "each with a reason"
    lost = {sample.source: sample.error for sample in Cache(cache).samples.values() if sample.status != "ok"}
    assert lost.keys() == CORRUPT
    assert all(lost.values())
    assert len(Cache(cache).samples) == NUM_SHARDS * OF_SHARD, "what is lost has its row, too"


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("order", ["global", "window"])
def test_every_sound_sample_comes_exactly_once_in_every_epoch(
    samples: CachedSamples, num_ranks: int, order: Literal["global", "window"]
) -> None:
    sources = {key: sample.source for key, sample in samples.cache.samples.items()}
    sound = {name_of(number) for number in range(NUM_SHARDS * OF_SHARD)} - CORRUPT
    options = LoaderOptions(batch_size=3, order=order, window=30)
    loaders = [
        Loader(samples, options, seed=5, device=torch.device("cpu"), rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    assert loaders[0].batches_per_epoch == len(sound) / 3 == 39
    streams = []
    for loader in loaders:
        with closing(iter(loader)) as steps:
            streams.append(list(itertools.chain(*itertools.islice(steps, 3 * 39 // num_ranks))))
    batches = sorted(itertools.chain(*streams), key=lambda batch: batch.position)
    epochs = [[sources[key] for batch in batches[e * 39 : (e + 1) * 39] for key in batch.keys] for e in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(sound), "each once: nothing is drawn with replacement"
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_run_of_two_epochs_is_trained_on_every_sound_sample_twice(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    loss = Step.loss

    def watched(self: Step, batch: Batch) -> torch.Tensor:
        seen.append(batch.keys)
        return loss(self, batch)

    monkeypatch.setattr(Step, "loss", watched)
    options = load(TrainConfig, [
        "--recipe", str(ROOT / "train/recipes/tile.yaml"), "--cache", str(cache), "--runs", str(tmp_path),
        "--steps", "78", "--loader.global-batch", "3", "--device", "cpu", "--tracker", "none",
    ], command="train")  # fmt: skip
    assert options is not None
    assert train(options) == 0
    sound = [key for key, sample in Cache(cache).samples.items() if sample.status == "ok"]
    assert len(sound) == NUM_SHARDS * OF_SHARD - len(CORRUPT)
    assert len(seen) == 78
    for epoch in (seen[:39], seen[39:]):
        assert Counter(itertools.chain(*epoch)) == Counter(sound)


def test_what_comes_is_the_sample_s_own_picture_made_small_and_large_again(samples: CachedSamples) -> None:
    loader = Loader(samples, LoaderOptions(batch_size=4), seed=0, device=torch.device("cpu"))
    batch = loader.make(0)
    shown = families.get("sd15").condition(batch, samples.recipes, None, torch.float32)
    assert shown.shape == (4, 3, SIDE, SIDE)
    with Tile(TILE).open("cpu") as drawer:
        for key, pixels in zip(batch.keys, shown, strict=True):
            number = int(samples.cache.samples[key].source.split("/")[1].split(".")[0])
            image = np.asarray(Image.open(io.BytesIO(jpeg(number))))
            drawn = drawer(image[None])[0, 0]
            np.testing.assert_array_equal((pixels.permute(1, 2, 0) * 255).round().numpy(), drawn)
            assert 2 < np.abs(drawn.astype(int) - image).mean() < 40, "coarser, and still that picture"


def test_of_a_hundred_epochs_a_twentieth_of_the_captions_is_dropped(samples: CachedSamples) -> None:
    loader = Loader(samples, LoaderOptions(batch_size=8, caption_dropout=0.05), seed=0, device=torch.device("cpu"))
    chosen = [loader.choose(position) for position in range(100 * loader.batches_per_epoch)]
    dropped = Counter(
        index
        for choice in chosen
        for index, caption in zip(choice.indices, choice.captions, strict=True)
        if not caption
    )
    total = sum(len(choice.indices) for choice in chosen)
    assert total == 100 * len(samples)
    assert dropped.total() / total == pytest.approx(0.05, abs=0.008)
    assert max(dropped.values()) < 20, "of every sample a few: it is drawn anew in each epoch"
    assert len(dropped) > 0.97 * len(samples)
