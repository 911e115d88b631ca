"""SD 1.5: what is cached and computed is what diffusers' own pipeline computes from the same pixels and captions."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from preprocess.config import EncodeOptions
from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from shared import families
from shared.cache.reader import Cache
from shared.errors import UserError
from shared.families.base import Batch, Inputs
from shared.families.parts import autoencoder
from shared.model_folder import resolve
from tests.conftest import preprocess_options, write_data
from tests.preprocess.runs import placed_image

SD15 = families.get("sd15")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SD15.tiny(tmp_path_factory.mktemp("model") / "tiny-sd15")


@pytest.fixture
def model(tiny_sd15: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_sd15, tmp_path / "model")


def write_fill(folder: Path, count: int, sizes: tuple[tuple[int, int], ...]) -> Path:
    """A data set as fill50k is laid out: images, coloured conditioning images, captions."""
    write_data(folder, count, sizes)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "conditioning").mkdir()
    random = np.random.default_rng(0)
    for i, line in enumerate(lines):
        width, height = sizes[i % len(sizes)]
        drawing = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(drawing).save(folder / "conditioning" / line["file_name"])
        line |= {"conditioning_image": f"conditioning/{line['file_name']}", "text": [f"Zwölf & number {i}", "a box"]}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@dataclass
class Made:
    """The same data once through our cache and once through the pipeline."""

    data: Path
    model: Path
    cache: Cache
    pipeline: Any
    dtype: torch.dtype


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def made(request: pytest.FixtureRequest, tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("sd15")
    data = write_fill(folder / "data", 4, ((64, 64), (131, 77)))
    options = preprocess_options(
        data, folder / "cache", tiny_sd15, family="sd15", text_length=None, precision=request.param,
        condition=("canny", "precomputed"), encode=EncodeOptions(image_batch=1, text_batch=1),
        geometry=GeometryOptions(resolution=256),
    )  # fmt: skip
    options.check()
    assert preprocess(options) == 0
    dtype = PRECISIONS[request.param]
    return Made(data, tiny_sd15, Cache(folder / "cache"), pipeline_of(tiny_sd15, dtype), dtype)


def pipeline_of(model: Path, dtype: torch.dtype) -> Any:
    """The pipeline of inference, with a ControlNet whose outputs are not zero."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        model, controlnet=moved(SD15.make_controlnet(resolve(str(model), ()), 0, 0, "copy", dtype)), dtype=dtype,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """With every weight moved, so that nothing is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, scale: float = 1.0) -> None:
    """Equal to 1e-6 of the largest value in fp32, to one rounding (8 bits of mantissa) in bf16."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    relative = 1e-6 if ours.dtype == torch.float32 else 2.0**-8
    largest = theirs.float().abs().max().item()
    assert largest > 0
    assert (ours.float() - theirs.float()).abs().max().item() <= scale * relative * largest


def batch_of(cache: Cache, keys: list[str], condition: str, caption: int = 0) -> Batch:
    samples = [cache.samples[key] for key in keys]
    ids = [sample.captions[caption] for sample in samples]
    tensors = {
        **{f"latents.{f}": torch.stack([cache.layer("latents").tensors(k)[f] for k in keys]) for f in ("mean", "std")},
        "condition_pixels.pixels": torch.stack(
            [cache.layer(f"{condition}_pixels").tensors(key)["pixels"][0] for key in keys]
        ),
        "clip.prompt_embeds": torch.stack([cache.layer("clip").tensors(i)["prompt_embeds"] for i in ids]),
    }
    return Batch(keys, samples[0].bucket_height or 0, samples[0].bucket_width or 0, tensors)


def same_shape(cache: Cache) -> list[str]:
    """Two samples that are wider than high."""
    keys = [s.key for s in cache.samples.values() if (s.bucket_width, s.bucket_height) == (320, 192)]
    assert len(keys) == 2
    return keys


# --- stage 1: the cache holds what the pipeline computes ------------------------------------------------------------


def test_cached_latents_are_the_pipeline_s(made: Made) -> None:
    layer, pipeline = made.cache.layer("latents"), made.pipeline
    for sample in made.cache.samples.values():
        pixels = placed_image(made.data, sample)
        image = pipeline.image_processor.preprocess(Image.fromarray(pixels)).to(made.dtype).contiguous()
        with torch.no_grad():
            posterior = pipeline.vae.encode(image).latent_dist
        raw = {name: tensor[None] for name, tensor in layer.tensors(sample.key).items()}
        assert_near(raw["mean"], posterior.mean)
        assert_near(raw["std"], posterior.std)
        ours = SD15.model_latents(raw, layer.summary.recipe, torch.Generator().manual_seed(7), torch.float32)
        theirs = posterior.sample(torch.Generator().manual_seed(7)) * pipeline.vae.config.scaling_factor
        assert_near(ours, theirs.float(), scale=1 if made.dtype == torch.float32 else 2**17)  # their noise is rounded


@pytest.mark.parametrize("condition", ["canny", "precomputed"])
def test_a_condition_in_pixels_is_what_the_pipeline_gives_the_controlnet(made: Made, condition: str) -> None:
    drawings = made.cache.layer(condition)
    for key, sample in made.cache.samples.items():
        width, height = sample.bucket_width or 0, sample.bucket_height or 0
        batch = batch_of(made.cache, [key], condition)
        ours = SD15.condition(batch, {}, None, made.dtype)
        drawing = Image.open(io.BytesIO(drawings.read(key, "0.png"))).convert("RGB")
        theirs = made.pipeline.prepare_image(drawing, width, height, 1, 1, torch.device("cpu"), made.dtype)
        assert torch.equal(ours, theirs)
        assert ours.shape == (1, 3, height, width)
        channels = 1 if condition == "canny" else 3
        assert batch.tensors["condition_pixels.pixels"].shape == (1, channels, height, width)


def test_cached_embeddings_are_the_pipeline_s(made: Made) -> None:
    texts = {caption.id: caption.text for caption in made.cache.captions.values()}
    assert "" in texts.values()
    assert len(texts) == 6
    for key, text in texts.items():
        with torch.no_grad():
            theirs, _ = made.pipeline.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        assert theirs.shape == (1, 77, 24)
        assert_near(made.cache.layer("clip").tensors(key)["prompt_embeds"][None], theirs)


def test_rows_have_the_bytes_and_shapes_that_were_foretold(made: Made) -> None:
    model = resolve(str(made.model), ())
    kinds = {kind.name: kind for kind in SD15.layers}
    for name in ("latents", "clip"):
        layer = made.cache.layer(name)
        for key in made.cache.wanted(layer.summary.reads):
            sample = made.cache.samples.get(key)
            pixels = 0 if sample is None else (sample.bucket_width or 0) * (sample.bucket_height or 0)
            foretold = SD15.row_bytes(kinds[name], model, made.dtype, pixels, 77)
            in_tar = 512 + -(-layer.members(key)["safetensors"].length // 512) * 512
            assert abs(in_tar - foretold) <= 512
    key = same_shape(made.cache)[0]
    batch = batch_of(made.cache, [key], "precomputed")
    assert {name: tuple(tensor.shape[1:]) for name, tensor in batch.tensors.items()} == SD15.sample_shapes(
        192, 320, 77, model
    )


def test_another_text_length_than_clip_s_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text_length must be 77 with sd15, or left out, not 24"):
        preprocess_options(tmp_path, tmp_path, tiny_sd15, family="sd15", text_length=24).check()


# --- stage 2: what is made of the cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["fp32"], indirect=True)  # in bf16 roundings add up over the steps
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_picture_painted_from_the_cache_is_the_pipeline_s(made: Made, prediction: str) -> None:
    """All of stage 2 at once: inputs, residuals, prediction, guidance and schedule against the pipeline's own loop."""
    cache, pipeline, model = made.cache, made.pipeline, resolve(str(made.model), ())
    batch, empty = (batch_of(cache, same_shape(cache), "precomputed", caption) for caption in (0, 1))
    condition = SD15.condition(batch, {}, None, torch.float32)
    captioned, uncaptioned = (SD15.inputs(each, condition, torch.float32) for each in (batch, empty))
    noise = torch.randn(2, 4, 24, 40, generator=torch.Generator().manual_seed(3))

    def predict(x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float) -> torch.Tensor:
        residuals = SD15.residuals(pipeline.controlnet, x_t, t, inputs, 1.0, None, scale=scale) if scale else None
        return SD15.predict(pipeline.unet, x_t, t, inputs, 1.0, residuals)

    def step(x_t: torch.Tensor, t: torch.Tensor, scale: float = 0.7) -> torch.Tensor:
        away = predict(x_t, t, uncaptioned, scale)
        return away + 7.5 * (predict(x_t, t, captioned, scale) - away)

    changed = {"prediction_type": prediction}
    scheduler = pipeline.scheduler
    with torch.no_grad():
        ours = SD15.sample(model, noise, 4, step, changed)
        without = SD15.sample(model, noise, 4, lambda x_t, t: step(x_t, t, 0.0), changed)
        try:
            pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changed)
            theirs = pipeline(
                prompt_embeds=captioned.embeds["encoder_hidden_states"],
                negative_prompt_embeds=uncaptioned.embeds["encoder_hidden_states"],
                image=condition, latents=noise, num_inference_steps=4, guidance_scale=7.5,
                controlnet_conditioning_scale=0.7, output_type="latent",
            ).images  # fmt: skip
        finally:
            pipeline.scheduler = scheduler
    assert_near(ours, theirs, scale=20)  # fp32 rounding through four steps, seven times enlarged
    assert (ours - without).abs().max() > 1e-2, "the ControlNet has a say"


