"""FLUX: what is cached and computed is what diffusers' own pipeline computes from the same pixels and captions."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_controlnet import calculate_shift, retrieve_latents
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from preprocess.conditions.canny import CannyDrawer, CannyOptions
from preprocess.config import EncodeOptions
from preprocess.pipeline import preprocess
from shared import families
from shared.cache.reader import Cache, Layer
from shared.errors import UserError
from shared.families.base import Batch, Tensors
from shared.families.flux import image_ids, pack, resolution_shift, unpack
from shared.model_folder import ModelFolder, resolve
from tests.conftest import TEXT_LENGTH, preprocess_options, write_data
from tests.preprocess.runs import placed_image

FLUX = families.get("flux")
LAYERS = {layer.name: layer for layer in FLUX.layers}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of three shapes, none of which fits its bucket, with punctuation and rare letters in captions."""
    data = write_data(tmp_path_factory.mktemp("five"), 5, sizes=((90, 70), (131, 67), (50, 80)))
    texts = ["a box", "", "Zwölf Boxkämpfer, quick & <b>bold</b>!", "long " * 60, "a box"]
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": [text or "x", "a box"]}) for i, text in enumerate(texts)]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    return data


@dataclass
class Made:
    """The same data once through our cache and once through the pipeline."""

    data: Path
    model: Path
    cache: Cache
    pipeline: Any
    dtype: torch.dtype

    def layer(self, name: str) -> Layer:
        return self.cache.layer(name)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def made(
    request: pytest.FixtureRequest, five: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("cache")
    one_by_one = EncodeOptions(image_batch=1, text_batch=1)  # as the pipeline below: other batches round otherwise
    options = preprocess_options(five, folder, tiny_model, precision=request.param, encode=one_by_one)
    assert preprocess(options) == 0
    dtype = PRECISIONS[request.param]
    return Made(five, tiny_model, Cache(folder), pipeline_of(tiny_model, dtype), dtype)


def pipeline_of(model: Path, dtype: torch.dtype) -> Any:
    """The pipeline of inference, with a ControlNet whose outputs are not zero."""
    pipeline = FluxControlNetPipeline.from_pretrained(model, controlnet=None, dtype=dtype)
    controlnet = FLUX.make_controlnet(resolve(str(model), ()), 2, 1, "zero", dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if "controlnet" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    pipeline.register_modules(controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, scale: float = 1.0) -> None:
    """Equal to 1e-6 of the largest value in fp32, to one rounding (8 bits of mantissa) in bf16."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    relative = 1e-6 if ours.dtype == torch.float32 else 2.0**-8
    largest = theirs.float().abs().max().item()
    assert largest > 0
    assert (ours.float() - theirs.float()).abs().max().item() <= scale * relative * largest


def prepared(pipeline: Any, pixels: NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    """(1, 3, H, W): the pixels as the pipeline prepares a control image."""
    height, width = pixels.shape[:2]
    return pipeline.prepare_image(Image.fromarray(pixels), width, height, 1, 1, torch.device("cpu"), dtype)


def final_latents(pipeline: Any, pixels: NDArray[np.uint8], dtype: torch.dtype, **how: Any) -> torch.Tensor:
    """(1, T, 64): what the pipeline gives the model for these pixels."""
    vae = pipeline.vae
    with torch.no_grad():
        latents = retrieve_latents(vae.encode(prepared(pipeline, pixels, dtype)), **how)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return pipeline._pack_latents(latents, *latents.shape)


def moments(layer: Layer, key: str, drawing: int | None = None) -> Tensors:
    tensors = layer.tensors(key)
    assert list(tensors) == ["mean", "std"]
    return {name: (tensor if drawing is None else tensor[drawing]).clone()[None] for name, tensor in tensors.items()}


# --- stage 1: the cache holds what the pipeline computes ---


def test_cached_latents_are_the_pipeline_s(made: Made) -> None:
    layer = made.layer("latents")
    assert len(made.cache.samples) == 5
    for sample in made.cache.samples.values():
        pixels = placed_image(made.data, sample)
        assert pixels.shape == (sample.bucket_height, sample.bucket_width, 3)
        with torch.no_grad():
            posterior = made.pipeline.vae.encode(prepared(made.pipeline, pixels, made.dtype)).latent_dist
        raw = moments(layer, sample.key)
        assert_near(raw["mean"], posterior.mean)
        assert_near(raw["std"], posterior.std)
        ours = FLUX.model_latents(raw, layer.summary.recipe, None, made.dtype)
        # The pipeline rounds to bf16 after the shift and after the scale, we once: two more roundings of theirs.
        assert_near(ours, final_latents(made.pipeline, pixels, made.dtype, sample_mode="argmax"), scale=2)


@pytest.mark.parametrize("made", ["fp32"], indirect=True)  # in bf16 the pipeline's noise is rounded, ours is not
def test_a_draw_of_cached_latents_is_the_pipeline_s_draw_with_the_same_noise(made: Made) -> None:
    for layer_name, drawing in (("latents", None), ("canny_latents", 0)):
        layer = made.layer(layer_name)
        for sample in made.cache.samples.values():
            pixels = placed_image(made.data, sample)
            if drawing is not None:
                pixels = CannyDrawer(CannyOptions())(pixels[None])[0, drawing]
            seeded = torch.Generator().manual_seed(7)
            ours = FLUX.model_latents(moments(layer, sample.key, drawing), layer.summary.recipe, seeded, made.dtype)
            theirs = final_latents(made.pipeline, pixels, made.dtype, generator=torch.Generator().manual_seed(7))
            assert_near(ours, theirs)


def test_cached_condition_latents_are_the_pipeline_s_of_the_drawing(made: Made) -> None:
    layer, drawings = made.layer("canny_latents"), made.layer("canny")
    for sample in made.cache.samples.values():
        drawn = CannyDrawer(CannyOptions())(placed_image(made.data, sample)[None])[0, 0]
        stored = Image.open(io.BytesIO(drawings.read(sample.key, "0.png"))).convert("RGB")
        assert np.array_equal(np.asarray(stored), drawn)
        ours = FLUX.model_latents(moments(layer, sample.key, 0), layer.summary.recipe, None, made.dtype)
        assert_near(ours, final_latents(made.pipeline, drawn, made.dtype, sample_mode="argmax"), scale=2)


def test_cached_embeddings_are_the_pipeline_s(made: Made) -> None:
    clip, t5 = made.layer("clip"), made.layer("t5")
    texts = {caption.id: caption.text for caption in made.cache.captions.values()}
    assert "" in texts.values()
    assert len(texts) == 5  # four distinct ones and the empty one
    for key, text in texts.items():
        with torch.no_grad():
            prompt_embeds, pooled, txt_ids = made.pipeline.encode_prompt(text, None, max_sequence_length=TEXT_LENGTH)
        assert_near(t5.tensors(key)["prompt_embeds"].clone()[None], prompt_embeds)
        assert_near(clip.tensors(key)["pooled_prompt_embeds"].clone()[None], pooled)
        assert prompt_embeds.shape == (1, TEXT_LENGTH, 32)
        assert torch.equal(txt_ids, torch.zeros(TEXT_LENGTH, 3))


def test_rows_take_the_bytes_that_were_foretold(made: Made) -> None:
    model = resolve(str(made.model), ())
    for name, kind in (("latents", "latents"), ("canny_latents", "condition_latents"), ("clip", "clip"), ("t5", "t5")):
        layer = made.layer(name)
        keys = made.cache.wanted(layer.summary.reads)
        for key in keys:
            sample = made.cache.samples.get(key)
            pixels = 0 if sample is None else (sample.bucket_width or 0) * (sample.bucket_height or 0)
            foretold = FLUX.row_bytes(LAYERS[kind], model, made.dtype, pixels, TEXT_LENGTH)
            in_tar = 512 + -(-layer.members(key)["safetensors"].length // 512) * 512
            assert in_tar <= foretold + 512
            assert foretold <= in_tar + 512


def test_fields_state_the_dtypes_and_shapes_that_are_there(made: Made) -> None:
    for name in ("latents", "canny_latents", "clip", "t5"):
        layer = made.layer(name)
        key = next(iter(made.cache.wanted(layer.summary.reads)))
        tensors = layer.tensors(key)
        assert list(tensors) == [field.name for field in layer.summary.fields]
        for field in layer.summary.fields:
            assert field.dtype == str(made.dtype).removeprefix("torch.")
            assert len(field.shape.split()) == tensors[field.name].dim()


# --- the helpers that FLUX's pipeline has too ---


def test_pack_is_the_pipeline_s_and_unpack_its_inverse() -> None:
    for h, w in ((8, 8), (6, 10), (2, 32)):
        latents = torch.arange(2 * 16 * h * w).reshape(2, 16, h, w).float()
        tokens = pack(latents)
        assert tokens.shape == (2, h // 2 * (w // 2), 64)
        assert torch.equal(tokens, FluxControlNetPipeline._pack_latents(latents, 2, 16, h, w))
        assert torch.equal(unpack(tokens, h, w), latents)
        assert torch.equal(unpack(tokens, h, w), FluxControlNetPipeline._unpack_latents(tokens, 8 * h, 8 * w, 8))


def test_the_positions_that_are_looked_up_are_the_model_s_own_to_the_bit(tiny_model: Path) -> None:
    model = resolve(str(tiny_model), components=())
    theirs = FluxTransformer2DModel.from_config(model.config("transformer")).pos_embed
    for ours in (
        FLUX.load_base(model, torch.float32),
        FLUX.make_base(model),
        FLUX.make_controlnet(model, 1, 1, "copy", torch.float32),
    ):
        positions = ours.get_submodule("pos_embed")
        for h, w in ((8, 8), (16, 6), (6, 16)):  # the last two have as many tokens as each other
            ids = torch.cat([torch.zeros(24, 3), image_ids(h, w).float()])
            for found, expected in zip(positions(ids), theirs(ids), strict=True):
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)


def test_image_ids_are_the_pipeline_s() -> None:
    for h, w in ((8, 8), (6, 10), (2, 32)):
        theirs = FluxControlNetPipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32)
        assert torch.equal(image_ids(h, w).float(), theirs)


def test_the_resolution_s_shift_is_the_pipeline_s() -> None:
    scheduler = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    for tokens in (16, 256, 1024, 4096, 9216):
        assert resolution_shift(tokens, scheduler) == pytest.approx(calculate_shift(tokens), abs=1e-12)


# --- stage 2: what is made of the cache ---


def batch_of(cache: Cache, keys: list[str], caption: int) -> Batch:
    samples = [cache.samples[key] for key in keys]
    layers = {role: cache.layer(name) for role, name in (("condition_latents", "canny_latents"), ("t5", "t5"))}
    clip = cache.layer("clip")
    tensors = {
        f"condition_latents.{field}": torch.stack([layers["condition_latents"].tensors(key)[field][0] for key in keys])
        for field in ("mean", "std")
    }
    ids = [sample.captions[caption] for sample in samples]
    tensors["t5.prompt_embeds"] = torch.stack([layers["t5"].tensors(i)["prompt_embeds"] for i in ids])
    tensors["clip.pooled_prompt_embeds"] = torch.stack([clip.tensors(i)["pooled_prompt_embeds"] for i in ids])
    assert samples[0].bucket_height is not None
    assert samples[0].bucket_width is not None
    return Batch(keys, samples[0].bucket_height, samples[0].bucket_width, tensors)


@pytest.mark.parametrize("made", ["fp32"], indirect=True)  # in bf16 roundings add up over the steps
def test_a_picture_painted_from_the_cache_is_the_pipeline_s(made: Made) -> None:
    """All of FLUX's stage 2 at once: inputs, residuals, prediction and schedule against the pipeline's own loop."""
    cache, pipeline = made.cache, made.pipeline
    shape = next((s.bucket_width, s.bucket_height) for s in cache.samples.values() if s.bucket_width != s.bucket_height)
    keys = [s.key for s in cache.samples.values() if (s.bucket_width, s.bucket_height) == shape][:2]
    batch = batch_of(cache, keys, caption=0)
    layer = cache.layer("canny_latents")
    mean = batch.tensors["condition_latents.mean"]
    control = FLUX.model_latents({"mean": mean}, layer.summary.recipe, None, torch.float32)
    noise = torch.randn(control.shape, generator=torch.Generator().manual_seed(3))
    inputs = FLUX.inputs(batch, control, torch.float32)

    def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        residuals = FLUX.residuals(pipeline.controlnet, x_t, t, inputs, 3.5, None, scale=0.7)
        return FLUX.predict(pipeline.transformer, x_t, t, inputs, 3.5, residuals)

    with torch.no_grad():
        ours = FLUX.sample(resolve(str(made.model), ()), noise, 3, step)
        without = FLUX.sample(
            resolve(str(made.model), ()), noise, 3, lambda x_t, t: FLUX.predict(
                pipeline.transformer, x_t, t, inputs, 3.5, None
            )
        )  # fmt: skip

        class Mean:
            """The pipeline encodes the control image itself, with noise: here it is given the posterior's mean."""

            latents = mean

        encode = pipeline.vae.encode
        try:
            pipeline.vae.encode = lambda image: Mean
            theirs = pipeline(
                prompt_embeds=batch.tensors["t5.prompt_embeds"],
                pooled_prompt_embeds=batch.tensors["clip.pooled_prompt_embeds"],
                control_image=torch.zeros(len(keys), 3, batch.height, batch.width),
                height=batch.height, width=batch.width, latents=noise, num_inference_steps=3, guidance_scale=3.5,
                controlnet_conditioning_scale=0.7, output_type="latent",
            ).images  # fmt: skip
        finally:
            pipeline.vae.encode = encode
    assert_near(ours, theirs, scale=5)  # fp32 rounding through three steps of both networks
    assert (ours - without).abs().max() > 1e-2, "the ControlNet has a say"


def test_decoding_is_the_pipeline_s(made: Made) -> None:
    layer = made.layer("latents")
    key, sample = next(iter(made.cache.samples.items()))
    tokens = FLUX.model_latents(moments(layer, key), layer.summary.recipe, None, made.dtype)
    height, width = sample.bucket_height or 0, sample.bucket_width or 0
    ours = FLUX.open_decoder(resolve(str(made.model), ()), "cpu", made.dtype)(tokens, height, width)
    pipeline = made.pipeline
    latents = pipeline._unpack_latents(tokens, height, width, 8)
    with torch.no_grad():
        theirs = pipeline.vae.decode(
            latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor, return_dict=False
        )[0]
    expected = pipeline.image_processor.postprocess(theirs, output_type="np")
    difference = np.abs(ours.numpy().astype(float) - np.round(expected * 255))
    assert difference.max() <= (1 if made.dtype == torch.float32 else 2)


# --- the encoders' files ---


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def without_vae(model: Path) -> None:
    shutil.rmtree(model / "vae")


def without_tokenizer(model: Path) -> None:
    shutil.rmtree(model / "tokenizer")


def without_vocabulary(model: Path) -> None:
    (model / "tokenizer_2" / "tokenizer.json").unlink()


def with_another_vocabulary(model: Path) -> None:
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 49408}))


