"""The step's benchmarks run, on models of a few thousand parameters. No time is looked at."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.step import __main__ as command
from benchmarks.step import assembly, ceilings, models, planned, slices, step_cells, tables, ways
from benchmarks.step.cells import A100_40GB, LARGEST, Cell, plan, tiny_plan
from benchmarks.step.data import RECIPES, make_batch
from benchmarks.step.planned import Planned, can_be_planned, setting_of
from benchmarks.step.results import DONE, FAILED, TOO_LONG, Results
from benchmarks.step.sizes import FULL, TINY, flops
from benchmarks.step.ways import WAYS
from shared import families
from shared.errors import UserError
from shared.report import quiet_libraries
from tests import forked
from train.memory_plan import Recompute

CPU = torch.device("cpu")
AT: dict[str, Any] = {"depth": "1-1", "resolution": 64, "text_length": 16}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling is other tests' business, and takes its time."""
    quiet_libraries()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # else it would stay set
    for name, way in WAYS.items():
        monkeypatch.setitem(ways.WAYS, name, dataclasses.replace(way, compiled=False))


def measured(cell: Cell) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return step_cells.measure(cell, TINY, CPU, Path(folder))


# What a step costs


@pytest.mark.parametrize(("depth", "resolution", "text_length", "parts", "multiple"), [
    # Counted on the real models: ControlNet forward, base forward, base backward, ControlNet backward (10^12), step in
    # base forwards.
    ((2, 4), 512, 77, (1.71, 15.07, 16.05, 3.45), 2.41),
    ((2, 4), 512, 512, (2.39, 21.50, 23.51, 4.86), 2.43),
    ((2, 4), 1024, 512, (8.31, 74.38, 94.95, 17.38), 2.62),
    ((4, 0), 512, 512, (1.60, 21.50, 23.51, 3.07), 2.31),
    ((5, 10), 512, 512, (5.96, 21.50, 23.51, 12.12), 2.93),
    ((5, 10), 1024, 77, (18.55, 66.08, 82.88, 38.71), 3.12),
    ((19, 38), 512, 512, (22.60, 21.50, 23.51, 46.02), 5.28),
])  # fmt: skip
def test_operations_are_those_that_were_counted_on_the_real_model(
    depth: tuple[int, int], resolution: int, text_length: int, parts: tuple[float, ...], multiple: float
) -> None:
    found = flops(FULL, depth, resolution, text_length)
    ours = (found.controlnet_forward, found.base_forward, found.base_backward, found.controlnet_backward)
    assert [value / 1e12 for value in ours] == pytest.approx(list(parts), rel=0.01)
    assert found.base_forwards == pytest.approx(multiple, rel=0.01)


def test_recomputing_every_block_does_its_forward_twice() -> None:
    one = flops(FULL, (2, 4), 512, 512)
    all_of_them = flops(FULL, (2, 4), 512, 512, recomputed=(57, 6))
    assert all_of_them.model == one.model
    assert all_of_them.machine / 1e12 == pytest.approx(75.6, rel=0.01)  # as counted
    assert flops(FULL, (2, 4), 512, 512, batch=3).model == pytest.approx(3 * one.model)


# Models and data


