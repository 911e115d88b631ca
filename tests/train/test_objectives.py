"""Flow matching against the closed forms of its papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shared.errors import UserError
from train.objectives import FlowMatching, Noised, Objective, ObjectiveOptions

B, T, C = 4, 6, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(objective: Objective, x_0: torch.Tensor, draw: torch.Generator) -> Noised:
    """Times, then noise, from one generator."""
    return objective.noise(x_0, objective.sample_t(len(x_0), draw, "cpu"), draw)


def latents(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, T, C, generator=generator(seed)).to(dtype)


def flow(**options: Any) -> FlowMatching:
    made = ObjectiveOptions(**options)
    made.check()
    return FlowMatching(made)


# --- x_t and target -------------------------------------------------------------------------------------------------


def test_x_t_is_the_data_at_0_and_the_noise_at_1() -> None:
    x_0, noise = latents(1), latents(2)
    assert torch.equal(flow().noise_at(x_0, torch.zeros(B), noise).x_t, x_0)
    assert torch.equal(flow().noise_at(x_0, torch.ones(B), noise).x_t, noise)


def test_x_t_is_the_straight_line_between_data_and_noise_each_sample_at_its_own_t() -> None:
    x_0, noise, t = latents(1), latents(2), torch.tensor([0.0, 0.25, 0.5, 1.0])
    x_t = flow().noise_at(x_0, t, noise).x_t
    for sample in range(B):
        line = (1 - t[sample]) * x_0[sample] + t[sample] * noise[sample]
        torch.testing.assert_close(x_t[sample], line, rtol=0, atol=0)


def test_the_target_is_the_derivative_of_x_t() -> None:
    x_0, noise, step = latents(1), latents(2), 0.125
    before = flow().noise_at(x_0, torch.full((B,), 0.25), noise)
    after = flow().noise_at(x_0, torch.full((B,), 0.25 + step), noise)
    torch.testing.assert_close((after.x_t - before.x_t) / step, before.target, rtol=0, atol=1e-5)


def test_stepping_from_x_t_along_the_target_reaches_the_data() -> None:
    x_0 = latents()
    noised = drawn(flow(), x_0, generator())
    torch.testing.assert_close(noised.x_t - noised.t.view(B, 1, 1) * noised.target, x_0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_are_as_documented(dtype: torch.dtype) -> None:
    noised = drawn(flow(), latents(dtype=dtype), generator())
    assert (noised.x_t.shape, noised.x_t.dtype) == ((B, T, C), dtype)
    assert (noised.target.shape, noised.target.dtype) == ((B, T, C), torch.float32)
    assert (noised.t.shape, noised.t.dtype) == ((B,), torch.float32)
    assert (noised.weight.shape, noised.weight.dtype) == ((B,), torch.float32)


def test_in_bf16_x_t_is_rounded_only_once() -> None:
    x_0, noise = latents(1, torch.bfloat16), latents(2, torch.bfloat16)
    t = torch.rand(B, generator=generator(3))
    line = (1 - t.double().view(B, 1, 1)) * x_0.double() + t.double().view(B, 1, 1) * noise.double()
    error = (flow().noise_at(x_0, t, noise).x_t.double() - line).abs()
    assert (error <= line.abs() * 2**-8 + 1e-6).all()  # half of bf16's spacing


def test_image_shaped_latents_are_noised_alike() -> None:
    x_0, noise, t = latents(1), latents(2), torch.rand(B, generator=generator(3))
    tokens = flow().noise_at(x_0, t, noise)
    image = flow().noise_at(x_0.view(B, C, 3, 2), t, noise.view(B, C, 3, 2))
    assert torch.equal(image.x_t.reshape(B, T, C), tokens.x_t)
    assert torch.equal(flow().loss(image.x_t, image), flow().loss(tokens.x_t, tokens))


# --- randomness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "mode", "shifted"])
def test_the_same_seed_draws_the_same_and_another_seed_does_not(timesteps: str) -> None:
    x_0, objective = latents(), flow(timesteps=timesteps)
    first, again, other = (drawn(objective, x_0, generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(first.t, again.t)
    assert torch.equal(first.x_t, again.x_t)
    assert not torch.equal(first.t, other.t)
    assert not torch.equal(first.target, other.target)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn(flow(), latents(), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_at_drawn_times_equals_noise_at_with_that_noise() -> None:
    x_0, objective = latents(), flow()
    noised = drawn(objective, x_0, generator(5))
    by_hand = generator(5)
    t = objective.sample_t(B, by_hand, "cpu")
    given = objective.noise_at(x_0, t, torch.randn(B, T, C, generator=by_hand))
    for field in dataclasses.fields(Noised):
        assert torch.equal(getattr(noised, field.name), getattr(given, field.name))


def test_one_seed_means_one_noise_whatever_the_dtype() -> None:
    x_0 = torch.zeros(B, T, C)
    full, half = drawn(flow(), x_0, generator(5)), drawn(flow(), x_0.bfloat16(), generator(5))
    assert torch.equal(full.t, half.t)
    assert torch.equal(full.target.bfloat16().float(), half.target)


# --- distributions of t ---------------------------------------------------------------------------------------------

N = 40_000
KS_LIMIT = 1.63 / math.sqrt(N)
"""A correct sampler exceeds this Kolmogorov-Smirnov distance with 1 % of the seeds; the seed is fixed."""


def ks_distance(t: torch.Tensor, cdf: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The largest distance between the drawn and the analytic distribution function."""
    expected = cdf(t.double().sort().values)
    rank = torch.arange(1, len(t) + 1, dtype=torch.float64) / len(t)
    return torch.maximum(rank - expected, expected - rank + 1 / len(t)).max().item()