def with_pickled_weights(model: Path) -> None:
    folder = model / "text_encoder_2"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_half_a_file(model: Path) -> None:
    path = model / "text_encoder_2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_another_vae(model: Path) -> None:
    path = model / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latent_channels": 4, "shift_factor": None}))


def with_another_text_encoder(model: Path) -> None:
    shutil.rmtree(model / "text_encoder_2")
    shutil.copytree(model / "text_encoder", model / "text_encoder_2")


def without_config(model: Path) -> None:
    (model / "vae" / "config.json").unlink()


def with_a_broken_config(model: Path) -> None:
    (model / "text_encoder" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_vae, "has no folder 'vae'"),
        (without_tokenizer, "has no folder 'tokenizer'"),
        (without_vocabulary, r"tokenizer_2 lacks spiece.model"),
        (with_another_vocabulary, "tokenizer knows .* tokens, but text_encoder expects 49408"),
        (with_pickled_weights, r"text_encoder_2 holds no .safetensors file; .* loading them can run code"),
        (with_half_a_file, r"text_encoder_2/model.safetensors cannot be read"),
        (with_another_vae, "is not FLUX's: it has 4 latent channels"),
        (with_another_text_encoder, "text_encoder_2 .* is a 'clip_text_model', where FLUX.1-dev has 't5'"),
        (without_config, r"vae lacks config.json"),
        (with_a_broken_config, "is not JSON"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_model_that_is_not_whole_is_refused(model: Path, spoil: Callable[[Path], None], sentence: str) -> None:
    FLUX.check_encoders(resolve(str(model), ()))
    spoil(model)
    with pytest.raises(UserError, match=sentence):
        FLUX.check_encoders(resolve(str(model), ()))


@pytest.mark.parametrize(
    ("layer", "component"), [("latents", "vae"), ("clip", "text_encoder"), ("t5", "text_encoder_2")]
)
def test_missing_weights_are_refused_and_not_left_at_random(model: Path, layer: str, component: str) -> None:
    (path,) = (model / component).glob("*.safetensors")
    tensors = load_file(path)
    gone = next(name for name in sorted(tensors) if "norm" in name)
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"weights of {component} are not whole: 1 tensors .*{gone}"):
        FLUX.open_encoder(LAYERS[layer], resolve(str(model), ()), "cpu", torch.float32, TEXT_LENGTH)