def test_the_full_size_is_that_of_the_default_model() -> None:
    theirs = families.get("flux").make_base()
    mine = models.empty_base(FULL, torch.bfloat16)
    shapes = [{name: p.shape for name, p in module.named_parameters()} for module in (mine, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in mine.parameters()) == 11_901_408_320


def test_no_weight_is_zero_and_every_gate_is_open() -> None:
    base, controlnet = models.make_base(TINY, CPU, torch.float32).module, models.make_controlnet(
        TINY, (1, 1), CPU, torch.float32
    )  # fmt: skip
    for module in (base, controlnet):
        for name, parameter in module.named_parameters():
            assert parameter.abs().median() > 1e-4, name
    gate = base.get_parameter("single_transformer_blocks.0.norm.linear.bias")[-TINY.width :]
    assert 0.2 < gate.abs().mean() < 0.6


def test_activations_keep_their_variance_through_as_many_blocks_as_the_real_model_has() -> None:
    deep = dataclasses.replace(TINY, num_layers=19, num_single_layers=38)
    base = models.make_base(deep, CPU, torch.float32).module
    family, deviations = families.get("flux"), []
    for block in family.blocks(base):
        block.register_forward_hook(lambda module, inputs, outputs: deviations.append(outputs[1].std().item()))
    batch = make_batch(deep, 2, 64, 16, CPU, torch.float32, 0, 2)
    x_t = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    out = family.predict(base, x_t, torch.tensor([0.3, 0.8]), family.inputs(batch, None, torch.float32), 3.5, None)
    assert len(deviations) == 57
    assert 0.5 < min(deviations) < max(deviations) < 5
    assert 0.3 < out.std() < 3


def test_every_way_of_holding_the_base_holds_the_same_one() -> None:
    plain = models.make_base(TINY, CPU, torch.float32).module
    hoisted = models.make_base(TINY, CPU, torch.float32, hoist=True)
    theirs = dict(plain.named_parameters())
    ours = dict(hoisted.module.named_parameters())
    ours |= {f"{name}.{which}": p for name, linear in hoisted.taken.items() for which, p in linear.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(p.requires_grad for p in models.make_base(TINY, CPU, torch.float32, "quanto").module.parameters())


def test_data_have_the_variance_of_a_model_s_inputs_and_are_repeated() -> None:
    batch = make_batch(TINY, 2, 128, 16, CPU, torch.float32, 3, 2)
    latents = families.get("flux").model_latents(batch.role("latents"), RECIPES["latents"], None, torch.float32)
    assert latents.shape == (2, 64, 64)
    assert 0.9 < latents.std() < 1.1
    again = make_batch(TINY, 2, 128, 16, CPU, torch.float32, 3, 2)
    assert all(torch.equal(batch.tensors[name], again.tensors[name]) for name in batch.tensors)


# Cells


@pytest.mark.parametrize("way", WAYS)
def test_every_way_takes_steps_and_reports_them(way: str) -> None:
    found = measured(Cell("step", way, **AT))
    assert "outcome" not in found
    assert math.isfinite(found["loss"])
    assert found["gradient_norm"] > 0
    assert found["images_per_second"] == pytest.approx(found["batch"] * WAYS[way].accumulation / found["step_ms"] * 1e3)
    assert found["recomputed_blocks"] == ([5, 2] if WAYS[way].recompute == "all" else [0, 0])
    assert found["split_ms"].keys() == {
        "controlnet forward", "base forward", "base backward", "controlnet backward", "update",
    }  # fmt: skip
    json.dumps(found)


def test_ways_of_the_same_numbers_take_the_same_first_step() -> None:
    losses = {}
    for way in (
        "bf16",
        "diffusers",
        "diffusers-recomputed",
        "ours-bf16",
        "ours-lean",
        "quanto",
        "ours-streamed",
        "ours",
    ):
        made = assembly.assemble(Cell("step", way, **AT), TINY, CPU, torch.float32)
        losses[way] = made.take(2)["loss"]
        made.close()
    assert losses["diffusers"] == losses["diffusers-recomputed"] == pytest.approx(losses["bf16"], rel=1e-6)
    assert losses["ours-bf16"] == pytest.approx(losses["bf16"], rel=1e-6)  # hoisted: the same modulation
    assert losses["ours-lean"] == pytest.approx(losses["quanto"], rel=1e-6)
    assert losses["ours-streamed"] == losses["ours"] == pytest.approx(losses["quanto"], rel=1e-2)


def test_quanto_s_base_can_be_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for compiled in (False, True):
        monkeypatch.setitem(ways.WAYS, "quanto", dataclasses.replace(WAYS["quanto"], compiled=compiled))
        made = assembly.assemble(Cell("step", "quanto", **AT), TINY, CPU, torch.float32)
        losses.append([made.take(1)["loss"] for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_steps_move_the_controlnet_alone_and_each_step_has_its_own_noise() -> None:
    made = assembly.assemble(Cell("step", "ours", **AT), TINY, CPU, torch.float32)
    before = {name: p.detach().clone() for name, p in made.adapter.named_parameters()}
    positions = [batch.position for number in range(9) for batch in made.batches(1, number)]
    assert len(set(positions)) == 9  # the data come round, times and noise do not
    for _ in range(2):
        made.take(1)
    made.close()
    moved = [name for name, p in made.adapter.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)


def test_fidelity_of_the_lean_linear_is_that_of_quanto_and_of_8_bit_arithmetic_is_less() -> None:
    lean = measured(Cell("fidelity", "ours-lean", **AT))
    assert lean["against quanto"]["relative_error"] < 1e-5
    assert 1e-4 < lean["against bf16"]["relative_error"] < 0.05
    assert 0.999 < lean["against bf16"]["cosine"] < 1


def test_two_gradients_are_compared_over_all_their_parameters() -> None:
    theirs = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert step_cells.compare(theirs, theirs) == {"cosine": pytest.approx(1), "relative_error": 0}
    ours = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])}
    assert step_cells.compare(ours, theirs) == {
        "cosine": pytest.approx(25 / (26 * 25) ** 0.5), "relative_error": pytest.approx(0.2),
    }  # fmt: skip


def test_a_forward_and_the_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cells, "compile_blocks", lambda *args, **named: None)
    assert measured(Cell("forward", **AT))["forward_ms"] > 0
    found = ceilings.measure(TINY, CPU, torch.float32)
    assert next(iter(found["gemm"])) == "128x128x128"
    assert all(value > 0 for part in found.values() for value in part.values())
    assert {name.split()[0] for name in found["attention"]} >= {"math"}


