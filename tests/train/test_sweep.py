"""A sweep: which experiments it has, that each is trained once and for all, and what becomes of those that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from shared.config import load, to_dict
from shared.errors import EXIT_INCOMPLETE, EXIT_INTERRUPTED, UserError
from tests.train.conftest import content, controlnet_bytes, metrics, train_options
from train import children, grid
from train.grid import SweepConfig, dimensions, experiments
from train.sweep import PAGE, SWEEP, main, recorded, sweep
from train.trainer import train


def sweep_options(cache: Path, runs: Path, **changes: Any) -> SweepConfig:
    """A sweep of `train_options`."""
    own = {field.name for field in dataclasses.fields(SweepConfig)} - {"name"}
    of_all = train_options(cache, runs, **{key: value for key, value in changes.items() if key not in NEW})
    given = {field.name: getattr(of_all, field.name) for field in dataclasses.fields(of_all) if field.name in own}
    options = SweepConfig(**{**given, "name": "first", **{key: changes[key] for key in changes if key in NEW}})
    options.check()
    return options


NEW = ("depths", "rates", "seeds", "vary", "gpus", "shared_base")


def outcomes(folder: Path) -> dict[str, str]:
    stated = json.loads((folder / SWEEP).read_text())["experiments"]
    return {name: state["outcome"] for name, state in stated.items()}


# --- which experiments ----------------------------------------------------------------------------------------------


def test_every_combination_is_an_experiment_named_by_what_varies_and_seeds_come_round_last() -> None:
    options = SweepConfig(
        name="first", depths=("2-0", "2-4"), rates=(1e-5, 2e-5), seeds=(0, 1), vary=("loader.batch-size=2",), steps=7
    )
    found = experiments(options)
    assert [each.name for each in found] == [
        f"depth-{depth}_lr-{rate}_seed-{seed}"
        for seed in (0, 1) for depth in ("2-0", "2-4") for rate in ("1e-05", "2e-05")
    ]  # fmt: skip
    last = found[-1]
    assert (last.options.depth, last.options.seed, last.options.optimizer.learning_rate) == ("2-4", 1, 2e-5)
    assert last.varied == {"seed": 1, "depth": "2-4", "optimizer.learning_rate": 2e-5, "loader.batch_size": 2}
    assert {each.options.loader.batch_size for each in found} == {2}
    assert last.folder == Path("runs/first/depth-2-4_lr-2e-05_seed-1")


def test_what_is_not_varied_is_the_same_in_all() -> None:
    options = SweepConfig(depths=("1-0", "1-1"), vary=("objective.logit_mean=0,0.5", "ema.profile=off,power"), seed=3)
    for each in experiments(options):
        expected = to_dict(options) | {"runs": "runs/sweep", "name": each.name, "depth": each.varied["depth"]}
        expected["objective"]["logit_mean"] = each.varied["objective.logit_mean"]
        expected["ema"]["profile"] = each.varied["ema.profile"]
        assert to_dict(each.options) == {key: expected[key] for key in to_dict(each.options)}
    assert [each.name for each in experiments(SweepConfig())] == ["depth-2-4"]
    assert [each.name for each in experiments(options)][-1] == "depth-1-1_logit_mean-0.5_profile-power"


@pytest.mark.parametrize(("changes", "words"), [
    ({"vary": ("objective.logit_meen=0,1",)}, "unknown option 'objective.logit_meen': did you mean 'objective.logit_"),
    ({"vary": ("logit_mean",)}, "write an option and its values, as objective.logit_mean=0,1"),
    ({"vary": ("seed=1,2",), "seeds": (1, 2)}, "seed is listed already"),
    ({"vary": ("name=a,b",)}, "unknown option 'name'"),
    ({"depths": ("2-0", "2-0")}, "depth lists 2-0 twice"),
    ({"gpus": ("0", "0")}, "GPUS names one twice"),
])  # fmt: skip
def test_a_grid_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SweepConfig(**changes).check()


def test_an_experiment_that_is_impossible_is_refused_before_any_starts(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "start", lambda *_: pytest.fail("started"))
    for changes, words in (
        ({"depths": ("1-0", "3-0")}, "depth-3-0: DEPTH 3-0 is deeper than the base"),
        ({"depths": ("1-0", "9")}, "DEPTH is num_layers-num_single_layers"),
        ({"vary": ("condition=canny,cany",)}, "condition-cany: .* holds no condition 'cany'"),
        ({"vary": ("base.weights=int8,none",), "shared_base": True}, "SHARED_BASE: base.weights makes another base"),
    ):
        with pytest.raises(UserError, match=words):
            sweep(sweep_options(tiny_cache, tmp_path, **changes))
    assert not (tmp_path / "first").exists()


def test_dry_run_says_what_would_be_trained_and_what_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--dry-run", "--depths", "1-0", "2-0", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  depth-1-0  (new)", "  depth-2-0  (new)"]
    assert not list(tmp_path.iterdir())


# --- training them, for real ----------------------------------------------------------------------------------------


def run_module(module: str, words: Sequence[str], log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Forked:
    """A child that begins with everything imported."""

    def __init__(self, context: ForkServerContext, module: str, words: Sequence[str], log: Path) -> None:
        self.process = context.Process(target=run_module, args=(module, words, log))
        self.process.start()
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode


@pytest.fixture
def forked(processes: ForkServerContext, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Children are forked; back comes what was started."""
    started: list[list[str]] = []

    def start(module: str, words: Sequence[str], log: Path, gpu: str | None) -> Forked:
        started.append([module, *words])
        return Forked(processes, module, words, log)

    monkeypatch.setattr(children, "start", start)
    return started