def test_a_recipe_depends_on_the_weights_and_not_on_where_they_are(tiny_model: Path, model: Path) -> None:
    def recipes(folder: Path, text_length: int = TEXT_LENGTH) -> dict[str, Any]:
        found = resolve(str(folder), ())
        return {layer.name: FLUX.encoder_recipe(layer, found, text_length) for layer in FLUX.layers}

    assert recipes(model) == recipes(tiny_model)
    assert str(tiny_model) not in json.dumps(recipes(tiny_model))
    longer = recipes(model, TEXT_LENGTH + 1)
    assert [name for name, recipe in longer.items() if recipe != recipes(model)[name]] == ["t5"]
    shutil.rmtree(model / "text_encoder")
    FLUX.tiny(model.parent / "another", seed=1)
    shutil.copytree(model.parent / "another" / "text_encoder", model / "text_encoder")
    assert [name for name, recipe in recipes(model).items() if recipe != recipes(tiny_model)[name]] == ["clip"]


def test_an_image_encodes_alike_in_every_batch(tiny_model: Path) -> None:
    encode = FLUX.open_encoder(LAYERS["latents"], resolve(str(tiny_model), ()), "cpu", torch.float32, TEXT_LENGTH)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    together = encode(images)["mean"]
    assert together.shape == (5, 16, 4, 6)
    for i in range(5):
        assert_near(encode(images[i : i + 1])["mean"], together[i : i + 1], scale=10)
    several = encode(images.reshape(1, 5, 32, 48, 3))["mean"]  # (B, R, ...): drawings of one sample
    assert several.shape == (1, 5, 16, 4, 6)
    assert_near(several[0], together, scale=10)


