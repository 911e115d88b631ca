"""A training step is the method's, to rounding; a new ControlNet changes nothing; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from PIL import Image

from shared.cache.reader import Cache
from shared.cache.schema import Caption
from shared.errors import UserError
from shared.families.base import Batch, Inputs
from shared.model_folder import resolve
from tests.conftest import TEXT_LENGTH
from tests.preprocess.runs import placed_image
from tests.train.conftest import flux, samples_of, train_options, trainer_of
from train.adapters.controlnet import ControlNetAdapter, ControlNetOptions, parse_depth
from train.quantize import place_base
from train.trainer import Trainer, train
from train.validation import seed_of

CPU = torch.device("cpu")


def new_controlnet(model: Path, num_layers: int = 1) -> torch.nn.Module:
    return flux().make_controlnet(resolve(str(model), ()), num_layers, 1, "copy", torch.float32)


def base_of(model: Path) -> torch.nn.Module:
    return flux().load_base(resolve(str(model), ()), torch.float32)


def randomize(controlnet: torch.nn.Module) -> None:
    """Move every weight off its start, the zeros at the outputs too: as after some training."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def batch_of(cache: Path, indices: tuple[int, ...] = (0, 1)) -> Batch:
    samples = samples_of(cache)
    batch = samples.batch([samples.size_of(0).start + i for i in indices])
    batch.step_samples = len(batch)
    return batch


def call(cache: Path) -> tuple[torch.Tensor, torch.Tensor, Inputs]:
    """x_t, t and inputs of a model call."""
    batch, recipes = batch_of(cache), samples_of(cache).recipes
    condition = flux().model_latents(batch.role("condition_latents"), recipes["condition_latents"], None, torch.float32)
    x_t = torch.randn(condition.shape, generator=torch.Generator().manual_seed(3))
    return x_t, torch.tensor([0.3, 0.8]), flux().inputs(batch, condition, torch.float32)


# --- the step is the method's ---------------------------------------------------------------------------------------


