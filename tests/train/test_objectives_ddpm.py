"""Diffusion over a table of noise levels against its papers' closed forms and diffusers' own schedulers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from shared import families
from shared.errors import UserError
from shared.families.base import Order
from shared.model_folder import ModelFolder
from tests.train.made_run import make_run
from train.objectives import DDPM, FlowMatching, Noised, Objective, ObjectiveOptions, make
from train.objectives.ddpm import PredictionType, zero_terminal
from train.objectives.options import Kind
from train.sample import SampleConfig, sample

N, B, C, H, W = 1000, 4, 4, 6, 5
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
EVERY_T = torch.arange(N).float()
PREDICTIONS: tuple[Literal["epsilon", "v"], ...] = ("epsilon", "v")


def scheduler(**changes: Any) -> Any:
    return diffusers.DDPMScheduler(**{**STABLE_DIFFUSION, "num_train_timesteps": N, **changes})


def alpha_bars() -> torch.Tensor:
    """By the formula, not from diffusers: betas whose square roots rise evenly."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, N, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def ddpm(predicts: PredictionType = "epsilon", levels: torch.Tensor | None = None, **options: Any) -> DDPM:
    made = ObjectiveOptions(**options)
    made.check()
    return DDPM(made, alpha_bars() if levels is None else levels, predicts)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(seed: int = 1, count: int = B) -> torch.Tensor:
    return torch.randn(count, C, H, W, generator=generator(seed))


def all_noised(objective: Objective, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, Noised]:
    """x_0, noise, and what becomes of them at every t."""
    x_0, noise = latents(seed, N), latents(seed + 1, N)
    return x_0, noise, objective.noise_at(x_0, EVERY_T, noise)


# --- x_t and target -------------------------------------------------------------------------------------------------


def test_x_t_and_both_targets_are_diffusers_own_at_every_t() -> None:
    theirs = scheduler()
    for prediction in PREDICTIONS:
        x_0, noise, noised = all_noised(ddpm(prediction=prediction))
        torch.testing.assert_close(noised.x_t, theirs.add_noise(x_0, noise, EVERY_T.long()), rtol=0, atol=1e-5)
        target = noise if prediction == "epsilon" else theirs.get_velocity(x_0, noise, EVERY_T.long())
        torch.testing.assert_close(noised.target, target, rtol=0, atol=1e-5)