# Memory


@pytest.mark.parametrize("uneven", [0, 3])
@pytest.mark.parametrize(("static", "slope", "limit"), list(itertools.product((10, 35, 60), (1, 7, 26), (40,))))
def test_the_largest_batch_is_found_with_few_tries(static: int, slope: int, limit: int, uneven: int) -> None:
    tried: list[int] = []

    def peak(batch: int) -> int:  # the first step up, or the last ones, are higher than the others
        return static + slope * batch + (batch > 3) * (uneven == 0) + (batch > 1) * uneven

    def peak_of(batch: int) -> int | None:
        tried.append(batch)
        return peak(batch) if peak(batch) <= limit else None

    found = step_cells.largest_batch(peak_of, limit, most=16)
    assert found == max((b for b in range(1, 17) if peak(b) <= limit), default=0)
    assert len(tried) == len(set(tried))
    assert uneven or len(tried) <= 5


def test_without_a_limit_the_largest_batch_is_the_most_that_is_asked_for() -> None:
    assert step_cells.largest_batch(lambda batch: 0, 0, most=2) == 2


def forgetful(monkeypatch: pytest.MonkeyPatch, fits: Callable[[assembly.Assembled, int], bool]) -> None:
    """Steps run out of memory unless they fit."""
    take = assembly.Assembled.take

    def taken(made: assembly.Assembled, batch: int) -> dict[str, float]:
        if not fits(made, batch):
            raise torch.OutOfMemoryError("out of memory")
        return take(made, batch)

    monkeypatch.setattr(assembly.Assembled, "take", taken)


def test_where_memory_does_not_suffice_that_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful(monkeypatch, lambda made, batch: False)
    found = measured(Cell("step", "quanto", **AT))
    assert found["outcome"] == step_cells.OUT_OF_MEMORY
    assert found["while"] == "a step of batch 1"


