"""A sweep that was killed ends as the one that was not; and what the benchmark holds to be the same, it compares."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.sweep_kills import Kill, Plan, compare, draw_kills, found_in, options_of
from tests import forked
from tests.train.made_sweep import make_run
from train import checkpoints


def compare_into(file: Path, words: list[str], kills: list[Kill]) -> None:
    outcome = compare(words, kills, file.parent)
    file.write_text(json.dumps({"line": outcome.line(), "starts": outcome.starts, "different": outcome.different}))


@pytest.mark.parametrize("shared_base", [False, True])
def test_kills_of_an_experiment_of_the_sweep_and_of_both_change_nothing_on_the_page(
    shared_base: bool, tiny_cache: Path, tmp_path: Path
) -> None:
    words = [*options_of(tiny_cache, steps=4), "--depths", "1-0", "0-1", "--shared-base", str(shared_base)]
    kills = [Kill(4, "experiment"), Kill(8, "both"), Kill(12, "sweep")]  # two batches make a step
    file = tmp_path / "outcome.json"
    process = forked.context().Process(target=compare_into, args=(file, words, kills))
    process.start()
    process.join()
    assert process.exitcode == 0
    outcome = json.loads(file.read_text())
    assert outcome["different"] == []
    assert outcome["starts"] >= 3
    assert outcome["line"].startswith("sweep kills=3 (experiment=1 sweep=1 both=1)")
    said = (tmp_path / "killed" / "said.txt").read_text()
    assert "resuming after step" in said
    assert said.count(f"--- exit code {-signal.SIGKILL}") == 2
    assert "resuming" not in (tmp_path / "undisturbed" / "said.txt").read_text()


def test_kills_are_drawn_by_the_seed_of_each_kind_alike_and_one_after_the_other() -> None:
    kills = draw_kills(30, seed=1, between=6)
    assert kills == draw_kills(30, seed=1, between=6) != draw_kills(30, seed=2, between=6)
    assert sorted(kill.victim for kill in kills) == ["both"] * 10 + ["experiment"] * 10 + ["sweep"] * 10
    assert all(0 < later.batch - earlier.batch < 12 for earlier, later in itertools.pairwise(kills))


def test_each_kill_comes_once_at_its_batch_and_never_to_a_process_that_is_not_the_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me, parent, init = os.getpid(), 1 << 22, 1
    above, killed = parent, list[int]()

    def kill(pid: int, number: int) -> None:
        nonlocal above
        assert number == signal.SIGKILL
        killed.append(pid)
        above = init if pid == above else above

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(os, "getppid", lambda: above)
    plan = Plan([Kill(2, "experiment"), Kill(3, "sweep"), Kill(3, "sweep"), Kill(6, "both")])
    seen = []
    for number in range(1, 8):
        plan.before_batch(parent)
        seen.append([*killed])
        killed.clear()
        above = parent if number == 4 else above  # the sweep was started again
    assert seen == [[], [me], [parent], [], [], [parent, me], []]
    assert plan.num_done == 4


def sweep_of_two(folder: Path) -> Path:
    for seed in (0, 1):
        run = make_run(folder / f"seed-{seed}", seed=seed, steps=20)
        text = (run / "config.yaml").read_text()
        assert str(folder) not in text
        checkpoints.save(run, 20, lambda part: part.mkdir(), {}, {}, keep=0)
    (folder / "compare.html").write_text("<!doctype html>")
    return folder


def changed_metric(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"gradient_norm": 1.', '"gradient_norm": 2.'))


def line_twice(run: Path) -> None:
    """The look of a step that was taken twice, with another figure."""
    line = {"step": 20, "held_out": {"loss": 0.1}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def changed_picture(run: Path) -> None:
    picture = next((run / "pictures" / "step-00000020").iterdir())
    picture.write_bytes(picture.read_bytes() + b"\0")


def changed_checkpoint(run: Path) -> None:
    checkpoints.save(run, 20, lambda part: part.mkdir(), {"weight.state1": torch.ones(1)}, {}, keep=0)


@pytest.mark.parametrize("change", [changed_metric, line_twice, changed_picture, changed_checkpoint])
def test_what_is_not_the_same_in_two_sweeps_is_found(change: Any, tmp_path: Path) -> None:
    one, other = sweep_of_two(tmp_path / "a" / "runs"), sweep_of_two(tmp_path / "b" / "runs")
    expected = found_in(one)
    assert expected == found_in(other)
    assert any(name.startswith("checkpoint.") for name in expected)
    change(other / "seed-1")
    assert found_in(other) != expected


def test_the_time_that_a_step_took_is_not_compared(tmp_path: Path) -> None:
    sweep = sweep_of_two(tmp_path / "runs")
    expected = found_in(sweep)
    metrics = sweep / "seed-0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step_seconds": 0.4', '"step_seconds": 7.0'))
    run = json.loads((sweep / "seed-0" / "run.json").read_text())
    run["starts"] = [run["starts"][0], run["starts"][0]]
    (sweep / "seed-0" / "run.json").write_text(json.dumps(run))
    assert found_in(sweep) == expected


def test_a_page_that_is_not_there_is_found(tmp_path: Path) -> None:
    sweep = sweep_of_two(tmp_path / "runs")
    expected = found_in(sweep)
    (sweep / "compare.html").unlink()
    assert found_in(sweep) != expected