def test_decoding_is_the_pipeline_s(made: Made) -> None:
    layer, pipeline = made.cache.layer("latents"), made.pipeline
    key, sample = next(iter(made.cache.samples.items()))
    raw = {"mean": layer.tensors(key)["mean"][None]}
    x_0 = SD15.model_latents(raw, layer.summary.recipe, None, made.dtype)
    decode = SD15.open_decoder(resolve(str(made.model), ()), "cpu", made.dtype)
    ours = decode(x_0, sample.bucket_height or 0, sample.bucket_width or 0)
    with torch.no_grad():
        theirs = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    expected: NDArray[np.float32] = pipeline.image_processor.postprocess(theirs, output_type="np")
    difference = np.abs(ours.numpy().astype(float) - np.round(expected * 255))
    assert difference.max() <= (1 if made.dtype == torch.float32 else 2)


def test_a_vae_as_old_as_sd15_s_is_read_as_diffusers_reads_it(model: Path, tiny_sd15: Path) -> None:
    """Its configuration states no scaling factor, and parts of its attention have the names of then."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, then in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{then}.")
        renamed[name] = tensor
    assert sum("attentions.0.query" in name for name in renamed) == 4
    save_file(renamed, file, metadata={"format": "pt"})
    config = json.loads((model / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (model / "vae" / "config.json").write_text(json.dumps(config))

    ours, saved_again = (resolve(str(folder), ()) for folder in (model, tiny_sd15))
    SD15.check_encoders(ours)
    theirs = AutoencoderKL.from_pretrained(model / "vae")
    facts = autoencoder.recipe(ours, "moments")
    assert facts["scale"] == theirs.config["scaling_factor"] == 0.18215
    assert facts == autoencoder.recipe(saved_again, "moments"), "the same VAE"
    x_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = [SD15.open_decoder(folder, "cpu", torch.float32)(x_0, 64, 64) for folder in (ours, saved_again)]
    assert torch.equal(*pictures)


def test_a_text_encoder_may_state_no_projection(model: Path) -> None:
    """As those that were saved before there were any: of SD 1.4, say."""
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "projection_dim"}))
    [kind] = [kind for kind in SD15.layers if kind.reads == "caption"]
    assert SD15.row_bytes(kind, resolve(str(model), ()), torch.bfloat16, 0, 77) == 77 * 24 * 2 + 1024


def test_the_painter_paints_as_the_pipeline_does(tiny_sd15: Path, tmp_path: Path) -> None:
    from shared.families.base import Order

    pipeline = pipeline_of(tiny_sd15, torch.float32)
    pipeline.controlnet.save_pretrained(tmp_path / "controlnet")
    paint = SD15.open_painter(resolve(str(tiny_sd15), ()), tmp_path / "controlnet", "cpu", torch.float32)
    drawing = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def painted(scale: float) -> NDArray[np.uint8]:
        return paint(Order([drawing], ["a box"], [5], num_steps=3, guidance=7.5, scale=scale, text_length=77))[0]

    [theirs] = pipeline(
        "a box", Image.fromarray(drawing), 64, 64, 3, generator=[torch.Generator().manual_seed(5)], guidance_scale=7.5
    ).images
    assert np.array_equal(painted(1.0), np.asarray(theirs))
    assert not np.array_equal(painted(1.0), painted(0.0))


# --- the base and its ControlNet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_controlnet_is_diffusers_own_from_the_unet_to_the_bit(tiny_sd15: Path, dtype: torch.dtype) -> None:
    model = resolve(str(tiny_sd15), ())
    ours = SD15.make_controlnet(model, 0, 0, "copy", dtype)
    theirs = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet")).to(dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    drawn = [name for name, tensor in theirs.state_dict().items() if not torch.equal(ours.state_dict()[name], tensor)]
    assert drawn
    assert all(name.startswith("controlnet_cond_embedding.") for name in drawn)
    entrance = {n: t for n, t in ours.state_dict().items() if n.startswith("controlnet_cond_embedding.")}
    assert not entrance["controlnet_cond_embedding.conv_out.weight"].any()
    assert entrance["controlnet_cond_embedding.conv_in.weight"].float().std() > 0.05
    again = SD15.make_controlnet(model, 0, 0, "zero", dtype).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in entrance.items())
    config = ours.config
    assert isinstance(config, Mapping)
    assert all(config[name] == value for name, value in theirs.config.items() if name != "_use_default_values")
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_a_model_whose_weights_are_not_whole_is_refused(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in sorted(tensors) if name.startswith("down_blocks"))
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 tensors of the first blocks .* \(as {gone}\)"):
        SD15.make_controlnet(resolve(str(model), ()), 0, 0, "copy", torch.float32)
    with pytest.raises(UserError, match=f"weights of unet are not whole.*{gone}"):
        SD15.load_base(resolve(str(model), ()), torch.float32)


def test_without_a_model_it_is_sd_1_5() -> None:
    base = SD15.make_base()
    assert sum(p.numel() for p in base.parameters()) == 859_520_964
    assert sum(p.numel() for p in SD15.make_empty_controlnet(0, 0).parameters()) == 361_279_120
    assert SD15.attention_shape(base, 512, 768, 77) == (8, 64 * 96, 40)
    assert SD15.sample_shapes(512, 768, 77)["latents.mean"] == (4, 64, 96)
    assert not any(p.requires_grad for p in base.parameters())
    assert SD15.max_depth() == (0, 0)
    assert not SD15.has_depths


def call_both(unet: torch.nn.Module, controlnet: torch.nn.Module) -> torch.Tensor:
    """One prediction under control, with numbers that are the same each time."""
    generator = torch.Generator().manual_seed(2)
    x_t, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 24, generator=generator)
    condition = torch.rand(2, 3, 64, 64, generator=generator)
    inputs = Inputs(condition, {"encoder_hidden_states": text}, 64, 64)
    t = torch.tensor([3.0, 900.0])
    return SD15.predict(unet, x_t, t, inputs, 1.0, SD15.residuals(controlnet, x_t, t, inputs, 1.0, None))


def require(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient


def both(model: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    found = resolve(str(model), ())
    controlnet = SD15.make_controlnet(found, 0, 0, "copy", torch.float32)
    return SD15.load_base(found, torch.float32), moved(controlnet).train()


def test_blocks_are_all_that_runs_in_the_order_in_which_it_runs(tiny_sd15: Path) -> None:
    for module in both(tiny_sd15):
        ran: list[torch.nn.Module] = []
        kinds = {type(block) for block in SD15.blocks(module)}
        assert {kind.__name__ for kind in kinds} == {"ResnetBlock2D", "BasicTransformerBlock"}
        for each in module.modules():
            if type(each) in kinds:
                each.register_forward_pre_hook(lambda block, _, ran=ran: ran.append(block))
        other = both(tiny_sd15)
        call_both(*((module, other[1]) if hasattr(module, "up_blocks") else (other[0], module)))
        assert ran == SD15.blocks(module)


def test_what_is_recomputed_has_the_same_gradients(tiny_sd15: Path) -> None:
    from train import recompute

    gradients = []
    for counts in ((0, 0), (5, 3), (12, 6)):
        unet, controlnet = both(tiny_sd15)
        assert recompute.apply(SD15, unet, controlnet, *counts) == counts
        call_both(unet, controlnet).square().mean().backward()
        gradients.append({name: require(parameter.grad) for name, parameter in controlnet.named_parameters()})
    for found in gradients[1:]:
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients[0].items())


def test_every_weight_of_a_controlnet_is_trained(tiny_sd15: Path) -> None:
    unet, controlnet = both(tiny_sd15)
    call_both(unet, controlnet).square().mean().backward()
    assert not SD15.has_idle_parameters(unet, controlnet)
    assert all(p.grad is not None and p.grad.any() for p in controlnet.parameters())


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_levels_and_prediction_are_the_scheduler_s(model: Path, schedule: str, prediction: str) -> None:
    theirs = DDPMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule=schedule, prediction_type=prediction)
    shutil.rmtree(model / "scheduler")
    assert torch.equal(SD15.noise_schedule(resolve(str(model), ())), SD15.noise_schedule())
    theirs.save_pretrained(model / "scheduler")
    assert torch.equal(SD15.noise_schedule(resolve(str(model), ())), theirs.alphas_cumprod)
    assert SD15.prediction_type(resolve(str(model), ())) == prediction


def test_a_condition_of_another_family_s_cache_is_named_and_left_out(
    tiny_model: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", 3, ((64, 64),))
    preprocess(preprocess_options(data, tmp_path / "cache", tiny_model))
    changes: dict[str, Any] = {"family": "sd15", "text_length": None, "condition": ("tile",)}
    (tmp_path / "data" / "metadata.jsonl").write_text(
        (tmp_path / "data" / "metadata.jsonl").read_text().replace("box", "box " * 99)
    )
    preprocess(preprocess_options(data, tmp_path / "cache", tiny_sd15, **changes))
    told = capsys.readouterr().err
    assert "condition canny is left out of the cache: it has no canny_pixels, which sd15 needs. Its files" in told
    assert "captions are cut off after 77 tokens\n" in told, "which is no choice"


# --- refusals -------------------------------------------------------------------------------------------------------


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_another_vae(model: Path) -> None:
    change(model / "vae" / "config.json", latent_channels=16, shift_factor=0.1159)


def with_normalised_latents(model: Path) -> None:
    change(model / "vae" / "config.json", latents_mean=[0.1] * 4, latents_std=[2.0] * 4)  # as Playground 2.5


def with_another_text_encoder(model: Path) -> None:
    change(model / "text_encoder" / "config.json", model_type="t5")


def of_sdxl(model: Path) -> None:
    change(model / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])


def with_a_longer_text(model: Path) -> None:
    change(model / "tokenizer" / "tokenizer_config.json", model_max_length=128)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (with_another_vae, "is not Stable Diffusion's: it has 16 latent channels"),
        (with_normalised_latents, "normalises each latent channel by itself"),
        (with_another_text_encoder, "is a 't5', where sd15 has 'clip_text_model'"),
        (of_sdxl, "has two text encoders, where sd15 has one: is it SDXL's"),
        (with_a_longer_text, "length of its tokenizer is 128, where CLIP has 77"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_encoders_of_another_family_are_refused(model: Path, spoil: Callable[[Path], None], sentence: str) -> None:
    SD15.check_encoders(resolve(str(model), ()))
    spoil(model)
    with pytest.raises(UserError, match=sentence):
        SD15.check_encoders(resolve(str(model), ()))


def of_flux(model: Path) -> None:
    change(model / "unet" / "config.json", _class_name="FluxTransformer2DModel")


def for_inpainting(model: Path) -> None:
    change(model / "unet" / "config.json", in_channels=9)


def with_wider_text(model: Path) -> None:
    change(model / "unet" / "config.json", cross_attention_dim=1024)


def that_predicts_x_0(model: Path) -> None:
    change(model / "scheduler" / "scheduler_config.json", prediction_type="sample")


def with_another_decoder(model: Path) -> None:
    vae = AutoencoderKL.from_pretrained(model / "vae")
    moved(vae)
    vae.save_pretrained(model / "vae")


@pytest.mark.parametrize("made", ["fp32"], indirect=True)
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (of_flux, "this cache is for sd15, but model .* has a FluxTransformer2DModel"),
        (for_inpainting, "it has 4 latent channels, .* takes 9"),
        (with_wider_text, "it has 24 features of the CLIP embeddings, .* takes 1024"),
        (that_predicts_x_0, "predicts 'sample': only epsilon and v_prediction"),
        (with_another_decoder, "encoded with another VAE"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_base_that_does_not_fit_the_cache_is_refused(
    made: Made, model: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    shapes = SD15.sample_shapes(64, 64, 77, resolve(str(made.model), ()))
    recipes = {"latents": made.cache.summary("latents").recipe}
    assert SD15.check_base(resolve(str(model), ()), shapes, recipes) is None
    spoil(model)
    with pytest.raises(UserError, match=sentence):
        SD15.check_base(resolve(str(model), ()), shapes, recipes)


def test_a_controlnet_that_does_not_fit_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    base = SD15.make_base(resolve(str(tiny_sd15), ()))
    ours = SD15.make_controlnet(resolve(str(tiny_sd15), ()), 0, 0, "copy", torch.float32)
    ours.save_pretrained(tmp_path / "ours")  # type: ignore[operator]
    SD15.check_controlnet(SD15.load_controlnet(str(tmp_path / "ours"), torch.float32), base, None)
    with pytest.raises(UserError, match="is not a union"):
        SD15.check_controlnet(ours, base, 1)
    with pytest.raises(UserError, match="its cross_attention_dim is 768, not 24"):
        SD15.check_controlnet(SD15.make_empty_controlnet(0, 0), base, None)
    with pytest.raises(UserError, match=r"holds no ControlNet: config\.json is missing"):
        SD15.load_controlnet(str(tmp_path), torch.float32)


def test_tiny_is_the_same_for_the_same_seed(tiny_sd15: Path, tmp_path: Path) -> None:
    def weights(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}

    again, other = SD15.tiny(tmp_path / "again"), SD15.tiny(tmp_path / "other", seed=1)
    assert weights(again) == weights(tiny_sd15)
    assert len(weights(again)) == 3
    assert all(weights(other)[name] != data for name, data in weights(again).items())
