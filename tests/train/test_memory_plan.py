"""Counted memory and work against tables that were counted by other means, on the real FLUX.1-dev's sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.errors import UserError
from train.adapters.lora import LoraOptions
from train.counting import Setting, trace
from train.memory_plan import COMPONENTS, GIB, Counted, changes, count, fewest_recomputed, resting_bytes
from train.optimizer import OptimizerOptions
from train.sharding import GATHERED

ALL = (57, 100)
"""Every block of the base; every block of any ControlNet."""
SETTINGS = [(depth, px, T) for depth in ((2, 4), (5, 10)) for px in (512, 1024) for T in (77, 512)]
"""DEPTH, pixels of a side, tokens of the long text embedding."""
HALF = [((2, 4), 512, 77), ((2, 4), 1024, 512), ((5, 10), 512, 512), ((5, 10), 1024, 77)]
"""Of them: each two values of different kinds meet once."""

PARAMETERS_B = {(2, 4): 1.348, (4, 0): 1.442, (5, 10): 3.302}
BASE_PARAMETERS_B = 11.901

FLOPS = {
    ((2, 4), 512, 77): (1.71, 15.07, 16.05, 3.45, 51.1, 52.7),
    ((2, 4), 512, 512): (2.39, 21.50, 23.51, 4.86, 73.4, 75.6),
    ((2, 4), 1024, 77): (7.42, 66.08, 82.88, 15.49, 236.8, 243.7),
    ((2, 4), 1024, 512): (8.31, 74.38, 94.95, 17.38, 268.1, 275.9),
    ((5, 10), 512, 77): (4.26, 15.07, 16.05, 8.63, 58.8, 62.8),
    ((5, 10), 512, 512): (5.96, 21.50, 23.51, 12.12, 84.2, 89.9),
    ((5, 10), 1024, 77): (18.55, 66.08, 82.88, 38.71, 271.1, 288.5),
    ((5, 10), 1024, 512): (20.75, 74.38, 94.95, 43.43, 306.6, 326.1),
}
"""TFLOP of one sample: ControlNet forward, base forward, base backward, ControlNet backward; the step with the base's
blocks recomputed, with all blocks recomputed."""

PEAKS = {
    ((2, 4), 512, 77): ((23.2, 21.2, 18.7, 18.7), (30.5, 26.1, 19.3, 18.7)),
    ((2, 4), 512, 512): ((26.0, 23.1, 18.7, 18.7), (36.1, 29.9, 20.3, 18.7)),
    ((2, 4), 1024, 77): ((42.8, 34.9, 22.0, 19.2), (70.3, 53.6, 27.9, 22.3)),
    ((2, 4), 1024, 512): ((45.5, 36.8, 22.5, 19.4), (75.8, 57.5, 28.9, 22.7)),
    ((5, 10), 512, 77): ((31.8, 29.7, 29.7, 29.7), (40.3, 35.9, 29.7, 29.7)),
    ((5, 10), 512, 512): ((35.0, 32.1, 29.7, 29.7), (46.8, 40.7, 30.9, 29.7)),
    ((5, 10), 1024, 77): ((54.8, 46.9, 33.9, 29.8), (87.1, 70.4, 44.5, 30.6)),
    ((5, 10), 1024, 512): ((58.0, 49.3, 34.9, 29.8), (93.5, 75.2, 46.4, 31.0)),
}
"""GiB at batch 1 and 2: quanto's layer, nothing recomputed; the lean layer with nothing, the base, all recomputed."""


def setting(depth: tuple[int, int], px: int, T: int, **more: Any) -> Setting:
    return Setting(depth, px, px, T, hoist=more.pop("hoist", False), **more)


def pass_gib(counted: Counted) -> float:
    """The peak of forward and backward: the tables have no optimizer's step."""
    return counted.pass_peak_bytes / GIB


