"""Every adapter trains on every family, through nothing but what the two answer: its step is that of diffusers' own
modules, a run learns and resumes, and what it leaves is sampled, exported, and painted with by diffusers alone."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared import families
from shared.cache.reader import Cache
from shared.errors import UserError
from shared.model_folder import ModelFolder
from tests.prepared import Prepared
from tests.train.conftest import content, losses, metrics, train_options
from tests.train.test_latent_diffusion import NAMES, cache_of, losses_of, moved, trainer
from tests.train.test_sweep import forked, sweep_options
from train import adapters, together
from train.adapters.lora import chosen
from train.export import ExportConfig, export
from train.plan import PlanConfig, plan, report, subject_of
from train.preparation import prepare
from train.sample import SampleConfig, sample
from train.sweep import PAGE, sweep
from train.trainer import open_base, train

__all__ = ["forked"]

FAMILIES = ("flux", *NAMES)
ADAPTERS = ("controlnet", "full", "lora")
RATES = {"controlnet": 3e-3, "full": 1e-3, "lora": 1e-2}
LEARNS = {"controlnet": 0.95, "full": 0.82, "lora": 0.98}
"""What of the held-out loss is left after `STEPS`, at most."""
STEPS = 24
LOOKS = {"every": STEPS, "samples": 4, "timesteps": 4, "pictures_every": STEPS, "pictures": 1}
DIFFUSERS = Prepared(
    (
        "diffusers.pipelines.controlnet.pipeline_controlnet",
        "diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl",
        "diffusers.pipelines.flux.pipeline_flux_controlnet",
    ),
    {"CUDA_VISIBLE_DEVICES": ""},
)  # fmt: skip
"""A process that knows nothing of this project."""


def options_of(adapter: str, cache: Path, runs: Path, **changes: Any) -> Any:
    base = {"weights": "none" if adapter == "full" else "int8"}
    optimizer = {"kind": "adamw", "learning_rate": RATES[adapter], "warmup_steps": 2}
    given = {"depth": "2-4" if Cache(cache).family != "flux" or adapter != "controlnet" else "1-1", **changes}
    return train_options(cache, runs, **{"adapter": adapter, "base": base, "optimizer": optimizer, **given})


@pytest.fixture(scope="module", params=FAMILIES)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=ADAPTERS)
def run(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each adapter on each family, looked at and followed by a tracker."""
    runs = tmp_path_factory.mktemp(request.param)
    options = options_of(
        request.param, cache, runs, name=f"{Cache(cache).family}-{request.param}", steps=STEPS,
        loader={"batch_size": 4}, validation=LOOKS, tracker="tensorboard",
    )  # fmt: skip
    assert train(options) == 0
    return runs / options.run_name


def family_of(run: Path) -> Any:
    return families.get(json.loads((run / "run.json").read_text())["family"])


def adapter_of(run: Path) -> Any:
    return adapters.get(run.name.partition("-")[2])


