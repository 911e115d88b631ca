"""Stable Diffusion's families train end to end: a step is diffusers' own, a run goes on where it was, pictures are
those of the family's pipeline. That runs learn, and what they leave: test_adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch._dynamo import config as dynamo
from torch.utils.flop_counter import FlopCounterMode

from preprocess.pipeline import preprocess
from shared import families
from shared.errors import UserError
from shared.families.base import Batch, Inputs
from tests.conftest import preprocess_options, write_data
from tests.train.conftest import content, controlnet_bytes, losses, train_options
from train import run as run_module
from train.baseline import Baseline
from train.compile import compile_blocks
from train.config import TrainConfig
from train.counting import Setting, trace
from train.memory_plan import count
from train.painting import Painter
from train.plan import PlanConfig, plan, report, subject_of
from train.preparation import prepare
from train.step import NOISE
from train.trainer import Trainer, train
from train.validation import fixed_noise, seed_of

NAMES = ("sd15", "sdxl")


@pytest.fixture(scope="module", params=NAMES)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache_of(request.param, tmp_path_factory.mktemp(request.param))


def cache_of(family: str, folder: Path, **changes: Any) -> Path:
    """A cache of 16 drawn pictures, 4 of which are held out, for a tiny model of this family. `changes` replace options
    of preprocessing."""
    model = families.get(family).tiny(folder / "model")
    data = write_data(folder / "data", 16, sizes=((64, 64),))
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["split"] = "validation" if i < 4 else "train"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = preprocess_options(data, folder / "cache", model, family=family, text_length=None, **changes)
    assert preprocess(options) == 0
    return folder / "cache"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def trainer(stack: ExitStack, cache: Path, runs: Path, **changes: Any) -> Trainer:
    prepared = prepare(train_options(cache, runs, **{"depth": "2-4", **changes}), stack)
    assert prepared is not None
    return Trainer(prepared)


def moved(made: Trainer) -> Trainer:
    """With a ControlNet whose every weight was moved, so that no output is zero."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in made.adapter.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return made


@pytest.mark.parametrize(
    "options", [{"snr_gamma": 0.0}, {"snr_gamma": 5.0}, {"snr_gamma": 5.0, "prediction": "v"}], ids=str
)
def test_a_step_s_loss_and_gradients_are_those_of_diffusers_own_modules(
    options: dict[str, Any], cache: Path, tmp_path: Path, stack: ExitStack
) -> None:
    made = moved(trainer(stack, cache, tmp_path, base={"weights": "none"}, objective=options))
    batch = next(iter(made.loader))[0]
    ours = made.step.loss(batch)
    ours.mean().backward()

    unet = UNet2DConditionModel.from_pretrained(Path(made.model.path) / "unet").requires_grad_(False)
    made.adapter.save(tmp_path / "controlnet")
    controlnet = ControlNetModel.from_pretrained(tmp_path / "controlnet")
    theirs = losses_of(made, batch, options, unet, controlnet)
    theirs.mean().backward()

    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    expected = dict(controlnet.named_parameters())
    gradients = {name: parameter.grad for name, parameter in made.adapter.named_parameters()}
    assert gradients.keys() == expected.keys()
    largest = max(float(p.grad.abs().max()) for p in expected.values())
    assert largest > 0
    for name, gradient in gradients.items():
        assert gradient is not None
        assert (gradient - expected[name].grad).abs().max() <= 1e-5 * largest, name


