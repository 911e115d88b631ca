"""A step is made to fit before it is taken, and where it did not, it is taken again as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import UserError
from shared.families.base import Batch
from shared.model_folder import ModelFolder
from tests.train.conftest import controlnet_bytes, flux, losses, train_options
from tests.train.made_models import NUM_BLOCKS, NUM_CONTROLNET_BLOCKS, adapter_of, batch_of, predicted
from train.adapters.controlnet import ControlNetAdapter
from train.budget import GIB, MemoryOptions
from train.counting import Setting
from train.fit import Fit, Guard, Measured, decide
from train.loader import LoaderOptions
from train.memory_plan import Recompute, count, fewest_recomputed, least_bytes
from train.optimizer import Optimizer, OptimizerOptions
from train.step import Step
from train.trainer import train

CPU = torch.device("cpu")
FULL = (NUM_BLOCKS, NUM_CONTROLNET_BLOCKS)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A step on the small models: batches of 2, 128 px."""
    folder = tmp_path_factory.mktemp("model")
    adapter_of(int8=False).base.save_config(folder / "transformer")  # type: ignore[operator]
    return Setting(
        depth=(2, 2), height=128, width=128, text_length=5, batch_size=2, model=ModelFolder("small", None, folder),
        dtype=torch.float32, weights=torch.float32, hoist=False,
    )  # fmt: skip


def decided(setting: Setting, memory: MemoryOptions | None = None, **changes: Any) -> Fit:
    loader = changes.pop("loader", LoaderOptions(batch_size=setting.batch_size, accumulation=setting.accumulation))
    given: dict[str, Any] = {"device": CPU, "free_bytes": None, **changes}
    return decide(memory or MemoryOptions(), loader, setting, **given)


def peak(setting: Setting, blocks: tuple[int, int] = (0, 0)) -> int:
    return count(setting, *blocks).peak_bytes


def blocks(of: Recompute) -> tuple[int, int]:
    return of.base_blocks, of.controlnet_blocks


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.12f}GiB"


# --- before anything is loaded --------------------------------------------------------------------------------------


def test_without_a_budget_nothing_is_counted_and_nothing_recomputed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.fit.count", lambda *_: pytest.fail("counted"))
    monkeypatch.setattr("train.fit.fewest_recomputed", lambda *_: pytest.fail("counted"))
    fit = decided(setting)
    assert (fit.recompute, fit.hoist, fit.stream, fit.words()) == (Recompute(0, 0, 0), False, False, None)
    fit = decided(setting, MemoryOptions(recompute="all", hoist="yes", stream="yes"))
    assert (fit.hoist, fit.stream, fit.fixed) == (True, True, True)


def test_what_a_budget_leaves_no_room_for_is_recomputed(setting: Setting) -> None:
    roomy, tight = peak(setting), (peak(setting) + least_bytes(setting)) // 2
    assert decided(setting, MemoryOptions(budget=gib(roomy + 1024))).recompute == Recompute(0, 0, roomy)
    fit = decided(setting, MemoryOptions(budget=gib(tight)))
    assert fit.recompute == fewest_recomputed(setting, fit.budget_bytes or 0)
    assert blocks(fit.recompute) not in ((0, 0), FULL)
    assert fit.recompute.peak_bytes <= tight
    base, controlnet = blocks(fit.recompute)
    assert f"with {base} of 6 blocks of the base and {controlnet} of 4 of the ControlNet" in (fit.words() or "")


def test_an_automatic_budget_is_what_is_free(setting: Setting) -> None:
    tight = (peak(setting) + least_bytes(setting)) // 2
    assert decided(setting, free_bytes=tight).budget_bytes == tight
    assert decided(setting, free_bytes=tight).recompute == fewest_recomputed(setting, tight)
    assert decided(setting, MemoryOptions(budget="1GiB"), free_bytes=2 * GIB).budget_bytes == GIB