def logit_normal_cdf(mean: float, std: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: 0.5 * (1 + torch.erf((torch.logit(t) - mean) / (std * math.sqrt(2))))


def mode_cdf(scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """t falls from 1 to 0 as u rises, so P(t' <= t) = 1 - u(t), with u(t) found by bisection."""

    def cdf(t: torch.Tensor) -> torch.Tensor:
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(50):
            u = (low + high) / 2
            above = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u) > t
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1 - low

    return cdf


DISTRIBUTIONS: list[tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
    ({"timesteps": "uniform"}, lambda t: t),
    ({"timesteps": "logit_normal"}, logit_normal_cdf(0, 1)),
    ({"timesteps": "logit_normal", "logit_mean": 1.2, "logit_std": 0.7}, logit_normal_cdf(1.2, 0.7)),
    ({"timesteps": "mode"}, mode_cdf(1.29)),
    ({"timesteps": "mode", "mode_scale": -0.8}, mode_cdf(-0.8)),
    ({"timesteps": "mode", "mode_scale": 0.0}, lambda t: t),
    ({"timesteps": "shifted"}, logit_normal_cdf(math.log(3), 1)),
    (
        {"timesteps": "shifted", "shift": 0.5, "logit_mean": 0.3, "logit_std": 1.4},
        logit_normal_cdf(0.3 + math.log(0.5), 1.4),
    ),
]


@pytest.mark.parametrize(("options", "cdf"), DISTRIBUTIONS, ids=[str(options) for options, _ in DISTRIBUTIONS])
def test_t_follows_its_analytic_distribution(
    options: dict[str, Any], cdf: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    t = flow(**options).sample_t(N, generator(), "cpu")
    assert (t.shape, t.dtype) == ((N,), torch.float32)
    assert 0 <= t.min() <= t.max() <= 1
    assert ks_distance(t, cdf) < KS_LIMIT


def test_the_distributions_can_be_told_apart_by_this_test() -> None:
    t = flow(timesteps="logit_normal").sample_t(N, generator(), "cpu")
    assert all(ks_distance(t, cdf) > 3 * KS_LIMIT for options, cdf in DISTRIBUTIONS if options != DISTRIBUTIONS[1][0])


def test_mode_prefers_the_middle_above_0_and_the_ends_below() -> None:
    def middle(scale: float) -> float:
        t = flow(timesteps="mode", mode_scale=scale).sample_t(N, generator(), "cpu")
        return ((t - 0.5).abs() < 0.25).float().mean().item()

    assert middle(1.29) > 0.55 > 0.45 > middle(-0.8)


def test_shifted_is_equation_23_of_the_same_draw() -> None:
    plain = flow(timesteps="logit_normal").sample_t(100, generator(), "cpu")
    shifted = flow(timesteps="shifted", shift=3.0).sample_t(100, generator(), "cpu")
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert (shifted > plain).all()


def test_extreme_draws_stay_within_0_and_1() -> None:
    for options in (
        {"timesteps": "logit_normal", "logit_std": 50.0},
        {"timesteps": "shifted", "logit_std": 50.0, "shift": 100.0},
        {"timesteps": "mode", "mode_scale": -1.0},
    ):
        t = flow(**options).sample_t(N, generator(), "cpu")
        assert torch.isfinite(t).all()
        assert 0 <= t.min() <= t.max() <= 1


# --- weights and loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        ("none", lambda t: 1.0),
        ("sigma_sqrt", lambda t: max(t, 1e-3) ** -2),
        ("cosmap", lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)),
    ],
)
def test_weights_follow_their_formulas_and_stay_finite(weighting: str, formula: Callable[[float], float]) -> None:
    t = torch.tensor([0.0, 1e-4, 0.1, 0.5, 0.9, 1.0])
    expected = torch.tensor([formula(value) for value in t.tolist()])
    x_0 = torch.zeros(len(t), T, C)
    torch.testing.assert_close(flow(weighting=weighting).noise_at(x_0, t, x_0).weight, expected)