def test_a_sweep_trains_what_single_runs_would_be_reports_what_fails_and_goes_on_where_it_ended(
    tiny_cache: Path, tmp_path: Path, forked: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(tiny_cache)
    looks: dict[str, Any] = {"steps": 4, "validation": {"every": 2, "samples": 2, "timesteps": 2}}
    options = sweep_options(tiny_cache, tmp_path, rates=(1e-3, 1e30), depths=("1-0",), **looks)
    assert sweep(options) == EXIT_INCOMPLETE
    assert outcomes(tmp_path / "first") == {"lr-0.001": "trained", "lr-1e+30": "failed"}
    failed = json.loads((tmp_path / "first" / SWEEP).read_text())["experiments"]["lr-1e+30"]
    assert failed["exit_code"] == 2
    assert "is not finite" in failed["why"]
    assert "lr-1e+30 failed: step 2: the loss" in capsys.readouterr().err
    assert content(tiny_cache) == before
    assert train(train_options(tiny_cache, tmp_path, name="single", depth="1-0", **looks)) == 0
    assert metrics(tmp_path / "first" / "lr-0.001") == metrics(tmp_path / "single")
    page = (tmp_path / "first" / PAGE).read_text()
    assert "lr-0.001" in page
    assert "lr-1e+30" in page

    # More is listed now, and what was trained keeps its name; what failed is tried again.
    forked.clear()
    more = dataclasses.replace(options, depths=("1-0", "0-1"))
    assert sweep(more) == EXIT_INCOMPLETE
    assert [Path(words[-1]).stem for words in forked] == ["lr-1e+30", "depth-0-1_lr-0.001", "depth-0-1_lr-1e+30"]
    assert outcomes(tmp_path / "first")["depth-0-1_lr-0.001"] == "trained"
    assert capsys.readouterr().out.count("1 of 4 experiments are trained already") == 1

    # On one base: the same.
    forked.clear()
    shared = dataclasses.replace(more, name="second", rates=(1e-3,), shared_base=True)
    assert sweep(shared) == 0
    assert [words[0] for words in forked] == ["train.together"]
    assert metrics(tmp_path / "second" / "depth-1-0") == metrics(tmp_path / "single")
    twin = tmp_path / "first" / "depth-0-1_lr-0.001"
    assert controlnet_bytes(tmp_path / "second" / "depth-0-1") == controlnet_bytes(twin)


def test_a_command_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    child = children.start("http.server", ["0", "--bind", "127.0.0.1"], tmp_path / "log", None)
    assert isinstance(child, subprocess.Popen)
    assert child.stdin is not None
    while not (tmp_path / "log").stat().st_size and child.poll() is None:
        time.sleep(0.02)  # as long as Python takes to start
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(30) < 0


# --- children that only seem to train -------------------------------------------------------------------------------


class Puppet:
    """A child that does nothing until it is told how it ended."""

    def __init__(self, module: str, words: Sequence[str], log: Path, gpu: str | None) -> None:
        self.module, self.words, self.log, self.gpu = module, words, log, gpu
        self.code: int | None = None
        self.calls: list[str] = []

    @property
    def names(self) -> list[str]:
        return [Path(word).stem for word in self.words if word.endswith(".yaml")]

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.calls.append("terminate")
        self.code = -15

    def kill(self) -> None:
        self.calls.append("kill")
        self.code = -9


Play = Callable[[Callable[[list[Puppet]], None]], list[Puppet]]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Puppets instead of processes; what is given is called, with all of them, each time the sweep waits."""
    puppets: list[Puppet] = []

    def start(*what: Any) -> Puppet:
        puppets.append(Puppet(*what))
        return puppets[-1]

    def play(act: Callable[[list[Puppet]], None]) -> list[Puppet]:
        monkeypatch.setattr("train.sweep.time.sleep", lambda _: act(puppets))
        return puppets

    monkeypatch.setattr(children, "start", start)
    monkeypatch.setattr("train.sweep.refuse_impossible", lambda found: None)
    monkeypatch.setattr("train.compare.write", lambda runs, out: out)
    return play


def test_one_experiment_at_a_time_on_each_gpu(stage: Play, tmp_path: Path) -> None:
    most = []

    def act(puppets: list[Puppet]) -> None:
        running = [puppet for puppet in puppets if puppet.code is None]
        most.append(sorted(str(puppet.gpu) for puppet in running))
        for puppet in running[:1]:
            puppet.code = 0

    puppets = stage(act)
    options = sweep_options(Path("cache"), tmp_path, depths=("1-0", "2-0", "0-1", "0-2"), gpus=("0", "3"))
    assert sweep(options) == EXIT_INCOMPLETE  # they have left nothing behind
    assert max(most, key=len) == ["0", "3"]
    assert [puppet.names for puppet in puppets] == [["depth-1-0"], ["depth-2-0"], ["depth-0-1"], ["depth-0-2"]]
    assert {puppet.module for puppet in puppets} == {"train"}


def test_on_a_shared_base_each_gpu_has_one_process_for_its_share(stage: Play, tmp_path: Path) -> None:
    def act(puppets: list[Puppet]) -> None:
        for puppet in puppets:
            if puppet.code is None:
                told = {name: {"outcome": "trained", "step": 6} for name in puppet.names[:1]}
                Path(puppet.words[1]).write_text(json.dumps(told))
                puppet.log.write_text("one line\n")
                puppet.code = -9

    puppets = stage(act)
    options = sweep_options(Path("cache"), tmp_path, depths=("1-0", "2-0", "0-1"), gpus=("0", "1"), shared_base=True)
    assert sweep(options) == EXIT_INCOMPLETE
    assert [(puppet.gpu, puppet.names) for puppet in puppets] == [
        ("0", ["depth-1-0", "depth-0-1"]), ("1", ["depth-2-0"]),
    ]  # fmt: skip
    assert outcomes(tmp_path / "first") == {"depth-1-0": "trained", "depth-2-0": "trained", "depth-0-1": "failed"}
    why = json.loads((tmp_path / "first" / SWEEP).read_text())["experiments"]["depth-0-1"]["why"]
    assert why == "ended by SIGKILL, as the system does where memory is short\none line"


def test_stopped_it_asks_its_children_to_stop_begins_nothing_more_and_goes_on_next_time(
    stage: Play, tmp_path: Path
) -> None:
    calls = iter(range(1000))

    def act(puppets: list[Puppet]) -> None:
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)

    puppets = stage(act)
    options = sweep_options(Path("cache"), tmp_path, depths=("1-0", "2-0"))
    assert sweep(options) == EXIT_INTERRUPTED
    assert [puppet.calls for puppet in puppets] == [["terminate"]]
    assert outcomes(tmp_path / "first") == {"depth-1-0": "stopped", "depth-2-0": "waiting"}
    assert [experiment.options for experiment, _ in recorded(tmp_path / "first").values()] == [
        each.options for each in grid.experiments(options)
    ]


def test_options_of_the_command_line_make_the_same_sweep() -> None:
    lists = ["--depths", "2-0", "2-4", "--rates", "1e-5", "2e-5", "--seeds", "0", "1", "--gpus", "0", "1"]
    words = [*lists, "--shared-base", "True", "--loader.batch-size", "2"]
    options = load(SweepConfig, words, command="sweep")
    assert options is not None
    assert dimensions(options) == {
        "seed": ["0", "1"], "depth": ["2-0", "2-4"], "optimizer.learning_rate": ["1e-05", "2e-05"],
    }  # fmt: skip
    assert (options.gpus, options.shared_base, options.loader.batch_size) == (("0", "1"), True, 2)