def losses_of(made: Trainer, batch: Batch, options: dict[str, Any], unet: Any, controlnet: Any = None) -> torch.Tensor:
    """The loss of each sample (B,) of this batch, as diffusers' own modules and scheduler have it: what the trainer's
    first step computes under these options of the objective."""
    scheduler = DDPMScheduler.from_pretrained(Path(made.model.path) / "scheduler")
    generator = torch.Generator().manual_seed(seed_of(0, batch.position, NOISE))
    mean, std = batch.tensors["latents.mean"], batch.tensors["latents.std"]
    x_0 = (mean + std * torch.randn(mean.shape, generator=generator)) * made.model.config("vae")["scaling_factor"]
    noise = torch.randn(x_0.shape, generator=generator)
    t = made.step.times(batch.position, len(batch)).long()
    x_t = scheduler.add_noise(x_0, noise, t)
    told = arguments(made, batch.tensors)
    residuals: dict[str, Any] = {}
    if controlnet is not None:
        pixels = (batch.tensors["condition_pixels.pixels"].float() / 255).expand(-1, 3, -1, -1)
        down, middle = controlnet(x_t, t, controlnet_cond=pixels, return_dict=False, **told)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    prediction = unet(x_t, t, return_dict=False, **residuals, **told)[0]
    predicts_v = options.get("prediction") == "v"
    target = scheduler.get_velocity(x_0, noise, t) if predicts_v else noise
    found = (prediction - target).square().mean(dim=(1, 2, 3))
    if gamma := options["snr_gamma"]:
        snr = compute_snr(scheduler, t)
        found = found * snr.clamp(max=gamma) / (snr + 1 if predicts_v else snr)
    return found


def arguments(made: Trainer, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What UNet and ControlNet are told beside x_t, t and the condition, by the family's own layers."""
    if made.family.name == "sd15":
        return {"encoder_hidden_states": tensors["clip.prompt_embeds"]}
    added = {"text_embeds": tensors["clip_2.pooled_prompt_embeds"], "time_ids": tensors["sizes.time_ids"]}
    both = [tensors["clip.prompt_embeds"], tensors["clip_2.prompt_embeds"]]
    return {"encoder_hidden_states": torch.cat(both, dim=-1), "added_cond_kwargs": added}


def test_a_run_that_was_interrupted_goes_on_to_the_bit(cache: Path, tmp_path: Path) -> None:
    def run(name: str, steps: int, **changes: Any) -> Path:
        assert train(train_options(cache, tmp_path, depth="2-4", name=name, steps=steps, **changes)) == 0
        return tmp_path / name

    whole, parts = run("whole", 4), run("parts", 2)
    run("parts", 4)
    assert losses(parts) == losses(whole)
    assert controlnet_bytes(parts) == controlnet_bytes(whole)
    assert controlnet_bytes(run("hoisted", 4, memory={"hoist": "yes"})) == controlnet_bytes(whole)
    assert controlnet_bytes(run("recomputed", 4, memory={"recompute": "7+4"})) == controlnet_bytes(whole)


def test_a_run_without_a_name_has_no_depth_in_it_and_one_from_before_there_was_auto_goes_on(
    cache: Path, tmp_path: Path
) -> None:
    named: dict[str, Any] = {"depth": "2-4", "name": None}
    with pytest.MonkeyPatch.context() as before:
        before.setattr(run_module, "_left_open", lambda options, kind: options)
        assert train(train_options(cache, tmp_path, steps=2, objective={"timesteps": "uniform"}, **named)) == 0
        with pytest.raises(UserError, match=r"another experiment \(objective\.timesteps was uniform, is auto\)"):
            train(train_options(cache, tmp_path, steps=4, **named))
    assert [path.name for path in tmp_path.iterdir()] == ["controlnet"]
    assert train(train_options(cache, tmp_path, steps=4, **named)) == 0
    assert train(train_options(cache, tmp_path, steps=4, depth="2-4", name="whole")) == 0
    assert losses(tmp_path / "controlnet") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match=r"objective\.timesteps was auto, is logit_normal"):
        train(train_options(cache, tmp_path, steps=5, objective={"timesteps": "logit_normal"}, **named))


def test_training_goes_on_from_an_existing_controlnet(cache: Path, tmp_path: Path) -> None:
    assert train(train_options(cache, tmp_path, depth="2-4", steps=2)) == 0
    start = tmp_path / "run" / "controlnet"
    before = content(start.resolve())
    options = train_options(cache, tmp_path, depth="2-4", steps=2, name="on", controlnet={"start_from": str(start)})
    assert train(options) == 0
    assert content(start.resolve()) == before
    assert controlnet_bytes(tmp_path / "on") != controlnet_bytes(tmp_path / "run")


