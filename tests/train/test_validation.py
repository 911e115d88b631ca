"""The held-out figures repeat, begin at no difference, and tell learning from following; pictures are as diffusers'."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from shared.errors import UserError
from shared.model_folder import resolve
from shared.pictures import _GAP, _HEAD
from tests.conftest import preprocess_options, write_data
from tests.train.conftest import content, flux, metrics, samples_of, train_options, trainer_of
from train.adapters.controlnet import ControlNetAdapter
from train.baseline import Baseline
from train.fit import look
from train.painting import Painter
from train.trainer import Trainer, train
from train.validation import ValidationOptions, fixed_noise, seed_of, standard_error


@pytest.fixture(scope="module")
def half_held_out(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with 9 of its 18 samples held out, of three shapes; one shape has a single sample."""
    folder = tmp_path_factory.mktemp("half")
    data = write_data(folder / "data", 17)
    Image.open(data / "000.png").resize((48, 96)).save(data / "tall.png")
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines.append({"file_name": "tall.png", "text": "a tall box"})
    held_out = {"tall.png", *(f"{i:03d}.png" for i in range(8))}
    for line in lines:
        line["split"] = "validation" if line["file_name"] in held_out else "train"
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    options = preprocess_options(data, folder / "cache", tiny_model, geometry=GeometryOptions(resolution=64))
    assert preprocess(options) == 0
    sizes = samples_of(folder / "cache", "validation").by_size
    assert sorted(size.stop - size.start for size in sizes) == [1, 4, 4]
    return folder / "cache"


def made(cache: Path, runs: Path, **changes: Any) -> Trainer:
    looks = {"every": 1, **changes.pop("validation", {})}
    return trainer_of(train_options(cache, runs, validation=looks, **changes))


def figures_of(trainer: Trainer) -> dict[str, float]:
    assert trainer.validation is not None
    return trainer.validation.held_out(trainer.adapter)


def painter(trainer: Trainer, folder: Path) -> Painter:
    assert trainer.validation is not None
    return Painter(trainer.validation, Baseline(folder), 4)