class Reference:
    """The loss as diffusers' pipeline would have it, from the pictures and captions themselves."""

    def __init__(self, data: Path, cache: Path, model: Path, controlnet: torch.nn.Module) -> None:
        self.data, self.cache = data, Cache(cache)
        own = FluxControlNetModel.from_config(controlnet.config)
        own.load_state_dict(controlnet.state_dict())
        self.pipeline = FluxControlNetPipeline.from_pretrained(model, controlnet=own)

    def captions(self, batch: Batch) -> list[str]:
        """Which caption each sample was given: the one of its own, or the empty one, with these embeddings."""
        found = []
        for key, embeds in zip(batch.keys, batch.tensors["t5.prompt_embeds"], strict=True):
            candidates = [Caption.of("").id, *self.cache.samples[key].captions]
            cached = self.cache.layer("t5")
            [caption] = [c for c in candidates if torch.equal(cached.tensors(c)["prompt_embeds"], embeds)]
            found.append(self.cache.captions[caption].text)
        return found

    def latents(self, pixels: list[Any], generator: torch.Generator) -> torch.Tensor:
        vae = self.pipeline.vae
        images = self.pipeline.image_processor.preprocess([Image.fromarray(np.asarray(p)) for p in pixels])
        latents = vae.encode(images.contiguous()).latent_dist.sample(generator)  # as prepare_image gives them
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        B, c, h, w = latents.shape
        return self.pipeline._pack_latents(latents, B, c, h, w)

    def loss_without_control(self, pipeline: FluxPipeline, batch: Batch, seed: int) -> torch.Tensor:
        """The mean loss, 0-dim, of another pipeline's own transformer at guidance 1."""
        samples = [self.cache.samples[key] for key in batch.keys]
        draw = torch.Generator().manual_seed(seed_of(seed, batch.position, 3))
        times = torch.Generator().manual_seed(seed_of(seed, batch.position, 4))
        with torch.no_grad():
            x_0 = self.latents([placed_image(self.data, sample) for sample in samples], draw)
            t = torch.sigmoid(torch.randn(len(samples), generator=times))
            noise = torch.randn(x_0.shape, generator=draw)
            captions = self.captions(batch)
            embeds, pooled, text_ids = pipeline.encode_prompt(
                prompt=captions, prompt_2=captions, max_sequence_length=TEXT_LENGTH
            )
        ids = pipeline._prepare_latent_image_ids(len(t), batch.height // 16, batch.width // 16, CPU, torch.float32)
        velocity = pipeline.transformer(
            hidden_states=(1 - t[:, None, None]) * x_0 + t[:, None, None] * noise, timestep=t,
            guidance=torch.ones(len(t)), pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids,
            img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        return (velocity - (noise - x_0)).square().mean()

    def losses(self, batch: Batch, seed: int) -> torch.Tensor:
        pipeline, samples = self.pipeline, [self.cache.samples[key] for key in batch.keys]
        drawings = self.cache.layer("canny")
        draw = torch.Generator().manual_seed(seed_of(seed, batch.position, 3))
        with torch.no_grad():
            x_0 = self.latents([placed_image(self.data, sample) for sample in samples], draw)
            pages = [Image.open(io.BytesIO(drawings.read(key, "0.png"))).convert("RGB") for key in batch.keys]
            condition = self.latents(pages, draw)
            times = torch.Generator().manual_seed(seed_of(seed, batch.position, 4))
            t = torch.sigmoid(torch.randn(len(samples), generator=times))
            noise = torch.randn(x_0.shape, generator=draw)
            captions = self.captions(batch)
            prompt_embeds, pooled, text_ids = pipeline.encode_prompt(
                prompt=captions, prompt_2=captions, max_sequence_length=TEXT_LENGTH
            )
        x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
        model_input = {
            "hidden_states": x_t,
            "timestep": t,
            "guidance": torch.tensor([3.5]).expand(len(t)),
            "pooled_projections": pooled,
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": text_ids,
            "img_ids": pipeline._prepare_latent_image_ids(
                len(t), batch.height // 16, batch.width // 16, CPU, torch.float32
            ),
            "return_dict": False,
        }
        double, single = pipeline.controlnet(controlnet_cond=condition, conditioning_scale=1.0, **model_input)
        velocity = pipeline.transformer(
            controlnet_block_samples=double, controlnet_single_block_samples=single, **model_input
        )[0]
        return (velocity - (noise - x_0)).square().mean(dim=(1, 2))


def step_and_reference(
    data: Path, cache: Path, model: Path, runs: Path, **changes: Any
) -> tuple[Trainer, dict[str, float], float, dict[str, torch.Tensor]]:
    """One step of a trainer, its figures, and the reference's loss and gradients for the same batches."""
    trainer = trainer_of(
        train_options(
            cache, runs, base={"weights": "none"}, seed=5, optimizer={"clip_norm": 0.0, "kind": "adamw"}, **changes
        )
    )
    randomize(trainer.adapter.trained)
    reference = Reference(data, cache, model, trainer.adapter.trained)
    iterator = iter(trainer.loader)
    batches = next(iterator)
    iterator.close()
    figures = trainer.step(batches, 1, 2e-5)
    expected = torch.cat([reference.losses(batch, seed=5) for batch in batches]).mean()
    expected.backward()
    gradients = {name: p.grad for name, p in reference.pipeline.controlnet.named_parameters() if p.grad is not None}
    return trainer, figures, expected.item(), gradients


def assert_same_gradients(trainer: Trainer, expected: dict[str, torch.Tensor]) -> None:
    """Each tensor to 1e-5 of the whole gradient's norm, and to 2e-4 of its own: the small ones (attention's keys, above
    all) are sums of large numbers, and carry the fp32 rounding of those."""
    actual = {name: p.grad for name, p in trainer.adapter.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    norms = {name: gradient.norm().item() for name, gradient in expected.items()}
    assert all(norm > 0 for norm in norms.values())
    errors = {name: (actual[name] - gradient).norm().item() for name, gradient in expected.items()}
    of_whole = max(errors.values()) / math.hypot(*norms.values())
    of_own = max(errors[name] / norm for name, norm in norms.items())
    print(f"{len(errors)} gradients differ by at most {of_whole:.1e} of the whole norm, {of_own:.1e} of their own")
    assert of_whole < 1e-5
    assert of_own < 2e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": "1-1"},
        {"depth": "2-2", "loader": {"batch_size": 2, "accumulation": 2, "caption_dropout": 0.5}},
        {"depth": "1-2", "memory": {"recompute": "all"}},
    ],
    ids=["batch-of-2", "accumulation", "checkpointing"],
)
def test_loss_and_every_gradient_equal_those_computed_by_diffusers_from_the_pictures_themselves(
    changes: dict[str, Any], tiny_data: Path, tiny_cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    trainer, figures, loss, gradients = step_and_reference(tiny_data, tiny_cache, tiny_model, tmp_path, **changes)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(trainer, gradients)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])).item()
    assert figures["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert all(p.grad is None for p in trainer.adapter.base.parameters())


def test_the_int8_base_hardly_turns_the_gradient(tiny_cache: Path, tmp_path: Path) -> None:
    gradients = []
    for base in ("none", "int8"):
        trainer = trainer_of(train_options(tiny_cache, tmp_path, base={"weights": base}, optimizer={"clip_norm": 0.0}))
        randomize(trainer.adapter.trained)
        trainer.step([batch_of(tiny_cache)], 1, 2e-5)
        gradients.append(
            torch.cat([p.grad.double().flatten() for _, p in trainer.adapter.named_parameters() if p.grad is not None])
        )
    cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0).item()
    print(f"cosine of the gradients, int8 base and unquantized: {cosine:.6f}")
    assert 0.999 < cosine < 1 - 1e-9