def test_a_budget_above_what_is_free_is_what_is_free(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert decided(setting, MemoryOptions(budget="2GiB"), free_bytes=GIB).budget_bytes == GIB
    assert "the device has 1.0 GiB free, less than MEMORY 2GiB" in capsys.readouterr().err


def test_blocks_that_the_user_names_are_taken_as_they_are(setting: Setting) -> None:
    fit = decided(setting, MemoryOptions(budget="1GiB", recompute="3+1"))
    assert fit.recompute == Recompute(3, 1, peak(setting, (3, 1)))
    assert fit.fixed
    assert blocks(decided(setting, MemoryOptions(budget="1GiB", recompute="all")).recompute) == FULL


def test_hoisting_is_automatic_on_a_gpu_alone(setting: Setting) -> None:
    gpu = torch.device("cuda")
    assert [decided(setting, device=device).hoist for device in (CPU, gpu)] == [False, True]
    assert [decided(setting, MemoryOptions(hoist=h)).hoist for h in ("yes", "no")] == [True, False]
    assert not decided(setting, MemoryOptions(hoist="no"), device=gpu).hoist


def test_the_base_is_streamed_where_nothing_else_makes_it_fit_and_only_then(setting: Setting) -> None:
    streamed = replace(setting, stream=True)
    assert least_bytes(streamed) < least_bytes(setting)
    between = (least_bytes(streamed) + least_bytes(setting)) // 2
    assert not decided(setting, free_bytes=least_bytes(setting)).stream
    fit = decided(setting, free_bytes=between)
    assert fit.stream
    assert fit.recompute == fewest_recomputed(streamed, between)
    for refused in (
        lambda: decided(setting, MemoryOptions(stream="no"), free_bytes=between),
        lambda: decided(replace(setting, base="quanto"), free_bytes=between),
        lambda: decided(setting, free_bytes=least_bytes(streamed) - 1),
    ):
        with pytest.raises(UserError, match="GiB at least, with every block recomputed"):
            refused()
    assert decided(setting, MemoryOptions(stream="yes"), free_bytes=GIB).stream


def test_the_base_is_spread_over_cards_before_it_is_streamed_and_only_where_it_must(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.memory_plan.GATHERED", 3)  # of a model with so few blocks four are nearly all

    def found(free_bytes: int, memory: MemoryOptions | None = None) -> Fit:
        return decided(setting, memory, free_bytes=free_bytes, cards=64, num_processes=64)

    whole = replace(setting, cards=64, num_processes=64)
    least = least_bytes(whole)
    spread, streamed = least_bytes(replace(whole, shard=True)), least_bytes(replace(whole, stream=True))
    assert streamed < spread < least
    assert not found(least).shard
    fit = found(spread)
    assert (fit.shard, fit.stream) == (True, False)
    assert fit.recompute.peak_bytes <= spread
    assert "the base's blocks spread over 64 cards" in str(fit.words())
    further = found(streamed)
    assert (further.shard, further.stream) == (False, True)
    assert found(spread, MemoryOptions(shard="no")).stream
    assert found(GIB, MemoryOptions(shard="yes")).shard
    hoisted = least_bytes(replace(whole, shard=True, hoist=True))
    with pytest.raises(UserError, match=r"cheapest change that fits: --memory\.shard yes"):
        found(hoisted, MemoryOptions(hoist="yes", shard="no", stream="no"))


def test_one_process_has_nobody_to_share_the_base_with(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"one process on this machine.*accelerate launch"):
        decided(setting, MemoryOptions(shard="yes"))
    with pytest.raises(UserError, match=r"quanto's own weights cannot be cut"):
        decided(replace(setting, base="quanto"), MemoryOptions(shard="yes"), cards=2, num_processes=2)
    with pytest.raises(UserError, match=r"on other cards or on the host, not both"):
        MemoryOptions(shard="yes", stream="yes").check()
    monkeypatch.setattr(ControlNetAdapter, "spreads_base", False)
    with pytest.raises(UserError, match=r"memory\.shard yes: adapter controlnet needs its base whole"):
        decided(setting, MemoryOptions(shard="yes"), cards=2, num_processes=2)


# --- a global batch -------------------------------------------------------------------------------------------------


def batches(fit: Fit) -> tuple[int, int]:
    return fit.loader.batch_size, fit.loader.accumulation


def test_a_global_batch_is_one_batch_where_memory_allows_and_split_where_it_does_not(setting: Setting) -> None:
    asked = LoaderOptions(global_batch=4)
    assert batches(decided(setting, loader=asked)) == (4, 1)
    assert batches(decided(setting, loader=asked, free_bytes=GIB)) == (4, 1)
    assert batches(decided(setting, loader=asked, free_bytes=GIB, num_processes=2)) == (2, 1)
    one, all_4 = (replace(setting, batch_size=size) for size in (1, 4))
    assert least_bytes(one) < least_bytes(all_4)
    for split in (2, 4):
        here = replace(setting, batch_size=4 // split, accumulation=split)
        fit = decided(setting, loader=asked, free_bytes=least_bytes(here))
        assert fit.loader.batch_size * fit.loader.accumulation == 4
        assert fit.recompute.peak_bytes <= least_bytes(here)
        assert fit.loader.global_batch is None


def test_a_larger_batch_with_recomputing_gives_way_to_a_smaller_one_without(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a batch costs nothing by itself, arithmetic decides."""
    asked = LoaderOptions(global_batch=4)
    small = replace(setting, batch_size=1, accumulation=4)
    budget = peak(small)
    assert budget < peak(replace(setting, batch_size=2, accumulation=2))
    monkeypatch.setattr("train.fit.BATCH_FLOPS", 0)
    assert batches(decided(setting, loader=asked, free_bytes=budget)) == (1, 4)
    monkeypatch.setattr("train.fit.BATCH_FLOPS", 1e9)
    chosen = decided(setting, loader=asked, free_bytes=budget)
    assert chosen.loader.batch_size > 1
    assert blocks(chosen.recompute) > (0, 0)


def test_a_run_that_goes_on_keeps_its_batches(setting: Setting) -> None:
    asked, saved = LoaderOptions(global_batch=8), {"batch_size": 2, "batches_per_step": 4}
    assert batches(decided(setting, loader=asked, saved=saved)) == (2, 4)
    assert batches(decided(setting, loader=asked, saved=saved, free_bytes=GIB, num_processes=2)) == (2, 2)
    with pytest.raises(UserError, match="4 batches of 2, which 3 processes cannot share"):
        decided(setting, loader=asked, saved=saved, num_processes=3)


def test_a_global_batch_that_cannot_be_had_is_refused(setting: Setting) -> None:
    with pytest.raises(UserError, match="global_batch 4 cannot be shared by 3 processes"):
        decided(setting, loader=LoaderOptions(global_batch=4), num_processes=3)
    with pytest.raises(UserError, match=r"batch 1 x 2 takes .* at least, with every block recomputed.*given up"):
        decided(setting, loader=LoaderOptions(global_batch=2), free_bytes=1000)
    for wrong in (
        LoaderOptions(global_batch=0),
        LoaderOptions(global_batch=8, batch_size=2),
        LoaderOptions(global_batch=8, accumulation=2),
    ):
        with pytest.raises(UserError, match=r"loader\.global_batch"):
            wrong.check()
    LoaderOptions(global_batch=8).check()


def test_released_gradients_are_never_accumulated(setting: Setting) -> None:
    releasing = replace(setting, optimizer=OptimizerOptions(release=True, clip="parameter"))
    assert batches(decided(releasing, loader=LoaderOptions(global_batch=4))) == (4, 1)
    with pytest.raises(UserError, match=r"optimizer\.release cannot add up the gradients of 2 batches"):
        decided(releasing, loader=LoaderOptions(batch_size=2, accumulation=2))
    with pytest.raises(UserError, match=r"gradients of pictures and class images: leave it out.*prior_weight 0"):
        decided(replace(releasing, prior=True))


# --- a step that runs out of memory ---------------------------------------------------------------------------------


class Running:
    """A run of small steps whose backward runs out of memory until so many blocks are recomputed."""

    def __init__(self, fit: Fit, enough: tuple[int, int] = (0, 0), **changes: Any) -> None:
        self.adapter = adapter_of()
        self.optimizer = Optimizer(OptimizerOptions(learning_rate=1e-3), dict(self.adapter.named_parameters()))
        self.guard = Guard(fit, flux(), self.adapter, self.optimizer, CPU, **changes)
        self.enough, self.num_tries = enough, 0
        self.at_update = False
        for name, parameter in self.adapter.named_parameters():
            if name.startswith("transformer_blocks.1") or name.startswith("x_embedder"):
                parameter.register_post_accumulate_grad_hook(self._run_out)

    def _run_out(self, parameter: torch.Tensor) -> None:
        if blocks(self.guard.recompute) < self.enough:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def step(self, *batches: Batch) -> float:
        taken = list(batches) or [batch_of(2, size=128)]

        def step() -> float:
            self.num_tries += 1
            self.optimizer.zero_grad()
            loss = sum((predicted(self.adapter, batch).square().mean() for batch in taken), torch.zeros(()))
            loss.backward()
            if self.at_update:
                self.optimizer.step(1e-3, None)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.optimizer.step(1e-3, None)
            return loss.item()

        return self.guard(taken, step)


def weights(adapter: ControlNetAdapter) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}


def unlimited(setting: Setting) -> Fit:
    """Nothing recomputed, since the count sees room enough."""
    fit = decided(setting, free_bytes=GIB)
    assert blocks(fit.recompute) == (0, 0)
    return fit


def test_a_step_that_ran_out_of_memory_is_taken_again_from_the_same_weights(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = Running(unlimited(setting))
    losses = [undisturbed.step() for _ in range(3)]
    assert undisturbed.num_tries == 3
    running = Running(unlimited(setting), enough=(5, 0))
    assert [running.step() for _ in range(3)] == losses
    assert running.num_tries == 5  # with 0, 3 and 5 blocks
    expected = weights(undisturbed.adapter)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(running.adapter).items())
    said = capsys.readouterr()
    assert (said.out + said.err).count("memory ran out before any weight was stepped; the step is taken again") == 2
    assert "5 of 6 blocks of the base and 0 of 4 of the ControlNet are recomputed" in said.out + said.err


def test_it_recomputes_more_and_more_and_gives_up_with_advice(setting: Setting) -> None:
    running = Running(unlimited(setting), enough=(NUM_BLOCKS + 1, 0))
    before = weights(running.adapter)
    with pytest.raises(UserError, match=r"with 6 of 6 blocks of the base and 4 of 4 of the ControlNet.*; try --"):
        running.step()
    assert running.num_tries == 5  # 0, 3, 5, 6 of the base, then all of the ControlNet
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(running.adapter).items())


def test_a_step_is_not_taken_again_when_weights_have_moved(setting: Setting) -> None:
    running = Running(unlimited(setting))
    running.at_update = True
    with pytest.raises(UserError, match="a part of the weights had been stepped, so the step cannot be taken again"):
        running.step()
    assert running.num_tries == 1


def test_what_the_user_fixed_is_not_changed_by_running_out(setting: Setting) -> None:
    fit = decided(setting, MemoryOptions(recompute="2"), free_bytes=GIB)
    running = Running(fit, enough=(3, 0))
    with pytest.raises(UserError, match=r"with 2 of 6 .* recomputed; leave memory\.recompute to auto"):
        running.step()
    assert running.num_tries == 1


def test_several_processes_do_not_wait_for_one_that_tries_again(setting: Setting) -> None:
    running = Running(unlimited(setting), enough=(3, 0), num_processes=2)
    with pytest.raises(UserError, match="in one of several processes, which the others cannot wait for"):
        running.step()
    assert running.num_tries == 1


def test_other_errors_pass(setting: Setting) -> None:
    running = Running(unlimited(setting))

    def step() -> None:
        raise ValueError("another")

    with pytest.raises(ValueError, match="another"):
        running.guard([batch_of()], step)


# --- what is measured corrects what was counted ---------------------------------------------------------------------


class Gauge:
    """Measures what the count says and an error that it does not know of."""

    def __init__(self, setting: Setting, error: Callable[[tuple[int, int]], int], num_retries: int = 0) -> None:
        self.setting, self.error, self.num_retries = setting, error, num_retries
        self.guard: Guard | None = None

    def begin(self) -> None:
        """Nothing."""

    def end(self) -> Measured:
        assert self.guard is not None
        now = blocks(self.guard.recompute)
        taken = peak(self.setting, now) + self.error(now)
        return Measured(taken, taken + 1000, self.num_retries)


def measured(
    setting: Setting, fit: Fit, error: Callable[[tuple[int, int]], int], num_retries: int = 0
) -> tuple[Running, list[tuple[int, int]]]:
    """Twelve steps of full size: the run, and what was recomputed after each."""
    gauge = Gauge(setting, error, num_retries)
    running = Running(fit, meter=gauge)
    gauge.guard = running.guard
    seen = []
    for _ in range(12):
        running.step()
        seen.append(blocks(running.guard.recompute))
    return running, seen


def cost(setting: Setting, now: tuple[int, int]) -> float:
    return count(setting, *now).recomputed_flops


def tight(setting: Setting) -> Fit:
    fit = decided(setting, free_bytes=(peak(setting) + least_bytes(setting)) // 2)
    assert blocks(fit.recompute) not in ((0, 0), FULL)
    return fit


def test_a_count_that_holds_changes_nothing_and_is_said_once(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = tight(setting)
    running, seen = measured(setting, fit, lambda now: 0)
    assert set(seen) == {blocks(fit.recompute)}
    said = capsys.readouterr()
    assert (said.out + said.err).count("memory: a step takes") == 1
    figures = running.guard.figures()
    assert figures["recomputed_base_blocks"] == fit.recompute.base_blocks
    assert figures["allocated_gib"] == figures["expected_gib"] == round(fit.recompute.peak_bytes / GIB, 3)


def test_more_is_recomputed_where_a_step_takes_more_than_the_budget(setting: Setting) -> None:
    fit = tight(setting)
    budget = fit.budget_bytes or 0
    error = budget - fit.recompute.peak_bytes + (budget - least_bytes(setting)) // 4
    running, seen = measured(setting, fit, lambda now: error)
    assert seen[0] == blocks(fit.recompute)  # the first also compiles
    assert seen[1] != seen[0]
    assert set(seen[1:]) == {seen[1]}
    taken = fewest_recomputed(setting, budget - error)
    assert seen[1] == blocks(taken)
    assert running.guard.measured is not None
    assert running.guard.measured.allocated_bytes <= budget


def test_less_is_recomputed_once_where_a_step_takes_less_than_was_counted(setting: Setting) -> None:
    fit = tight(setting)
    _, seen = measured(setting, fit, lambda now: -(peak(setting) - least_bytes(setting)))
    assert seen[0] == blocks(fit.recompute)
    assert seen[-1] == (0, 0)
    assert len(set(seen)) == 2


def test_it_comes_to_rest_where_memory_does_not_follow_the_count(setting: Setting) -> None:
    """Fewer blocks take far more than was expected: back to more, and not down again."""
    fit = tight(setting)
    spread = peak(setting) - least_bytes(setting)
    had = cost(setting, blocks(fit.recompute))
    running, seen = measured(setting, fit, lambda now: spread if cost(setting, now) < had else -spread)
    assert len(set(seen)) >= 2
    assert len(set(seen[-4:])) == 1
    assert running.guard.measured is not None
    assert running.guard.measured.allocated_bytes <= (fit.budget_bytes or 0)


def test_less_is_never_recomputed_than_what_ran_out(setting: Setting) -> None:
    gauge = Gauge(setting, lambda now: 0)
    running = Running(unlimited(setting), enough=(2, 0), meter=gauge)
    gauge.guard = running.guard
    for _ in range(8):
        running.step()
    assert cost(setting, blocks(running.guard.recompute)) > cost(setting, (0, 0))
    assert running.num_tries == 8 + 1


def test_an_allocator_that_just_found_room_has_more_recomputed(setting: Setting) -> None:
    fit = tight(setting)
    _, seen = measured(setting, fit, lambda now: 0, num_retries=1)
    assert cost(setting, seen[1]) > cost(setting, seen[0])
    assert seen[-1] == FULL


def test_a_budget_that_nothing_meets_is_said_and_training_goes_on(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    running, seen = measured(setting, tight(setting), lambda now: GIB)
    assert seen[-1] == FULL
    said = capsys.readouterr().err
    assert said.count("; try --") == 1
    assert running.num_tries == 12


def test_smaller_steps_say_nothing_of_the_largest(setting: Setting) -> None:
    gauge = Gauge(setting, lambda now: GIB)
    running = Running(tight(setting), meter=gauge)
    gauge.guard = running.guard
    for _ in range(4):
        running.step(batch_of(1, size=128), batch_of(2, size=64))
    assert running.guard.recompute == running.guard.fit.recompute
    assert running.guard.measured is None


def test_a_measured_run_has_its_optimizer_s_memory_from_the_start(setting: Setting) -> None:
    class Counting(Optimizer):
        reserved = 0

        def reserve(self) -> None:
            type(self).reserved += 1
            super().reserve()

    adapter = adapter_of()
    optimizer = Counting(OptimizerOptions(), dict(adapter.named_parameters()))
    states = optimizer.state()
    Guard(tight(setting), flux(), adapter, optimizer, CPU, meter=Gauge(setting, lambda now: 0))
    assert Counting.reserved == 1
    assert optimizer.num_updates == 0
    assert optimizer.state()[1] == states[1]


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with nothing given up."""
    runs = tmp_path_factory.mktemp("plain")
    assert train(train_options(tiny_cache, runs)) == 0
    return runs / "run"


@pytest.mark.parametrize(
    "memory",
    [{"recompute": "all"}, {"recompute": "3+1"}, {"stream": "yes"}, {"stream": "yes", "recompute": "2"},
     {"budget": "1GiB"}],
    ids=str,
)  # fmt: skip
def test_nothing_that_is_given_up_for_memory_changes_what_is_learned(
    memory: dict[str, str], plain: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    assert train(train_options(tiny_cache, tmp_path, memory=memory)) == 0
    assert controlnet_bytes(tmp_path / "run") == controlnet_bytes(plain)
    assert losses(tmp_path / "run") == losses(plain)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": {"hoist": "yes", "hoist_steps": 2, "stream": "yes"}, "loader": {"batch_size": 1, "accumulation": 2},
         "optimizer": {"states": "cpu"}},
    ],
    ids=["plain", "everything-elsewhere"],
)  # fmt: skip
def test_a_run_whose_steps_run_out_of_memory_goes_on_as_if_they_had_not(
    changes: dict[str, Any],
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(train_options(tiny_cache, tmp_path, name="undisturbed", **changes)) == 0
    capsys.readouterr()
    backward = Step.backward
    calls: list[int] = []

    def running_out(self: Step, batches: list[Batch]) -> Any:
        calls.append(len(calls))
        found = backward(self, batches)
        if len(calls) in (1, 2, 6):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Step, "backward", running_out)
    assert train(train_options(tiny_cache, tmp_path, **changes)) == 0
    assert len(calls) == 6 + 3
    assert controlnet_bytes(tmp_path / "run") == controlnet_bytes(tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    said = capsys.readouterr()
    assert (said.out + said.err).count("the step is taken again") == 3


def test_a_run_with_a_global_batch_goes_on_with_the_batches_that_it_began_with(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"loader": {"batch_size": 1, "global_batch": 4}, "checkpoint": {"every": 2}}
    by_hand = {"batch_size": 2, "accumulation": 2}
    assert train(train_options(tiny_cache, tmp_path, name="by-hand", loader=by_hand)) == 0
    with monkeypatch.context() as patch:  # so long as only batches of 2 fit
        patch.setattr("train.fit._ways", lambda loader, *_: [replace(loader, global_batch=None, **by_hand)])
        assert train(train_options(tiny_cache, tmp_path, **asked, steps=2)) == 0
    assert train(train_options(tiny_cache, tmp_path, **asked, steps=6)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "by-hand")
    assert controlnet_bytes(tmp_path / "run") == controlnet_bytes(tmp_path / "by-hand")