@pytest.mark.parametrize(("depth", "px", "T"), SETTINGS)
def test_operations_and_peaks_are_those_of_the_tables(depth: tuple[int, int], px: int, T: int) -> None:
    kept = count(setting(depth, px, T))
    parts = [kept.work[f"{part} {way}"].flops / 1e12 for part, way in (
        ("controlnet", "forward"), ("base", "forward"), ("base", "backward"), ("controlnet", "backward"),
    )]  # fmt: skip
    expected = FLOPS[depth, px, T][:4]
    assert parts == pytest.approx(expected, rel=0.02)
    assert kept.model_flops / 1e12 == pytest.approx(sum(expected), rel=0.02)
    assert pass_gib(kept) == pytest.approx(PEAKS[depth, px, T][0][1], rel=0.02)


@pytest.mark.parametrize(("depth", "px", "T"), HALF)
def test_what_is_recomputed_and_what_quanto_keeps_are_those_of_the_tables(
    depth: tuple[int, int], px: int, T: int
) -> None:
    one = setting(depth, px, T)
    kept, base_again, all_again = count(one), count(one, 57, 0), count(one, *ALL)
    for again, total in zip((base_again, all_again), FLOPS[depth, px, T][4:], strict=True):
        assert again.model_flops == pytest.approx(kept.model_flops)
        assert (again.model_flops + again.recomputed_flops) / 1e12 == pytest.approx(total, rel=0.02)
    peaks = [pass_gib(counted) for counted in (count(setting(depth, px, T, base="quanto")), base_again, all_again)]
    quanto, _, *both = PEAKS[depth, px, T][0]
    assert peaks == pytest.approx([quanto, *both], rel=0.02)


@pytest.mark.parametrize(("depth", "px", "T"), [((2, 4), 512, 512), ((5, 10), 1024, 77)])
def test_peaks_at_batch_2_are_those_of_the_table(depth: tuple[int, int], px: int, T: int) -> None:
    _, lean, base_again, all_again = PEAKS[depth, px, T][1]
    two = setting(depth, px, T, batch_size=2)
    assert pass_gib(count(two)) == pytest.approx(lean, rel=0.02)
    assert pass_gib(count(two, 57, 0)) == pytest.approx(base_again, rel=0.02)
    assert pass_gib(count(two, *ALL)) == pytest.approx(all_again, rel=0.02)


def test_a_base_in_bfloat16_takes_what_the_table_says() -> None:
    plain = setting((2, 4), 512, 512, base="none")
    assert pass_gib(count(plain)) == pytest.approx(34.1, rel=0.02)
    assert pass_gib(count(plain, *ALL)) == pytest.approx(29.8, rel=0.02)


def test_parameters_are_those_of_the_real_models() -> None:
    for depth, expected in PARAMETERS_B.items():
        counted = count(setting(depth, 512, 77))
        assert counted.num_trained / 1e9 == pytest.approx(expected, abs=0.001)
        assert counted.num_base_parameters / 1e9 == pytest.approx(BASE_PARAMETERS_B, abs=0.001)


def test_hoisted_modulation_is_three_gib_less_in_int8_and_six_in_bfloat16() -> None:
    for base, saved in (("int8", 3.02), ("none", 6.05)):
        kept, hoisted = (count(setting((2, 4), 512, 512, base=base, hoist=hoist)) for hoist in (False, True))
        assert (kept.pass_peak_bytes - hoisted.pass_peak_bytes) / GIB == pytest.approx(saved, abs=0.05)
        assert hoisted.num_base_parameters == kept.num_base_parameters


def test_the_goals_of_memory_hold_with_nothing_recomputed() -> None:
    for depth, goal in (((2, 4), 20.1), ((5, 10), 29.1)):
        assert pass_gib(count(setting(depth, 512, 512, hoist=True))) == pytest.approx(goal, rel=0.02)


def test_accumulated_gradients_add_themselves_to_the_peak() -> None:
    once, twice = (count(setting((2, 4), 512, 512, accumulation=num)) for num in (1, 2))
    assert (twice.pass_peak_bytes - once.pass_peak_bytes) / GIB == pytest.approx(2.51, abs=0.05)
    assert twice.components["gradients"] / GIB == pytest.approx(2.51, abs=0.01)
    assert twice.model_flops == pytest.approx(2 * once.model_flops)


