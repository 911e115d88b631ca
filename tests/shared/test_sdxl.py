"""SDXL: two text encoders and the picture's sizes, as diffusers' own pipeline has them. What it shares with SD 1.5 is
tested there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, UNet2DConditionModel

from preprocess.config import EncodeOptions
from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from shared import families
from shared.cache.reader import Cache
from shared.errors import UserError
from shared.families.base import Batch, Inputs
from shared.model_folder import resolve
from tests.conftest import preprocess_options, write_data
from tests.shared.test_sd15 import assert_near, moved, require

SDXL = families.get("sdxl")
SIZES = ((100, 80), (150, 77))


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SDXL.tiny(tmp_path_factory.mktemp("model") / "tiny-sdxl")


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Four pictures of two shapes, each twice: as it is, and mirrored; with different corners cut out."""
    folder = tmp_path_factory.mktemp("sdxl")
    data = write_data(folder / "data", 4, SIZES)
    geometry = GeometryOptions(resolution=128, flip=True, crop="random")
    options = preprocess_options(
        data, folder / "cache", tiny_sdxl, family="sdxl", text_length=None, geometry=geometry,
        encode=EncodeOptions(image_batch=1, text_batch=1),
    )  # fmt: skip
    options.check()
    assert preprocess(options) == 0
    return Cache(folder / "cache")


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path) -> Any:
    """Of inference, with a ControlNet whose outputs are not zero."""
    controlnet = moved(SDXL.make_controlnet(resolve(str(tiny_sdxl), ()), 0, 0, "copy", torch.float32))
    found = StableDiffusionXLControlNetPipeline.from_pretrained(tiny_sdxl, controlnet=controlnet, add_watermarker=False)
    found.set_progress_bar_config(disable=True)
    return found


def batch_of(cache: Cache, keys: list[str], caption: int) -> Batch:
    samples = [cache.samples[key] for key in keys]
    ids = [sample.captions[caption] for sample in samples]

    def stacked(layer: str, of: list[str], field: str) -> torch.Tensor:
        return torch.stack([cache.layer(layer).tensors(key)[field] for key in of])

    tensors = {
        "condition_pixels.pixels": stacked("canny_pixels", keys, "pixels")[:, 0],
        "sizes.time_ids": stacked("sizes", keys, "time_ids"),
        "clip.prompt_embeds": stacked("clip", ids, "prompt_embeds"),
        **{f"clip_2.{f}": stacked("clip_2", ids, f) for f in ("prompt_embeds", "pooled_prompt_embeds")},
    }
    return Batch(keys, samples[0].bucket_height or 0, samples[0].bucket_width or 0, tensors)


def test_cached_embeddings_are_the_pipeline_s(cache: Cache, pipeline: Any) -> None:
    assert len(cache.captions) == 6
    for key, caption in cache.captions.items():
        with torch.no_grad():
            both, _, pooled, _ = pipeline.encode_prompt(caption.text, device="cpu", do_classifier_free_guidance=False)
        first, second = cache.layer("clip").tensors(key), cache.layer("clip_2").tensors(key)
        assert both.shape == (1, 77, 48)
        assert_near(torch.cat([first["prompt_embeds"], second["prompt_embeds"]], dim=-1)[None], both)
        assert_near(second["pooled_prompt_embeds"][None], pooled)


def test_sizes_are_those_of_the_image_and_of_what_was_cut_out_of_it(cache: Cache) -> None:
    corners = set()
    mirrored = 0
    for key, sample in cache.samples.items():
        height, width, top, left, of_height, of_width = cache.layer("sizes").tensors(key)["time_ids"].tolist()
        assert (width, height) in SIZES
        assert (of_width, of_height) == (sample.bucket_width, sample.bucket_height)
        placed = json.loads(sample.placement or "")
        right = placed["resize_width"] - placed["bucket_width"] - placed["crop_left"]
        assert left == (right if placed["flip"] else placed["crop_left"])
        assert top == placed["crop_top"]
        mirrored += placed["flip"] and right != placed["crop_left"]
        corners.add((top, left))
    assert mirrored
    assert len(corners) > 2