def model_of(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["model"]["name"]


# --- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", ["full", "lora"])  # a ControlNet's: test_latent_diffusion
def test_a_step_s_loss_and_gradients_are_those_of_diffusers_and_peft_s_own_modules(
    adapter: str, name: str, tmp_path: Path
) -> None:
    """FLUX's are held to them from the pictures on: test_controlnet, test_full, test_lora."""
    options = {"snr_gamma": 5.0, "prediction": "v"}
    with ExitStack() as stack:
        lora = {"rank": 4, "alpha": 2.0, "weights": "fp32"}
        given = {"base": {"weights": "none"}, "objective": options, "lora": lora}
        made = trainer(stack, cache_of(name, tmp_path), tmp_path, adapter=adapter, **given)
        moved(made)
        batch = next(iter(made.loader))[0]
        ours = made.step.loss(batch)
        ours.mean().backward()
        gradients = {name: parameter.grad for name, parameter in made.adapter.named_parameters()}

        model = Path(made.model.path)
        made.adapter.save(tmp_path / "saved")
        if adapter == "full":
            unet = UNet2DConditionModel.from_pretrained(tmp_path / "saved")
            expected = dict(unet.named_parameters())
        else:
            pytest.importorskip("peft")
            pipeline = DiffusionPipeline.from_pretrained(model)
            pipeline.load_lora_weights(tmp_path / "saved")
            unet = pipeline.unet
            weights = {name: p.requires_grad_() for name, p in unet.named_parameters() if "lora" in name}
            named = {saved: own for own, saved in made.adapter._names().items()}  # type: ignore[attr-defined]
            expected = {named[f"unet.{name.replace('.default_0', '')}"]: p for name, p in weights.items()}
        theirs = losses_of(made, batch, options, unet)
        theirs.mean().backward()

    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert gradients.keys() == expected.keys()
    largest = max(float(p.grad.abs().max()) for p in expected.values() if p.grad is not None)
    assert largest > 0
    for each, gradient in gradients.items():
        assert gradient is not None, each
        assert (gradient - expected[each].grad).abs().max() <= 1e-5 * largest, each


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_is_shown_to_the_tracker_with_its_pictures(run: Path) -> None:
    looked = [line["held_out"] for line in metrics(run) if "held_out" in line]
    left = looked[-1]["loss"] / looked[0]["loss"]
    print(f"{run.name}: held-out loss {looked[0]['loss']:.4f} -> {looked[-1]['loss']:.4f}, {left:.3f}")
    assert left < LEARNS[adapter_of(run).name]
    if adapter_of(run).keeps_base:
        [without] = {figures["loss_without_control"] for figures in looked}
        assert looked[0]["loss"] == without
    picture = Image.open(run / "pictures" / f"step-{STEPS:08d}.png")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    [image] = events.Images("held_out")
    assert (image.step, image.width, image.height) == (STEPS, *picture.size)
    assert [event.value for event in events.Scalars("held_out/loss")] == [
        pytest.approx(figures["loss"]) for figures in looked
    ]
    assert len(events.Scalars("train/loss")) == STEPS


def test_a_base_without_a_modulation_says_that_there_is_none_to_compute_ahead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cache_of("sd15", tmp_path)
    with ExitStack() as stack:
        prepare(options_of("lora", made, tmp_path, memory={"hoist": "yes"}), stack)
    assert "option memory.hoist has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_loras_and_a_controlnet_side_by_side_on_one_base_are_what_they_are_alone(name: str, tmp_path: Path) -> None:
    made = cache_of(name, tmp_path)

    def runs(folder: str) -> list[Any]:
        common: dict[str, Any] = {
            "depth": "1-1" if name == "flux" else "2-4", "validation": {"every": 2, "samples": 2, "timesteps": 2},
        }  # fmt: skip
        small, hoist = {"rank": 4, "alpha": 8.0}, {"hoist": "yes" if name == "flux" else "auto"}
        return [
            options_of("lora", made, tmp_path / folder, name="a", steps=4, memory=hoist, **common),
            options_of("controlnet", made, tmp_path / folder, name="b", steps=3, memory=hoist, **common),
            options_of(
                "lora", made, tmp_path / folder, name="c", steps=3, seed=1, lora=small,
                memory={**hoist, "recompute": "all"}, **common,
            ),
        ]  # fmt: skip

    for options in runs("alone"):
        assert train(options) == 0
    opened: list[Any] = []

    def open_once(prepared: Any, attention: str) -> Any:
        opened.append(open_base(prepared, attention))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "open_base", open_once)
        assert together.train_together(runs("shared")) == 0
    [base] = opened
    for run in ("a", "b", "c"):
        assert metrics(tmp_path / "shared" / run) == metrics(tmp_path / "alone" / run)
        folder = "controlnet" if run == "b" else "lora"
        assert content(tmp_path / "shared" / run / folder) == content(tmp_path / "alone" / run / folder)
    assert not any(module._forward_hooks for module in base.module.modules())


def test_a_whole_base_is_not_shared(tmp_path: Path) -> None:
    made = cache_of("sd15", tmp_path)
    both = [options_of("full", made, tmp_path, name=name, steps=1) for name in ("a", "b")]
    with pytest.raises(UserError, match="adapter full changes what the base computes"):
        together.train_together(both)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_run_of_stable_diffusion_goes_on_to_the_bit(adapter: str, name: str, tmp_path: Path) -> None:
    """As FLUX's, and as a ControlNet, do: test_resume, test_latent_diffusion."""
    made = cache_of(name, tmp_path)
    for run, stops in (("whole", (4,)), ("resumed", (2, 4))):
        for steps in stops:
            assert train(options_of(adapter, made, tmp_path, name=run, steps=steps)) == 0
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    folder = {"full": "unet", "lora": "lora"}[adapter]
    assert content(tmp_path / "resumed" / folder) == content(tmp_path / "whole" / folder)


# --- what it leaves -------------------------------------------------------------------------------------------------