def test_the_gradients_of_several_processes_lie_in_their_buckets_from_the_beginning_and_nowhere_else() -> None:
    one = setting((2, 4), 512, 77, hoist=True)
    alone, together = (count(replace(one, num_processes=num)) for num in (1, 2))
    assert (together.peak_bytes - alone.peak_bytes) / GIB == pytest.approx(2.51, abs=0.01)
    assert together.components["gradients"] / GIB == pytest.approx(2.51, abs=0.01)
    # With everything recomputed one process's peak is the optimizer's step, with all gradients: two have no more then.
    alone, together = (count(replace(one, num_processes=num), *ALL) for num in (1, 2))
    assert (alone.when, together.when) == ("optimizer step", "backward of the base")
    assert (together.peak_bytes - alone.peak_bytes) / GIB == pytest.approx(0.62, abs=0.05)


def test_what_is_accumulated_lies_beside_the_buckets_of_several_processes() -> None:
    one = setting((2, 4), 512, 77, hoist=True, accumulation=2)
    alone, together = (count(replace(one, num_processes=num)) for num in (1, 2))
    assert (together.peak_bytes - alone.peak_bytes) / GIB == pytest.approx(2.51, abs=0.01)


def test_a_base_spread_over_cards_is_a_part_of_its_blocks_and_room_to_gather_some() -> None:
    one = setting((2, 4), 512, 77, hoist=True)
    for whole, cards in ((one, 2), (one, 4), (replace(one, base="none"), 2)):
        whole = replace(whole, num_processes=cards, cards=cards)
        blocks = trace(whole).weights.base_blocks
        saved = count(whole).peak_bytes - count(replace(whole, shard=True)).peak_bytes
        assert saved == sum(blocks) - sum(blocks) // cards - GATHERED * max(blocks)
    assert saved / GIB > 6


def test_what_can_be_given_up_takes_off_what_it_should() -> None:
    one = setting((2, 4), 512, 77, hoist=True)
    kept = count(one)
    assert kept.components["optimizer states"] / GIB == pytest.approx(2.55, rel=0.02)
    on_host = count(replace(one, optimizer=OptimizerOptions(states="cpu")))
    assert on_host.components["optimizer states"] == 0
    assert (kept.pass_peak_bytes - on_host.pass_peak_bytes) / GIB == pytest.approx(2.55, rel=0.02)
    assert on_host.host_states_bytes == kept.components["optimizer states"]
    streamed = count(replace(one, stream=True))
    assert 7 < (kept.peak_bytes - streamed.peak_bytes) / GIB < 8
    released = count(replace(one, optimizer=OptimizerOptions(release=True, clip="parameter")), *ALL)
    assert (count(one, *ALL).peak_bytes - released.peak_bytes) / GIB > 1.5


def test_components_add_up_to_the_peak() -> None:
    for blocks in ((0, 0), (28, 3), ALL):
        counted = count(setting((2, 4), 512, 77), *blocks)
        assert list(counted.components) == list(COMPONENTS)
        assert sum(counted.components.values()) == counted.peak_bytes
        assert all(num_bytes >= 0 for num_bytes in counted.components.values())


def test_a_few_traced_blocks_stand_for_all_of_them() -> None:
    one = setting((2, 4), 512, 77)
    assert sum(len(copies) > 1 for copies in trace(one).copies) == 2  # one of each kind stands for others
    for blocks in ((0, 0), (28, 3), ALL):
        few, whole = count(one, *blocks), count(one, *blocks, whole=True)
        assert few.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.005)
        assert few.pass_peak_bytes == pytest.approx(whole.pass_peak_bytes, rel=0.005)
        assert few.recomputed_flops == pytest.approx(whole.recomputed_flops, rel=1e-6)
        assert few.model_flops == pytest.approx(whole.model_flops, rel=1e-6)
        assert {n: w.num_kernels for n, w in few.work.items()} == {n: w.num_kernels for n, w in whole.work.items()}