# --- a new ControlNet changes nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("embedder", ["copy", "zero"])
@pytest.mark.parametrize("depth", ["1-1", "2-0", "0-2", "1-2"])
def test_at_step_0_the_prediction_is_the_base_s_to_the_bit(
    depth: str, embedder: Any, tiny_model: Path, tiny_cache: Path
) -> None:
    base = base_of(tiny_model)
    controlnet = flux().make_controlnet(resolve(str(tiny_model), ()), *parse_depth(depth), embedder, torch.float32)
    adapter = ControlNetAdapter(flux(), place_base(base, CPU, "int8"), controlnet, ControlNetOptions(embedder=embedder))
    x_t, t, inputs = call(tiny_cache)
    with torch.no_grad():
        assert torch.equal(adapter.predict(x_t, t, inputs), adapter.predict_without(x_t, t, inputs))
    config = controlnet.config
    assert (config["num_layers"], config["num_single_layers"]) == parse_depth(depth)  # type: ignore[index]
    shared = {name: tensor for name, tensor in base_of(tiny_model).state_dict().items()}
    own = ("controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder")
    copied = {name: tensor for name, tensor in controlnet.state_dict().items() if not name.startswith(own)}
    assert {f"transformer_blocks.{i}" for i in range(int(depth[0]))} <= {".".join(n.split(".")[:2]) for n in copied}
    assert all(torch.equal(tensor, shared[name]) for name, tensor in copied.items())


@pytest.mark.parametrize("embedder", ["copy", "zero"])
def test_the_first_gradient_reaches_the_outputs_and_a_copied_embedder_the_condition_in_the_second_step(
    embedder: Any, tiny_model: Path, tiny_cache: Path
) -> None:
    base = base_of(tiny_model)
    controlnet = flux().make_controlnet(resolve(str(tiny_model), ()), 1, 1, embedder, torch.float32)
    adapter = ControlNetAdapter(flux(), place_base(base, CPU, "int8"), controlnet, ControlNetOptions(embedder=embedder))
    x_t, t, inputs = call(tiny_cache)
    assert inputs.condition is not None
    weights = dict(adapter.named_parameters())

    def gradients() -> dict[str, float]:
        controlnet.zero_grad()
        inputs.condition = inputs.condition.detach().requires_grad_()  # type: ignore[union-attr]
        adapter.predict(x_t, t, inputs).square().mean().backward()
        found = {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in weights.items()}
        assert inputs.condition.grad is not None
        return found | {"condition": inputs.condition.grad.abs().max().item()}

    first = gradients()
    assert first["controlnet_blocks.0.weight"] > 0
    assert first["controlnet_single_blocks.0.weight"] > 0
    assert {name for name, size in first.items() if size} == {
        f"controlnet{kind}_blocks.0.{part}" for kind in ("", "_single") for part in ("weight", "bias")
    }
    with torch.no_grad():
        for name, weight in weights.items():
            if name.startswith(("controlnet_blocks", "controlnet_single_blocks")):
                assert weight.grad is not None
                weight.sub_(0.1 * weight.grad)
    second = gradients()
    assert (second["condition"] > 0) == (embedder == "copy")
    assert second["controlnet_x_embedder.weight"] > 0


def test_weights_in_fp32_are_computed_in_bf16_and_get_fp32_gradients(tiny_cache: Path, tmp_path: Path) -> None:
    trainer = trainer_of(train_options(tiny_cache, tmp_path, precision="bf16", controlnet={"weights": "fp32"}))
    randomize(trainer.adapter.trained)
    batch = batch_of(tiny_cache)
    batch.step_samples = 2
    loss = trainer.step.loss(batch)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for _, p in trainer.adapter.named_parameters() if p.grad is not None} == {torch.float32}
    assert next(trainer.adapter.base.parameters()).dtype == torch.bfloat16
    exact = trainer_of(train_options(tiny_cache, tmp_path))
    randomize(exact.adapter.trained)
    torch.testing.assert_close(loss, exact.step.loss(batch), rtol=0.02, atol=0)