def test_a_depth_that_no_controlnet_has_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"DEPTH 4-4: .* is the first half of its base, at no other depth"):
        train(train_options(cache, tmp_path, depth="4-4"))


def test_pictures_are_led_away_from_the_empty_caption(cache: Path, tmp_path: Path, stack: ExitStack) -> None:
    """Painted as here, by hand; and the times at which the base is asked are the scheduler's."""
    made = moved(trainer(stack, cache, tmp_path, validation={"every": 1, "picture_steps": 3}))
    validation = made.validation
    assert validation is not None
    asked: list[Inputs] = []
    predict = made.adapter.predict

    def watched(x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, scale: float = 1.0) -> torch.Tensor:
        asked.append(inputs)
        return predict(x_t, t, inputs, scale)

    made.adapter.predict = watched  # type: ignore[method-assign]
    [picture] = Painter(validation, Baseline(tmp_path / "baseline"), 1).paint(made.adapter, 1)
    assert picture.shape == (64, 64, 3)
    assert len(asked) == 6
    captioned, uncaptioned = asked[0], asked[1]
    assert torch.equal(captioned.condition, uncaptioned.condition)  # type: ignore[arg-type]
    samples = validation.samples
    [index] = validation.indices[:1]
    texts = {0: "", int(samples.captions(index)[0]): samples.caption_texts([index])[0]}
    assert samples.cache.caption_texts(list(texts)) == list(texts.values())
    by_text = {
        c.text: samples.cache.layer("clip").tensors(c.id)["prompt_embeds"] for c in samples.cache.captions.values()
    }
    told = [each.embeds["encoder_hidden_states"][0, :, :24] for each in (captioned, uncaptioned)]
    assert torch.equal(told[0], by_text[list(texts.values())[1]])
    away = by_text[""] if made.family.name == "sd15" else torch.zeros_like(told[1])  # as SDXL's pipeline has it
    assert torch.equal(told[1], away)

    guidance = made.family.guidance_scale
    assert guidance is not None

    def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        away = predict(x_t, t, uncaptioned)
        return away + guidance * (predict(x_t, t, captioned) - away)

    with torch.no_grad():
        noise = fixed_noise(torch.Size((4, 8, 8)), validation.seed, index, 0, 6)[None]
        x_0 = made.family.sample(made.model, noise, 3, step)
    decode = made.family.open_decoder(made.model, "cpu", torch.float32)
    assert np.array_equal(decode(x_0, 64, 64)[0].numpy(), picture)


def test_the_base_alone_paints_what_its_own_pipeline_does(cache: Path, tmp_path: Path, stack: ExitStack) -> None:
    """From the same noise and caption, guided, by its own scheduler: no negative prompt is given."""
    made = trainer(stack, cache, tmp_path, validation={"every": 1, "picture_steps": 3}, base={"weights": "none"})
    validation = made.validation
    assert validation is not None
    painter = Painter(validation, Baseline(tmp_path / "baseline"), 1)
    ours = painter.references(made.adapter).without[0]
    [index] = painter.indices
    noise = fixed_noise(torch.Size((4, 8, 8)), validation.seed, index, 0, 6)[None]
    pipeline = DiffusionPipeline.from_pretrained(made.model.path)
    pipeline.set_progress_bar_config(disable=True)
    [caption] = validation.samples.caption_texts([index])
    theirs = pipeline(
        caption, latents=noise, num_inference_steps=3, guidance_scale=made.family.guidance_scale, output_type="np"
    ).images[0]
    assert np.abs(ours - 255 * theirs).max() < 1.01


def test_a_schedule_without_terminal_noise_is_refused_for_epsilon_and_trains_with_v(
    cache: Path, tmp_path: Path
) -> None:
    asked = {"zero_terminal_snr": True}
    with pytest.raises(UserError, match="zero_terminal_snr"):
        train(train_options(cache, tmp_path, depth="2-4", objective=asked))
    options = train_options(
        cache, tmp_path, depth="2-4", steps=2, objective={**asked, "prediction": "v"},
        validation={"every": 2, "pictures_every": 2},
    )  # fmt: skip
    assert train(options) == 0
    assert all(np.isfinite(losses(tmp_path / "run")))