def test_as_few_blocks_as_possible_are_recomputed() -> None:
    one = setting((2, 4), 1024, 512, hoist=True)
    budget = int(22.9 * GIB)
    found = fewest_recomputed(one, budget)
    assert 0 < found.base_blocks < 57
    assert found.peak_bytes <= budget
    assert found.peak_bytes == count(one, found.base_blocks, found.controlnet_blocks).peak_bytes
    cost = count(one, found.base_blocks, found.controlnet_blocks).recomputed_flops
    for controlnet_blocks in range(7):
        for base_blocks in range(58):
            other = count(one, base_blocks, controlnet_blocks)
            assert other.peak_bytes > budget or other.recomputed_flops >= cost
    assert fewest_recomputed(one, 80 * GIB).base_blocks == fewest_recomputed(one, 80 * GIB).controlnet_blocks == 0


def test_what_does_not_fit_is_refused_with_the_cheapest_change_that_does() -> None:
    big = setting((5, 10), 512, 512, hoist=True)
    with pytest.raises(UserError, match=r"the budget is 22\.9 GiB.* fits: --optimizer\.states cpu \(22\.\d GiB"):
        fewest_recomputed(big, int(22.9 * GIB))
    with pytest.raises(UserError, match=r"--memory\.hoist yes"):
        fewest_recomputed(setting((5, 10), 512, 512), int(27.5 * GIB))
    with pytest.raises(UserError, match="choose a lower DEPTH or RESOLUTION"):
        fewest_recomputed(big, 4 * GIB)


def test_weights_in_float32_are_counted_as_such() -> None:
    half, full = (count(setting((2, 4), 512, 77, weights=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert full.components["ControlNet weights"] == pytest.approx(2 * half.components["ControlNet weights"], rel=0.001)


def advised(setting: Setting) -> str:
    return " ".join(words for words, _ in changes(setting))


def test_nothing_is_advised_that_would_be_refused_or_do_nothing() -> None:
    one = setting((2, 4), 512, 77)
    for option in ("--memory.hoist yes", "--optimizer.release True", "--optimizer.states cpu"):
        assert option in advised(one)
    lora = replace(one, adapter="lora", depth=(0, 0), weights=torch.float32)
    assert "--memory.hoist" in advised(lora)
    assert "--memory.hoist" not in advised(replace(lora, lora=LoraOptions(train_text_encoder=True)))
    assert "--memory.hoist" not in advised(replace(lora, family="sd15"))
    assert "--optimizer.release" not in advised(replace(one, num_processes=2, cards=2))
    prodigy = advised(replace(lora, optimizer=OptimizerOptions(kind="prodigy", learning_rate=1)))
    assert "--optimizer" not in prodigy
    assert "--memory.stream yes" in prodigy


def test_a_run_on_a_shared_base_holds_its_own_text_encoder_between_its_turns() -> None:
    lora = Setting((0, 0), 512, 512, 77, family="sd15", adapter="lora", weights=torch.float32)
    along = replace(lora, lora=LoraOptions(train_text_encoder=True))
    assert trace(along).weights.text_encoders > 0.2 * 2**30  # CLIP-L in bfloat16
    assert resting_bytes(along) - resting_bytes(lora) > trace(along).weights.text_encoders


def test_prodigy_s_step_needs_where_all_weights_were_and_how_they_moved() -> None:
    prodigy = OptimizerOptions(kind="prodigy", learning_rate=1)
    full = Setting(
        (0, 0), 64, 64, 77, family="sd15", adapter="full", base="none", hoist=False, weights=torch.float32,
        optimizer=prodigy,
    )  # fmt: skip
    counted = count(full)
    assert counted.when == "optimizer step"
    assert counted.peak_bytes > (1 + 1 + 4 + 2) * 4 * counted.num_trained  # weights, gradients, states, and these