_WITHOUT = {
    "controlnet": "controlnet_conditioning_scale=1.0 -> controlnet_conditioning_scale=0.0",
    "full": "{component}=trained, -> ",
    "lora": 'pipeline.load_lora_weights("{out}") -> ',
}


def test_the_card_s_code_paints_with_the_export_in_another_process_and_otherwise_than_the_base(
    run: Path, tmp_path: Path
) -> None:
    family, adapter = family_of(run), adapter_of(run)
    if adapter.name == "lora":
        pytest.importorskip("peft")
    out = export(ExportConfig(run=str(run), out=str(tmp_path / "out"), precision="fp32"))
    card = (out / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    model = model_of(run)
    for given, here in (
        ("YOUR-NAME/YOUR-MODEL", str(out)), (f'"{Path(model).name}"', f'"{model}"'), ('"cuda"', '"cpu"'),
        ("torch.bfloat16", "torch.float32"), ("num_inference_steps=28", "num_inference_steps=2, generator=seeded()"),
    ):  # fmt: skip
        assert given in code, given
        code = code.replace(given, here)
    code = "def seeded():\n    return torch.Generator().manual_seed(0)\n\n\n" + code
    drawn = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(drawn).save(tmp_path / "drawing.png")
    words = _WITHOUT[adapter.name].format(component=family.base_component, out=out).split(" -> ")
    assert words[0] in code
    both = f"{code}\nimport sys\nassert not any(n.split('.')[0] in ('shared', 'train') for n in sys.modules)\n" + (
        f"first = picture\n{code.replace(words[0], words[1])}\n"
        "import numpy\nfound = [numpy.asarray(each).astype(int) for each in (first, picture)]\n"
        "print(found[0].shape, abs(found[1] - found[0]).max())"
    )
    done = DIFFUSERS.run(both, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("(64, 64, 3)")
    assert int(done.stdout.split()[-1]) > 2


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_s_single_file_has_the_names_that_other_programs_know_and_paints_alike(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    made = cache_of(name, tmp_path, text_tokens=True)
    lora = {"rank": 4, "alpha": 2.0, "train_text_encoder": True}
    options = options_of("lora", made, tmp_path, name="known", steps=3, lora=lora)
    assert train(options) == 0
    out = export(ExportConfig(run=str(tmp_path / "known"), precision="fp32", base="me/tiny", licence="mit"))
    model = Path(Cache(made).manifest["model"]["name"])
    base = families.get(name).make_base(ModelFolder(str(model), None, model))
    linears = chosen(base, families.get(name).lora_targets)
    ends = [f"{way}.weight" for way in ("lora_down", "lora_up")]
    expected = {f"lora_unet_{linear.replace('.', '_')}.{end}" for linear in linears for end in ends}
    found = set(load_file(out / "known.safetensors"))
    assert {name for name in found if name.startswith("lora_unet_")} == expected
    # As ComfyUI calls CLIP's linears: comfy/lora.py, model_lora_keys_clip.
    clips = {"sd15": ("lora_te",), "sdxl": ("lora_te1", "lora_te2")}[name]
    first = "text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
    assert {f"{clip}_{first}" for clip in clips} <= found - expected
    assert all(re.match(r"lora_te[12]?_text_model_encoder_layers_", name) for name in found - expected)
    painted = []
    for file in ("pytorch_lora_weights.safetensors", "known.safetensors", None):
        pipeline = DiffusionPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        if file is not None:
            pipeline.load_lora_weights(out, weight_name=file)
        words: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        painted.append(pipeline("a box", generator=torch.Generator().manual_seed(0), **words).images)
    torch.testing.assert_close(painted[0], painted[1])
    assert not torch.allclose(painted[0], painted[2], rtol=1e-2)


def test_it_is_sampled(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_of(run)
    if adapter.name == "lora":
        pytest.importorskip("peft")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "drawing.png")
    drawing = (str(tmp_path / "drawing.png"),) if adapter.conditioned else ()
    options = SampleConfig(
        run=str(run), image=drawing, prompt=("a box",), steps=2, device="cpu", out=str(tmp_path / "picture.png")
    )
    assert sample(options) == 0
    assert "it/s" not in capsys.readouterr().err, "no bars where there is no terminal"
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    columns = 1 + adapter.keeps_base + adapter.conditioned
    assert Image.open(tmp_path / "picture-grid.png").width == columns * 64 + (columns - 1) * 2


def test_what_training_changed_of_the_scheduler_paints_words_too_and_parts_that_painting_needs_not_may_be_away(
    tmp_path: Path,
) -> None:
    made = cache_of("sd15", tmp_path)
    index = Path(Cache(made).manifest["model"]["name"]) / "model_index.json"
    listed = json.loads(index.read_text())
    listed["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # which no one has fetched
    listed["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index.write_text(json.dumps(listed))
    painted = []
    for name, changed in (("as-it-was", {}), ("v", {"prediction": "v", "zero_terminal_snr": True})):
        options = options_of("full", made, tmp_path, name=name, steps=1, objective=changed)
        assert train(replace(options, optimizer=replace(options.optimizer, learning_rate=1e-12))) == 0
        words = SampleConfig(run=str(tmp_path / name), prompt=("a box",), steps=2, device="cpu", guidance=1.0)
        assert sample(words) == 0
        painted.append(np.asarray(Image.open(tmp_path / name / "samples" / "words-0.png")).astype(int))
        out = export(ExportConfig(run=str(tmp_path / name), licence="mit", base="me/tiny"))
        card = (out / "README.md").read_text()
        assert ("rescale_betas_zero_snr=True" in card) == bool(changed)
    assert abs(painted[0] - painted[1]).max() > 2


def test_a_sweep_over_adapters_and_ranks_has_one_page_and_a_base_is_shared_where_it_stays_as_it_is(
    tmp_path: Path, forked: list[list[str]]
) -> None:
    made, looks = cache_of("sdxl", tmp_path), {"every": 2, "samples": 2, "timesteps": 2}
    common: dict[str, Any] = {"depth": "2-4", "steps": 2, "validation": looks, "base": {"weights": "none"}}
    assert sweep(sweep_options(made, tmp_path, vary=("adapter=controlnet,full,lora",), **common)) == 0
    trained = {"adapter-controlnet": "controlnet", "adapter-full": "unet", "adapter-lora": "lora"}
    for name, folder in trained.items():
        assert (tmp_path / "first" / name / folder).is_symlink()
    page = (tmp_path / "first" / PAGE).read_text()
    assert all(name in page for name in trained)
    assert "2-4" not in page  # a depth that none of them has
    forked.clear()
    assert sweep(sweep_options(made, tmp_path, vary=("adapter=controlnet,full,lora",), **common)) == 0
    assert not forked

    options = sweep_options(made, tmp_path, adapter="lora", vary=("lora.rank=2,16",), shared_base=True, **common)
    assert sweep(replace(options, name="second")) == 0
    assert [words[0] for words in forked] == ["train.together"]
    assert metrics(tmp_path / "second" / "rank-16") == metrics(tmp_path / "first" / "adapter-lora")
    with pytest.raises(UserError, match="SHARED_BASE: adapter full changes what the base computes"):
        sweep(sweep_options(made, tmp_path, adapter="full", seeds=(0, 1), shared_base=True, **common))

    forked.clear()  # before the first one is trained, the last one is refused
    held = sweep_options(made, tmp_path, adapter="full", vary=("base.weights=none,int8",), **common)
    with pytest.raises(UserError, match="weights-int8: adapter full trains the base's own weights"):
        sweep(replace(held, name="third"))
    unlearnable = ("objective.zero_terminal_snr=False,True",)
    with pytest.raises(UserError, match="snr-True: the base predicts the noise"):
        sweep(replace(sweep_options(made, tmp_path, vary=unlearnable, **common), name="fourth"))
    assert not forked


@pytest.mark.parametrize(("adapter", "title"), [("controlnet", "ControlNet"), ("full", "trained"), ("lora", "LoRA")])
def test_a_plan_names_what_is_trained(adapter: str, title: str) -> None:
    options = PlanConfig(cache="nowhere", family="sd15", gpu="4090", depth="2-4", adapter=adapter)
    options = replace(options, base=replace(options.base, weights="none"))
    subject = subject_of(options)
    told = report(options, subject, plan(options, subject, options.depth))
    assert re.search(rf"^{title} +[0-9.]+ B parameters", told, re.MULTILINE)
    assert ("ControlNet" in told) == (adapter == "controlnet")
    assert ("LoRA weights" in told) == (adapter == "lora")


def test_the_folder_is_the_registry() -> None:
    assert adapters.names() == ["controlnet", "full", "lora"]
    assert {adapters.get(name).name for name in adapters.names()} == set(adapters.names())
    with pytest.raises(UserError, match="unknown adapter 'lore': did you mean 'lora'"):
        adapters.get("lore")
    for family in families.names():
        assert families.get(family).lora_targets