def test_our_way_recomputes_what_the_plan_says_and_more_where_that_does_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = iter([Recompute(1, 0, 0), Recompute(3, 1, 0)])
    budgets = []

    def fewest(setting: object, budget_bytes: int) -> Recompute:
        budgets.append(budget_bytes)
        return next(asked)

    monkeypatch.setattr(step_cells, "fewest_recomputed", fewest)
    forgetful(monkeypatch, lambda made, batch: made.recomputed == (3, 1))
    found = measured(Cell("step", "ours", **AT, cap_gib=1.0))
    assert found["recomputed_blocks"] == [3, 1]
    assert budgets[0] == 2**30 > budgets[1]
    assert found["flops"]["recomputed"] > 0


def test_what_cannot_fit_keeps_the_plan_s_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(setting: object, budget_bytes: int) -> Recompute:
        raise UserError("nothing fits")

    monkeypatch.setattr(step_cells, "fewest_recomputed", refuse)
    forgetful(monkeypatch, lambda made, batch: False)
    found = measured(Cell("step", "ours", **AT, cap_gib=1.0))
    assert (found["outcome"], found["plan"]) == (step_cells.OUT_OF_MEMORY, "nothing fits")


def test_the_plan_counts_what_a_way_holds() -> None:
    ours = setting_of(Cell("step", "ours-cpu-states", "5-10", cap_gib=A100_40GB), 2)
    assert (ours.depth, ours.batch_size, ours.base, ours.hoist, ours.optimizer.states) == (
        (5, 10),
        2,
        "int8",
        True,
        "cpu",
    )
    theirs = setting_of(Cell("step", "quanto"), 1)
    assert (theirs.base, theirs.hoist, theirs.stream) == ("quanto", False, False)
    assert not can_be_planned(Cell("step", "quanto-online"))
    assert not can_be_planned(Cell("step", "diffusers"))


def test_planned_peaks_are_counted_once_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(setting: object, *blocks: int) -> Recompute:
        calls.append(blocks)
        return Recompute(blocks[0], blocks[1], peak_bytes=20 * 2**30)

    monkeypatch.setattr(planned, "count", count)
    record = {
        "cell": Cell("step", "ours").to_dict(), "batch": 1, "recomputed_blocks": [2, 0], "peak_allocated_gib": 20.5,
    }  # fmt: skip
    path = tmp_path / "planned.json"
    assert Planned(path, count_missing=False).peak_gib(record) is None
    assert Planned(path, count_missing=True).peak_gib(record) == 20
    assert Planned(path, count_missing=True).peak_gib(record) == 20
    assert Planned(path, count_missing=False).peak_gib(record) == 20
    assert calls == [(2, 0)]


# Results, slices and tables


def test_the_plan_begins_with_the_ceilings_names_no_cell_twice_and_covers_the_grid() -> None:
    cells = plan()
    assert cells[0] == Cell("ceilings")
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.way for cell in cells} == {"", *WAYS}
    assert {(c.depth, c.resolution, c.text_length, c.batch) for c in cells if c.way == "ours"} >= set(
        itertools.product(("2-4", "5-10"), (512, 1024), (77, 512), (1, 2, 4, LARGEST))
    )
    assert {cell.part for cell in tiny_plan()} == {cell.part for cell in cells}


def test_results_are_read_back_and_what_failed_is_tried_again_last(tmp_path: Path) -> None:
    cells = [Cell("step", "quanto", batch=batch) for batch in (1, 2, 4)]
    results = Results(tmp_path / "r.jsonl", "tiny")
    results.add(cells[0], FAILED, {}, {})
    results.add(cells[1], step_cells.OUT_OF_MEMORY, {}, {})
    again = Results(tmp_path / "r.jsonl", "tiny")
    assert again.left(cells) == [cells[2], cells[0]]
    assert again.outcome(cells[1]) == step_cells.OUT_OF_MEMORY
    assert again.figures(cells[1]) is None
    again.add(cells[0], DONE, {"step_ms": 1.0}, {})
    figures = Results(tmp_path / "r.jsonl", "tiny").figures(cells[0])
    assert figures is not None
    assert figures["step_ms"] == 1.0
    assert Results(tmp_path / "r.jsonl", "FLUX.1-dev").left(cells) == cells


