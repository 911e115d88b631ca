"""Several processes are one process with as much more accumulation: the same losses, the same weights on all, whether
each has the whole base or they hold it together; and no sample comes twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from shared.config import to_yaml
from shared.errors import UserError, run_command_line
from tests.train.conftest import controlnet_tensors, losses, metrics, samples_of, train_options
from train import checkpoints
from train.config import TrainConfig
from train.loader import Loader, LoaderOptions
from train.processes import accelerator, refuse_unseen
from train.step import Step
from train.trainer import Trainer, train


@dataclass
class World:
    """Processes that train together, and what is peculiar to them."""

    folder: Path
    """Of each process: its stderr, its weights at the end, the samples that it saw, what it holds of the base."""
    count: int = 2
    per_machine: int = 2
    poisoned: str | None = None
    """The loss of this sample is NaN."""
    last: TrainConfig | None = None
    """The options of the last process, if others."""

    def seen(self) -> list[tuple[int, str]]:
        """(position, key) of every sample that any process saw."""
        lines = [line for rank in range(self.count) for line in (self.folder / f"seen-{rank}").read_text().splitlines()]
        return [(int(position), key) for position, key in (line.split(" ", 1) for line in lines)]


def train_as(rank: int, port: int, options: TrainConfig, world: World) -> None:
    """One of several processes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank % world.per_machine), WORLD_SIZE=str(world.count),
        LOCAL_WORLD_SIZE=str(world.per_machine), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    folder = world.folder
    sys.stderr = (folder / f"stderr-{rank}").open("w", buffering=1)
    end, loss = Trainer.run_to_the_end, Step.loss

    def run_to_the_end(self: Trainer) -> None:
        end(self)
        self.adapter.save(folder / f"rank-{rank}")
        gradients = [p.grad.untyped_storage() for _, p in self.adapter.named_parameters() if p.grad is not None]
        buckets = {storage.data_ptr(): storage.nbytes() for storage in gradients}
        (folder / f"gradients-{rank}").write_text(json.dumps([len(gradients), len(buckets), sum(buckets.values())]))
        if self.models.shards is not None:
            weights = [parameter for block in self.models.shards.blocks for parameter in block.parameters()]
            held = [self.models.shards.held_bytes, sum(weight.numel() * weight.itemsize for weight in weights)]
            (folder / f"held-{rank}").write_text(json.dumps(held))

    def poisoned_loss(self: Step, batch: Any) -> torch.Tensor:
        with (folder / f"seen-{rank}").open("a") as seen:
            seen.writelines(f"{batch.position} {key}\n" for key in batch.keys)
        poisoned = world.poisoned
        factors = [float("nan") if key == poisoned else 1.0 for key in batch.keys]
        return loss(self, batch) * torch.tensor(factors)

    Trainer.run_to_the_end = run_to_the_end  # type: ignore[method-assign]
    Step.loss = poisoned_loss  # type: ignore[method-assign]
    is_last = rank == world.count - 1
    run_command_line(lambda: train(world.last if is_last and world.last is not None else options))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def started(context: ForkServerContext, options: TrainConfig, world: World) -> list[ForkServerProcess]:
    world.folder.mkdir(exist_ok=True)
    port = free_port()
    all_of_them = [context.Process(target=train_as, args=(rank, port, options, world)) for rank in range(world.count)]
    for process in all_of_them:
        process.start()
    return all_of_them


def exit_codes(both: list[ForkServerProcess], world: World) -> list[int | None]:
    for process in both:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    for rank in range(world.count):
        print((world.folder / f"stderr-{rank}").read_text())
    return [process.exitcode for process in both]


def looks() -> dict[str, int]:
    return {"every": 6, "pictures_every": 6, "samples": 2, "timesteps": 2, "pictures": 1}


WORLDS = {
    "two": ("1-1", 1, 2, 2, "no"),
    "two with idle parameters": ("1-0", 1, 2, 2, "no"),
    "two that hold the base together, accumulating": ("0-1", 2, 2, 2, "yes"),
    "four on two machines, each machine's two holding the base together": ("1-1", 1, 4, 2, "yes"),
}