def test_captions_beyond_the_text_length_are_counted(tiny_model: Path) -> None:
    captions = ["a" * 22, "a" * 23, "a" * 100, ""]  # T5: one token a letter here, a space before, an end after
    assert FLUX.count_truncated(resolve(str(tiny_model), ()), captions, 24) == 2


def test_tiny_is_the_same_for_the_same_seed(tiny_model: Path, tmp_path: Path) -> None:
    def weights(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}

    again, other = FLUX.tiny(tmp_path / "again"), FLUX.tiny(tmp_path / "other", seed=1)
    assert weights(again) == weights(tiny_model)
    assert len(weights(again)) == 4
    assert all(weights(other)[name] != data for name, data in weights(again).items())


# --- the base and its ControlNet ------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def call_base(base: torch.nn.Module, dtype: torch.dtype) -> None:
    """One prediction for t 0.123 and 0.9, which bf16 rounds."""
    inputs = Batch(["a", "b"], 64, 64, {
        "t5.prompt_embeds": randn(2, 8, 32), "clip.pooled_prompt_embeds": randn(2, 24),
    })  # fmt: skip
    x_t, t = randn(2, 16, 64, dtype=dtype), torch.tensor([0.123, 0.9])
    with torch.no_grad():
        FLUX.predict(base, x_t, t, FLUX.inputs(inputs, None, dtype), 3.5, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [(1, 1), (2, 0), (0, 2)])