def test_a_line_that_a_kill_cut_off_spoils_nothing(tmp_path: Path) -> None:
    path, cells = tmp_path / "r.jsonl", [Cell("step", "quanto", batch=batch) for batch in (1, 2)]
    Results(path, "tiny").add(cells[0], DONE, {}, {})
    path.write_text(path.read_text()[:-20])
    results = Results(path, "tiny")
    assert results.left(cells) == cells
    results.add(cells[1], DONE, {}, {})
    assert Results(path, "tiny").left(cells) == [cells[0]]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"loss": 1}\n{"loss": 2}\n')
    with pytest.raises(UserError, match=r"line 1 is no result of these benchmarks .* choose another --results"):
        Results(path, "tiny")


def run_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, Any] | None], minutes: float = 1.0
) -> tuple[Results, int, list[str]]:
    asked = []

    def answer(cell: Cell, *_: object) -> dict[str, Any] | None:
        asked.append(cell.way)
        return answers[cell.way]

    monkeypatch.setattr(slices, "_in_own_process", answer)
    cells = [Cell("step", way) for way in ("ours", "quanto", "seed")]
    results = Results(tmp_path / "r.jsonl", "tiny")
    left = slices.run(cells, results, "cpu", minutes, tmp_path)
    return results, left, asked


STEP = {"batch": 1, "step_ms": 5.0, "images_per_second": 200.0}


def test_a_slice_goes_on_after_a_failure_and_the_next_one_does_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"outcome": FAILED, "code": 1, "printed": ["RuntimeError: no"]}
    answers: dict[str, dict[str, Any] | None] = {"ours": dict(STEP), "quanto": failed, "seed": dict(STEP)}
    _, left, asked = run_slice(tmp_path, monkeypatch, answers)
    assert (left, asked) == (1, ["ours", "quanto", "seed"])
    _, left, asked = run_slice(tmp_path, monkeypatch, {"quanto": dict(STEP)})
    assert (left, asked) == (0, ["quanto"])


def test_a_cell_that_takes_the_whole_slice_is_noted_and_does_not_block_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, left, asked = run_slice(tmp_path, monkeypatch, {"ours": None})
    assert (left, asked) == (3, ["ours"])
    assert results.outcome(Cell("step", "ours")) == TOO_LONG
    _, left, asked = run_slice(tmp_path, monkeypatch, {"ours": None, "quanto": dict(STEP), "seed": dict(STEP)})
    assert (left, asked) == (1, ["quanto", "seed", "ours"])


def test_no_cell_is_begun_with_too_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, left, asked = run_slice(tmp_path, monkeypatch, {"ours": dict(STEP)}, minutes=0.5)
    assert (left, asked) == (2, ["ours"])


def test_a_cell_is_measured_in_a_process_of_its_own_and_a_late_one_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(slices, "subprocess", forked)
        found = slices._in_own_process(Cell("ceilings"), "tiny", "cpu", 300.0, tmp_path)
    assert found is not None
    assert "gemm" in found, found
    assert found["environment"]["torch"] == torch.__version__.split("+")[0]
    # One that begins with its imports is late.
    assert slices._in_own_process(Cell("ceilings"), "tiny", "cpu", 0.0, tmp_path) is None


def test_what_a_failed_process_printed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "subprocess", forked)
    found = slices._in_own_process(Cell("ceilings"), "no such size", "cpu", 300.0, tmp_path)
    assert found is not None
    assert found["outcome"] == FAILED
    assert "no such size" in found["printed"][-1]


def record_full(results: Results, cell: Cell, **figures: Any) -> None:
    environment = {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "c0ffee"}
    base = {"recomputed_blocks": [0, 0], "batch": cell.batch, "tflops": 500.0}
    results.add(cell, DONE, {**base, **figures}, environment)


