"""What is kept of the VAE's posterior: its moments, its mean, or one draw that nothing but the sample decides."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.pipeline import preprocess
from shared import families
from shared.cache.reader import Cache
from shared.families.base import Posterior
from shared.model_folder import resolve
from tests.conftest import preprocess_options, write_data

FLUX = families.get("flux")
KEPT = ("mean", "sample")
VAE_LAYERS = ("latents", "canny_latents", "tile_latents")
SIZES = ((64, 64), (96, 48))


def options_of(data: Path, cache: Path, model: Path, posterior: str, **changes: object) -> PreprocessConfig:
    tile = dataclasses.replace(PreprocessConfig(data="").conditions.tile, factors=(2, 4))
    parts = dataclasses.replace(PreprocessConfig(data="").conditions, tile=tile)
    changed = {"condition": ("canny", "tile"), "conditions": parts, "posterior": posterior, **changes}
    return preprocess_options(data, cache, model, **changed)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "boxes", 5, SIZES)


@pytest.fixture(scope="module")
def caches(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same data set three times, with canny, and tile at two factors."""
    folder = tmp_path_factory.mktemp("caches")
    for posterior in get_args(Posterior):
        assert preprocess(options_of(data, folder / posterior, tiny_model, posterior)) == 0
    return {posterior: folder / posterior for posterior in get_args(Posterior)}


def tensors(cache: Path) -> dict[tuple[str, str, str], torch.Tensor]:
    """(layer, key, field) -> tensor, of the layers that the VAE makes."""
    opened = Cache(cache)
    return {
        (name, key, field): tensor.clone()
        for name in VAE_LAYERS
        for key in opened.samples
        for field, tensor in opened.layer(name).tensors(key).items()
    }


def test_the_config_names_the_posteriors_that_families_know() -> None:
    assert get_type_hints(PreprocessConfig)["posterior"] == Posterior
    assert PreprocessConfig(data="").posterior == "moments"


@pytest.mark.parametrize("posterior", get_args(Posterior))
def test_layers_hold_the_fields_that_they_state(posterior: Posterior, caches: dict[str, Path]) -> None:
    expected = {"moments": ["mean", "std"], "mean": ["mean"], "sample": ["sample"]}[posterior]
    cache = Cache(caches[posterior])
    for name in VAE_LAYERS:
        layer = cache.layer(name)
        assert [field.name for field in layer.summary.fields] == expected
        assert layer.summary.recipe.get("posterior", "moments") == posterior
        for key in cache.samples:
            assert sorted(layer.tensors(key)) == expected
    [latents] = [kind for kind in FLUX.layers if kind.name == "latents"]
    assert [field.name for field in FLUX.fields(latents, posterior)] == expected


def test_the_mean_is_the_moments_mean(caches: dict[str, Path]) -> None:
    moments, means = tensors(caches["moments"]), tensors(caches["mean"])
    assert means.keys() == {place for place in moments if place[2] == "mean"}
    for place, mean in means.items():
        assert torch.equal(mean, moments[place])


def test_a_draw_is_of_its_posterior_and_another_for_every_sample_drawing_and_layer(caches: dict[str, Path]) -> None:
    moments, draws = tensors(caches["moments"]), tensors(caches["sample"])
    assert len(draws) == len(moments) / 2
    noises = []
    for (name, key, field), draw in draws.items():
        assert field == "sample"
        mean, std = moments[name, key, "mean"], moments[name, key, "std"]
        noise = (draw - mean) / std
        noises += list(noise.flatten(0, -4)) if noise.ndim == 4 else [noise]  # (16, h, w) of each drawing
    assert len(noises) == 5 * (1 + 1 + 2)
    together = torch.cat([noise.flatten() for noise in noises])
    assert abs(together.mean().item()) < 5 / math.sqrt(len(together))
    assert abs(together.std().item() - 1) < 5 / math.sqrt(len(together))
    for i, one in enumerate(noises):
        for other in noises[:i]:
            shared = min(one.numel(), other.numel())
            correlation = (one.flatten()[:shared] * other.flatten()[:shared]).mean().item()
            assert abs(correlation) < 5 / math.sqrt(shared)