def test_a_controlnet_from_slices_is_diffusers_own_from_the_whole_base_to_the_bit(
    depth: tuple[int, int], dtype: torch.dtype, tiny_model: Path
) -> None:
    model = resolve(str(tiny_model), ())
    base: Any = FLUX.load_base(model, dtype)
    theirs: Any = FluxControlNetModel.from_transformer(
        base, *depth, base.config.attention_head_dim, base.config.num_attention_heads
    ).to(dtype)
    for embedder in ("zero", "copy"):
        ours: Any = FLUX.make_controlnet(model, *depth, embedder, dtype)
        noted = {"_name_or_path": base.config["_name_or_path"]}  # where the base lay is nobody's business
        assert {**ours.config, **noted} == dict(theirs.config)
        assert all(p.requires_grad and p.dtype == dtype and p.device.type == "cpu" for p in ours.parameters())
        if embedder == "copy":
            assert torch.equal(ours.controlnet_x_embedder.weight, base.x_embedder.weight)
            ours.controlnet_x_embedder.weight.data.zero_()
        expected = theirs.state_dict()
        assert list(ours.state_dict()) == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def with_tensors(model: Path, folder: Path, kept: Callable[[str], bool]) -> ModelFolder:
    """A copy of the transformer with some of its tensors only."""
    shutil.copytree(model / "transformer", folder / "transformer")
    [file] = (folder / "transformer").glob("*.safetensors")
    save_file({n: t for n, t in load_file(file).items() if kept(n)}, file)
    return resolve(str(folder), ())