def test_goals_are_kept_missed_or_said_to_be_not_measured(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl", FULL.name)
    none = Planned(tmp_path / "planned.json", count_missing=False)
    assert tables.goals(results, none).count("not measured: make bench") == len(tables.GOALS) + 1
    record_full(
        results,
        Cell("step", "ours", batch=LARGEST, cap_gib=A100_40GB),
        images_per_second=9.0,
        step_ms=444.0,
        batch=4,
        tried={"1": 20.1},
    )
    record_full(
        results, Cell("step", "quanto", batch=LARGEST, cap_gib=A100_40GB), images_per_second=8.0, step_ms=250.0, batch=2
    )
    assert re.search(r"peak of 2-4.* 20\.1 GiB +kept", tables.goals(results, none))  # on the way to the largest batch
    record_full(
        results, Cell("step", "ours", cap_gib=A100_40GB), images_per_second=8.0, step_ms=125.0, peak_allocated_gib=20.4
    )
    record_full(results, Cell("forward", batch=4), forward_ms=160.0, tflops=540.0)
    lines = {line.split("  ")[0]: line.split() for line in tables.goals(results, none).splitlines()}
    assert lines["2-4 at 512 px, exact, images/s below 39.4 GiB"][-2:] == ["9", "kept"]
    assert lines["5-10 at 512 px, exact, images/s below 39.4 GiB"][-4:] == ["not", "measured:", "make", "bench"]
    assert lines["2-4 exact beside quanto, cached"][-2:] == ["1.12x", "missed"]
    assert lines["peak of 2-4, batch 1, nothing recomputed"][-3:] == ["20.4", "GiB", "kept"]
    r_forward = 444.0 / (flops(FULL, (2, 4), 512, 512).base_forwards * 160.0)
    assert lines["R_fwd of 2-4 at the best batch"][-2:] == [f"{r_forward:.3g}", "kept"]
    assert lines["5-10 at 512 px, exact, images/s below 39.4 GiB"][-4:] == ["not", "measured:", "make", "bench"]


def test_the_tables_show_shares_of_both_rates_slopes_and_what_has_no_result(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl", FULL.name)
    results.add(Cell("ceilings"), DONE, {
        "gemm": {"8192x8192x8192": 790.0}, "int8": {}, "attention": {}, "copy": {"within the device": 4.3},
    }, {"gpu": "NVIDIA H200"})  # fmt: skip
    for batch, peak in ((1, 20.0), (4, 36.5)):
        record_full(
            results, Cell("step", "ours", batch=batch, cap_gib=A100_40GB), images_per_second=9.0, step_ms=100.0 * batch,
            peak_allocated_gib=peak, peak_reserved_gib=peak + 1,
        )  # fmt: skip
    results.add(Cell("step", "diffusers"), step_cells.OUT_OF_MEMORY, {}, {})
    results.add(Cell("step", "seed"), FAILED, {"printed": ["RuntimeError: no"]}, {})
    shown = tables.report(results, plan(), Planned(tmp_path / "p.json", count_missing=False))
    assert "50.6%" in shown  # 500 of 989
    assert "63.3%" in shown  # 500 of 790
    assert "5.50" in shown  # GiB a sample
    assert "out of memory" in shown
    assert "failed, RuntimeError: no" in shown
    assert shown.splitlines()[-1] == f"bench cells={len(plan())} done=4 left={len(plan()) - 4}"


def test_the_command_refuses_the_full_size_without_a_gpu_and_unknown_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["step", "--results", str(tmp_path / "r.jsonl"), *words])
        return command.main()

    with pytest.raises(UserError, match="there is none: --tiny shows that it runs"):
        run("--device", "cpu")
    with pytest.raises(UserError, match=r"--only quannto: did you mean 'quanto'\?"):
        run("--only", "quannto")
    assert run("--table") == 0  # needs no GPU
