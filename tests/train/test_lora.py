"""A LoRA is peft's: what it computes, where it begins, what it saves; on an int8 base it learns the same."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from shared.errors import UserError
from shared.families.base import Batch
from shared.model_folder import resolve
from tests.train.conftest import content, flux, losses, metrics, samples_of, train_options
from tests.train.test_compile import Counting, inputs_of
from tests.train.test_controlnet import CPU, Reference
from tests.train.test_distributed import World, exit_codes, started
from train import adapters, checkpoints
from train.adapters.lora import WEIGHTS, LoraAdapter, LoraOptions, chosen
from train.compile import compile_blocks
from train.config import TrainConfig
from train.counting import Setting
from train.export import ExportConfig, export
from train.memory_plan import count
from train.preparation import ground_of
from train.quantize import place_base
from train.sample import SampleConfig, sample
from train.samples import CachedSamples
from train.step import Step
from train.trainer import train

LOOKS = {"every": 4, "samples": 2, "timesteps": 2}


def lora_options(cache: Path, runs: Path, **changes: Any) -> TrainConfig:
    """A run that learns at once."""
    learning = {"learning_rate": 1e-2, "kind": "adamw", **changes.pop("optimizer", {})}
    return train_options(cache, runs, adapter="lora", depth="2-4", optimizer=learning, **changes)


def base_of(model: Path) -> torch.nn.Module:
    return flux().load_base(resolve(str(model), ()), torch.float32)


def adapter_of(base: torch.nn.Module, **changes: Any) -> LoraAdapter:
    return LoraAdapter(flux(), base, LoraOptions(**changes), dtype=torch.float32, device="cpu", seed=7)


def stirred(adapter: LoraAdapter) -> LoraAdapter:
    """Off its start, where B is zero: as after some training."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.lora.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return adapter


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lora" / WEIGHTS)


def batch_of(cache: Path) -> Batch:
    samples = samples_of(cache)
    batch = samples.batch([samples.size_of(0).start + i for i in (0, 1)])
    batch.step_samples, batch.position = len(batch), 3
    return batch