def test_bf16_weights_in_an_fp32_computation_are_refused(tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set precision bf16 too"):
        train(train_options(tiny_cache, tmp_path, controlnet={"weights": "bf16"}))


# --- an existing ControlNet -----------------------------------------------------------------------------------------


def save_controlnet(folder: Path, base: torch.nn.Module, **config: Any) -> Path:
    """A ControlNet as someone else may have trained it."""
    sizes = {
        "num_layers": 1, "num_single_layers": 0, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 64,
        "joint_attention_dim": 32, "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    torch.manual_seed(3)
    FluxControlNetModel(**{**sizes, **config}).save_pretrained(folder)
    return folder


def test_training_goes_on_from_an_existing_controlnet_and_needs_it_only_once(
    tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    start = save_controlnet(tmp_path / "start", base_of(tiny_model))
    options = train_options(tiny_cache, tmp_path, name=None, controlnet={"start_from": str(start)})
    assert options.run_name == "from-start"
    trainer = trainer_of(options)
    theirs = FluxControlNetModel.from_pretrained(start).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trainer.adapter.trained.state_dict().items())
    assert train(options) == 0
    start.rename(tmp_path / "moved")
    assert train(dataclasses.replace(options, steps=8)) == 0
    trained = FluxControlNetModel.from_pretrained(tmp_path / "from-start" / "controlnet")
    assert (trained.config["num_layers"], trained.config["num_single_layers"]) == (1, 0)
    moved = [name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, theirs[name])]
    assert "controlnet_blocks.0.weight" in moved


def test_one_mode_of_a_union_controlnet_is_trained(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> None:
    union = save_controlnet(tmp_path / "union", base_of(tiny_model), num_mode=3)
    options = train_options(tiny_cache, tmp_path, controlnet={"start_from": str(union), "control_mode": 1})
    assert train(options) == 0
    before = FluxControlNetModel.from_pretrained(union).state_dict()
    after = FluxControlNetModel.from_pretrained(tmp_path / "run" / "controlnet").state_dict()
    name = "controlnet_mode_embedder.weight"
    rows = (after[name] - before[name]).abs().amax(dim=1)
    assert rows[1] > 10 * max(rows[0], rows[2])  # the others feel weight decay alone
    for mode, sentence in ((None, "union of 3 modes: set control_mode from 0 to 2"), (3, "from 0 to 2")):
        wrong = train_options(
            tiny_cache, tmp_path, name="x", controlnet={"start_from": str(union), "control_mode": mode}
        )
        with pytest.raises(UserError, match=sentence):
            train(wrong)


@pytest.mark.parametrize(
    ("config", "mode", "sentence"),
    [
        ({"joint_attention_dim": 48}, None, "its joint_attention_dim is 48, not 32"),
        ({"num_attention_heads": 3}, None, "its num_attention_heads is 3, not 2"),
        ({"conditioning_embedding_channels": 4}, None, "takes pixels"),
        ({}, 0, "not a union"),
    ],
)
def test_an_existing_controlnet_that_does_not_fit_is_refused(
    config: dict[str, Any], mode: int | None, sentence: str, tiny_model: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    start = save_controlnet(tmp_path / "start", base_of(tiny_model), **config)
    options = train_options(tiny_cache, tmp_path, controlnet={"start_from": str(start), "control_mode": mode})
    with pytest.raises(UserError, match=sentence):
        train(options)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_folder_without_a_controlnet_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    options = train_options(tiny_cache, tmp_path, controlnet={"start_from": str(tmp_path)})
    with pytest.raises(UserError, match=r"config\.json is missing"):
        train(options)


@pytest.mark.parametrize("depth", ["", "2", "2-", "a-b", "0-0", "00-0", "-1-2", "1-2-3", "2 - 4", "\u0661-\u0662"])
def test_a_malformed_depth_is_refused(depth: str) -> None:
    with pytest.raises(UserError, match="DEPTH is num_layers-num_single_layers"):
        parse_depth(depth)


def test_the_saved_controlnet_loads_back_to_the_same_bits_and_another_one_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = base_of(tiny_model)
    one = ControlNetAdapter(flux(), base, new_controlnet(tiny_model, 1), ControlNetOptions())
    randomize(one.controlnet)
    one.save(tmp_path / "one")
    again = ControlNetAdapter(flux(), base, new_controlnet(tiny_model, 1), ControlNetOptions())
    again.load(tmp_path / "one")
    expected = one.controlnet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.controlnet.state_dict().items())
    other = ControlNetAdapter(flux(), base, new_controlnet(tiny_model, 2), ControlNetOptions())
    with pytest.raises(UserError, match="of another shape"):
        other.load(tmp_path / "one")


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs controlnet\.start_from"):
        ControlNetOptions(control_mode=1).check()
    with pytest.raises(UserError, match="guidance must not be negative"):
        ControlNetOptions(guidance=-1.0).check()