def test_targets_of_epsilon_and_v_invert_to_the_same_x_0_at_every_t() -> None:
    signal, sigma = (rate.sqrt().view(N, 1, 1, 1) for rate in (alpha_bars().double(), 1 - alpha_bars().double()))
    x_0, _, epsilon = all_noised(ddpm(prediction="epsilon"))
    _, _, v = all_noised(ddpm(prediction="v"))
    assert torch.equal(epsilon.x_t, v.x_t)
    from_epsilon = (epsilon.x_t.double() - sigma * epsilon.target.double()) / signal
    from_v = signal * v.x_t.double() - sigma * v.target.double()
    torch.testing.assert_close(from_epsilon, x_0.double(), rtol=0, atol=2e-5)  # divided by a signal of 0.07 at the end
    torch.testing.assert_close(from_v, x_0.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusers_own_step_from_a_perfect_prediction_finds_x_0(prediction: Any) -> None:
    theirs = scheduler(prediction_type="epsilon" if prediction == "epsilon" else "v_prediction")
    x_0, _, noised = all_noised(ddpm(prediction=prediction))
    for t in (0, 1, 250, 700, 999):
        found = theirs.step(noised.target[t], t, noised.x_t[t]).pred_original_sample
        torch.testing.assert_close(found, x_0[t], rtol=0, atol=1e-4)


def test_auto_predicts_what_the_base_predicts_and_an_option_overrides_it() -> None:
    assert (ddpm("epsilon").predicted, ddpm("v_prediction").predicted) == ("epsilon", "v_prediction")
    assert (ddpm("v_prediction", prediction="epsilon").predicted, ddpm(prediction="v").predicted) == (
        "epsilon",
        "v_prediction",
    )


def test_x_t_keeps_the_latents_dtype_and_is_rounded_once() -> None:
    x_0, noise, t = latents(1).bfloat16(), latents(2).bfloat16(), torch.tensor([0.0, 20.0, 500.0, 999.0])
    noised = ddpm().noise_at(x_0, t, noise)
    exact = ddpm().noise_at(x_0.float(), t, noise.float())
    assert (noised.x_t.dtype, noised.target.dtype, noised.t.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(noised.x_t, exact.x_t.bfloat16())
    assert torch.equal(noised.target, exact.target)


def test_where_there_are_shapes_and_no_numbers_it_works_too() -> None:
    x_0 = torch.empty(B, C, H, W, device="meta")
    noised = ddpm(prediction="v").noise_at(x_0, torch.empty(B, device="meta"), x_0)
    assert ddpm().loss(x_0, noised).shape == (B,)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [5.0, 1.0, 20.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_equal_the_closed_form_at_every_t(prediction: Any, gamma: float) -> None:
    weights = ddpm(prediction=prediction, snr_gamma=gamma).weight(EVERY_T)
    expected = []
    for alpha_bar in alpha_bars().double().tolist():
        snr = alpha_bar / (1 - alpha_bar)
        expected.append(min(snr, gamma) / (snr if prediction == "epsilon" else snr + 1))
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-6, atol=0)


def test_min_snr_weights_equal_diffusers_own_signal_to_noise_ratio_s() -> None:
    from diffusers.training_utils import compute_snr

    snr = compute_snr(scheduler(), EVERY_T.long())
    clamped = snr.clamp(max=5.0)
    torch.testing.assert_close(ddpm().weight(EVERY_T), clamped / snr, rtol=1e-4, atol=0)
    torch.testing.assert_close(ddpm(prediction="v").weight(EVERY_T), clamped / (snr + 1), rtol=1e-4, atol=0)


def test_both_predictions_weigh_the_same_error_of_x_0_alike() -> None:
    """The loss of a guess at x_0, said as its noise or as its velocity, is min(SNR, 5) times that guess's error."""
    signal, sigma = (rate.sqrt().view(N, 1, 1, 1) for rate in (alpha_bars().double(), 1 - alpha_bars().double()))
    guess = latents(9, N).double()
    losses = []
    for prediction in PREDICTIONS:
        objective = ddpm(prediction=prediction)
        x_0, _, noised = all_noised(objective)
        noise = (noised.x_t.double() - signal * guess) / sigma
        said = noise if prediction == "epsilon" else signal * noise - sigma * guess
        losses.append(objective.loss(said.float(), noised))
    snr = (signal / sigma).flatten() ** 2
    expected = snr.clamp(max=5) * (guess - x_0.double()).square().flatten(1).mean(1)
    for loss in losses:
        torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_gamma_of_0_weighs_all_alike(prediction: Any) -> None:
    assert torch.equal(ddpm(prediction=prediction, snr_gamma=0.0).weight(EVERY_T), torch.ones(N))


def test_the_loss_is_each_sample_s_weighted_mean_squared_error() -> None:
    objective, t = ddpm(prediction="v"), torch.tensor([0.0, 100.0, 600.0, 999.0])
    noised, prediction = objective.noise_at(latents(1), t, latents(2)), latents(3)
    for b, loss in enumerate(objective.loss(prediction, noised).tolist()):
        error = (prediction[b].double() - noised.target[b].double()).square().mean().item()
        assert loss == pytest.approx(error * noised.weight[b].item(), rel=1e-5)


# --- times ----------------------------------------------------------------------------------------------------------


def test_every_level_is_drawn_alike_and_nothing_between_or_outside() -> None:
    t = ddpm().sample_t(N * 200, generator(), "cpu")
    assert (t.dtype, t.shape) == (torch.float32, (N * 200,))
    assert torch.equal(t, t.floor())
    counts = torch.bincount(t.long(), minlength=N)
    assert len(counts) == N
    chi_square = ((counts - 200.0) ** 2 / 200).sum().item()
    assert 850 < chi_square < 1150, "999 degrees of freedom: 999 +- 45"


def test_the_distributions_of_flow_matching_draw_levels_too() -> None:
    shifted = ddpm(timesteps="shifted").sample_t(20_000, generator(), "cpu")
    share = FlowMatching(ObjectiveOptions(timesteps="shifted")).sample_t(20_000, generator(), "cpu")
    assert torch.equal(shifted, (share * N).floor().clamp(max=N - 1))
    assert shifted.mean() > 650


def test_a_share_of_the_way_is_a_level_and_the_ends_are_levels_too() -> None:
    shares = torch.tensor([0.0, 0.125, 0.4999, 0.5, 0.875, 0.9999, 1.0])
    assert ddpm().time_at(shares).tolist() == [0, 125, 499, 500, 875, 999, 999]


def test_the_same_seed_draws_the_same_and_no_global_state_is_touched() -> None:
    before = torch.get_rng_state()
    first, again, other = (ddpm().sample_t(50, generator(seed), "cpu") for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# --- zero terminal SNR ----------------------------------------------------------------------------------------------


def test_zero_terminal_snr_is_diffusers_own_rescaling() -> None:
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = zero_terminal(alpha_bars().double())
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=0, atol=1e-6)
    assert ours[-1] == 0
    assert ours[0].item() == pytest.approx(alpha_bars()[0].item(), rel=1e-12)


def test_with_zero_terminal_snr_the_last_x_t_is_noise_alone_and_the_target_is_the_data() -> None:
    x_0, noise, noised = all_noised(ddpm("v_prediction", zero_terminal_snr=True))
    assert torch.equal(noised.x_t[-1], noise[-1])
    assert torch.equal(noised.target[-1], -x_0[-1])
    _, noise, plain = all_noised(ddpm("v_prediction"))
    assert not torch.equal(plain.x_t[-1], noise[-1]), "without it, some of the data is left"
    assert torch.isfinite(noised.weight).all()
    assert noised.weight[-1] == 0, "Min-SNR's closed form"
    assert ddpm("v_prediction", zero_terminal_snr=True, snr_gamma=0).weight(EVERY_T)[-1] == 1


@pytest.mark.parametrize(
    ("predicts", "options", "words"),
    [
        ("epsilon", {}, "the base predicts the noise, but objective.zero_terminal_snr makes"),
        ("v_prediction", {"prediction": "epsilon"}, "objective.prediction is epsilon, but objective.zero_terminal_snr"),
    ],
)
def test_epsilon_with_zero_terminal_snr_is_refused_since_pure_noise_says_nothing(
    predicts: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=f"{words}.*set objective.prediction v, or leave"):
        ddpm(predicts, zero_terminal_snr=True, **options)


def test_a_base_whose_schedule_ends_in_pure_noise_is_as_it_is_and_epsilon_on_it_is_refused() -> None:
    levels = zero_terminal(alpha_bars().double()).float()
    plain, asked = ddpm("v_prediction", levels), ddpm("v_prediction", levels, zero_terminal_snr=True)
    assert torch.equal(all_noised(plain)[2].x_t, all_noised(asked)[2].x_t)
    assert plain.scheduler == {}
    with pytest.raises(UserError, match=r"the base's schedule has .* pure noise.*set objective.prediction v$"):
        ddpm("epsilon", levels)


# --- painting with what was trained so ------------------------------------------------------------------------------


def test_diffusers_scheduler_is_told_what_training_changed_and_nothing_else() -> None:
    assert ddpm("epsilon").scheduler == ddpm("v_prediction").scheduler == {}
    assert ddpm("v_prediction", prediction="epsilon").scheduler == {"prediction_type": "epsilon"}
    assert ddpm("epsilon", prediction="v", zero_terminal_snr=True).scheduler == {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    }  # fmt: skip


def test_what_another_kind_of_objective_would_ask_for_changes_no_scheduler() -> None:
    assert ObjectiveOptions(prediction="v", zero_terminal_snr=True).scheduler("flow") == {}


def test_a_card_is_told_what_was_trained_and_of_the_defaults_what_matters() -> None:
    plain, changed = ObjectiveOptions(), ObjectiveOptions("shifted", weighting="cosmap", prediction="v", snr_gamma=0)
    assert plain.facts("flow") == {"Timesteps": "logit_normal"}
    assert plain.facts("ddpm") == {"Timesteps": "uniform", "Min-SNR gamma": "5"}
    assert changed.facts("flow") == {"Timesteps": "shifted", "Loss weights": "cosmap"}
    assert changed.facts("ddpm") == {"Timesteps": "shifted", "Prediction": "v"}
    assert ObjectiveOptions(zero_terminal_snr=True).facts("ddpm")["Noise levels"] == "zero terminal SNR"


@pytest.mark.parametrize(
    "options", [{}, {"prediction": "v"}, {"prediction": "v", "zero_terminal_snr": True}], ids=lambda each: str(each)
)
def test_diffusers_ddim_with_these_settings_walks_from_noise_to_x_0(options: dict[str, Any]) -> None:
    """A model that knows x_0 and predicts what the objective asks for, painted by a scheduler of the base's
    configuration: with settings that did not fit, it would end elsewhere."""
    objective = ddpm(**options)
    config = diffusers.DDIMScheduler(**STABLE_DIFFUSION, set_alpha_to_one=True).config
    painter = diffusers.DDIMScheduler.from_config(config, **objective.scheduler)
    painter.set_timesteps(10)
    x_0, x_t = latents(1, 1), latents(2, 1)
    if options.get("zero_terminal_snr"):
        assert painter.timesteps[0] == N - 1, "the level of pure noise is visited"
    for t in painter.timesteps:
        signal, sigma = (rate.view(1, 1, 1, 1) for rate in objective.rates(t.float()[None]))
        noise = (x_t - signal * x_0) / sigma
        x_t = painter.step(objective.target(x_0, noise, signal, sigma), t, x_t).prev_sample
    torch.testing.assert_close(x_t, x_0, rtol=0, atol=1e-4)


def test_a_trained_run_is_painted_with_the_scheduler_that_its_training_changed(tmp_path: Path) -> None:
    sd15 = families.get("sd15")
    model = ModelFolder("mine", None, sd15.tiny(tmp_path / "model"))
    # As SD 1.5 comes: PNDM knows nothing of zero terminal SNR.
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, **STABLE_DIFFUSION}
    (model.path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((model.path / "model_index.json").read_text())
    (model.path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "PNDMScheduler"]}))
    made = sd15.make_controlnet(model, 0, 0, "copy", torch.float32)
    made.save_pretrained(tmp_path / "controlnet")  # type: ignore[operator]
    paint = sd15.open_painter(model, tmp_path / "controlnet", "cpu", torch.float32)
    drawing = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def painted(scheduler: dict[str, Any]) -> NDArray[np.uint8]:
        return paint(Order([drawing], ["a box"], [5], 3, 7.5, 1.0, 77, scheduler=scheduler))[0]

    changes = ddpm("epsilon", prediction="v", zero_terminal_snr=True).scheduler
    plain, changed, plain_again = painted({}), painted(changes), painted({})
    assert np.array_equal(plain, plain_again)
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        model.path, controlnet=diffusers.ControlNetModel.from_pretrained(tmp_path / "controlnet"), safety_checker=None,
    )  # fmt: skip
    assert isinstance(theirs.scheduler, diffusers.PNDMScheduler)
    theirs.scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    drawn = torch.Generator().manual_seed(5)
    [expected] = theirs("a box", Image.fromarray(drawing), 64, 64, 3, guidance_scale=7.5, generator=drawn).images
    assert np.array_equal(changed, np.asarray(expected))
    assert not np.array_equal(changed, plain)