# --- at full size ---------------------------------------------------------------------------------------------------


def test_memory_is_counted_before_anything_is_loaded() -> None:
    full = Setting(depth=(0, 0), height=512, width=512, text_length=77, family="sd15", hoist=False)
    counted, wider = count(full), count(replace(full, batch_size=4))
    assert (counted.num_base_blocks, counted.num_controlnet_blocks) == (38, 17)
    assert 1.9e9 < counted.peak_bytes < wider.peak_bytes < 8e9
    assert count(full, 38, 17).peak_bytes < counted.peak_bytes
    assert count(replace(full, weights=torch.float32)).peak_bytes > counted.peak_bytes + 361e6 * (2 + 2)


def test_the_work_that_is_counted_is_torch_s_own_count() -> None:
    """Convolutions too, forward and backward."""
    setting = Setting(depth=(0, 0), height=256, width=256, text_length=77, family="sd15", base="none", hoist=False)
    segments = trace(setting).kept

    family = families.get("sd15")
    base, controlnet = family.make_base(), family.make_empty_controlnet(0, 0)
    with torch.device("meta"):
        inputs = Inputs(torch.empty(1, 3, 256, 256), {"encoder_hidden_states": torch.empty(1, 77, 768)}, 256, 256)
        x_t, t = torch.empty(1, 4, 32, 32), torch.empty(1)
    with FlopCounterMode(display=False) as forward:
        predicted = family.predict(base, x_t, t, inputs, 1.0, family.residuals(controlnet, x_t, t, inputs, 1.0, None))
    with FlopCounterMode(display=False) as backward:
        predicted.sum().backward()
    counted = [sum(s.work.flops for s in segments if s.backward == way and s.part != "loss") for way in (False, True)]
    assert counted[0] == pytest.approx(forward.get_total_flops(), rel=1e-3)
    # torch lets flash attention's backward count five products for four.
    assert counted[1] == pytest.approx(backward.get_total_flops(), rel=0.05)


def test_a_run_is_planned_without_a_model_or_a_cache() -> None:
    options = PlanConfig(cache="nowhere", family="sdxl", resolution=1024, gpu="4090", depth=TrainConfig.depth)
    options.check()
    subject = subject_of(options)
    assert (subject.text_length, subject.model) == (77, None)
    planned = plan(options, subject, options.depth)
    assert planned.refusal is None
    assert planned.counted.num_controlnet_blocks == 42
    assert "stable-diffusion-xl-base-1.0" in report(options, subject, planned)
    with pytest.raises(UserError, match="leave DEPTH out"):
        plan(options, subject, "4-4")


def test_blocks_of_many_shapes_are_compiled_whole() -> None:
    """As many kinds of block as SD 1.5 has, in one process: beyond the limit a call would be refused."""
    family = families.get("sd15")
    config = {name: value for name, value in family.unet.items() if name[0] != "_"}  # type: ignore[attr-defined]
    small = {"block_out_channels": (8, 16, 24, 32), "norm_num_groups": 4, "attention_head_dim": 2}
    base = UNet2DConditionModel(**{**config, **small, "cross_attention_dim": 24}).requires_grad_(False).eval()
    controlnet = ControlNetModel.from_unet(base)
    blocks = [*family.blocks(base), *family.blocks(controlnet)]
    assert len(blocks) == 55
    x_t, told = torch.randn(2, 4, 8, 8), {"encoder_hidden_states": torch.randn(2, 77, 24)}
    inputs, t = Inputs(torch.rand(2, 3, 64, 64), told, 64, 64), torch.tensor([3.0, 900.0])

    def loss() -> float:
        residuals = family.residuals(controlnet, x_t, t, inputs, 1.0, None)
        found = family.predict(base, x_t, t, inputs, 1.0, residuals).square().mean()
        found.backward()
        return found.item()

    before = loss()
    limits = {name: getattr(dynamo, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    try:
        compile_blocks(blocks, num_shapes=1, backend="eager")
        assert loss() == before
    finally:
        torch.compiler.reset()
        for name, value in limits.items():
            setattr(dynamo, name, value)