def test_the_weight_at_cosmap_integrates_to_one() -> None:
    t = (torch.arange(10_000) + 0.5) / 10_000
    assert flow(weighting="cosmap").weight(t).mean().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_the_loss_is_each_sample_s_weighted_mean_squared_error(weighting: str) -> None:
    objective = flow(weighting=weighting)
    noised, prediction = drawn(objective, latents(), generator()), latents(9)
    loss = objective.loss(prediction, noised)
    assert (loss.shape, loss.dtype) == ((B,), torch.float32)
    for sample in range(B):
        errors = [
            (prediction[sample, token, channel] - noised.target[sample, token, channel]).item() ** 2
            for token in range(T)
            for channel in range(C)
        ]
        assert loss[sample].item() == pytest.approx(sum(errors) / (T * C) * noised.weight[sample].item(), rel=1e-5)


def test_a_perfect_prediction_loses_nothing_and_a_sample_s_loss_is_its_own() -> None:
    noised = drawn(flow(), latents(), generator())
    assert torch.equal(flow().loss(noised.target, noised), torch.zeros(B))
    prediction = noised.target.clone()
    prediction[2] += 1
    assert flow().loss(prediction, noised).tolist() == pytest.approx([0, 0, 1, 0], abs=1e-5)


def test_a_bf16_prediction_is_compared_in_float32_and_gets_gradients_in_bf16() -> None:
    noised = drawn(flow(), latents(dtype=torch.bfloat16), generator())
    prediction = latents(9, torch.bfloat16).requires_grad_()
    loss = flow().loss(prediction, noised)
    assert torch.equal(loss, (prediction.float() - noised.target).square().flatten(1).mean(1))
    loss.mean().backward()
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_caught() -> None:
    x_0 = latents()
    with pytest.raises(AssertionError, match="one t per sample"):
        flow().noise_at(x_0, torch.zeros(B, 1), x_0)
    with pytest.raises(AssertionError, match="noise"):
        flow().noise_at(x_0, torch.zeros(B), x_0[:1])
    with pytest.raises(AssertionError, match="for"):
        flow().loss(x_0[..., :1], drawn(flow(), x_0, generator()))


def test_time_is_the_share_of_the_way_itself_and_needs_no_other_scheduler() -> None:
    shares = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.equal(flow().time_at(shares), shares)
    assert flow().scheduler == {}


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timesteps": "logitnormal"}, "did you mean 'logit_normal'"),
        ({"weighting": "cosmpa"}, "did you mean 'cosmap'"),
        ({"logit_mean": math.nan}, "logit_mean must be a finite number"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
        ({"logit_std": math.inf}, "logit_std must be above 0"),
        ({"shift": -3.0}, "shift must be above 0"),
        ({"mode_scale": 1.8}, "mode_scale must be from -1 to 1.75"),
        ({"mode_scale": math.nan}, "mode_scale must be from -1 to 1.75"),
        ({"prediction": "epsilonn"}, "did you mean 'epsilon'"),
        ({"snr_gamma": -5.0}, "snr_gamma must be above 0, or 0 for none"),
        ({"snr_gamma": math.inf}, "snr_gamma must be above 0, or 0 for none"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ObjectiveOptions(**options).check()


def test_the_defaults_are_possible_and_all_in_use() -> None:
    ObjectiveOptions().check()
    assert ObjectiveOptions().unused("flow") == ObjectiveOptions().unused("ddpm") == []


def test_what_one_kind_of_objective_asks_for_is_unused_by_the_other() -> None:
    options = ObjectiveOptions(weighting="cosmap", prediction="v", snr_gamma=0, zero_terminal_snr=True)
    options.check()
    assert options.unused("flow") == ["prediction", "snr_gamma", "zero_terminal_snr"]
    assert options.unused("ddpm") == ["weighting"]


def test_left_alone_t_is_drawn_as_the_base_was_trained() -> None:
    assert torch.equal(
        flow().sample_t(100, generator(), "cpu"), flow(timesteps="logit_normal").sample_t(100, generator(), "cpu")
    )
    changed = ObjectiveOptions(logit_mean=1.0)
    assert (changed.unused("flow"), changed.unused("ddpm")) == ([], ["logit_mean"])


@pytest.mark.parametrize(
    ("timesteps", "unused"),
    [
        ("uniform", ["logit_mean", "logit_std", "mode_scale", "shift"]),
        ("logit_normal", ["mode_scale", "shift"]),
        ("mode", ["logit_mean", "logit_std", "shift"]),
        ("shifted", ["mode_scale"]),
    ],
)
def test_options_without_effect_are_named(timesteps: Any, unused: list[str]) -> None:
    changed: dict[str, Any] = {"logit_mean": 1.0, "logit_std": 2.0, "mode_scale": 0.5, "shift": 2.0}
    x_0 = latents()
    plain = drawn(flow(timesteps=timesteps), x_0, generator())
    assert ObjectiveOptions(timesteps=timesteps, weighting="cosmap", **changed).unused("flow") == unused
    for name, value in changed.items():  # and the claim is true
        noised = drawn(flow(timesteps=timesteps, **{name: value}), x_0, generator())
        assert torch.equal(noised.t, plain.t) == (name in unused)
