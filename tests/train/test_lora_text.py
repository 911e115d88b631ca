"""CLIP trained along with a LoRA is diffusers' and peft's: what it computes of cached tokens, what it saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from preprocess.pipeline import preprocess
from shared import families
from shared.errors import UserError
from shared.families.base import Batch
from tests.conftest import TEXT_LENGTH, preprocess_options, write_data
from tests.train.conftest import content, losses, metrics, train_options
from train import checkpoints
from train.adapters.lora import WEIGHTS
from train.budget import MemoryOptions
from train.config import TrainConfig
from train.counting import Setting
from train.export import ExportConfig, export
from train.fit import decide
from train.loader import LoaderOptions
from train.memory_plan import count
from train.preparation import ground_of, prepare
from train.rows import Buffers
from train.samples import CachedSamples
from train.trainer import Trainer, train

LOOKS = {"every": 4, "samples": 2, "timesteps": 2}
CPU = torch.device("cpu")


def text_options(cache: Path, runs: Path, **changes: Any) -> TrainConfig:
    """A run that learns at once, CLIP too."""
    learning = {"learning_rate": 1e-2, "kind": "adamw", **changes.pop("optimizer", {})}
    lora = {"rank": 4, "alpha": 8.0, "train_text_encoder": True, **changes.pop("lora", {})}
    return train_options(cache, runs, adapter="lora", depth="2-4", optimizer=learning, lora=lora, **changes)


@pytest.fixture(scope="module", params=["flux", "sd15", "sdxl"])
def any_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with tokens, of each family."""
    if request.param == "flux":
        return request.getfixturevalue("token_cache")
    folder = tmp_path_factory.mktemp(request.param)
    model = families.get(request.param).tiny(folder / "model")
    data = write_data(folder / "data", 6, sizes=((64, 64),))
    changes: dict[str, Any] = {"family": request.param, "text_length": None, "text_tokens": True}
    assert preprocess(preprocess_options(data, folder / "cache", model, **changes)) == 0
    return folder / "cache"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def trainer(stack: ExitStack, options: TrainConfig) -> Trainer:
    prepared = prepare(options, stack)
    assert prepared is not None
    return Trainer(prepared)


def stirred(made: Trainer) -> Trainer:
    """Off its start, where B is zero: as after some training."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in made.adapter.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return made


# --- the step is peft's ---------------------------------------------------------------------------------------------


def predicted(pipeline: Any, family: str, captions: list[str], batch: Batch, noised: Any) -> torch.Tensor:
    """The prediction of diffusers' own pipeline's models, from the captions themselves."""
    x_t, t = noised.x_t, noised.t
    if family == "flux":
        embeds, pooled, text_ids = pipeline.encode_prompt(captions, captions, max_sequence_length=TEXT_LENGTH)
        ids = pipeline._prepare_latent_image_ids(len(t), batch.height // 16, batch.width // 16, CPU, torch.float32)
        return pipeline.transformer(
            x_t, timestep=t, guidance=torch.ones(len(t)), pooled_projections=pooled, encoder_hidden_states=embeds,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
    if family == "sd15":
        embeds, _ = pipeline.encode_prompt(captions, CPU, 1, do_classifier_free_guidance=False)
        return pipeline.unet(x_t, t, embeds, return_dict=False)[0]
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": batch.tensors["sizes.time_ids"]}
    return pipeline.unet(x_t, t, embeds, added_cond_kwargs=added, return_dict=False)[0]


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_loss_and_gradients_of_both_are_those_of_the_pipeline_that_loads_the_file(
    any_cache: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    options = text_options(any_cache, tmp_path, base={"weights": "none"}, memory={"recompute": "all"})
    made = stirred(trainer(stack, options))
    [batch] = next(iter(made.loader))
    seen: list[Any] = []
    noise = made.objective.noise

    def watched(*given: Any) -> Any:
        seen.append(noise(*given))
        return seen[-1]

    monkeypatch.setattr(made.objective, "noise", watched)
    loss = made.step.loss(batch)
    loss.mean().backward()

    made.adapter.save(tmp_path / "saved")
    pipeline = DiffusionPipeline.from_pretrained(made.model.path)
    pipeline.load_lora_weights(tmp_path / "saved", adapter_name="it")
    components = [made.family.base_component, *(encoder.component for encoder in made.family.text_encoders)]
    expected: dict[str, torch.Tensor] = {}
    for component in components:
        for name, parameter in getattr(pipeline, component).named_parameters():
            if "lora" in name:
                part = "text_model." if "text" in component and not name.startswith("text_model") else ""
                expected[f"{component}.{part}{name.replace('.it.', '.')}"] = parameter.requires_grad_(True)
    captions = made.samples.cache.caption_texts(list(made.loader.choose(0).captions))
    theirs = made.objective.loss(predicted(pipeline, made.family.name, captions, batch, seen[0]), seen[0])
    theirs.mean().backward()

    assert (loss - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    saved = made.adapter._names()  # type: ignore[attr-defined]
    actual = {saved[name]: gradient_of(parameter) for name, parameter in made.adapter.named_parameters()}
    assert actual.keys() == expected.keys()
    assert {name.partition(".")[0] for name in actual} == {*components}
    for component in components:
        own = {name: gradient_of(p) for name, p in expected.items() if name.startswith(f"{component}.")}
        largest = max(float(gradient.abs().max()) for gradient in own.values())
        assert largest > 0
        worst = max(float((actual[name] - gradient).abs().max()) for name, gradient in own.items())
        print(f"{component}: {len(own)} gradients differ by at most {worst / largest:.1e}")
        assert worst <= 1e-5 * largest
        assert all(float(actual[name].abs().max()) > 0 for name in own), "a pair that nobody hears"


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(token_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 8 steps: "whole", and "resumed" after the fourth; averaged, and looked at on the way."""
    folder = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {"checkpoint": {"every": 4, "keep": 0}, "ema": {"profile": "power", "every": 2}}
    painted = {**common, "validation": {**LOOKS, "pictures_every": 8, "pictures": 1}}
    assert train(text_options(token_cache, folder, name="whole", steps=8, **painted)) == 0
    for steps in (4, 8):
        assert train(text_options(token_cache, folder, name="resumed", steps=steps, validation=LOOKS, **common)) == 0
    return folder