def test_a_picture_painted_from_the_cache_is_the_pipeline_s(cache: Cache, pipeline: Any, tiny_sdxl: Path) -> None:
    keys = [s.key for s in cache.samples.values() if s.bucket_width != s.bucket_height][:1]
    batch, other = (batch_of(cache, keys, caption) for caption in (0, 1))
    condition = SDXL.condition(batch, {}, None, torch.float32)
    captioned, uncaptioned = (SDXL.inputs(each, condition, torch.float32) for each in (batch, other))
    noise = torch.randn(1, 4, batch.height // 8, batch.width // 8, generator=torch.Generator().manual_seed(3))

    def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        def predict(inputs: Inputs) -> torch.Tensor:
            residuals = SDXL.residuals(pipeline.controlnet, x_t, t, inputs, 1.0, None, scale=0.7)
            return SDXL.predict(pipeline.unet, x_t, t, inputs, 1.0, residuals)

        away = predict(uncaptioned)
        return away + 5.0 * (predict(captioned) - away)

    height, width, top, left, of_height, of_width = (int(n) for n in batch.tensors["sizes.time_ids"][0])
    sizes = {
        "original_size": (height, width),
        "crops_coords_top_left": (top, left),
        "target_size": (of_height, of_width),
    }
    with torch.no_grad():
        ours = SDXL.sample(resolve(str(tiny_sdxl), ()), noise, 4, step)
        theirs = pipeline(
            prompt_embeds=captioned.embeds["encoder_hidden_states"],
            pooled_prompt_embeds=captioned.embeds["text_embeds"],
            negative_prompt_embeds=uncaptioned.embeds["encoder_hidden_states"],
            negative_pooled_prompt_embeds=uncaptioned.embeds["text_embeds"],
            image=condition, latents=noise, num_inference_steps=4, guidance_scale=5.0,
            controlnet_conditioning_scale=0.7, output_type="latent", **sizes,
        ).images  # fmt: skip
        batch.tensors["sizes.time_ids"] = batch.tensors["sizes.time_ids"] + 500
        captioned = uncaptioned = SDXL.inputs(batch, condition, torch.float32)
        elsewhere = SDXL.sample(resolve(str(tiny_sdxl), ()), noise, 4, step)
    assert_near(ours, theirs, scale=20)
    assert (ours - elsewhere).abs().max() > 1e-3, "sizes have a say"


def test_a_controlnet_is_diffusers_own_and_every_weight_of_it_is_trained(tiny_sdxl: Path) -> None:
    model = resolve(str(tiny_sdxl), ())
    ours = SDXL.make_controlnet(model, 0, 0, "copy", torch.float32)
    base = SDXL.load_base(model, torch.float32)
    theirs = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")).state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(
        torch.equal(ours.state_dict()[name], tensor)
        for name, tensor in theirs.items()
        if not name.startswith("controlnet_cond_embedding.")
    )
    moved(ours)
    embeds = {"encoder_hidden_states": torch.randn(2, 77, 48), "text_embeds": torch.randn(2, 24)}
    inputs = Inputs(torch.rand(2, 3, 64, 64), {**embeds, "time_ids": torch.full((2, 6), 64.0)}, 64, 64)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0])
    residuals = SDXL.residuals(ours, x_t, t, inputs, 1.0, None)
    SDXL.predict(base, x_t, t, inputs, 1.0, residuals).square().mean().backward()
    assert all(require(parameter.grad).any() for parameter in ours.parameters())


def test_without_a_model_it_is_sdxl() -> None:
    assert sum(p.numel() for p in SDXL.make_base().parameters()) == 2_567_463_684
    assert SDXL.attention_shape(SDXL.make_base(), 1024, 1024, 77) == (10, 64 * 64, 64)
    shapes = SDXL.sample_shapes(1024, 1024, 77)
    assert shapes["clip.prompt_embeds"] == (77, 768)
    assert shapes["clip_2.prompt_embeds"] == (77, 1280)
    assert shapes["clip_2.pooled_prompt_embeds"] == (1280,)


def test_rows_have_the_shapes_that_were_foretold(cache: Cache, tiny_sdxl: Path) -> None:
    shapes = SDXL.sample_shapes(128, 128, 77, resolve(str(tiny_sdxl), ()))
    batch = batch_of(cache, [next(iter(cache.samples))], 0)
    for name, tensor in batch.tensors.items():
        if name != "condition_pixels.pixels":
            assert tuple(tensor.shape[1:]) == shapes[name]


def test_a_base_that_does_not_fit_the_cache_is_refused(cache: Cache, tiny_sdxl: Path, tmp_path: Path) -> None:
    shapes = SDXL.sample_shapes(64, 64, 77, resolve(str(tiny_sdxl), ()))
    recipes = {"latents": cache.summary("latents").recipe}
    assert SDXL.check_base(resolve(str(tiny_sdxl), ()), shapes, recipes) is None
    for changes, sentence in (
        ({"addition_embed_type": None}, "is told no sizes"),
        ({"projection_class_embeddings_input_dim": 99}, "has 24 features of the pooled CLIP embedding, .* takes 51"),
        ({"cross_attention_dim": 64}, "has 48 features of both CLIP embeddings, .* takes 64"),
    ):
        model = shutil.copytree(tiny_sdxl, tmp_path / sentence[:9].strip())
        path = model / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(UserError, match=sentence):
            SDXL.check_base(resolve(str(model), ()), shapes, recipes)
        shutil.rmtree(model)