def learned(trainer: Trainer) -> Trainer:
    """The trainer with a ControlNet whose every weight was moved."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.adapter.trained.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return trainer


@pytest.mark.parametrize("base", ["none", "int8"])
def test_a_controlnet_at_step_0_has_no_gap_at_all(base: str, half_held_out: Path, tmp_path: Path) -> None:
    figures = figures_of(made(half_held_out, tmp_path, base={"weights": base}))
    assert figures["control_gap"] == figures["condition_gap"] == 0
    assert figures["loss"] == figures["loss_without_control"] == figures["loss_other_drawing"]


def test_the_same_weights_have_the_same_figures_at_any_time_and_in_any_run(half_held_out: Path, tmp_path: Path) -> None:
    trainer = learned(made(half_held_out, tmp_path))
    first = figures_of(trainer)
    torch.manual_seed(77)
    torch.rand(5)
    assert figures_of(trainer) == first
    another = learned(made(half_held_out, tmp_path, name="b", depth="1-1", optimizer={"learning_rate": 1.0}))
    assert figures_of(another) == first
    other_seed = learned(made(half_held_out, tmp_path, name="c", seed=1))  # of the training: looked at alike
    assert figures_of(other_seed) == first
    looked_at_otherwise = learned(made(half_held_out, tmp_path, name="d", validation={"seed": 1}))
    assert figures_of(looked_at_otherwise) != first


def test_the_figures_do_not_depend_on_the_batch_size_but_for_rounding(half_held_out: Path, tmp_path: Path) -> None:
    by_size = [
        figures_of(learned(made(half_held_out, tmp_path, name=f"b{size}", validation={"batch_size": size})))
        for size in (1, 4)
    ]
    assert by_size[0].keys() == by_size[1].keys()
    for name, value in by_size[0].items():
        assert by_size[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("hoist", ["yes", "no"])
def test_a_look_that_runs_out_of_memory_is_taken_again_with_fewer_samples_at_a_time(
    hoist: str, half_held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, four = (
        learned(made(half_held_out, tmp_path, memory={"hoist": hoist}, validation={"batch_size": size}))
        for size in (1, 4)
    )
    expected, validation = figures_of(alone), four.validation
    assert alone.validation is not None
    assert validation is not None
    pictures = painter(alone, tmp_path / "alone").paint(alone.adapter, 4)
    fits, predict = 3, ControlNetAdapter.predict

    def predicted(self: ControlNetAdapter, x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x_t) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(self, x_t, *rest)

    monkeypatch.setattr(ControlNetAdapter, "predict", predicted)
    assert look(validation, lambda: validation.held_out(four.adapter)).keys() == expected.keys()
    assert validation.batch_size == 2
    fits = 1
    found = look(validation, lambda: validation.held_out(four.adapter))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert validation.batch_size == 1
    painted = look(validation, lambda: painter(four, tmp_path / "four").paint(four.adapter, 4))
    assert all(np.array_equal(*pair) for pair in zip(painted, pictures, strict=True))
    assert capsys.readouterr().err.count("memory ran out while looking at held-out samples") == 2
    fits = 0
    with pytest.raises(UserError, match=r"while looking at one held-out sample: set a smaller memory\.budget"):
        look(validation, lambda: validation.held_out(four.adapter))


def test_the_losses_are_the_objective_s_on_the_fixed_grid(half_held_out: Path, tmp_path: Path) -> None:
    trainer = learned(made(half_held_out, tmp_path, base={"weights": "none"}, validation={"timesteps": 3}))
    validation, samples = trainer.validation, samples_of(half_held_out, "validation")
    assert validation is not None
    own, without, other = (validation.losses(trainer.adapter, control) for control in ("own", "none", "other"))
    assert own.shape == without.shape == other.shape == (9, 3)
    for row, index in enumerate(validation.indices):
        batch = samples.batch([index])
        x_0, condition = (
            flux().model_latents(batch.role(role), samples.recipes[role], None, torch.float32)
            for role in ("latents", "condition_latents")
        )
        partners = [i for i in range(9) if samples.size_of(i) == samples.size_of(index)]
        partner = partners[(partners.index(index) + 1) % len(partners)]
        theirs = samples.batch([partner])
        other_condition = flux().model_latents(
            theirs.role("condition_latents"), samples.recipes["condition_latents"], None, torch.float32
        )
        for j, t in enumerate((1 / 6, 3 / 6, 5 / 6)):
            noise = fixed_noise(x_0.shape[1:], 0, index, j, 5)[None]
            x_t, time = (1 - t) * x_0 + t * noise, torch.tensor([t])
            with torch.no_grad():
                predictions = {
                    "own": trainer.adapter.predict(x_t, time, flux().inputs(batch, condition, torch.float32)),
                    "other": trainer.adapter.predict(x_t, time, flux().inputs(batch, other_condition, torch.float32)),
                    "none": trainer.adapter.predict_without(x_t, time, flux().inputs(batch, None, torch.float32)),
                }
            for control, losses in (("own", own), ("none", without), ("other", other)):
                expected = (predictions[control] - (noise - x_0)).square().mean().item()
                if control == "other" and partner == index:
                    expected = math.nan
                assert losses[row, j].item() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    paired = ~other.isnan().any(dim=1)
    assert paired.sum() == 8
    figures = figures_of(trainer)
    assert figures["loss"] == pytest.approx(own.mean().item())
    assert figures["loss_without_control"] == pytest.approx(without.mean().item())
    assert figures["control_gap"] == pytest.approx((without - own).mean().item(), rel=1e-4)
    assert figures["condition_gap"] == pytest.approx((other - own)[paired].mean().item(), rel=1e-4)
    assert figures["loss_other_drawing"] == pytest.approx(figures["loss"] + figures["condition_gap"] * 8 / 9)
    assert figures["control_gap_error"] == pytest.approx(((without - own).mean(dim=1).std() / 3).item())
    assert figures["loss_error"] == pytest.approx((own.mean(dim=1).std() / 3).item())
    assert figures["loss_t0.833_error"] == pytest.approx((own[:, 2].std() / 3).item())
    assert [figures[f"loss_t{t}"] for t in ("0.167", "0.500", "0.833")] == pytest.approx(own.mean(dim=0).tolist())


def test_where_no_sample_has_another_of_its_shape_there_is_no_condition_gap(
    half_held_out: Path, tmp_path: Path
) -> None:
    trainer = learned(made(half_held_out, tmp_path, validation={"samples": 1, "pictures": 1}))
    assert trainer.validation is not None
    samples = trainer.validation.samples
    [tall] = [i for i in range(9) if samples.cache.samples[samples.key(i)].source == "tall.png"]
    trainer.validation.indices = [tall]
    figures = figures_of(trainer)
    assert "condition_gap" not in figures
    assert math.isfinite(figures["loss"])
    assert math.isnan(figures["control_gap_error"])
    trainer.validation.indices, trainer.validation._without = [(tall + 1) % 9], None
    assert "condition_gap" in figures_of(trainer)  # its partner need not be in the grid itself


def test_looking_does_not_change_what_is_trained(half_held_out: Path, tmp_path: Path) -> None:
    never = {"every": 0, "pictures_every": 0}
    often = {"every": 1, "pictures_every": 2, "adherence_every": 3, "samples": 2, "adherence_samples": 2}
    assert train(train_options(half_held_out, tmp_path, name="never", validation=never)) == 0
    assert train(train_options(half_held_out, tmp_path, name="often", validation=often)) == 0
    trained = [content(tmp_path / name / "controlnet") for name in ("never", "often")]
    assert trained[0] == trained[1]
    steps = [line["step"] for line in metrics(tmp_path / "often") if "held_out" in line]
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics(tmp_path / "often") if "adherence" in line] == [0, 3, 6]
    assert not any("held_out" in line or "adherence" in line for line in metrics(tmp_path / "never"))


def test_the_picture_shows_every_sample_as_drawing_with_without_and_original(
    half_held_out: Path, tmp_path: Path
) -> None:
    trainer = made(half_held_out, tmp_path, validation={"every": 0, "pictures_every": 1, "pictures": 3})
    validation = trainer.validation
    assert validation is not None
    samples = validation.samples

    def painted(step: int) -> np.ndarray:
        trainer.look(step)
        return opened(tmp_path / "run" / "pictures" / f"step-{step:08d}.png")

    picture = painted(1)
    rows = [samples.cache.samples[samples.key(index)] for index in validation.indices[:3]]
    height, width = max(s.bucket_height or 0 for s in rows), max(s.bucket_width or 0 for s in rows)
    assert picture.shape == (_HEAD + 3 * (height + _GAP) - _GAP, 4 * (width + _GAP) - _GAP, 3)

    def cell(row: int, column: int) -> np.ndarray:
        top, left, sample = _HEAD + row * (height + _GAP), column * (width + _GAP), rows[row]
        return picture[top : top + (sample.bucket_height or 0), left : left + (sample.bucket_width or 0)]

    drawings = samples.cache.layer("canny")
    for row, sample in enumerate(rows):
        (tmp_path / "drawing.png").write_bytes(drawings.read(sample.key, "0.png"))
        assert np.array_equal(cell(row, 0), opened(tmp_path / "drawing.png"))
        assert np.array_equal(cell(row, 1), cell(row, 2))  # a new ControlNet changes nothing
        assert not np.array_equal(cell(row, 2), cell(row, 3))
    learned(trainer)
    controlled = painted(2)
    assert not np.array_equal(controlled, picture)
    untouched = np.s_[:, 2 * (width + _GAP) :]
    assert np.array_equal(controlled[untouched], picture[untouched])  # without control: the same again
    assert np.array_equal(painted(3), controlled)

    # And each alone, for the page that compares runs.
    folder, picture = tmp_path / "run" / "pictures", controlled
    texts = {caption.text for caption in samples.cache.captions.values()}
    told = json.loads((folder / "held-out.json").read_text())
    assert [each["key"] for each in told] == [sample.key for sample in rows]
    assert all(each["caption"] in texts for each in told)
    for row in range(3):
        names = ("step-00000003/{}.png", "held-out/{}-without.png", "held-out/{}-original.png")
        for column, name in enumerate(("held-out/{}-drawing.png", *names)):
            assert np.array_equal(opened(folder / name.format(f"{row:02d}")), cell(row, column))


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


PIPELINE = """
import sys
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