def test_both_learn_and_what_the_model_does_alone_stays(runs: Path) -> None:
    looked = [line["held_out"] for line in metrics(runs / "whole") if "held_out" in line]
    assert looked[0]["control_gap"] == 0
    assert looked[-1]["loss"] < 0.95 * looked[0]["loss"]
    assert len({figures["loss_without_control"] for figures in looked}) == 1
    saved = load_file(runs / "whole" / "lora" / WEIGHTS)
    assert all(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in saved


def test_a_resumed_run_goes_on_to_the_bit(runs: Path) -> None:
    assert losses(runs / "resumed") == losses(runs / "whole")
    assert content(runs / "resumed" / "lora") == content(runs / "whole" / "lora")
    last = checkpoints.path_of(Path(), 8)
    assert content(runs / "resumed" / last / "ema") == content(runs / "whole" / last / "ema")


def test_clip_is_loaded_but_never_t5_and_tokens_are_read_in_the_place_of_what_clip_said(
    runs: Path, token_cache: Path, tmp_path: Path
) -> None:
    facts = json.loads((runs / "whole" / "run.json").read_text())
    assert "clip_tokens" in facts["cache"]
    assert "clip" not in facts["cache"]
    assert [part["name"] for part in facts["starts"][0]["components"]] == ["flux base", "lora", "text encoder"]
    ground = ground_of(text_options(token_cache, tmp_path))
    assert ground.samples.batch([0]).tensors["clip_tokens.input_ids"].shape == (1, 77)


_PAINT = """
import sys, torch
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
def painted():
    return pipeline("a box", height=64, width=64, num_inference_steps=2, max_sequence_length=24, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images
def pooled():
    return pipeline.encode_prompt("a box", None, max_sequence_length=24)[1].detach()
before, said = painted(), pooled()
pipeline.load_lora_weights(sys.argv[2])
print((painted() - before).abs().max().item() > 0.01, (pooled() - said).abs().max().item() > 0.01)
pipeline.unload_lora_weights()
print(torch.equal(painted(), before), torch.equal(pooled(), said))
"""


def test_another_process_loads_it_onto_both_and_takes_it_off_again(runs: Path, tiny_model: Path) -> None:
    pytest.importorskip("peft")
    done = subprocess.run(
        [sys.executable, "-c", _PAINT, str(tiny_model), str(runs / "whole" / "lora")],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.stdout.split() == ["True"] * 4, done.stderr[-2000:]


def test_an_export_has_alpha_worked_into_both(runs: Path, tmp_path: Path) -> None:
    out = export(ExportConfig(run=str(runs / "whole"), out=str(tmp_path / "out"), base="owner/base", licence="mit"))
    exported, saved = load_file(out / WEIGHTS), load_file(runs / "whole" / "lora" / WEIGHTS)
    assert exported.keys() == saved.keys()
    name = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj.lora_B.weight"
    assert torch.equal(exported[name], (2 * saved[name]).bfloat16())
    assert "and its text encoder" in (out / "README.md").read_text()


def test_text_learns_at_a_rate_of_its_own(token_cache: Path, tmp_path: Path, stack: ExitStack) -> None:
    lora = {"text_learning_rate": 1e-4}
    made = trainer(
        stack, text_options(token_cache, tmp_path, lora=lora, optimizer={"weight_decay": 0.0, "epsilon": 1e-20})
    )
    before = {name: parameter.detach().clone() for name, parameter in made.adapter.named_parameters()}
    [batch] = next(iter(made.loader))
    made.step([batch], 1, 1e-2)
    for name, parameter in made.adapter.named_parameters():
        moved = float((parameter.detach() - before[name]).abs().max())
        if "lora_B" in name:  # A has no gradient yet. Adam's first step is as long as its rate.
            assert moved == pytest.approx(1e-4 if name.startswith("texts.") else 1e-2, rel=1e-3), name


def test_a_caption_that_is_dropped_is_the_empty_one_s_tokens(
    token_cache: Path, tmp_path: Path, stack: ExitStack
) -> None:
    made = trainer(stack, text_options(token_cache, tmp_path, loader={"batch_size": 2, "caption_dropout": 1.0}))
    [batch] = next(iter(made.loader))
    [encoder] = made.family.text_encoders
    expected = encoder.open_tokens(made.model)([""])["input_ids"]  # type: ignore[attr-defined]
    assert torch.equal(batch.tensors["clip_tokens.input_ids"], expected.expand(2, -1))
    assert made.step([batch], 1, 1e-3)["loss"] > 0


def test_without_the_pairs_it_says_of_tokens_what_is_cached(any_cache: Path, tmp_path: Path, stack: ExitStack) -> None:
    made = stirred(trainer(stack, text_options(any_cache, tmp_path)))
    choice = made.loader.choose(0)
    [batch] = next(iter(made.loader))
    plain = CachedSamples(made.samples.cache, made.family, (), "train")
    cached, stacking = plain.begin_batch(choice, Buffers(pinned=False))
    cached.tensors = stacking.finish()
    expected = made.family.inputs(cached, None, torch.float32).embeds
    with torch.no_grad():
        without = made.adapter.inputs(batch, None, torch.float32, without=True).embeds
        trained = made.adapter.inputs(batch, None, torch.float32).embeds
    differing = {name for name in expected if not torch.allclose(trained[name], expected[name], atol=1e-3)}
    assert differing == {"flux": {"pooled_projections"}, "sd15": {"encoder_hidden_states"}}.get(
        made.family.name, {"encoder_hidden_states", "text_embeds"}
    )
    for name, tensor in expected.items():  # in a batch of another size sums may be rounded otherwise
        torch.testing.assert_close(without[name], tensor, rtol=1e-5, atol=1e-5)


# --- what it cannot be trained with ---------------------------------------------------------------------------------


def test_a_cache_without_tokens_is_refused_with_what_adds_them(tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokens of its captions \(clip_tokens\).*--text-tokens True"):
        train(text_options(tiny_cache, tmp_path))
    assert not (tmp_path / "run").exists()


def test_modulation_is_not_computed_ahead_of_what_changes_it(token_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory\.hoist yes: what the text encoder says enters the modulation"):
        ground_of(text_options(token_cache, tmp_path, memory={"hoist": "yes"}))
    for trained, hoisted in ((False, True), (True, False)):
        lora = text_options(token_cache, tmp_path, lora={"train_text_encoder": trained}).lora
        setting = Setting((0, 0), 64, 64, TEXT_LENGTH, adapter="lora", lora=lora)
        fitted = decide(MemoryOptions(), LoaderOptions(), setting, device=torch.device("cuda"), free_bytes=None)
        assert fitted.hoist is hoisted


# --- memory ---------------------------------------------------------------------------------------------------------


def test_its_memory_is_counted_without_weights(token_cache: Path, tmp_path: Path) -> None:
    found = {}
    for trained in (False, True):
        lora = text_options(token_cache, tmp_path, lora={"train_text_encoder": trained}).lora
        found[trained] = count(Setting((0, 0), 512, 512, 512, adapter="lora", hoist=False, lora=lora))
    clip_bytes = found[True].components["base weights"] - found[False].components["base weights"]
    assert clip_bytes == pytest.approx(2 * 123.06e6, rel=0.01)
    assert found[True].num_trained - found[False].num_trained == 12 * 4 * 4 * (768 + 768)
    assert found[True].peak_bytes > found[False].peak_bytes + clip_bytes
