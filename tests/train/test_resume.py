"""A run that was killed, at any moment, and started again is to the bit the run that nothing disturbed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import EXIT_REFUSED, UserError, run_command_line
from shared.families.base import Batch
from tests.train.conftest import content, losses, metrics, train_options
from train import checkpoints
from train.config import TrainConfig
from train.step import Step
from train.trainer import train

STEPS = 8

KINDS: dict[str, dict[str, Any]] = {
    "adamw-fp32-early-stop": {"optimizer": {"kind": "adamw"}, "early_stop": {"patience": 9}},
    "adamw8bit-bf16-accumulation-ema": {
        "optimizer": {"kind": "adamw8bit"},
        "precision": "bf16",
        "loader": {"accumulation": 2},
        "memory": {"recompute": "all"},
        "ema": {"profile": "power", "every": 2},
    },
    "adamw8bit-bf16-master-host-hoisted": {
        "optimizer": {"master": True, "states": "cpu", "release": True, "clip": "parameter", "survival_every": 2},
        "precision": "bf16",
        "memory": {"hoist": "yes", "hoist_steps": 5},
    },
}


def options_of(cache: Path, runs: Path, **changes: Any) -> TrainConfig:
    """8 steps with a checkpoint after 3, 6 and 8, and where the best look is kept after 4; with looks at the held-out
    samples between and on them."""
    looks = {"every": 4, "pictures_every": 5, "samples": 2, "timesteps": 1, "pictures": 1}
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
        ended = json.loads((run / "run.json").read_text())["starts"][-1]["ended"]
        assert ended == {"step": steps, "why": "trained"}
    assert [link and link.name for link in (checkpoints.best(one), checkpoints.best(other))] in (
        [None, None],
        [f"step-{steps:08d}"] * 2,
    )
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    assert names[0] == names[1]
    assert len(names[0]) == 2
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


def before_batch(step: int, batch: int, do: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """From now on `do` is done before this batch (the first is 0) of this step."""
    take, loss = Step.__call__, Step.loss
    here = [0, 0]

    def taken(self: Step, batches: list[Batch], number: int, rate: float) -> dict[str, float]:
        here[:] = number, 0
        return take(self, batches, number, rate)

    def counted(self: Step, batch_of_step: Batch) -> torch.Tensor:
        if here == [step, batch]:
            do()
        here[1] += 1
        return loss(self, batch_of_step)

    patch.setattr(Step, "__call__", taken)
    patch.setattr(Step, "loss", counted)


# --- stopped in this process ----------------------------------------------------------------------------------------


class PulledPlugError(Exception):
    """What ends a run in the middle of a step."""


def pull_the_plug() -> None:
    raise PulledPlugError


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_broke_off_thrice_ends_as_the_undisturbed_one(
    kind: str, undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(tiny_cache, tmp_path, **KINDS[kind])
    last_batch = options.loader.accumulation - 1  # where several make up a step, gradients of the others are there
    for step in (2, 5, 8):  # before the first checkpoint, between two, before the last
        with monkeypatch.context() as patch:
            before_batch(step, last_batch, pull_the_plug, patch)
            with pytest.raises(PulledPlugError):
                train(options)
    assert train(options) == 0
    assert_same_run(tmp_path / "run", undisturbed(kind))
    state = load_file(checkpoints.path_of(tmp_path / "run", STEPS) / "optimizer.safetensors")
    assert any(name.endswith(".state1") for name in state) == ("adamw8bit" in kind)
    assert (checkpoints.path_of(tmp_path / "run", STEPS) / "ema").is_dir() == ("ema" in kind)
    assert (tmp_path / "run" / "best").is_symlink() == ("early-stop" in kind)


def test_raising_the_steps_goes_on_as_if_they_had_been_so_from_the_start(tiny_cache: Path, tmp_path: Path) -> None:
    """With 8-bit states beside fp32 weights."""
    kind: dict[str, Any] = {"optimizer": {"kind": "adamw8bit"}, "validation": {}}
    for steps in (2, 5, STEPS):
        assert train(options_of(tiny_cache, tmp_path / "raised", steps=steps, **kind)) == 0
    assert train(options_of(tiny_cache, tmp_path / "whole", **kind)) == 0
    raised, whole = tmp_path / "raised" / "run", tmp_path / "whole" / "run"
    assert losses(raised) == losses(whole)
    assert content(raised / "controlnet") == content(whole / "controlnet")
    starts = json.loads((raised / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2, 5]


def test_a_damaged_newest_checkpoint_is_passed_over_and_its_steps_are_run_again(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = undisturbed("adamw-fp32-early-stop"), tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    weights = checkpoints.path_of(run, STEPS) / "controlnet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert train(options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32-early-stop"])) == 0
    said = capsys.readouterr()
    assert f"step-{STEPS:08d} is damaged (controlnet/diffusion_pytorch_model.safetensors was altered)" in said.err
    assert "resuming after step 6" in said.out
    assert_same_run(run, whole)


def test_where_every_checkpoint_is_damaged_it_starts_anew(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("adamw-fp32-early-stop"), tmp_path / "run", symlinks=True)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "optimizer.safetensors").unlink()
    assert train(options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32-early-stop"])) == 0
    assert_same_run(tmp_path / "run", undisturbed("adamw-fp32-early-stop"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_from_the_checkpoint_before(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, calls = checkpoints.save_file, iter(range(9))

    def full(tensors: Any, path: Path) -> None:
        if next(calls) == 1:
            raise checkpoints.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    options = options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32-early-stop"])
    with pytest.raises(UserError, match=r"the disk is full: writing .*step-00000004 failed"):
        train(options)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(options) == 0
    assert_same_run(tmp_path / "run", undisturbed("adamw-fp32-early-stop"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_finishes_the_step_saves_and_exits_well(
    number: signal.Signals,
    undisturbed: Callable[[str], Path],
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32-early-stop"])
    with monkeypatch.context() as patch:
        before_batch(4, 0, lambda: os.kill(os.getpid(), number), patch)
        assert train(options) == 0
    assert checkpoints.newest(tmp_path / "run") == checkpoints.path_of(tmp_path / "run", 4)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][-1]["ended"]["why"] == "stopped"
    assert train(options) == 0
    assert losses(tmp_path / "run") == losses(undisturbed("adamw-fp32-early-stop"))
    assert content(tmp_path / "run" / "controlnet") == content(undisturbed("adamw-fp32-early-stop") / "controlnet")


# --- killed at a change of the folder -------------------------------------------------------------------------------


class KilledError(BaseException):
    """A kill: what the process does while it unwinds is undone."""


def train_until_a_new_rename(options: TrainConfig, seen: set[tuple[str, str]], stash: Path) -> bool:
    """Train, but be killed just before, or just after, the first rename in the run's folder of a kind (the name without
    its numbers, before or after) that is not among the `seen`; it is put there. Whether it was killed."""
    run = Path(options.runs) / options.run_name
    replace = os.replace

    def killed_if_new(target: Any, when: str) -> None:
        kind = re.sub(r"\d+", "#", Path(target).name), when
        if Path(target).is_relative_to(run) and kind not in seen:
            seen.add(kind)
            shutil.copytree(run, stash, symlinks=True)  # as a kill leaves it
            raise KilledError

    def killing(source: Any, target: Any) -> None:
        killed_if_new(target, "before")
        replace(source, target)
        killed_if_new(target, "after")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", killing)
        try:
            assert train(options) == 0
        except KilledError:
            patch.undo()
            shutil.rmtree(run)
            replace(stash, run)
            return True
    return False


def test_a_kill_before_or_after_any_kind_of_rename_changes_nothing(
    undisturbed: Callable[[str], Path], tiny_cache: Path, tmp_path: Path
) -> None:
    options, seen = options_of(tiny_cache, tmp_path, **KINDS["adamw-fp32-early-stop"]), set[tuple[str, str]]()
    kills = 0
    while train_until_a_new_rename(options, seen, tmp_path / "stash"):
        kills += 1
    assert kills == len(seen)
    assert {name for name, _ in seen} >= {
        "config.yaml", "run.json", "metrics.jsonl", "step-#.png", "step-#", "step-#.part", "controlnet", "best",
    }  # fmt: skip
    assert_same_run(tmp_path / "run", undisturbed("adamw-fp32-early-stop"))


# --- killed in a process of its own ---------------------------------------------------------------------------------


def started(context: ForkServerContext, target: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def train_until_a_batch(options: TrainConfig, step: int, batch: int) -> None:
    """Train, but be killed before this batch of this step; step 0: never."""
    before_batch(step, batch, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())
    run_command_line(lambda: train(options))


def train_but_for_the_last_step(options: TrainConfig) -> None:
    """Train, and stand still before the end, to be killed: on a busy machine who kills may come late."""
    before_batch(options.steps, 0, lambda: time.sleep(600), pytest.MonkeyPatch())
    run_command_line(lambda: train(options))


def last_step(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl; -1 where there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def test_sigkill_at_random_moments_and_amid_the_batches_of_a_step_changes_nothing(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    """8-bit AdamW, bf16 weights, two batches a step."""
    steps, draw = 15, random.Random(20)
    options = options_of(tiny_cache, tmp_path, steps=steps, **KINDS["adamw8bit-bf16-accumulation-ema"])
    run, whole = tmp_path / "run", dataclasses.replace(options, name="whole")
    kills: list[int] = []
    while len(kills) < 6:
        newest = checkpoints.newest(run)
        reach = (-1 if newest is None else checkpoints.step_of(newest)) + draw.randrange(0, 6)  # 0: as it starts
        amid = len(kills) % 2 == 0
        if amid:
            process = started(processes, train_until_a_batch, options, min(max(1, reach + 1), steps), 1)
        else:
            process = started(processes, train_but_for_the_last_step, options)
            while last_step(run) < min(reach, steps - 1) and process.is_alive():
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.06))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed so often"
        kills.append(last_step(run))
    assert train(options) == 0  # a killed process holds nothing
    assert train(whole) == 0
    print(f"the last figures at each kill were of the steps {kills}, of {steps}")
    assert_same_run(run, tmp_path / "whole", steps)


def test_two_processes_do_not_train_one_run(
    processes: ForkServerContext,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = train_options(tiny_cache, tmp_path, steps=2)
    others: list[ForkServerProcess] = []

    def another() -> None:
        others.append(started(processes, train_until_a_batch, options, 0, 0))
        others[0].join()

    before_batch(2, 0, another, monkeypatch)
    assert train(options) == 0
    assert [other.exitcode for other in others] == [EXIT_REFUSED]
    assert len(losses(tmp_path / "run")) == 2