def test_a_controlnet_needs_only_the_blocks_that_it_copies(tiny_model: Path, tmp_path: Path) -> None:
    kept = (
        "time_text_embed.",
        "context_embedder.",
        "x_embedder.",
        "transformer_blocks.0.",
        "single_transformer_blocks.0.",
    )
    model = with_tensors(tiny_model, tmp_path / "first", lambda name: name.startswith(kept))
    FLUX.make_controlnet(model, 1, 1, "copy", torch.float32)
    with pytest.raises(UserError, match=r"do not fit its config\.json: 32 tensors .* \(as transformer_blocks\.1\."):
        FLUX.make_controlnet(model, 2, 1, "copy", torch.float32)


def test_an_empty_base_is_the_loaded_one_without_numbers(tiny_model: Path) -> None:
    model = resolve(str(tiny_model), ())
    empty, loaded = FLUX.make_base(model), FLUX.load_base(model, torch.float32)
    shapes = [(name, tensor.shape) for name, tensor in loaded.state_dict().items()]
    assert [(name, tensor.shape) for name, tensor in empty.state_dict().items()] == shapes
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert not any(p.requires_grad for p in empty.parameters())
    assert not any(module.training for module in empty.modules())
    empty.load_state_dict(loaded.state_dict(), assign=True)
    call_base(empty, torch.float32)


def test_without_a_model_the_base_is_flux_1_dev() -> None:
    base, controlnet = FLUX.make_base(), FLUX.make_empty_controlnet(2, 4)
    assert sum(p.numel() for p in base.parameters()) == 11_901_408_320
    assert sum(p.numel() for p in controlnet.parameters()) == 1_347_918_848
    assert sum(p.numel() for linear in FLUX.modulations(base).values() for p in linear.parameters()) == 3_247_448_064


def test_blocks_are_in_the_order_in_which_they_run(tiny_model: Path) -> None:
    base = FLUX.load_base(resolve(str(tiny_model), ()), torch.float32)
    ran: list[torch.nn.Module] = []
    for block in FLUX.blocks(base):
        block.register_forward_pre_hook(lambda block, _: ran.append(block))
    call_base(base, torch.float32)
    assert len(ran) == 4
    assert all(ours is theirs for ours, theirs in zip(FLUX.blocks(base), ran, strict=True))


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_time_embedding_is_what_every_modulation_is_called_with_to_the_bit(
    dtype: torch.dtype, guidance_embeds: bool, tiny_model: Path
) -> None:
    base: Any = FLUX.load_base(resolve(str(tiny_model), ()), dtype)
    if not guidance_embeds:  # schnell
        base = FluxTransformer2DModel.from_config({**base.config, "guidance_embeds": False}).to(dtype)
    seen: list[torch.Tensor] = []
    modulations = FLUX.modulations(base)
    for linear in modulations.values():
        linear.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    call_base(base, dtype)
    with torch.no_grad():
        computed = FLUX.time_embedding(base, torch.tensor([0.123, 0.9]), 3.5, randn(2, 24, dtype=dtype))
    assert len(seen) == len(modulations) == 2 * 2 + 2 + 1
    assert all(torch.equal(computed, vector) for vector in seen)
