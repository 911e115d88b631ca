"""A run that was killed, at any moment, and started again is to the bit the run that nothing disturbed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.errors import UserError
from shared.families.base import Batch
from tests.train.conftest import content, losses, metrics, train_options
from train import checkpoints
from train.config import TrainConfig
from train.step import Step
from train.trainer import train

STEPS = 12

KINDS: dict[str, dict[str, Any]] = {
    "adamw-fp32": {"optimizer": {"kind": "adamw"}},
    "adamw8bit-fp32": {"optimizer": {"kind": "adamw8bit"}},
    "adamw8bit-bf16": {"optimizer": {"kind": "adamw8bit"}, "precision": "bf16"},
    "adamw8bit-bf16-master-host": {
        "optimizer": {"master": True, "states": "cpu", "release": True, "clip": "parameter", "survival_every": 2},
        "precision": "bf16",
    },
    "accumulation": {"loader": {"accumulation": 2}, "memory": {"recompute": "all"}},
    "hoisted": {"memory": {"hoist": "yes", "hoist_steps": 5}},
}


def options_of(cache: Path, runs: Path, **changes: Any) -> TrainConfig:
    """12 steps with a checkpoint after every 3, and looks at the held-out samples between and on them."""
    looks = {"every": 2, "pictures_every": 6, "samples": 2, "timesteps": 1, "pictures": 1}
    changes = {"steps": STEPS, "checkpoint": {"every": 3}, "validation": looks, **changes}
    return train_options(cache, runs, **changes)


def assert_same_run(one: Path, other: Path, steps: int = STEPS) -> None:
    """The same figures (times apart), pictures, weights and optimizer, to the bit; whole, and nothing left over."""
    assert metrics(one) == metrics(other)
    assert content(one / "pictures") == content(other / "pictures")
    for run in (one, other):
        assert (run / "controlnet").resolve() == (checkpoints.path_of(run, steps) / "controlnet").resolve()
        assert not list(run.rglob("*.part"))
        assert checkpoints.newest(run) == checkpoints.path_of(run, steps)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    assert names[0] == names[1] == [f"step-{steps - 3:08d}", f"step-{steps:08d}"]
    files = [content(checkpoints.path_of(run, steps)) for run in (one, other)]
    states = [json.loads(file.pop("state.json")) for file in files]
    assert files[0] == files[1]
    for state in states:
        del state["options"], state["times"], state["checksum"]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def undisturbed(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a kind that nothing disturbed."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            runs = tmp_path_factory.mktemp(kind)
            assert train(options_of(tiny_cache, runs, **KINDS[kind])) == 0
            done[kind] = runs / "run"
        return done[kind]

    return run


# --- stopped in this process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_broke_off_twice_ends_as_the_undisturbed_one(
    kind: str, undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Step.__call__

    class PulledPlugError(Exception):
        pass

    def breaks_at(number: int) -> None:
        def broken(self: Step, batches: list[Batch], step: int, rate: float) -> dict[str, float]:
            if step == number:
                raise PulledPlugError
            return take(self, batches, step, rate)

        monkeypatch.setattr(Step, "__call__", broken)

    options = options_of(tiny_cache, tmp_path, **KINDS[kind])
    for number in (2, 5, 11):  # before the first checkpoint, between two, before the last
        breaks_at(number)
        with pytest.raises(PulledPlugError):
            train(options)
    monkeypatch.setattr(Step, "__call__", take)
    assert train(options) == 0
    assert_same_run(tmp_path / "run", undisturbed(kind))
    state = load_file(checkpoints.path_of(tmp_path / "run", STEPS) / "optimizer.safetensors")
    assert any(name.endswith(".state1") for name in state) == (kind != "adamw-fp32")


def test_raising_the_steps_goes_on_as_if_they_had_been_so_from_the_start(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path
) -> None:
    for steps in (4, 9, STEPS):
        assert train(options_of(tiny_cache, tmp_path, steps=steps, **KINDS["adamw8bit-fp32"])) == 0
    whole = undisturbed("adamw8bit-fp32")
    assert losses(tmp_path / "run") == losses(whole)
    assert content(tmp_path / "run" / "controlnet") == content(whole / "controlnet")
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4, 9]


def test_a_damaged_newest_checkpoint_is_passed_over_and_its_steps_are_run_again(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32"])
    assert train(dataclasses.replace(options, steps=9)) == 0
    weights = checkpoints.path_of(tmp_path / "run", 9) / "controlnet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert train(options) == 0
    said = capsys.readouterr()
    assert "step-00000009 is damaged (controlnet/diffusion_pytorch_model.safetensors was altered)" in said.err
    assert "resuming after step 6" in said.out
    assert losses(tmp_path / "run") == losses(undisturbed("adamw-fp32"))
    assert content(tmp_path / "run" / "controlnet") == content(undisturbed("adamw-fp32") / "controlnet")


def test_where_every_checkpoint_is_damaged_it_starts_anew(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("adamw-fp32"), tmp_path / "run", symlinks=True)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "optimizer.safetensors").unlink()
    assert train(options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32"])) == 0
    assert_same_run(tmp_path / "run", undisturbed("adamw-fp32"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_from_the_checkpoint_before(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, calls = checkpoints.save_file, iter(range(9))

    def full(tensors: Any, path: Path) -> None:
        if next(calls) == 2:
            raise checkpoints.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    options = options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32"])
    with pytest.raises(UserError, match=r"the disk is full: writing .*step-00000009 failed"):
        train(options)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    assert train(options) == 0
    assert_same_run(tmp_path / "run", undisturbed("adamw-fp32"))


# --- killed in a process of its own ---------------------------------------------------------------------------------


def started(context: ForkServerContext, target: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def train_and_exit(options: TrainConfig) -> None:
    sys.exit(train(options))


def train_until_a_rename(options: TrainConfig, number: int, before: bool) -> None:
    """Train, but be killed just before, or just after, the rename of this number."""
    replace, calls = os.replace, iter(range(1000))

    def killing(source: Any, target: Any) -> None:
        last = next(calls) == number
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killing  # type: ignore[assignment]
    sys.exit(train(options))


def last_step(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl; -1 where there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def test_sigkill_at_ten_random_moments_changes_nothing(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    steps, draw = 36, random.Random(20)
    kills: list[int] = []
    options = options_of(tiny_cache, tmp_path, steps=steps, **KINDS["adamw8bit-bf16"])
    run, whole = tmp_path / "run", dataclasses.replace(options, name="whole")
    while len(kills) < 10:
        newest = checkpoints.newest(run)
        reach = -1 if newest is None else checkpoints.step_of(newest)
        reach += draw.randrange(0, 7)  # 0: as it starts
        process = started(processes, train_and_exit, options)
        while last_step(run) < reach and process.is_alive():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed ten times"
        kills.append(last_step(run))
    for finished in (options, whole):
        process = started(processes, train_and_exit, finished)
        process.join()
        assert process.exitcode == 0
    print(f"the last figures at each kill were of the steps {kills}, of {steps}")
    assert_same_run(run, tmp_path / "whole", steps)


def test_a_kill_before_or_after_any_rename_changes_nothing(
    processes: ForkServerContext, undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path
) -> None:
    kind = "adamw-fp32"
    kills = 0
    for before in (True, False):
        options = options_of(tiny_cache, tmp_path / f"before-{before}", **KINDS[kind])
        for number in range(4, 40, 5):  # every start makes the same renames first, then goes on a little further
            process = started(processes, train_until_a_rename, options, number % 7, before)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        assert train(options) == 0
        assert_same_run(Path(options.runs) / "run", undisturbed(kind))
    assert kills >= 10


def test_after_a_kill_between_a_finished_checkpoint_and_its_link_the_link_is_mended(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("adamw-fp32"), tmp_path / "run", symlinks=True)
    checkpoints.link(tmp_path / "run", checkpoints.path_of(tmp_path / "run", STEPS - 3))
    assert train(options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32"])) == 0  # says that all is done
    assert_same_run(tmp_path / "run", undisturbed("adamw-fp32"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_finishes_the_step_saves_and_exits_well(
    number: signal.Signals,
    processes: ForkServerContext,
    undisturbed: Callable[[str], Path],
    tiny_cache: Path,
    tmp_path: Path,
) -> None:
    options = options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32"])
    lasting = dataclasses.replace(options, steps=100_000)
    process = started(processes, train_and_exit, lasting)
    written = tmp_path / "run" / "metrics.jsonl"
    while not (written.exists() and written.read_text().count('"loss"') > 4) and process.is_alive():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 0
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None
    stopped = checkpoints.step_of(newest)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, stopped + 1))
    if stopped < STEPS:
        assert train(options) == 0
        assert losses(tmp_path / "run") == losses(undisturbed("adamw-fp32"))
        assert content(tmp_path / "run" / "controlnet") == content(undisturbed("adamw-fp32") / "controlnet")


def test_two_processes_do_not_train_one_run(processes: ForkServerContext, tiny_cache: Path, tmp_path: Path) -> None:
    options = options_of(tiny_cache, tmp_path, steps=100_000)
    first = started(processes, train_and_exit, options)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and first.is_alive():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is training in"):
        train(options)
    first.kill()
    first.join()
    assert train(dataclasses.replace(options, steps=1)) == 0  # a killed process holds nothing