model, controlnet, folder = sys.argv[1:]
given = load_file(f"{folder}/given.safetensors")
pipeline = FluxControlNetPipeline.from_pretrained(
    model, controlnet=FluxControlNetModel.from_pretrained(controlnet), text_encoder=None, text_encoder_2=None,
    tokenizer=None, tokenizer_2=None,
)
pipeline.set_progress_bar_config(disable=True)
drawing = Image.open(f"{folder}/drawing.png").convert("RGB")
settings = dict(
    prompt_embeds=given["prompt_embeds"], pooled_prompt_embeds=given["pooled_prompt_embeds"], control_image=drawing,
    latents=given["noise"], height=drawing.height, width=drawing.width, num_inference_steps=4, guidance_scale=3.5,
)
latents = {
    f"scale_{scale}": pipeline(
        **settings, controlnet_conditioning_scale=float(scale), generator=torch.Generator().manual_seed(8),
        output_type="latent",
    ).images
    for scale in (0, 1)
}
save_file(latents, f"{folder}/painted.safetensors")
pipeline(**settings, generator=torch.Generator().manual_seed(8)).images[0].save(f"{folder}/painted.png")
"""


def test_sampling_with_a_saved_controlnet_equals_diffusers_pipeline_in_another_process(
    half_held_out: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = train_options(
        half_held_out, tmp_path, base={"weights": "none"}, steps=12, optimizer={"learning_rate": 1e-2}
    )
    assert train(options) == 0
    trainer = trainer_of(options)
    trainer.adapter.load(tmp_path / "run" / "controlnet")

    samples = samples_of(half_held_out, "validation")
    sample = samples.cache.samples[samples.key(0)]
    batch = samples.batch([0])
    seeded = torch.Generator().manual_seed(8)
    condition = flux().model_latents(
        batch.role("condition_latents"), samples.recipes["condition_latents"], seeded, torch.float32
    )
    noise = torch.randn(condition.shape, generator=torch.Generator().manual_seed(4))
    embeds = {name.split(".")[1]: tensor for name, tensor in batch.tensors.items() if "prompt_embeds" in name}
    save_file({**embeds, "noise": noise}, tmp_path / "given.safetensors")
    (tmp_path / "drawing.png").write_bytes(samples.cache.layer("canny").read(sample.key, "0.png"))
    subprocess.run(
        [sys.executable, "-c", PIPELINE, str(tiny_model), str(tmp_path / "run" / "controlnet"), str(tmp_path)],
        check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    inputs = flux().inputs(batch, condition, torch.float32)
    adapter = trainer.adapter

    def sampled(step: Any) -> torch.Tensor:
        with torch.no_grad():
            return flux().sample(resolve(str(tiny_model), ()), noise, 4, step)

    painted = load_file(tmp_path / "painted.safetensors")
    controlled = sampled(lambda x_t, t: adapter.predict(x_t, t, inputs))
    free = sampled(lambda x_t, t: adapter.predict_without(x_t, t, inputs))
    torch.testing.assert_close(controlled, painted["scale_1"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(free, painted["scale_0"], rtol=1e-5, atol=1e-5)
    assert (controlled - free).abs().max() > 1e-2
    height, width = sample.bucket_height, sample.bucket_width
    assert height is not None
    assert width is not None
    decode = flux().open_decoder(resolve(str(tiny_model), ()), "cpu", torch.float32)
    ours = decode(controlled, height, width)[0].numpy().astype(int)
    assert np.abs(ours - np.asarray(Image.open(tmp_path / "painted.png"))).max() <= 1


def test_the_scale_of_control_reaches_the_prediction(half_held_out: Path, tmp_path: Path) -> None:
    adapter = learned(made(half_held_out, tmp_path)).adapter
    samples = samples_of(half_held_out)
    batch = samples.batch([0])
    tokens = batch.height * batch.width // 256
    inputs = flux().inputs(batch, torch.randn(1, tokens, 64), torch.float32)
    x_t, t = torch.randn(1, tokens, 64), torch.tensor([0.5])
    with torch.no_grad():
        full, none, free = (adapter.predict(x_t, t, inputs, 1.0), adapter.predict(x_t, t, inputs, 0.0),
                            adapter.predict_without(x_t, t, inputs))  # fmt: skip
    assert torch.equal(none, free)
    assert not torch.equal(full, free)


def test_noise_is_its_numbers_alone() -> None:
    shape = torch.Size((3, 4))
    torch.manual_seed(0)
    one = fixed_noise(shape, 1, 2, 3, 5)
    torch.manual_seed(1)
    assert torch.equal(fixed_noise(shape, 1, 2, 3, 5), one)
    assert not torch.equal(fixed_noise(shape, 1, 2, 3, 6), one)
    seeds = {seed_of(a, b, c) for a in range(5) for b in range(20) for c in (2, 3)}
    assert len(seeds) == 200
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_the_standard_error_is_over_samples() -> None:
    assert math.isnan(standard_error(torch.ones(1, 4)))
    rows = torch.tensor([[1.0, 3.0], [3.0, 5.0], [5.0, 7.0]])  # means 2, 4, 6: deviation 2
    assert standard_error(rows) == pytest.approx(2 / math.sqrt(3))


def test_impossible_options_are_refused() -> None:
    def refused(sentence: str, **impossible: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            ValidationOptions(**impossible).check()

    for name in ("samples", "timesteps", "pictures", "picture_steps", "adherence_samples", "batch_size"):
        refused(rf"validation\.{name} must be 1 or more", **{name: 0})
    for name in ("every", "pictures_every", "adherence_every"):
        refused(r"must be 0 \(off\) or more", **{name: -1})
    refused(r"validation\.seed must be 0 or more, not -1", seed=-1)
