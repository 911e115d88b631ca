"""The one kernel steps as bitsandbytes' and torch's rounding do together, and compiles for the cards it is for. No GPU
is needed: it runs in Triton's interpreter, in a process of its own, and is compiled offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="torch's builds for other systems come without Triton")

from tests.train.interpreter import interpreted  # noqa: E402
from tests.train.test_kernels import resources  # noqa: E402
from train import one_pass  # noqa: E402

BEGIN = """
import math, torch
from bitsandbytes.functional import create_dynamic_map, optimizer_update_8bit_blockwise
from train import one_pass
from train.optimizer import Optimizer, OptimizerOptions
from tests.train.test_optimizer import CHUNK, Net, assert_same, generator, kept_drift, parameter, train_on
one_pass.BLOCKS = 64                                            # the interpreter likes few and large programs
CODES = create_dynamic_map(signed=True), create_dynamic_map(signed=False)

def at_once(made):
    assert made._eight_bit.one_pass is None
    made._eight_bit.go_over_memory_once()
    assert made._eight_bit.one_pass is one_pass
    return made

def trained(dtype, steps=range(3), chunk_numel=2 * CHUNK, once=True, **changes):
    net = Net(dtype)
    made = Optimizer(OptimizerOptions(**changes), dict(net.named_parameters()), chunk_numel=chunk_numel)
    if once:
        one_pass.agrees = lambda *_: True                       # tested by itself
        at_once(made)
    return net, made, train_on(net, made, steps)
"""


def test_it_is_bitsandbytes_s_kernel_and_a_broken_one_would_be_found_out() -> None:
    out = interpreted(
        BEGIN
        + """
print(one_pass.agrees(optimizer_update_8bit_blockwise, CODES))
right = one_pass.adamw
def wrong(**settings):
    def kernel(**given):
        return right(**{**given, **settings})
    return kernel
for settings in ({"weight_decay": 0.0}, {"codes": CODES[::-1]}, {"learning_rate": 0.0101}):
    one_pass.adamw = wrong(**settings)
    print(one_pass.agrees(optimizer_update_8bit_blockwise, CODES))
one_pass.adamw = lambda **given: 1.001 * right(**given)
print(one_pass.agrees(optimizer_update_8bit_blockwise, CODES))
def biased(**given):
    return right(**{**given, "mode": one_pass.NEAREST if given["mode"] == one_pass.STOCHASTIC else given["mode"]})
one_pass.adamw = biased
print(one_pass.agrees(optimizer_update_8bit_blockwise, CODES))
"""
    )
    assert out.split() == ["True"] + 5 * ["False"]


def test_every_state_becomes_the_nearest_of_its_256_values() -> None:
    out = interpreted(
        BEGIN
        + """