def test_sampling_from_a_run_asks_for_that_scheduler_but_not_without_control(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's weights are another family's, and nothing is painted: only what is asked for counts."""
    sd15 = families.get("sd15")
    model = sd15.tiny(tmp_path / "model")
    run = make_run(tmp_path / "run", tiny_model, steps=(2,), family="sd15")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "model": {"name": str(model), "revision": None}}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["objective"] |= {"prediction": "v", "zero_terminal_snr": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    orders: list[Order] = []

    def paint(order: Order) -> list[NDArray[np.uint8]]:
        orders.append(order)
        return order.drawings

    monkeypatch.setattr(type(sd15), "open_painter", lambda *_: paint)
    Image.new("RGB", (64, 64)).save(tmp_path / "drawing.png")
    options = SampleConfig(str(run), image=(str(tmp_path / "drawing.png"),), prompt=("a box",), device="cpu")
    assert sample(options) == 0
    asked = {order.scale: dict(order.scheduler) for order in orders}
    assert asked == {1.0: ddpm("epsilon", prediction="v", zero_terminal_snr=True).scheduler, 0.0: {}}
    assert {order.guidance for order in orders} == {7.5}, "the family's own"


# --- which objective a family has -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """As much of a family as an objective asks for."""

    objective: Kind

    def noise_schedule(self, model: ModelFolder | None = None) -> torch.Tensor:
        assert self.objective == "ddpm", "flow matching has no noise levels"
        return alpha_bars()

    def prediction_type(self, model: ModelFolder | None = None) -> PredictionType:
        return "v_prediction"


@pytest.mark.parametrize("name", families.names())
def test_every_family_s_default_base_has_an_objective_without_being_on_this_machine(name: str) -> None:
    made = make(ObjectiveOptions(), families.get(name))
    assert made.kind == families.get(name).objective
    t = made.sample_t(B, generator(), "cpu")
    assert made.loss(latents(3), made.noise(latents(1), t, generator())).shape == (B,)


@pytest.mark.parametrize("changes", [
    {}, {"beta_schedule": "linear"}, {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
], ids=lambda each: str(each))  # fmt: skip
def test_the_noise_levels_are_those_of_the_model_s_own_scheduler(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = families.get("sd15").tiny(tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    objective = make(ObjectiveOptions(snr_gamma=0), families.get("sd15"), ModelFolder(str(folder), None, folder))
    theirs = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    signal, _ = objective.rates(EVERY_T)
    torch.testing.assert_close(signal**2, theirs.alphas_cumprod, rtol=0, atol=1e-6)
    assert isinstance(objective, DDPM)
    assert objective.predicted == theirs.config.prediction_type
    assert objective.scheduler == {}


def test_noise_levels_that_nobody_here_knows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "sigmoidal"}))
    with pytest.raises(UserError, match=r"its scheduler's noise levels are unknown here.*sigmoidal"):
        make(ObjectiveOptions(), families.get("sd15"), ModelFolder("mine", None, tmp_path))


def test_a_family_says_how_its_bases_were_trained() -> None:
    assert isinstance(make(ObjectiveOptions(), Made("flow")), FlowMatching)
    made = make(ObjectiveOptions(), Made("ddpm"))
    assert isinstance(made, DDPM)
    assert made.predicted == "v_prediction"
