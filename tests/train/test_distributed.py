"""Two processes are one process with twice the accumulation: the same losses, the same weights on both."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import run_command_line
from tests.train.conftest import controlnet_tensors, losses, metrics, samples_of, train_options
from train import checkpoints
from train.config import TrainConfig
from train.step import Step
from train.trainer import Trainer, train


def train_as(rank: int, port: int, options: TrainConfig, folder: Path, poisoned: str | None) -> None:
    """One of two processes; its weights after every step go to `folder`. `poisoned`: the loss of this sample is NaN."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    sys.stderr = (folder / f"stderr-{rank}").open("w", buffering=1)
    end, loss = Trainer.run_to_the_end, Step.loss

    def run_to_the_end(self: Trainer) -> None:
        end(self)
        self.adapter.save(folder / f"rank-{rank}")

    def poisoned_loss(self: Step, batch: Any) -> torch.Tensor:
        factors = [float("nan") if key == poisoned else 1.0 for key in batch.keys]
        return loss(self, batch) * torch.tensor(factors)

    Trainer.run_to_the_end = run_to_the_end  # type: ignore[method-assign]
    Step.loss = poisoned_loss  # type: ignore[method-assign]
    run_command_line(lambda: train(options))


def started(
    context: ForkServerContext, options: TrainConfig, folder: Path, poisoned: str | None = None
) -> list[ForkServerProcess]:
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=train_as, args=(rank, port, options, folder, poisoned)) for rank in (0, 1)]
    for process in both:
        process.start()
    return both


def exit_codes(both: list[ForkServerProcess], folder: Path) -> list[int | None]:
    for process in both:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    for rank in (0, 1):
        print((folder / f"stderr-{rank}").read_text())
    return [process.exitcode for process in both]


def looks() -> dict[str, int]:
    return {"every": 3, "pictures_every": 6, "samples": 2, "timesteps": 2, "pictures": 1}


@pytest.mark.parametrize(
    ("depth", "accumulation"), [("1-1", 1), ("1-0", 1), ("0-1", 2)], ids=["1-1", "1-0 has idle parameters", "0-1 twice"]
)
def test_two_processes_are_one_with_twice_the_accumulation(
    depth: str, accumulation: int, processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, accumulation: int) -> TrainConfig:
        # SGD-like: an epsilon far above the gradients, so that rounding is not blown up to the size of a step.
        return train_options(
            tiny_cache, tmp_path, name=name, depth=depth, checkpoint={"every": 4}, validation=looks(),
            loader={"batch_size": 3, "accumulation": accumulation},
            optimizer={"kind": "adamw", "epsilon": 1.0, "learning_rate": 0.1},
        )  # fmt: skip

    assert train(options("one", 2 * accumulation)) == 0
    both = started(processes, options("two", accumulation), tmp_path / "ranks")
    assert exit_codes(both, tmp_path / "ranks") == [0, 0]

    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for name in {"loss", "gradient_norm"} & alone.keys():
            assert together[name] == pytest.approx(alone[name], rel=1e-5)
        if "held_out" in alone:
            assert together["held_out"] == pytest.approx(alone["held_out"], rel=1e-4, abs=1e-6)
    assert len(set(losses(tmp_path / "two"))) == 6
    expected, actual = controlnet_tensors(tmp_path / "one"), controlnet_tensors(tmp_path / "two")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    ranks = [load_file(tmp_path / "ranks" / f"rank-{r}" / "diffusion_pytorch_model.safetensors") for r in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert all(torch.equal(ranks[0][name], actual[name]) for name in ranks[0])
    assert "controlnet_x_embedder.weight" in expected


def test_a_run_of_two_processes_goes_on_in_one_and_the_other_way_round(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, steps: int, accumulation: int) -> TrainConfig:
        loader = {"batch_size": 2, "accumulation": accumulation}
        return train_options(tiny_cache, tmp_path, name=name, steps=steps, loader=loader)

    assert train(options("alone", 6, 2)) == 0
    assert train(options("turns", 2, 2)) == 0
    both = started(processes, options("turns", 4, 1), tmp_path / "ranks")
    assert exit_codes(both, tmp_path / "ranks") == [0, 0]
    assert train(options("turns", 6, 2)) == 0
    assert losses(tmp_path / "turns") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_a_signal_to_one_process_stops_and_saves_both(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    both = started(processes, train_options(tiny_cache, tmp_path, steps=100_000), tmp_path / "ranks")
    written = tmp_path / "run" / "metrics.jsonl"
    while not (written.exists() and written.read_text().count("\n") > 2) and all(p.is_alive() for p in both):
        time.sleep(0.02)
    assert both[1].pid is not None
    os.kill(both[1].pid, signal.SIGTERM)
    assert exit_codes(both, tmp_path / "ranks") == [0, 0]
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None
    assert metrics(tmp_path / "run")[-1]["step"] == checkpoints.step_of(newest)


def test_another_experiment_is_refused_by_one_process_in_one_sentence_and_the_other_ends_in_silence(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    assert train(train_options(tiny_cache, tmp_path, steps=1)) == 0
    both = started(processes, train_options(tiny_cache, tmp_path, seed=4), tmp_path / "ranks")
    assert exit_codes(both, tmp_path / "ranks") == [2, 2]
    said = [(tmp_path / "ranks" / f"stderr-{rank}").read_text() for rank in (0, 1)]
    assert said[0].count("\n") == 1
    assert "holds another experiment (seed was 0, is 4)" in said[0]
    assert said[1] == ""


def test_a_loss_that_is_not_finite_on_one_process_stops_both_and_both_name_the_sample(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    poisoned = samples_of(tiny_cache).key(4)
    both = started(processes, train_options(tiny_cache, tmp_path, steps=50), tmp_path / "ranks", poisoned)
    assert exit_codes(both, tmp_path / "ranks") == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / "ranks" / f"stderr-{rank}").read_text()
        assert f"is not finite of sample(s) {poisoned}; the optimizer did not step" in said
