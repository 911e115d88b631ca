"""A whole base that two cards train together: what is learned is one process's, and so is what is kept."""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from shared.errors import run_command_line
from tests.train.conftest import losses, metrics, train_options
from tests.train.test_distributed import World, exit_codes, free_port
from tests.train.test_full import full_options
from tests.train.test_latent_diffusion import cache_of
from train import checkpoints
from train.config import TrainConfig
from train.counting import Setting
from train.memory_plan import count
from train.optimizer_state import held_as_here
from train.sharded_optimizer import ShardedOptimizer
from train.step import Step
from train.trainer import Trainer, train

# SGD-like: an epsilon far above the gradients, so that rounding is not blown up to the size of a step.
STEPPED = {"kind": "adamw", "epsilon": 1.0, "learning_rate": 0.1}
LOOKS = {"every": 2, "samples": 2, "timesteps": 2}


def train_as(rank: int, port: int, options: TrainConfig, world: World) -> None:
    """One of several processes. Leaves what it holds at the end, and the sums of what it has of the first gradient."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank % world.per_machine), WORLD_SIZE=str(world.count),
        LOCAL_WORLD_SIZE=str(world.per_machine), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    sys.stderr = (world.folder / f"stderr-{rank}").open("w", buffering=1)
    end, finish = Trainer.run_to_the_end, Step.backward

    def run_to_the_end(self: Trainer) -> None:
        end(self)
        shards = self.models.trained_shards
        if shards is not None:
            assert isinstance(self.optimizer, ShardedOptimizer)
            held, kept = sum(part.nbytes for part in shards.parts.values()), self.optimizer.state_bytes
            (world.folder / f"held-{rank}").write_text(json.dumps([held, kept]))

    def backward(self: Step, batches: Any) -> Any:
        found = finish(self, batches)
        shards = self.optimizer.shards if isinstance(self.optimizer, ShardedOptimizer) else None
        if shards is not None and not (world.folder / f"seen-{rank}").exists():
            (world.folder / f"seen-{rank}").touch()
            shards.take_gradients()
            whole = shards.whole({name: part.grad for name, part in shards.parts.items() if part.grad is not None})
            if rank == 0:
                save_file(whole, world.folder / "gradient.safetensors")
        return found

    Trainer.run_to_the_end, Step.backward = run_to_the_end, backward  # type: ignore[method-assign]
    run_command_line(lambda: train(options))


def train_together(context: ForkServerContext, options: TrainConfig, world: World) -> None:
    world.folder.mkdir(exist_ok=True)
    port = free_port()
    everyone = [context.Process(target=train_as, args=(rank, port, options, world)) for rank in range(world.count)]
    for process in everyone:
        process.start()
    assert exit_codes(everyone, world) == [0] * world.count


def tensors(run: Path, step: int, what: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.path_of(run, step) / what)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(("count_", "per_machine"), [(2, 2), (4, 2)], ids=["one machine", "two machines"])
def test_loss_gradients_and_all_that_is_kept_equal_one_process_s(
    count_: int, per_machine: int, processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, batch_size: int, steps: int = 4, shard: str = "no") -> TrainConfig:
        return full_options(
            tiny_cache, tmp_path, name=name, steps=steps, memory={"shard": shard, "recompute": "3"}, optimizer=STEPPED,
            loader={"batch_size": batch_size, "accumulation": 4 // batch_size if name == "one" else 4 // count_},
            checkpoint={"every": 2, "keep": 0}, validation=LOOKS, ema={"profile": "power", "every": 2},
        )  # fmt: skip

    gradient: dict[str, torch.Tensor] = {}
    backward = Step.backward

    def watched(self: Step, batches: Any) -> Any:
        found = backward(self, batches)
        if not gradient:
            gradient.update({n: p.grad.clone() for n, p in self.optimizer.parameters.items() if p.grad is not None})
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Step, "backward", watched)
        assert train(options("one", 1)) == 0
    world = World(tmp_path / "ranks", count_, per_machine)
    train_together(processes, options("several", 1, shard="yes"), world)

    found = load_file(world.folder / "gradient.safetensors")
    assert found.keys() == gradient.keys()
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradient.values()])).item()
    assert max((found[name] - gradient[name]).norm().item() for name in gradient) < 1e-5 * norm
    one, several = metrics(tmp_path / "one"), metrics(tmp_path / "several")
    assert [line["step"] for line in one] == [line["step"] for line in several]
    for alone, together in zip(one, several, strict=True):
        for name in {"loss", "gradient_norm", "update_norm"} & alone.keys():
            assert together[name] == pytest.approx(alone[name], rel=1e-5)
        if "held_out" in alone:
            assert together["held_out"] == pytest.approx(alone["held_out"], rel=1e-4, abs=1e-6)
    for what in (WEIGHTS, "ema/diffusion_pytorch_model.safetensors", checkpoints.OPTIMIZER):
        expected, actual = tensors(tmp_path / "one", 4, what), tensors(tmp_path / "several", 4, what)
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{what}: {name}")
    FluxTransformer2DModel.from_pretrained(tmp_path / "several" / "transformer")
    config = json.loads((tmp_path / "several" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    # Neither weights nor states are anywhere twice.
    whole = sum(tensor.nbytes for tensor in tensors(tmp_path / "one", 4, WEIGHTS).values())
    for rank in range(count_):
        held, kept = json.loads((world.folder / f"held-{rank}").read_text())
        assert held / whole == pytest.approx(1 / per_machine, rel=0.02)
        assert kept / (2 * whole) == pytest.approx(1 / per_machine, rel=0.1)


def test_a_run_goes_on_with_another_number_of_processes_and_back_with_8_bit_moments_in_bf16(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, steps: int, accumulation: int, shard: str) -> TrainConfig:
        return full_options(
            tiny_cache, tmp_path, name=name, steps=steps, precision="bf16", memory={"shard": shard},
            loader={"batch_size": 2, "accumulation": accumulation},
            optimizer={"kind": "adamw8bit", "survival_every": 2}, checkpoint={"every": 2, "keep": 0},
        )  # fmt: skip

    assert train(options("alone", 6, 2, "no")) == 0
    assert train(options("turns", 2, 2, "no")) == 0
    train_together(processes, options("turns", 4, 1, "yes"), World(tmp_path / "first"))
    assert train(options("turns", 6, 2, "no")) == 0
    assert losses(tmp_path / "turns") == pytest.approx(losses(tmp_path / "alone"), rel=0.02)
    # To the bit where the number stays.
    for steps in (4, 6):
        train_together(processes, options("resumed", steps, 1, "yes"), World(tmp_path / f"resumed-{steps}"))
    train_together(processes, options("whole", 6, 1, "yes"), World(tmp_path / "whole-ranks"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    for what in (WEIGHTS, checkpoints.OPTIMIZER):
        expected, actual = tensors(tmp_path / "whole", 6, what), tensors(tmp_path / "resumed", 6, what)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    kept = [line["update_kept"] for line in metrics(tmp_path / "whole") if "update_kept" in line]
    assert kept[-1] == pytest.approx(1, abs=0.1)


def test_moments_change_between_8_bits_and_float32_where_cards_cut_them_otherwise() -> None:
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    codes = {"qmap1": create_dynamic_map(signed=True), "qmap2": create_dynamic_map(signed=False)}
    moments = {"exp_avg": torch.randn(30, 100), "exp_avg_sq": torch.rand(30, 100)}
    meta = {
        "kind": "adamw8bit", "master": False,
        "parameters": {"w": {"shape": [30, 100], "tensors": [*moments, "step"], "numbers": {}}},
    }  # fmt: skip
    saved = {f"w.{key}": tensor for key, tensor in moments.items()} | {"w.step": torch.tensor(7.0)}
    assert held_as_here(saved, meta, frozenset(), codes)[0] == saved
    eight, described = held_as_here(saved, meta, frozenset({"w"}), codes)
    assert described["parameters"]["w"]["numbers"] == {"step": 7}
    for number, moment in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        expected, state = quantize_blockwise(moments[moment], code=codes[f"qmap{number}"], blocksize=256)
        torch.testing.assert_close(eight[f"w.absmax{number}"], state.absmax)
        assert (eight[f"w.state{number}"] == expected).float().mean() > 0.99  # but where two codes are as near
    back, described = held_as_here(eight, described, frozenset(), codes)
    assert back["w.step"].item() == 7
    assert described["parameters"]["w"]["numbers"] == {}
    for moment, tensor in moments.items():
        torch.testing.assert_close(back[f"w.{moment}"], tensor, rtol=0.05, atol=0.05)


def test_a_lora_on_a_base_that_two_processes_hold_together_is_one_process_s(
    processes: ForkServerContext, tiny_cache: Path, tmp_path: Path
) -> None:
    def options(name: str, accumulation: int, shard: str = "no") -> TrainConfig:
        return train_options(
            tiny_cache, tmp_path, name=name, adapter="lora", memory={"shard": shard, "recompute": "3"},
            loader={"batch_size": 2, "accumulation": accumulation}, optimizer=STEPPED, steps=4,
            validation={"every": 2, "samples": 2, "timesteps": 2},
        )  # fmt: skip

    assert train(options("one", 4)) == 0
    train_together(processes, options("two", 2, "yes"), World(tmp_path / "ranks"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    file = Path("lora") / "pytorch_lora_weights.safetensors"
    expected, actual = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_the_memory_of_each_of_two_cards_is_half_but_for_what_is_gathered() -> None:
    alone = Setting(
        depth=(0, 0), height=512, width=512, text_length=512, adapter="full", base="none", hoist=False,
    )  # fmt: skip
    one = count(alone, 57)
    two = count(Setting(**{**vars(alone), "shard": True, "num_processes": 8, "cards": 8}), 57)
    assert two.components["optimizer states"] == pytest.approx(one.components["optimizer states"] / 8, rel=0.01)
    assert two.peak_bytes < 0.25 * one.peak_bytes
    print(f"FLUX.1-dev in full, all recomputed: {one.peak_bytes / 2**30:.1f} GiB, 8 cards {two.peak_bytes / 2**30:.1f}")


def test_a_unet_is_spread_as_well(processes: ForkServerContext, tmp_path: Path) -> None:
    cache = cache_of("sd15", tmp_path)

    def options(name: str, accumulation: int, shard: str = "no") -> TrainConfig:
        return full_options(
            cache, tmp_path, name=name, steps=2, memory={"shard": shard, "recompute": "2"}, optimizer=STEPPED,
            loader={"batch_size": 2, "accumulation": accumulation}, validation={**LOOKS, "every": 1},
        )  # fmt: skip

    assert train(options("one", 2)) == 0
    train_together(processes, options("two", 1, "yes"), World(tmp_path / "ranks"))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two)
    for alone, together in zip(one, two, strict=True):
        for name in {"loss", "gradient_norm", "update_norm"} & alone.keys():
            assert together[name] == pytest.approx(alone[name], rel=1e-5)
    expected, actual = (tensors(tmp_path / name, 2, f"unet/{WEIGHTS.split('/')[1]}") for name in ("one", "two"))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