numel = 256 * 40
size = torch.cat([torch.logspace(-9, 0, numel // 2), torch.rand(numel // 2)])
for values, codes in ((size * torch.randn(numel).sign(), CODES[0]), (size, CODES[1])):
    values = values[torch.randperm(numel)].view(-1, 256)
    values[:, 0] = 1                                            # the largest of each block
    state = {name: torch.zeros(numel, dtype=torch.uint8) for name in ("state1", "state2")}
    state |= {name: torch.zeros(numel // 256) for name in ("absmax1", "absmax2")}
    weight = torch.zeros(numel)
    signed = codes is CODES[0]
    one_pass.adamw(
        stepped=weight, weight=weight, gradient=(values if signed else values.sqrt()).reshape(-1), after=None,
        state=state, codes=CODES, middles=tuple(one_pass.middles_of(code) for code in CODES), scale=torch.ones(()),
        mode=one_pass.FLOAT32, seed=0, num_steps=1, learning_rate=1e-3, beta1=0.5, beta2=0.5, epsilon=1e-8,
        weight_decay=0,
    )
    of = values.view(-1).double() if signed else values.sqrt().square().view(-1).double()
    found = state["state1" if signed else "state2"].long()
    assert len(found.unique()) > 250
    distance = (of[:, None] - codes.double()).abs()
    worst = (distance.gather(1, found[:, None])[:, 0] - distance.min(1).values).max()
    assert worst < 1e-7, worst
    print("nearest")
"""
    )
    assert out.split() == 2 * ["nearest"]


def test_rounding_by_chance_is_right_on_average_and_infinities_and_nans_stay() -> None:
    out = interpreted(
        BEGIN
        + """
numel = 256 * 400
values = torch.tensor([0.02, -0.02, 0.0200001, 1.0039, -3.1e-5, 1234.5, math.inf, math.nan]).repeat(numel // 8)
def stepped(seed):
    state = {name: torch.zeros(numel, dtype=torch.uint8) for name in ("state1", "state2")}
    state |= {name: torch.zeros(numel // 256) for name in ("absmax1", "absmax2")}
    weight = torch.zeros(numel, dtype=torch.bfloat16)
    one_pass.adamw(
        stepped=values.clone(), weight=weight, gradient=torch.zeros(numel), after=None, state=state, codes=CODES,
        middles=tuple(one_pass.middles_of(code) for code in CODES), scale=torch.ones(()), mode=one_pass.STOCHASTIC,
        seed=seed, num_steps=1, learning_rate=1e-3, beta1=0.5, beta2=0.5, epsilon=1e-8, weight_decay=0,
    )
    return weight
seeds = [3, 4, 3 << 32, (1 << 64) - 1, 3]
drawn = [stepped(seed) for seed in seeds]
for weight in drawn:
    rounded, exact = weight.double().view(-1, 8), values.double().view(-1, 8)
    assert (rounded[:, 6] == math.inf).all() and rounded[:, 7].isnan().all()
    bits = values.view(torch.int32)
    down, up = ((bits & -65536) + more for more in (0, 65536))
    down, up = (one.view(torch.float32).double().view(-1, 8)[:, :6] for one in (down, up))
    assert ((rounded[:, :6] == down) | (rounded[:, :6] == up)).all()
    error = (up - down).abs()[0] / 2 / math.sqrt(numel // 8)
    assert ((rounded[:, :6].mean(0) - exact[0, :6]).abs() < 4 * error).all()
finite = [(weight != weight[0]).view(-1, 8)[:, 0].double() for weight in drawn]
assert torch.equal(drawn[0].view(torch.int16), drawn[4].view(torch.int16))
assert not any(torch.equal(finite[0], other) for other in finite[1:4])
up, other = ((weight.view(-1, 8)[:, 3] > 1).double() for weight in drawn[:2])
up, other = up - up.mean(), other - other.mean()
for one, two in ((up[1:], up[:-1]), (up[2:], up[:-2]), (up, other)):  # neighbouring places, other seeds: independent
    print(abs((one * two).mean().item()) < 4 * 0.25 / math.sqrt(numel // 8))
"""
    )
    assert out.split() == 3 * ["True"]


def test_an_optimizer_steps_the_same_way_with_it_but_for_the_noise() -> None:
    out = interpreted(
        BEGIN
        + """
for changes in ({"clip": "parameter", "clip_norm": 1e-3}, {"clip_norm": 0.05}):
    bf16 = ({"master": True}, {"rounding": "nearest"})
    for dtype, more in ((torch.float32, {}), *((torch.bfloat16, more) for more in bf16)):
        ours, theirs = (trained(dtype, once=once, **changes, **more) for once in (True, False))
        near = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2 ** -7, "atol": 2e-5}
        pairs = zip(ours[0].parameters(), theirs[0].parameters())
        apart = [1 - torch.isclose(a, b, **near).double().mean() for a, b in pairs]
        assert max(apart) < 0.01, apart                         # bitsandbytes' codes are not always the nearest
        for a, b in zip(ours[2], theirs[2]):
            assert abs(a.survival.update_kept.item() - b.survival.update_kept.item()) < 0.02, (a, b)
            assert abs(a.norm.item() / b.norm.item() - 1) < 1e-3, (a, b)
        print("same")
"""
    )
    assert out.split() == 6 * ["same"]


def test_what_holds_of_the_optimizer_holds_with_it() -> None:
    out = interpreted(
        BEGIN
        + """
for dtype, master in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
    plain = {"clip": "parameter", "clip_norm": 1e-3, "master": master}
    kept = trained(dtype, **plain)
    assert_same(kept, trained(dtype, states="cpu", release=True, **plain))
    net, made, _ = trained(dtype, range(2), **plain)
    resumed, later, _ = trained(dtype, range(0), states="cpu", **plain)
    resumed.load_state_dict(net.state_dict())
    later.load_state(*made.state())
    train_on(resumed, later, range(2, 3))
    assert_same(kept, (resumed, later))
    print("same")
survived = trained(torch.bfloat16)[2]
assert all(abs(one.survival.update_kept.item() - 1) < 0.1 for one in survived), survived
weight = parameter(64, 64, dtype=torch.bfloat16)
start, direction = weight.detach().double().clone(), torch.randn(64, 64, generator=generator(1)).sign()
made = at_once(Optimizer(OptimizerOptions(weight_decay=0), {"weight": weight}))
weight.grad = direction.bfloat16()
for step in range(80):
    made.step(2e-5, step)
print(((start - weight.detach().double()) * direction).mean().item() / (80 * 2e-5))
"""
    )
    words = out.split()
    assert words[:3] == 3 * ["same"]
    assert float(words[3]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("mode", "capability"),
    [(mode, capability) for mode in (one_pass.STOCHASTIC, one_pass.MASTER) for capability in (80, 89, 90)]
    + [(one_pass.NEAREST, 90), (one_pass.FLOAT32, 90)],
)
def test_it_compiles_without_spills(
    mode: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    kernel: Any = one_pass.adamw_kernel
    weight, stepped = ("*fp32" if mode == one_pass.FLOAT32 else "*bf16"), ("*fp32" if mode >= 2 else "*bf16")
    types = {"stepped": stepped, "weight": weight, "gradient": weight, "state1": "*u8", "state2": "*u8"}
    types |= {"numel": "i32", "key": "i32", "second_key": "i32"}
    pointers = ("after", "absmax1", "absmax2", "codes1", "codes2", "middles1", "middles2", "squares", "scale")
    types |= {name: "*fp32" for name in pointers}
    constants = {"MODE": mode, "MEASURED": False, "BLOCKS": one_pass.BLOCKS}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name == "numel"]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "fp32") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": one_pass.NUM_WARPS, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    used = resources(tmp_path / "kernel.cubin")
    print(f"sm_{capability}: {used}")
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= 128  # at least 512 threads on a multiprocessor at once