def test_a_draw_depends_neither_on_batches_nor_on_shards_nor_on_the_other_samples(
    data: Path, caches: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    fewer = write_data(tmp_path / "fewer", 5, SIZES)
    lines = (fewer / "metadata.jsonl").read_text().splitlines()
    (fewer / "metadata.jsonl").write_text("\n".join(reversed(lines[1:])) + "\n")
    encode = EncodeOptions(image_batch=1, text_batch=1, workers=1, shard_rows=1)
    assert preprocess(options_of(fewer, tmp_path / "cache", tiny_model, "sample", encode=encode)) == 0
    before, after = tensors(caches["sample"]), tensors(tmp_path / "cache")
    assert len(after) == len(before) * 4 / 5
    for place, draw in after.items():
        # the encoder's own convolutions may differ in the last bits with the batch; another draw differs by a whole std
        torch.testing.assert_close(draw, before[place], atol=1e-4, rtol=1e-4)


def test_a_draw_is_the_same_whoever_asks_and_another_with_another_seed() -> None:
    [latents] = [kind for kind in FLUX.layers if kind.name == "latents"]
    moments = {"mean": torch.zeros(16, 8, 8, dtype=torch.bfloat16), "std": torch.ones(16, 8, 8, dtype=torch.bfloat16)}
    torch.manual_seed(0)
    first = FLUX.keep(latents, moments, "sample", "latents/a")["sample"]
    torch.manual_seed(1)
    torch.rand(7)
    assert torch.equal(FLUX.keep(latents, moments, "sample", "latents/a")["sample"], first)
    assert not torch.equal(FLUX.keep(latents, moments, "sample", "latents/b")["sample"], first)
    assert first.dtype == torch.bfloat16
    assert FLUX.keep(latents, moments, "moments", "") is moments


def test_only_the_vae_s_layers_depend_on_the_posterior(caches: dict[str, Path]) -> None:
    prints = {posterior: Cache(cache).fingerprints for posterior, cache in caches.items()}
    for name in prints["moments"]:
        distinct = {prints[posterior][name] for posterior in get_args(Posterior)}
        assert len(distinct) == (3 if name in VAE_LAYERS else 1), name
    for name in VAE_LAYERS:
        assert "posterior" not in Cache(caches["moments"]).layer(name).summary.recipe


def test_another_posterior_in_the_same_cache_remakes_the_vae_s_layers_and_nothing_else(
    caches: dict[str, Path], data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(caches["moments"], tmp_path / "cache")
    before = {path: path.read_bytes() for path in cache.glob("*/*.tar")}
    assert preprocess(options_of(data, cache, tiny_model, "mean")) == 0
    assert {path: path.read_bytes() for path in before} == before
    new = {path.parent.name.split("-")[0] for path in cache.glob("*/*.tar") if path not in before}
    assert new == set(VAE_LAYERS)
    expected = tensors(caches["mean"])
    found = tensors(cache)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[place]) for place, tensor in found.items())


@pytest.mark.parametrize("posterior", get_args(Posterior))
def test_row_bytes_hold_what_a_row_takes_and_not_much_more(
    posterior: Posterior, caches: dict[str, Path], tiny_model: Path
) -> None:
    cache, model = Cache(caches[posterior]), resolve(str(tiny_model), ())
    [latents] = [kind for kind in FLUX.layers if kind.name == "latents"]
    for key, sample in cache.samples.items():
        assert sample.bucket_width is not None
        assert sample.bucket_height is not None
        pixels = sample.bucket_width * sample.bucket_height
        stated = FLUX.row_bytes(latents, model, torch.float32, pixels, 24, posterior)
        member = len(cache.layer("latents").read(key, "safetensors"))
        taken = 512 + -(-member // 512) * 512  # the member with its tar header, in blocks
        assert taken <= stated < taken + 1024
