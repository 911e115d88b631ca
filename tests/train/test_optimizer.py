"""Updates arrive, state survives: AdamW in both kinds over both dtypes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import UserError
from train import adamw
from train.offload import HostStates
from train.optimizer import Optimizer, OptimizerOptions, Update, learning_rate, stochastic_round_

KINDS = ["adamw", "adamw8bit"]
DTYPES = [torch.float32, torch.bfloat16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameter(*shape: int, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter((torch.randn(shape, generator=generator(seed)) * std).to(dtype))


def network(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """Two tensors large enough for 8-bit states, two that are not, and one that never gets a gradient."""
    return {
        "blocks.0.weight": parameter(72, 64, seed=1, dtype=dtype),
        "blocks.0.bias": parameter(72, seed=2, dtype=dtype),
        "blocks.1.weight": parameter(64, 65, seed=3, dtype=dtype),
        "scale": parameter(seed=4, dtype=dtype),
        "idle": parameter(5, seed=5, dtype=dtype),
    }


def set_gradients(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    draw = generator(seed)
    for name, weight in parameters.items():
        if name != "idle":
            weight.grad = torch.randn(weight.shape, generator=draw).to(weight.dtype)


def options(**changes: Any) -> OptimizerOptions:
    made = OptimizerOptions(**changes)
    made.check()
    return made


def run(optimizer: Optimizer, steps: range, draw: torch.Generator) -> None:
    for step in steps:
        set_gradients(optimizer.parameters, seed=100 + step)
        optimizer.step(1e-3 / (1 + step), draw)
        optimizer.zero_grad()


# --- stochastic rounding --------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_16_random_bits_added_and_16_bits_cut_off() -> None:
    x = torch.randn(37, 11, generator=generator(1)) * torch.logspace(-30, 30, 11)
    noise = torch.randint(0, 65536, x.shape, generator=generator(2), dtype=torch.int32)
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    rounded = stochastic_round_(x.clone(), generator(2))
    assert (rounded.shape, rounded.dtype) == (x.shape, torch.bfloat16)
    assert torch.equal(rounded.float().view(torch.int32).long() & 0xFFFFFFFF, (bits + noise) & 0xFFFF0000)


def test_stochastic_rounding_is_right_on_average_and_only_ever_a_neighbour() -> None:
    values = torch.tensor([0.02, -0.02, 0.0200001, 1.0039, -3.1e-5, 1234.5])
    draws = 100_000
    rounded = stochastic_round_(values.expand(draws, -1).contiguous(), generator()).double()
    bits = values.view(torch.int32)
    down = (bits & -65536).view(torch.float32).double()
    up = ((bits & -65536) + 65536).view(torch.float32).double()
    assert ((rounded == down) | (rounded == up)).all()
    standard_error = (up - down).abs() / 2 / math.sqrt(draws)
    assert ((rounded.mean(0) - values.double()).abs() < 4 * standard_error).all()


def test_stochastic_rounding_never_changes_a_value_that_bf16_holds() -> None:
    every_bf16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every_bf16[~every_bf16.isnan()]  # infinities, both zeros and subnormal numbers among them
    for seed in range(8):
        rounded = stochastic_round_(numbers.float(), generator(seed))
        assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))


def test_stochastic_rounding_keeps_every_nan_a_nan_and_infinities_infinite() -> None:
    odd = [0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF, -1, -0x7FFFFF, -0x400000, 0x7F800000, -0x800000]
    for seed in range(8):
        rounded = stochastic_round_(torch.tensor(odd, dtype=torch.int32).view(torch.float32), generator(seed))
        assert rounded[:7].isnan().all()
        assert rounded[7:].tolist() == [math.inf, -math.inf]


def test_stochastic_rounding_repeats_with_its_seed_and_handles_scalars_and_nothing() -> None:
    x = torch.randn(1000, generator=generator(1))
    assert torch.equal(stochastic_round_(x.clone(), generator(3)), stochastic_round_(x.clone(), generator(3)))
    assert not torch.equal(stochastic_round_(x.clone(), generator(3)), stochastic_round_(x.clone(), generator(4)))
    assert stochastic_round_(torch.tensor(1.5), generator()).item() == 1.5
    assert stochastic_round_(torch.empty(0, 3), generator()).shape == (0, 3)


# --- updates arrive -------------------------------------------------------------------------------------------------


def kept_drift(num_steps: int, **changes: Any) -> float:
    """The share of `num_steps` equal updates of 2e-5 that bf16 weights of std 0.02 have made in the end."""
    weight = parameter(64, 64, dtype=torch.bfloat16)
    start = weight.detach().double().clone()
    optimizer = Optimizer(options(weight_decay=0, **changes), {"weight": weight})
    direction = torch.randn(64, 64, generator=generator(1)).sign()
    draw = generator(2)
    weight.grad = direction.bfloat16()
    for _ in range(num_steps):
        optimizer.step(2e-5, draw)
    return ((start - weight.detach().double()) * direction).mean().item() / (num_steps * 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_keeps_a_drift_of_1000_small_updates(kind: str) -> None:
    assert kept_drift(1000, kind=kind) == pytest.approx(1, abs=0.03)


def test_rounding_to_nearest_loses_most_of_that_drift() -> None:
    assert kept_drift(1000, kind="adamw", rounding="nearest") < 0.2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_converge_on_least_squares(kind: str, dtype: torch.dtype) -> None:
    inputs, solution = torch.randn(256, 64, generator=generator(1)), parameter(64, 64, seed=2, std=1.0).detach()
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    bias = torch.nn.Parameter(torch.zeros(64, dtype=dtype))
    optimizer = Optimizer(options(kind=kind, weight_decay=0, beta2=0.99), {"weight": weight, "bias": bias})
    schedule = options(learning_rate=0.1, schedule="cosine", warmup_steps=10)
    draw = generator(3)
    for step in range(300):
        loss = (inputs @ weight.float() + bias.float() - inputs @ solution - 1).square().mean()
        loss.backward()
        optimizer.step(learning_rate(schedule, step, 300), draw)
        optimizer.zero_grad()
    assert loss.item() < (1e-6 if dtype == torch.float32 else 2e-3)  # from 63; bf16 rounded to nearest: 6e-3


def test_float32_adamw_is_torch_s_adamw() -> None:
    ours, reference = network(torch.float32), network(torch.float32)
    optimizer = Optimizer(options(kind="adamw", beta2=0.95, weight_decay=0.1), ours)
    torch_s = torch.optim.AdamW(reference.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(reference, step)
        optimizer.step(1e-3, None)
        torch_s.step()
    for name in ours:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-6, atol=1e-8)


def test_float32_adamw8bit_is_bitsandbytes_s_and_small_tensors_are_exact_adamw() -> None:
    import bitsandbytes

    large, small = parameter(64, 64), parameter(64, 63)
    reference_large, reference_small = parameter(64, 64), parameter(64, 63)
    optimizer = Optimizer(options(), {"large": large, "small": small})
    references = [bitsandbytes.optim.AdamW8bit([reference_large], lr=1e-3), torch.optim.AdamW([reference_small])]
    for step in range(5):
        for weight, reference in ((large, reference_large), (small, reference_small)):
            weight.grad = torch.randn(weight.shape, generator=generator(step))
            reference.grad = weight.grad.clone()
        optimizer.step(1e-3, None)
        for of_library in references:
            of_library.step()
    assert torch.equal(large, reference_large)
    torch.testing.assert_close(small, reference_small, rtol=1e-6, atol=1e-8)
    assert optimizer.state()[0]["large.state1"].dtype == torch.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_step_is_the_float32_step_rounded_to_a_neighbour(kind: str) -> None:
    half, full = network(torch.bfloat16), network(torch.bfloat16)
    full = {name: torch.nn.Parameter(weight.detach().float()) for name, weight in full.items()}
    set_gradients(half, 1)
    for name, weight in full.items():
        gradient = half[name].grad
        weight.grad = None if gradient is None else gradient.float()
    before = {name: weight.detach().clone() for name, weight in half.items()}
    Optimizer(options(kind=kind), half).step(1e-3, generator())
    Optimizer(options(kind=kind), full).step(1e-3, None)
    for name, weight in half.items():
        bits = full[name].detach().view(-1).view(torch.int32) & -65536
        down, up = bits.view(torch.float32), (bits + 65536).view(torch.float32)
        stepped = weight.detach().float().view(-1)
        assert ((stepped == down) | (stepped == up)).all()
        assert torch.equal(weight, before[name]) == (name == "idle")


def test_weights_of_both_dtypes_are_trained_together() -> None:
    weights = {"half": parameter(8, 8, dtype=torch.bfloat16), "full": parameter(8, 8)}
    set_gradients(weights, 1)
    share = Optimizer(options(kind="adamw"), weights).step(1e-2, generator(), share_updated=True)
    assert share is not None
    assert share.item() == 1.0
    assert (weights["half"].dtype, weights["full"].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transposed_weight_is_stepped_as_any_other(kind: str) -> None:
    plain = parameter(64, 80, dtype=torch.bfloat16)
    transposed = torch.nn.Parameter(plain.detach().t().contiguous().t())
    gradient = torch.randn(64, 80, generator=generator(1)).bfloat16()
    for weight in (plain, transposed):
        weight.grad = gradient.clone()
        Optimizer(options(kind=kind), {"weight": weight}).step(1e-2, generator(2))
    assert torch.equal(plain, transposed)


def test_float32_copies_live_only_during_the_step_and_only_one_bucket_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = {f"{n}": parameter(32, 32, seed=n, dtype=torch.bfloat16) for n in range(10)}
    weights["largest"] = parameter(64, 64, dtype=torch.bfloat16)
    made = Optimizer(options(kind="adamw"), weights)
    alive: list[weakref.ref[torch.Tensor]] = []
    numels: list[int] = []
    update = adamw.update

    def watched(
        options: Any, pieces: Any, values: list[torch.Tensor], gradients: list[torch.Tensor], *rest: Any
    ) -> None:
        assert not any(copy() is not None for copy in alive)
        alive.extend(weakref.ref(copy) for copy in (*values, *gradients))
        numels.append(sum(value.numel() for value in values))
        update(options, pieces, values, gradients, *rest)

    monkeypatch.setattr(adamw, "update", watched)
    set_gradients(weights, 1)
    made.step(1e-3, generator())
    assert sum(numels) == sum(weight.numel() for weight in weights.values())
    assert max(numels) == weights["largest"].numel()
    assert len(numels) == 4  # 4 of the small ones are as large as the largest
    assert not any(copy() is not None for copy in alive)


def test_the_share_of_changed_weights_tells_lost_updates_from_made_ones() -> None:
    def share(learning_rate: float, **changes: Any) -> float:
        weight = parameter(64, 64, dtype=torch.bfloat16)
        weight.grad = torch.randn(64, 64, generator=generator(1)).bfloat16()
        optimizer = Optimizer(options(kind="adamw", weight_decay=0, **changes), {"weight": weight})
        before = weight.detach().clone()
        changed = optimizer.step(learning_rate, generator(), share_updated=True)
        assert changed is not None
        assert changed.item() == pytest.approx((before != weight).float().mean().item())
        return changed.item()

    assert share(1.0) == 1.0
    assert share(2e-5, rounding="nearest") < share(2e-5)


def test_the_share_counts_all_weights_and_is_computed_only_on_request() -> None:
    weights = {"moving": parameter(30), "idle": parameter(70)}
    optimizer = Optimizer(options(kind="adamw"), weights)
    set_gradients(weights, 1)
    assert optimizer.step(1e-2, None) is None
    share = optimizer.step(1e-2, None, share_updated=True)
    assert share is not None
    assert share.item() == pytest.approx(0.3)
    optimizer.zero_grad()
    assert weights["moving"].grad is None
    nothing = optimizer.step(1e-2, None, share_updated=True)
    assert nothing is not None
    assert nothing.item() == 0


# --- clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_returns_the_global_norm_and_scales_down_to_the_limit(dtype: torch.dtype) -> None:
    weights = network(dtype)
    set_gradients(weights, 1)
    optimizer = Optimizer(options(), weights)
    before = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in before.values()))
    norm = optimizer.clip(1.0)
    assert (norm.shape, norm.dtype) == ((), torch.float32)
    assert norm.item() == pytest.approx(expected, rel=1e-5)  # also for bf16 gradients: summed in float32
    for name, gradient in before.items():
        torch.testing.assert_close(weights[name].grad, (gradient.double() / expected).to(dtype))
    assert optimizer.clip(0).item() == pytest.approx(1, rel=2e-3)


def test_clip_leaves_small_gradients_and_with_0_all_gradients() -> None:
    weights = network(torch.float32)
    set_gradients(weights, 1)
    optimizer = Optimizer(options(), weights)
    before = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    optimizer.clip(0)
    optimizer.clip(1e9)
    assert all(torch.equal(gradient, weights[name].grad) for name, gradient in before.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clip_shows_a_gradient_that_is_not_finite(bad: float) -> None:
    weights = network(torch.bfloat16)
    set_gradients(weights, 1)
    gradient = weights["blocks.0.bias"].grad
    assert gradient is not None
    gradient[3] = bad
    assert not torch.isfinite(Optimizer(options(), weights).clip(1.0))


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_bitwise_the_training_that_never_stopped(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    through, draw = Optimizer(options(kind=kind), network(dtype)), generator(9)
    run(through, range(10), draw)

    stopped, draw = Optimizer(options(kind=kind), network(dtype)), generator(9)
    run(stopped, range(4), draw)
    tensors, meta = stopped.state()
    safetensors.torch.save_file(tensors, tmp_path / "optimizer.safetensors")  # so: no pickle, no shared memory
    (tmp_path / "optimizer.json").write_text(json.dumps(meta))
    weights = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in stopped.parameters.items()}
    position = draw.get_state()
    run(stopped, range(4, 6), draw)  # what happens to the stopped run afterwards does not matter

    resumed, draw = Optimizer(options(kind=kind), weights), torch.Generator()
    draw.set_state(position)
    loaded = safetensors.torch.load_file(tmp_path / "optimizer.safetensors")
    resumed.load_state(loaded, json.loads((tmp_path / "optimizer.json").read_text()))
    run(resumed, range(4, 10), draw)

    for name, weight in through.parameters.items():
        assert torch.equal(weight, resumed.parameters[name]), name
    (expected, expected_meta), (actual, actual_meta) = through.state(), resumed.state()
    assert expected_meta == actual_meta
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_a_copy_that_training_does_not_touch_on_either_side(kind: str, dtype: torch.dtype) -> None:
    first, second = Optimizer(options(kind=kind), network(dtype)), Optimizer(options(kind=kind), network(dtype))
    run(first, range(2), generator())
    tensors, meta = first.state()
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    second.load_state(tensors, meta)
    run(first, range(2, 4), generator())
    run(second, range(2, 4), generator())
    assert all(torch.equal(kept[key], tensors[key]) for key in kept)


def test_state_names_its_parts_and_a_parameter_without_gradient_has_none() -> None:
    optimizer = Optimizer(options(), network(torch.bfloat16))
    assert optimizer.state()[0] == {}
    run(optimizer, range(3), generator())
    tensors, meta = optimizer.state()
    of_large = {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
    of_small = {"step", "exp_avg", "exp_avg_sq"}
    names = {"blocks.0.weight": of_large, "blocks.0.bias": of_small, "blocks.1.weight": of_large, "scale": of_small}
    assert tensors.keys() == {f"{name}.{key}" for name, keys in names.items() for key in keys}
    assert tensors["blocks.0.weight.state1"].shape == (72, 64)
    assert meta["kind"] == "adamw8bit"
    assert meta["parameters"]["blocks.0.weight"]["numbers"] == {"step": 3}
    assert meta["parameters"]["idle"] == {"shape": [5], "tensors": [], "numbers": {}}


def test_loading_replaces_state_that_is_there_and_keeps_this_run_s_settings() -> None:
    fresh, used = Optimizer(options(), network(torch.float32)), Optimizer(options(beta1=0.5), network(torch.float32))
    run(used, range(3), generator())
    used.load_state(*fresh.state())
    assert used.state()[0] == {}
    run(fresh, range(3), generator())
    used.load_state(*fresh.state())
    mean = used.state()[0]["scale.exp_avg"]
    set_gradients(used.parameters, 1)
    gradient = used.parameters["scale"].grad
    used.step(1e-3, None)
    torch.testing.assert_close(used.state()[0]["scale.exp_avg"], 0.5 * mean + 0.5 * gradient)  # type: ignore[operator]


def saved() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    optimizer = Optimizer(options(kind="adamw"), network(torch.float32))
    run(optimizer, range(1), generator())
    return optimizer.state()


def test_state_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"is of kind 'adamw', but optimizer\.kind is 'adamw8bit'"):
        Optimizer(options(kind="adamw8bit"), network(torch.float32)).load_state(*saved())


def test_state_with_a_master_copy_is_refused_without_one_and_the_other_way_round() -> None:
    with pytest.raises(UserError, match=r"is without float32 master weights, but optimizer\.master is true"):
        Optimizer(options(kind="adamw", master=True), network(torch.float32)).load_state(*saved())
    tensors, meta = saved()
    with pytest.raises(UserError, match=r"is with float32 master weights, but optimizer\.master is false"):
        Optimizer(options(kind="adamw"), network(torch.float32)).load_state(tensors, meta | {"master": True})


def test_state_of_another_8_bit_code_or_size_is_refused_before_anything_is_changed() -> None:
    made = Optimizer(options(), network(torch.bfloat16))
    run(made, range(1), generator())
    for key in ("blocks.0.weight.qmap1", "blocks.0.weight.absmax2", "scale.step"):
        tensors, meta = made.state()
        tensors[key] = torch.cat([tensors[key].view(-1), torch.ones(1)])
        fresh = Optimizer(options(), network(torch.bfloat16))
        with pytest.raises(UserError, match=f"is not as torch or bitsandbytes keep it here: {key}"):
            fresh.load_state(tensors, meta)
        assert fresh.state()[0] == {}


def test_state_of_other_parameters_is_refused_and_they_are_named() -> None:
    fewer = network(torch.float32)
    del fewer["scale"]
    with pytest.raises(UserError, match="of parameters that are not trained here: scale"):
        Optimizer(options(kind="adamw"), fewer).load_state(*saved())
    more = network(torch.float32) | {f"more.{n}": parameter(3) for n in range(5)}
    with pytest.raises(UserError, match=r"missing for parameters: more\.0, more\.1, more\.2 and 2 more"):
        Optimizer(options(kind="adamw"), more).load_state(*saved())
    other = network(torch.float32) | {"scale": parameter(2)}
    with pytest.raises(UserError, match=r"of another shape for: scale \(\), here \(2,\)"):
        Optimizer(options(kind="adamw"), other).load_state(*saved())


def test_damaged_state_is_refused_before_anything_is_changed() -> None:
    tensors, meta = saved()
    optimizer = Optimizer(options(kind="adamw"), network(torch.float32))
    del tensors["scale.exp_avg"]
    tensors["surplus"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"missing or unexpected: scale\.exp_avg, surplus"):
        optimizer.load_state(tensors, meta)
    assert optimizer.state()[0] == {}


# --- master weights, host states, released gradients ------------------------------------------------------------------

CHUNK = 4096
"""Small, so that the test's weights are cut in pieces; from 256 values on they count as large."""