def gradients_of(adapter: LoraAdapter, cache: Path, seed: int = 5) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step's backward, gradients by their names in the file."""
    from train.objectives import ObjectiveOptions, make

    step = Step(
        flux(), adapter, make(ObjectiveOptions(), flux()), None,  # type: ignore[arg-type]
        recipes=samples_of(cache).recipes, seed=seed, device=CPU, dtype=torch.float32,
    )  # fmt: skip
    total, _ = step.backward([batch_of(cache)])
    names = adapter._names()
    found = {names[name]: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    return total.item(), found


# --- the step is peft's ---------------------------------------------------------------------------------------------


def reference(
    data: Path, cache: Path, model: Path, saved: Path, batch: Batch, seed: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients as diffusers and peft have them: the saved file loaded into the pipeline, the step computed
    from the pictures and captions themselves."""
    pytest.importorskip("peft")
    own = flux().make_controlnet(resolve(str(model), ()), 1, 1, "copy", torch.float32)  # for its pictures alone
    pictures = Reference(data, cache, model, own)
    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.load_lora_weights(saved)
    weights = {name: p for name, p in pipeline.transformer.named_parameters() if "lora" in name}
    assert len(weights) >= 16
    for parameter in weights.values():
        parameter.requires_grad_(True)
    loss = pictures.loss_without_control(pipeline, batch, seed)
    loss.backward()
    named = {f"transformer.{name.replace('.default_0', '')}": p.grad for name, p in weights.items()}
    return loss.item(), {name: gradient for name, gradient in named.items() if gradient is not None}


@pytest.mark.parametrize(
    "changes", [{}, {"rank": 4, "alpha": 2.0, "targets": ("attn.to_q", "proj_mlp", "ff.net.2")}], ids=["default", "own"]
)
def test_loss_and_every_gradient_equal_those_of_peft_on_diffusers_own_model(
    changes: dict[str, Any], tiny_data: Path, tiny_cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = stirred(adapter_of(base_of(tiny_model), **changes))
    adapter.save(tmp_path)
    loss, actual = gradients_of(adapter, tiny_cache)
    expected_loss, expected = reference(tiny_data, tiny_cache, tiny_model, tmp_path, batch_of(tiny_cache), 5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    # The text half of the last double block goes on in the single ones, so every pair has a gradient.
    assert actual.keys() == expected.keys()
    whole = math.hypot(*(gradient.norm().item() for gradient in expected.values()))
    worst = max((actual[name] - gradient).norm().item() for name, gradient in expected.items())
    print(f"loss {loss:.6f} and {expected_loss:.6f}; {len(expected)} gradients differ by at most {worst / whole:.1e}")
    assert worst < 1e-5 * whole


def test_the_int8_base_hardly_turns_the_gradient(tiny_cache: Path, tiny_model: Path) -> None:
    found = []
    for weights in ("none", "int8"):
        adapter = stirred(adapter_of(place_base(base_of(tiny_model), CPU, weights)))
        _, gradients = gradients_of(adapter, tiny_cache)
        assert all(tensor.grad is None for tensor in adapter.base.parameters())
        found.append(torch.cat([gradients[name].double().flatten() for name in sorted(gradients)]))
    cosine = torch.nn.functional.cosine_similarity(found[0], found[1], dim=0).item()
    print(f"cosine of the LoRA's gradients, int8 base and unquantized: {cosine:.6f}")
    assert 0.999 < cosine < 1 - 1e-9


def test_what_is_recomputed_in_backward_is_recomputed_with_the_pairs(tiny_cache: Path, tiny_model: Path) -> None:
    from train import recompute

    adapter = stirred(adapter_of(place_base(base_of(tiny_model), CPU, "int8")))
    _, kept = gradients_of(adapter, tiny_cache)
    for parameter in adapter.lora.parameters():
        parameter.grad = None
    recompute.apply(flux(), adapter.base, adapter.with_blocks, 99, 99)
    _, again = gradients_of(adapter, tiny_cache)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


# --- where it begins ------------------------------------------------------------------------------------------------


def test_a_new_one_changes_nothing_and_its_first_gradients_are_b_s(tiny_cache: Path, tiny_model: Path) -> None:
    adapter = adapter_of(base_of(tiny_model))
    batch = batch_of(tiny_cache)
    inputs = flux().inputs(batch, None, torch.float32)
    x_t = torch.randn(2, batch.height * batch.width // 256, 64, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        assert torch.equal(adapter.predict(x_t, t, inputs), adapter.predict_without(x_t, t, inputs))
        stirred(adapter)
        assert not torch.equal(adapter.predict(x_t, t, inputs), adapter.predict_without(x_t, t, inputs))
        assert torch.equal(adapter.predict(x_t, t, inputs, scale=0.0), adapter.predict_without(x_t, t, inputs))
    fresh = adapter_of(base_of(tiny_model))
    _, gradients = gradients_of(fresh, tiny_cache)
    assert {name.split(".")[-2] for name, gradient in gradients.items() if gradient.any()} == {"lora_B"}
    bounds = {name: 1 / math.sqrt(weight.shape[1]) for name, weight in fresh.lora.state_dict().items() if "_A" in name}
    for name, bound in bounds.items():  # as torch draws a linear's weight, and so peft A
        assert 0.8 * bound < fresh.lora.state_dict()[name].abs().max() <= bound


def test_its_targets_are_those_of_diffusers_own_training_or_named_and_others_are_refused(tiny_model: Path) -> None:
    base = base_of(tiny_model)
    default = chosen(base, flux().lora_targets)
    assert "single_transformer_blocks.1.attn.to_q" in default
    assert "transformer_blocks.0.ff_context.net.2" in default
    assert not any("norm" in name or "embed" in name for name in default)
    assert list(chosen(base, ("proj_mlp",))) == [f"single_transformer_blocks.{i}.proj_mlp" for i in range(2)]
    with pytest.raises(UserError, match=r"no linear of the base ends with 'attn\.to_w'.*attn\.to_"):
        chosen(base, ("attn.to_w",))


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 8 steps: "whole", and "resumed" after the fourth; looked at on the way."""
    folder = tmp_path_factory.mktemp("runs")
    changes: dict[str, Any] = {"validation": LOOKS, "checkpoint": {"every": 4, "keep": 0}}
    pictures: dict[str, Any] = {"validation": {**LOOKS, "pictures_every": 8, "pictures": 1}}
    assert train(lora_options(tiny_cache, folder, name="whole", steps=8, **{**changes, **pictures})) == 0
    for steps in (4, 8):
        assert train(lora_options(tiny_cache, folder, name="resumed", steps=steps, **changes)) == 0
    return folder


def test_it_learns_and_what_the_base_does_alone_stays(runs: Path) -> None:
    looked = [line["held_out"] for line in metrics(runs / "whole") if "held_out" in line]
    assert len(looked) == 3
    assert looked[0]["control_gap"] == 0
    assert looked[-1]["loss"] < 0.95 * looked[0]["loss"]
    assert len({figures["loss_without_control"] for figures in looked}) == 1
    assert "condition_gap" not in looked[-1]
    assert (runs / "whole" / "pictures" / "step-00000008.png").is_file()


def test_a_resumed_run_goes_on_to_the_bit(runs: Path) -> None:
    assert losses(runs / "resumed") == losses(runs / "whole")
    assert content(runs / "resumed" / "lora") == content(runs / "whole" / "lora")


def test_with_the_modulation_computed_ahead_or_blocks_recomputed_it_is_the_same_to_the_bit(
    tiny_cache: Path, tmp_path: Path
) -> None:
    for name, memory in (("plain", {}), ("hoisted", {"hoist": "yes"}), ("recomputed", {"recompute": "all"})):
        changes: dict[str, Any] = {"memory": memory, "base": {"weights": "none"}}
        assert train(lora_options(tiny_cache, tmp_path, name=name, steps=3, **changes)) == 0
    assert losses(tmp_path / "hoisted") == losses(tmp_path / "recomputed") == losses(tmp_path / "plain")


def test_nothing_of_the_condition_is_read(tiny_cache: Path, runs: Path) -> None:
    ground = ground_of(lora_options(tiny_cache, runs))
    assert not any("canny" in name for name in ground.facts["cache"])
    assert ground.facts["condition"] == []
    samples = CachedSamples(ground.samples.cache, flux(), (), "train")
    assert {name.split(".")[0] for name in samples.batch([0]).tensors} == {"latents", "clip", "t5"}


def test_a_lora_of_another_rank_is_another_experiment(tiny_cache: Path, runs: Path) -> None:
    with pytest.raises(UserError, match=r"holds another experiment \(lora\.rank was 16, is 8\)"):
        train(lora_options(tiny_cache, runs, name="whole", steps=9, lora={"rank": 8}))


_PAINT = """
import sys, torch
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
def painted():
    return pipeline("a box", height=64, width=64, num_inference_steps=2, max_sequence_length=24, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images
before = painted()
pipeline.load_lora_weights(sys.argv[2])
after = painted()
pipeline.unload_lora_weights()
print((after - before).abs().max().item() > 0.01, torch.equal(painted(), before))
"""


def test_another_process_loads_what_is_saved_into_diffusers_pipeline_and_paints_otherwise(
    runs: Path, tiny_model: Path
) -> None:
    pytest.importorskip("peft")
    done = subprocess.run(
        [sys.executable, "-c", _PAINT, str(tiny_model), str(runs / "whole" / "lora")],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


def test_a_checkpoint_links_its_weights_by_their_name(runs: Path) -> None:
    checkpoint = checkpoints.path_of(runs / "whole", 8)
    assert (runs / "whole" / "lora").resolve() == checkpoint / "lora"
    assert checkpoints.weights_of(checkpoint, "trained") == checkpoint / "lora"
    assert checkpoints.linked(runs / "whole") == checkpoint
    names = set(tensors_of(runs / "whole"))
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in names


# --- memory ---------------------------------------------------------------------------------------------------------


def test_its_memory_is_counted_without_weights_and_is_less_than_a_controlnet_s() -> None:
    setting = Setting(depth=(0, 0), height=512, width=512, text_length=512, adapter="lora")
    ours, theirs = count(setting), count(Setting(depth=(2, 4), height=512, width=512, text_length=512))
    shapes = chosen(flux().make_base(), flux().lora_targets)
    assert ours.num_trained == sum(16 * (N + K) for N, K in shapes.values())
    assert ours.num_controlnet_blocks == 0
    assert ours.components["ControlNet weights"] < theirs.components["ControlNet weights"] / 10
    assert count(setting, 57).peak_bytes < ours.peak_bytes


# --- handed over ----------------------------------------------------------------------------------------------------


def test_what_is_exported_needs_no_alpha_and_is_read_by_diffusers(
    tiny_cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    lora = {"rank": 4, "alpha": 2.0, "save_fp32": True}
    options = lora_options(tiny_cache, tmp_path, steps=3, lora=lora)
    assert train(options) == 0
    out = export(ExportConfig(run=str(tmp_path / "run"), base="owner/base", licence="mit"))
    exported, saved = load_file(out / WEIGHTS), tensors_of(tmp_path / "run")
    assert exported.keys() == saved.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, saved[name] * (0.5 if "lora_B" in name else 1.0))
    assert (out / "run.safetensors").read_bytes() == (out / WEIGHTS).read_bytes()
    card = (out / "README.md").read_text()
    assert "A LoRA of rank 4 for [owner/base]" in card
    assert "load_lora_weights" in card
    assert "ControlNet" not in card
    velocities = []
    for folder in (out, tmp_path / "run" / "lora"):
        pipeline = FluxPipeline.from_pretrained(tiny_model)
        pipeline.load_lora_weights(folder)
        pipeline.set_progress_bar_config(disable=True)
        velocities.append(
            pipeline(
                "a box", height=64, width=64, num_inference_steps=1, max_sequence_length=24, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images
        )  # fmt: skip
    torch.testing.assert_close(velocities[0], velocities[1], rtol=1e-4, atol=1e-5)


def test_a_run_s_lora_paints_words_alone(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    given: dict[str, Any] = {"run": str(runs / "whole"), "steps": 2, "device": "cpu", "guidance": 1.0}
    assert sample(SampleConfig(prompt=("a box", "a box"), out=str(tmp_path / "two.png"), **given)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two-1.png", "two-2.png", "two-grid.png"]
    assert (tmp_path / "two-1.png").read_bytes() == (tmp_path / "two-2.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "two-grid.png")).astype(int)
    picture = np.asarray(Image.open(tmp_path / "two-1.png")).astype(int)
    with_it, without = sheet[-66:-2, :64], sheet[-66:-2, -64:]
    assert np.abs(with_it - without).max() > 2
    assert picture.shape == (64, 64, 3)
    with pytest.raises(UserError, match="which sees no drawing: give PROMPT alone"):
        sample(SampleConfig(image=("a.png",), prompt=("a box",), **given))


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["lora", "lora and text", "full"])
def test_several_processes_train_as_one_does_with_as_much_more_accumulation(
    what: str, processes: ForkServerContext, tiny_cache: Path, token_cache: Path, tmp_path: Path
) -> None:
    adapter, text = what.partition(" ")[0], "text" in what

    def options(name: str, accumulation: int) -> TrainConfig:
        # SGD-like: an epsilon far above the gradients, so that rounding is not blown up to the size of a step.
        return train_options(
            token_cache if text else tiny_cache, tmp_path, name=name, adapter=adapter, steps=4, validation=LOOKS,
            lora={"train_text_encoder": text},
            base={"weights": "none" if adapter == "full" else "int8"},
            loader={"batch_size": 2, "accumulation": accumulation},
            optimizer={"kind": "adamw", "epsilon": 1.0, "learning_rate": 0.1},
        )  # fmt: skip

    assert train(options("one", 2)) == 0
    world = World(tmp_path / "ranks")
    assert exit_codes(started(processes, options("several", 1), world), world) == [0, 0]
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(set(losses(tmp_path / "several"))) == 4
    kind = adapters.get(adapter)
    saved = "transformer" if adapter == "full" else "lora"
    expected = load_file(tmp_path / "one" / saved / kind.weights_file)
    assert any(name.startswith("text_encoder") for name in expected) == text
    for folder in (tmp_path / "several" / saved, tmp_path / "ranks" / "rank-0", tmp_path / "ranks" / "rank-1"):
        actual = load_file(folder / kind.weights_file)
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True], ids=["as it is", "int8"])
def test_compiled_blocks_compute_what_they_computed_and_a_kind_is_compiled_once_for_all_its_blocks(
    int8: bool, tiny_model: Path
) -> None:
    deep = {**resolve(str(tiny_model), ()).config("transformer"), "num_layers": 4, "num_single_layers": 4}
    base = FluxTransformer2DModel.from_config(deep).eval().requires_grad_(False)
    adapter = stirred(adapter_of(place_base(base, CPU, "int8" if int8 else "none")))

    def gradients() -> list[torch.Tensor]:
        prediction = adapter.predict(*inputs_of(2))
        prediction.square().mean().backward()
        found = [p.grad for p in adapter.lora.parameters() if p.grad is not None]
        adapter.lora.zero_grad(set_to_none=True)
        return [prediction.detach(), *found]

    expected = gradients()
    counting = Counting("aot_eager")
    compile_blocks(flux().blocks(adapter.base), num_shapes=1, backend=counting)
    found = gradients()
    assert len(found) == len(expected) > 100
    assert all((ours - theirs).norm() <= 1e-5 * theirs.norm() for ours, theirs in zip(found, expected, strict=True))
    first = counting.graphs
    gradients()
    print(f"{first} graphs for {len(flux().blocks(adapter.base))} blocks")
    assert counting.graphs == first <= 5, "other calls compile nothing anew"