@pytest.mark.parametrize(("depth", "accumulation", "count", "per_machine", "shard"), WORLDS.values(), ids=WORLDS)
def test_several_processes_are_one_with_as_much_more_accumulation(
    depth: str,
    accumulation: int,
    count: int,
    per_machine: int,
    shard: str,
    processes: ForkServerContext,
    tiny_cache: Path,
    tmp_path: Path,
) -> None:
    def options(name: str, accumulation: int, shard: str = "no") -> TrainConfig:
        # SGD-like: an epsilon far above the gradients, so that rounding is not blown up to the size of a step.
        return train_options(
            tiny_cache, tmp_path, name=name, depth=depth, checkpoint={"every": 4}, validation=looks(),
            memory={"shard": shard}, loader={"batch_size": 6 // count, "accumulation": accumulation},
            optimizer={"kind": "adamw", "epsilon": 1.0, "learning_rate": 0.1},
        )  # fmt: skip

    assert train(options("one", count * accumulation)) == 0
    world = World(tmp_path / "ranks", count, per_machine)
    assert exit_codes(started(processes, options("several", accumulation, shard), world), world) == [0] * count

    one, several = metrics(tmp_path / "one"), metrics(tmp_path / "several")
    assert [line["step"] for line in one] == [line["step"] for line in several]
    for alone, together in zip(one, several, strict=True):
        assert alone.keys() == together.keys()
        for name in {"loss", "gradient_norm"} & alone.keys():
            assert together[name] == pytest.approx(alone[name], rel=1e-5)
        if "held_out" in alone:
            assert together["held_out"] == pytest.approx(alone["held_out"], rel=1e-4, abs=1e-6)
    assert len(set(losses(tmp_path / "several"))) == 6
    expected, actual = controlnet_tensors(tmp_path / "one"), controlnet_tensors(tmp_path / "several")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    ranks = [load_file(world.folder / f"rank-{r}" / "diffusion_pytorch_model.safetensors") for r in range(count)]
    for weights in ranks:
        assert all(torch.equal(weights[name], actual[name]) for name in expected)
    assert "controlnet_x_embedder.weight" in expected

    for rank in range(count):
        num_gradients, num_buckets, num_bytes = json.loads((world.folder / f"gradients-{rank}").read_text())
        assert num_gradients > 30
        assert num_buckets < 4  # gradients lie in DDP's buckets and nowhere else
        assert num_bytes <= sum(tensor.nbytes for tensor in expected.values())
    assert_none_comes_twice(world.seen(), tiny_cache, 6 // count)
    if shard == "yes":
        held = [json.loads((world.folder / f"held-{rank}").read_text()) for rank in range(count)]
        whole = held[0][1]
        assert [part / whole for part, _ in held] == pytest.approx([1 / per_machine] * count, rel=0.01)


def assert_none_comes_twice(seen: list[tuple[int, str]], cache: Path, batch_size: int) -> None:
    loader = Loader(samples_of(cache), LoaderOptions(batch_size=batch_size), seed=0, device=torch.device("cpu"))
    epochs: dict[int, list[str]] = {}
    for position, key in seen:
        epochs.setdefault(position // loader.batches_per_epoch, []).append(key)
    assert len(epochs) > 1
    for keys in epochs.values():
        assert sorted(keys) == sorted(set(keys))
    everything = {loader.samples.key(i) for i in range(len(loader.samples))}
    assert set(epochs[0]) == everything


def test_a_run_of_two_processes_goes_on_in_one_and_the_other_way_round_and_says_what_differs(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def options(name: str, steps: int, accumulation: int) -> TrainConfig:
        loader = {"batch_size": 2, "accumulation": accumulation}
        return train_options(tiny_cache, tmp_path, name=name, steps=steps, loader=loader)

    assert train(options("alone", 6, 2)) == 0
    assert train(options("turns", 2, 2)) == 0
    world = World(tmp_path / "ranks")
    assert exit_codes(started(processes, options("turns", 4, 1), world), world) == [0, 0]
    capsys.readouterr()
    assert train(options("turns", 6, 2)) == 0
    said = capsys.readouterr().out
    assert "this run goes on with 1 process(es), it had 2" in said
    assert "the same samples as before (1 x 2 batch(es) of 2)" in said
    assert "gradients are now summed in another order" in said
    assert losses(tmp_path / "turns") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_a_signal_to_one_process_stops_and_saves_both(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    world = World(tmp_path / "ranks")
    both = started(processes, train_options(tiny_cache, tmp_path, steps=100_000), world)
    written = tmp_path / "run" / "metrics.jsonl"
    while not (written.exists() and written.read_text().count("\n") > 2) and all(p.is_alive() for p in both):
        time.sleep(0.02)
    assert both[1].pid is not None
    os.kill(both[1].pid, signal.SIGTERM)
    assert exit_codes(both, world) == [0, 0]
    newest = checkpoints.newest(tmp_path / "run")
    assert newest is not None
    assert metrics(tmp_path / "run")[-1]["step"] == checkpoints.step_of(newest)


def test_another_experiment_is_refused_by_one_process_in_one_sentence_and_the_other_ends_in_silence(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    assert train(train_options(tiny_cache, tmp_path, steps=1)) == 0
    world = World(tmp_path / "ranks")
    both = started(processes, train_options(tiny_cache, tmp_path, seed=4), world)
    assert exit_codes(both, world) == [2, 2]
    said = [(tmp_path / "ranks" / f"stderr-{rank}").read_text() for rank in (0, 1)]
    assert said[0].count("\n") == 1
    assert "holds another experiment (seed was 0, is 4)" in said[0]
    assert said[1] == ""


def test_a_loss_that_is_not_finite_on_one_process_stops_both_and_both_name_the_sample(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    poisoned = samples_of(tiny_cache).key(4)
    world = World(tmp_path / "ranks", poisoned=poisoned)
    both = started(processes, train_options(tiny_cache, tmp_path, steps=50), world)
    assert exit_codes(both, world) == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / "ranks" / f"stderr-{rank}").read_text()
        assert f"is not finite of sample(s) {poisoned}; the optimizer did not step" in said


def test_machines_that_were_started_differently_are_refused_by_one_in_one_sentence(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    """And not found out when one of them has taken all its steps and the other waits."""
    options = train_options(tiny_cache, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_cache, elsewhere)  # where the cache is may differ
    other = replace(options, steps=7, cache=str(elsewhere))
    world = World(tmp_path / "ranks", last=other)
    assert exit_codes(started(processes, options, world), world) == [2, 2]
    said = [(tmp_path / "ranks" / f"stderr-{rank}").read_text() for rank in (0, 1)]
    assert said[0].count("\n") == 1
    assert "process 1 on" in said[0]
    assert "(steps is 7, not 6): run the same command on every machine" in said[0]
    assert said[1] == ""
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_a_process_does_not_see_is_refused(tmp_path: Path) -> None:
    alone = Accelerator(cpu=True)
    refuse_unseen(alone, None)
    refuse_unseen(alone, tmp_path)
    with pytest.raises(UserError, match=r"does not see .*step-7, .* keep RUNS on a disk that all machines share"):
        refuse_unseen(alone, tmp_path / "step-7")


def test_what_accelerate_was_set_up_for_is_refused_where_it_is_not_ours(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sharding(Accelerator):
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr("train.processes.Accelerator", Sharding)
    with pytest.raises(UserError, match=r"set up for FSDP, .*examples/launch/one_machine\.yaml"):
        accelerator(train_options(tiny_cache, tmp_path))


def launch(machine: int, port: int, recipe: Path, folder: Path) -> None:
    """What a user types on a machine."""
    from accelerate.commands.launch import main

    os.chdir(Path(__file__).parents[2])
    sys.stdout = sys.stderr = (folder / f"launch-{machine}").open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    sys.argv = [
        "accelerate launch", "--config_file", "examples/launch/two_machines.yaml", "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(port), "--machine_rank", str(machine), "--num_processes", "2",
        "-m", "train", "--recipe", str(recipe),
    ]  # fmt: skip
    main()


def test_the_worked_example_of_two_machines_trains_on_two(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, accumulation: int) -> TrainConfig:
        return train_options(
            tiny_cache, tmp_path, name=name, steps=2, loader={"batch_size": 2, "accumulation": accumulation}
        )

    assert train(options("one", 2)) == 0
    recipe, port = tmp_path / "recipe.yaml", free_port()
    recipe.write_text(to_yaml(options("two", 1)))
    both = [processes.Process(target=launch, args=(machine, port, recipe, tmp_path)) for machine in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
    for machine in (0, 1):
        print((tmp_path / f"launch-{machine}").read_text())
    assert [process.exitcode for process in both] == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["starts"][-1]["num_processes"] == 2