class Net(torch.nn.Module):
    """Two layers whose weights take several chunks, biases that are small, and one parameter that nothing uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = generator(7)
        self.first = torch.nn.Linear(80, 120, dtype=dtype)
        self.second = torch.nn.Linear(120, 70, dtype=dtype)
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))
        self.idle = torch.nn.Parameter(torch.ones(300, dtype=dtype))
        with torch.no_grad():
            for weight in (*self.first.parameters(), *self.second.parameters()):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))

    def loss(self, seed: int) -> torch.Tensor:
        inputs = torch.randn(32, 80, generator=generator(seed)).to(self.scale.dtype)
        hidden = torch.nn.functional.gelu(self.first(inputs))
        return (self.scale * self.second(hidden)).float().square().mean()


def trained(
    dtype: torch.dtype, steps: range = range(5), net: Net | None = None, **changes: Any
) -> tuple[Net, Optimizer]:
    """A net after `steps` training steps, and its optimizer."""
    net = net or Net(dtype)
    made = Optimizer(options(**changes), dict(net.named_parameters()), chunk_numel=CHUNK)
    train_on(net, made, steps)
    return net, made


def train_on(net: Net, made: Optimizer, steps: range) -> list[Update]:
    updates = []
    for step in steps:
        made.begin(1e-3 / (1 + step), 1000 + step, measure=True)
        net.loss(step).backward()
        updates.append(made.finish(made.norm().item()))
    return updates


def assert_same(one: tuple[Net, Optimizer], other: tuple[Net, Optimizer]) -> None:
    """Weights and states, to the bit."""
    for (name, weight), theirs in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        assert torch.equal(weight, theirs), name
    (tensors, meta), (their_tensors, their_meta) = one[1].state(), other[1].state()
    assert meta == their_meta
    assert tensors.keys() == their_tensors.keys()
    assert all(torch.equal(tensor, their_tensors[key]) for key, tensor in tensors.items())


VARIANTS = [
    pytest.param(kind, dtype, master, id=f"{kind}-{str(dtype)[6:]}-{'master' if master else 'rounded'}")
    for kind in KINDS
    for dtype in DTYPES
    for master in (False, True)
    if not (master and dtype == torch.float32)
]


@pytest.mark.parametrize(("kind", "dtype", "master"), VARIANTS)
def test_states_in_host_memory_give_the_weights_that_states_on_the_device_give_to_the_bit(
    kind: str, dtype: torch.dtype, master: bool
) -> None:
    on_device = trained(dtype, kind=kind, master=master)
    assert_same(on_device, trained(dtype, kind=kind, master=master, states="cpu"))
    start = Net(dtype)
    moved = [not torch.equal(a, b) for a, b in zip(on_device[0].parameters(), start.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 2  # all but the idle one, and perhaps the bf16 scale


@pytest.mark.parametrize("states", ["device", "cpu"])
@pytest.mark.parametrize("clipping", [{"clip_norm": 0.0}, {"clip": "parameter", "clip_norm": 1e-3}])
@pytest.mark.parametrize(("kind", "dtype", "master"), VARIANTS)
def test_released_gradients_give_the_weights_that_kept_ones_give_to_the_bit(
    kind: str, dtype: torch.dtype, master: bool, clipping: dict[str, Any], states: str
) -> None:
    alike: dict[str, Any] = {"kind": kind, "master": master} | clipping
    assert_same(trained(dtype, **alike), trained(dtype, release=True, states=states, **alike))


@pytest.mark.parametrize("release", [False, True])
def test_released_gradients_are_gone_before_the_next_is_there(release: bool) -> None:
    net = Net(torch.bfloat16)
    made = Optimizer(options(release=release, clip_norm=0), dict(net.named_parameters()), chunk_numel=CHUNK)
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.numel() for p in net.parameters() if p.grad is not None))

    for weight in net.parameters():
        weight.register_post_accumulate_grad_hook(count)
    made.begin(1e-3, 0)
    net.loss(0).backward()
    small = net.first.bias.numel() + net.second.bias.numel() + 1
    assert most <= small if release else most == small + net.first.weight.numel() + net.second.weight.numel()
    norm = made.norm()
    made.finish(norm.item())
    plain = Net(torch.bfloat16)
    plain.loss(0).backward()
    assert norm.item() == pytest.approx(Optimizer(options(), dict(plain.named_parameters())).clip(0).item(), rel=1e-5)


def test_a_backward_outside_of_a_training_step_releases_nothing() -> None:
    net, _ = trained(torch.float32, range(0), release=True, clip_norm=0)
    before = [weight.detach().clone() for weight in net.parameters()]
    net.loss(0).backward()
    assert net.first.weight.grad is not None
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_a_second_backward_within_a_step_is_caught_where_gradients_are_released() -> None:
    net = Net(torch.float32)
    made = Optimizer(options(release=True, clip_norm=0), dict(net.named_parameters()), chunk_numel=CHUNK)
    made.begin(1e-3, 0)
    net.loss(0).backward()
    with pytest.raises(AssertionError, match="a second gradient"):
        net.loss(1).backward()


@pytest.mark.parametrize(("kind", "dtype", "master"), VARIANTS)
@pytest.mark.parametrize(("before", "after"), [("device", "cpu"), ("cpu", "device"), ("cpu", "cpu")])
def test_a_run_resumes_to_the_bit_wherever_its_states_were_and_are(
    kind: str, dtype: torch.dtype, master: bool, before: str, after: str, tmp_path: Path
) -> None:
    alike: dict[str, Any] = {"kind": kind, "master": master}
    through = trained(dtype, range(7), **alike)
    net, stopped = trained(dtype, range(3), states=before, **alike)
    tensors, meta = stopped.state()
    safetensors.torch.save_file(tensors, tmp_path / "optimizer.safetensors")
    meta = json.loads(json.dumps(meta))
    weights = {name: weight.detach().clone() for name, weight in net.state_dict().items()}
    train_on(net, stopped, range(3, 4))  # what the stopped run does afterwards does not matter

    resumed = Net(dtype)
    made = Optimizer(options(states=after, **alike), dict(resumed.named_parameters()), chunk_numel=CHUNK)
    resumed.load_state_dict(weights)
    made.load_state(safetensors.torch.load_file(tmp_path / "optimizer.safetensors"), meta)
    train_on(resumed, made, range(3, 7))
    assert_same(through, (resumed, made))


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_copy_moves_as_float32_weights_do_and_the_weights_are_its_nearest(kind: str) -> None:
    half, full = network(torch.bfloat16), network(torch.float32)
    for name, weight in full.items():
        weight.data = half[name].detach().float()
    ours, theirs = Optimizer(options(kind=kind, master=True), half), Optimizer(options(kind=kind), full)
    for step in range(20):
        set_gradients(half, step)
        for name, weight in full.items():
            gradient = half[name].grad
            weight.grad = None if gradient is None else gradient.float()
        ours.step(1e-4, None)
        theirs.step(1e-4, None)
    masters = {key: value for key, value in ours.state()[0].items() if key.endswith(".master")}
    assert masters.keys() == {f"{name}.master" for name in half if name != "idle"}
    for name in set(half) - {"idle"}:
        assert torch.equal(masters[f"{name}.master"], full[name]), name
        assert torch.equal(half[name], full[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_copy_keeps_a_drift_of_1000_small_updates(kind: str) -> None:
    assert kept_drift(1000, kind=kind, master=True) == pytest.approx(1, abs=0.03)


def test_states_in_host_memory_leave_the_device_nothing_between_steps() -> None:
    _, made = trained(torch.bfloat16, kind="adamw", master=True, states="cpu")
    assert isinstance(made._states, HostStates)
    assert not made._states._slots
    assert sum(rest.numel() for rest in made._states._rest) == made.state_bytes
    num_weights = sum(weight.numel() for weight in made.parameters.values())
    assert made.state_bytes == pytest.approx(12 * num_weights, rel=0.05)


@pytest.mark.parametrize(("kind", "dtype", "master"), VARIANTS)
@pytest.mark.parametrize("states", ["device", "cpu"])
def test_a_step_on_the_meta_device_takes_no_memory_and_runs_the_same_way(
    kind: str, dtype: torch.dtype, master: bool, states: str
) -> None:
    with torch.device("meta"):
        net = torch.nn.Linear(1 << 16, 1 << 14, dtype=dtype)  # 2 GiB in bf16
    made = Optimizer(options(kind=kind, master=master, states=states), dict(net.named_parameters()))
    made.begin(1e-3, 1, measure=True)
    net(torch.zeros(2, 1 << 16, dtype=dtype, device="meta")).sum().backward()
    assert made.norm().is_meta
    found = made.finish(1.0)
    assert found.norm is not None
    assert found.norm.is_meta
    assert found.survival is not None
    assert found.survival.update_kept.is_meta
    per_weight = {"adamw": 8.0, "adamw8bit": 2 + 1 / 32}[kind] + 4 * master
    assert made.state_bytes == pytest.approx(per_weight * (1 << 30), rel=1e-3)


def test_in_float32_it_does_not_matter_where_weights_are_cut() -> None:
    nets = []
    for chunk_numel in (CHUNK, 1 << 24):
        net = Net(torch.float32)
        made = Optimizer(options(), dict(net.named_parameters()), chunk_numel=chunk_numel)
        train_on(net, made, range(5))
        nets.append((net, made))
    assert len(nets[0][1]._buckets) > len(nets[1][1]._buckets)
    assert_same(*nets)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_on_the_way_is_clipping_before(kind: str) -> None:
    clipped, before = network(torch.float32), network(torch.float32)
    ours, theirs = (Optimizer(options(kind=kind, clip_norm=0.5), weights) for weights in (clipped, before))
    for step in range(3):
        ours.begin(1e-3, None)
        set_gradients(clipped, step)
        set_gradients(before, step)
        norm = ours.norm()
        assert norm.item() == theirs.clip(0.5).item() > 0.5
        ours.finish(norm.item())
        theirs.step(1e-3, None)
    for name, weight in clipped.items():
        torch.testing.assert_close(weight, before[name], rtol=1e-5, atol=1e-6)
    small = "scale.exp_avg"  # of unclipped gradients it would be 80 times as large
    torch.testing.assert_close(ours.state()[0][small], theirs.state()[0][small], rtol=1e-5, atol=0)


def test_gradients_are_clipped_each_by_itself_where_that_is_chosen() -> None:
    weights = {name: parameter(8) for name in ("loud", "quiet")}
    made = Optimizer(options(kind="adamw", clip="parameter", clip_norm=1.0), weights)
    made.begin(1e-3, None)
    weights["loud"].grad, weights["quiet"].grad = torch.full((8,), 5.0), torch.full((8,), 0.1)
    norm = made.norm()
    assert norm.item() == pytest.approx(math.sqrt(8 * 25 + 8 * 0.01))
    made.finish(norm.item())
    tensors, _ = made.state()
    assert torch.linalg.vector_norm(tensors["loud.exp_avg"]).item() == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(tensors["quiet.exp_avg"], torch.full((8,), 0.01))


def test_noise_depends_on_the_seed_and_the_weight_but_not_on_the_order() -> None:
    def stepped(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        weights = {name: parameter(64, 64, dtype=torch.bfloat16) for name in ("a", "b")}
        made = Optimizer(options(), weights, chunk_numel=CHUNK)
        for weight in weights.values():
            weight.grad = torch.ones(64, 64, dtype=torch.bfloat16)
        made.step(2e-5, seed)
        return weights["a"].detach(), weights["b"].detach()

    a, b = stepped(1)
    assert not torch.equal(a, b)
    assert torch.equal(a, stepped(1)[0])
    assert not torch.equal(a, stepped(2)[0])


class Held(TorchDispatchMode):
    """The most bytes that tensors made within it have held together, storages that were there before apart."""

    def __init__(self, *there: torch.Tensor) -> None:
        super().__init__()
        self._there = {tensor.untyped_storage()._cdata for tensor in there}
        self._alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._there and key not in self._alive:
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)
        self.most = max(self.most, sum(self._alive.values()))
        return result


@pytest.mark.parametrize(
    ("dtype", "measure", "bytes_per_weight"),
    [(torch.bfloat16, False, 8), (torch.bfloat16, True, 14), (torch.float32, False, 4), (torch.float32, True, 12)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_holds_8_bytes_for_each_weight_of_a_chunk_and_14_where_it_measures_and_of_float32_4_and_12(
    kind: str, dtype: torch.dtype, measure: bool, bytes_per_weight: int
) -> None:
    chunk = 1 << 20
    weight = torch.nn.Parameter(torch.empty(8 * chunk, dtype=dtype, device="meta"))
    made = Optimizer(options(kind=kind), {"weight": weight}, chunk_numel=chunk)
    made.reserve()
    made.begin(1e-3, 1, measure=measure)
    weight.grad = torch.empty_like(weight)
    states = [made._states.at_rest(bucket.index) for bucket in made._buckets]
    with Held(weight, weight.grad, *states) as held:
        made.norm()
        made.finish(1.0)
    assert held.most / chunk == pytest.approx(bytes_per_weight, rel=0.01)


# --- what survives --------------------------------------------------------------------------------------------------


def survival(steps: int = 20, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> tuple[float, float]:
    """Mean share of an update that is kept, and of weights that change, at 2e-5 and weights of std 0.02."""
    weight = parameter(256, 256, dtype=dtype)
    made = Optimizer(options(weight_decay=0, **changes), {"weight": weight})
    measured = []
    for step in range(steps):
        made.begin(2e-5, step, measure=True)
        weight.grad = torch.randn(256, 256, generator=generator(step)).to(dtype)
        found = made.finish(made.norm().item()).survival
        assert found is not None
        assert found.update_kept.shape == found.share_updated.shape == ()
        measured.append([found.update_kept.item(), found.share_updated.item()])
    return tuple(torch.tensor(measured).mean(0).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_what_survives_of_an_update_tells_rounding_that_loses_from_rounding_that_does_not(kind: str) -> None:
    lost, _ = survival(kind=kind, rounding="nearest")
    kept, moved = survival(kind=kind)
    assert lost < 0.35
    assert kept == pytest.approx(1, abs=0.05)
    assert 0.02 < moved < 0.5
    assert survival(kind=kind, dtype=torch.float32)[0] == 1.0
    assert survival(kind=kind, master=True)[0] == pytest.approx(1, abs=0.05)


def test_the_kept_share_is_the_projection_of_the_made_change_on_the_meant_one() -> None:
    half, full = network(torch.bfloat16), network(torch.float32)
    for name, weight in full.items():
        weight.data = half[name].detach().float()
    made, reference = Optimizer(options(kind="adamw"), half), Optimizer(options(kind="adamw"), full)
    made.begin(1e-4, 5, measure=True)
    set_gradients(half, 1)
    for name, weight in full.items():
        gradient = half[name].grad
        weight.grad = None if gradient is None else gradient.float()
    old = {name: weight.detach().float().clone() for name, weight in half.items()}
    update = made.finish(0.0)
    found = update.survival
    reference.step(1e-4, None)
    meant = torch.cat([(full[name].detach() - old[name]).view(-1) for name in half]).double()
    change = torch.cat([(half[name].detach().float() - old[name]).view(-1) for name in half]).double()
    assert update.norm is not None
    assert update.norm.item() == pytest.approx(meant.norm().item(), rel=1e-5)
    assert found is not None
    assert found.update_kept.item() == pytest.approx((change @ meant / (meant @ meant)).item(), rel=1e-5)
    assert found.share_updated.item() == pytest.approx((change != 0).double().mean().item(), rel=1e-6)


def test_measuring_changes_nothing_and_nothing_is_measured_unasked() -> None:
    weights = []
    for measure in (False, True):
        net = Net(torch.bfloat16)
        made = Optimizer(options(), dict(net.named_parameters()), chunk_numel=CHUNK)
        made.begin(1e-3, 3, measure=measure)
        net.loss(0).backward()
        assert (made.finish(made.norm().item()).survival is not None) == measure
        weights.append(torch.cat([weight.detach().view(-1) for weight in net.parameters()]))
    assert torch.equal(*weights)
    assert [step for step in range(1, 301) if options().measures(step)] == [100, 200, 300]
    assert not any(options(survival_every=0).measures(step) for step in range(300))


@pytest.mark.parametrize(("kind", "dtype", "master"), VARIANTS)
def test_the_norm_of_an_update_is_that_of_the_change_before_rounding(
    kind: str, dtype: torch.dtype, master: bool
) -> None:
    """Held against the same weights in float32; and not of what rounding made of it, which is far longer."""
    rate, norms, changes = 2e-5, [], []
    for half in (True, False):
        net = Net(torch.bfloat16).to(torch.float32 if not half else dtype)
        made = Optimizer(
            options(kind=kind, master=master and half, clip_norm=0.0), dict(net.named_parameters()), chunk_numel=CHUNK
        )
        gradients = generator(3)
        made.begin(rate, 1)
        for weight in net.parameters():
            weight.grad = torch.randn(weight.shape, generator=gradients).to(torch.bfloat16).to(weight.dtype)
        before = [weight.detach().double() for weight in net.parameters()]
        norm = made.finish(1.0).norm
        assert norm is not None
        norms.append(norm.item())
        pairs = zip(net.parameters(), before, strict=True)
        changes.append(math.sqrt(sum((weight.detach().double() - old).square().sum().item() for weight, old in pairs)))
    assert norms[1] == pytest.approx(changes[1], rel=1e-3)  # float32 rounds as well
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    if dtype == torch.bfloat16 and not master:
        assert changes[0] > 1.5 * norms[0]


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize(("kind", "dtype", "master"), VARIANTS)
def test_the_norm_of_an_update_is_the_same_to_the_bit_in_whatever_order_weights_are_stepped(
    kind: str, dtype: torch.dtype, master: bool, measure: bool
) -> None:
    norms = []
    for more in ({}, {"release": True, "states": "cpu"}):
        net = Net(dtype)
        made = Optimizer(
            options(kind=kind, master=master, clip_norm=0.0, **more), dict(net.named_parameters()), chunk_numel=CHUNK
        )
        made.begin(1e-3, 3, measure=measure)
        net.loss(0).backward()
        norm = made.finish(made.norm().item()).norm
        assert norm is not None
        norms.append(norm)
    assert torch.equal(*norms)


# --- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_learning_rate_rises_to_its_peak_over_the_warm_up(schedule: str) -> None:
    chosen = options(learning_rate=1e-4, warmup_steps=10, schedule=schedule)
    rates = [learning_rate(chosen, step, 100) for step in range(11)]
    assert rates[:10] == pytest.approx([1e-5 * (step + 1) for step in range(10)])
    assert rates[9] == rates[10] == 1e-4


def test_constant_stays_at_the_peak() -> None:
    assert {learning_rate(options(warmup_steps=0), step, 100) for step in (0, 50, 99, 1000)} == {2e-5}


def test_linear_and_cosine_meet_the_peak_the_middle_and_the_final_fraction() -> None:
    for schedule in ("linear", "cosine"):
        chosen = options(learning_rate=1.0, warmup_steps=20, schedule=schedule, final_fraction=0.2)
        rates = [learning_rate(chosen, step, 120) for step in (20, 70, 120, 500)]
        assert rates == pytest.approx([1.0, 0.6, 0.2, 0.2])
    quarter = options(learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(quarter, 25, 100) == pytest.approx(0.5 + math.sqrt(2) / 4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falling_schedules_never_rise_after_the_warm_up_nor_reach_0_before_the_end(schedule: str) -> None:
    chosen = options(schedule=schedule, warmup_steps=5)
    rates = [learning_rate(chosen, step, 50) for step in range(5, 50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_a_run_that_ends_within_its_warm_up_has_a_learning_rate() -> None:
    chosen = options(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert [learning_rate(chosen, step, 4) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert learning_rate(chosen, 10, 10) == 1.0


# --- options and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "adam8bit"}, "did you mean 'adamw8bit'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"rounding": "up"}, "there is: nearest, stochastic"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1"),
        ({"beta2": math.nan}, "beta2 must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, r"weight_decay must be 0 \(no decay\) or more"),
        ({"warmup_steps": -1}, "warmup_steps must be 0"),
        ({"clip_norm": math.inf}, "clip_norm must be 0"),
        ({"final_fraction": 1.1}, "final_fraction must be from 0 to 1"),
        ({"clip": "parameters"}, "did you mean 'parameter'"),
        ({"states": "gpu"}, "did you mean 'cpu'"),
        ({"survival_every": -1}, r"survival_every must be 0 \(never\) or more"),
        (
            {"release": True},
            r"global norm cannot clip them: choose optimizer\.clip parameter, or optimizer\.clip_norm 0",
        ),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        OptimizerOptions(**changes).check()


def test_options_without_effect_are_named() -> None:
    assert OptimizerOptions().unused() == []
    assert OptimizerOptions(final_fraction=0.1).unused() == ["final_fraction"]
    assert OptimizerOptions(final_fraction=0.1, schedule="linear").unused() == []
    assert OptimizerOptions(clip="parameter", clip_norm=0, rounding="nearest", master=True).unused() == [
        "clip",
        "rounding",
    ]
    prodigy = OptimizerOptions(kind="prodigy", rounding="nearest", one_pass="no", survival_every=1)
    assert prodigy.unused() == ["rounding", "one_pass", "survival_every"]


def test_release_is_refused_where_a_gradient_is_not_whole_when_backward_has_it() -> None:
    released = options(release=True, clip="parameter")
    released.check_release(1, 1)
    options().check_release(4, 4)
    with pytest.raises(UserError, match=r"add up the gradients of 2 batches: set loader\.accumulation 1"):
        released.check_release(2, 1)
    with pytest.raises(UserError, match="before the gradients of the 8 processes are averaged"):
        released.check_release(1, 8)


def test_weights_of_a_dtype_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(UserError, match=r"'half' is torch\.float16"):
        Optimizer(options(), {"half": torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))})


def test_frozen_doubled_or_no_parameters_and_missing_gradients_are_caught() -> None:
    weight = parameter(3)
    with pytest.raises(AssertionError, match="nothing to train"):
        Optimizer(options(), {})
    with pytest.raises(AssertionError, match="two names"):
        Optimizer(options(), {"a": weight, "b": weight})
    with pytest.raises(AssertionError, match="no gradients"):
        Optimizer(options(), {"a": weight}).clip(1.0)
    weight.requires_grad_(False)
    with pytest.raises(AssertionError, match="frozen"):
        Optimizer(options(), {"a": weight})


def test_stochastic_rounding_without_a_generator_is_caught() -> None:
    weights = {"weight": parameter(3, dtype=torch.bfloat16)}
    set_gradients(weights, 1)
    with pytest.raises(AssertionError, match="generator"):
        Optimizer(options(), weights).step(1e-3, None)


def test_bitsandbytes_is_imported_only_when_8_bit_states_are_kept() -> None:
    program = (
        "import sys, torch\n"
        "from train.optimizer import Optimizer, OptimizerOptions\n"
        "Optimizer(OptimizerOptions(kind='adamw'), {'a': torch.nn.Parameter(torch.zeros(64, 64))})\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_a_missing_bitsandbytes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        Optimizer(options(), {"weight": parameter(64, 64)})
