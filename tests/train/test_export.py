"""Handing a ControlNet over: what diffusers and ComfyUI read of it, what its card says, and the refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from shared import families
from shared.errors import UserError
from shared.model_folder import ModelFolder
from tests.train import comfyui
from tests.train.made_run import make_run
from train import checkpoints
from train.export import ExportConfig, export

ROOT = Path(__file__).parents[2]
TINY = comfyui.Sizes(hidden=32, head=16, tokens=64, text=32, pooled=24)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4; no test changes it."""
    return make_run(tmp_path_factory.mktemp("runs") / "first", tiny_model)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def metadata(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_the_export_is_the_checkpoint_to_the_bit_and_appears_whole(run: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        out = export(ExportConfig(run=str(run), step=step, out=str(tmp_path / str(step))))
        saved = checkpoints.path_of(run, step) / "controlnet"
        ours, theirs = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (out, saved))
        assert {*ours} == {*theirs}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert (out / "first.safetensors").read_bytes() == (out / "diffusion_pytorch_model.safetensors").read_bytes()
        assert len({path.stat().st_mode for path in out.glob("*.*")}) == 1  # whoever reads one reads all
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]  # nothing half done beside them


def test_the_average_of_the_weights_is_exported_where_one_was_kept(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    averaged = make_run(tmp_path / "averaged", tiny_model, steps=(4,), averaged=True)
    plain, average = (export(ExportConfig(run=str(averaged), weights=weights)) for weights in ("trained", "ema"))
    assert (plain.name, average.name) == ("step-00000004", "step-00000004-ema")
    ours, theirs = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (average, plain))
    assert {*ours} == {*theirs}
    assert all(torch.equal(ours[name], 0.5 * theirs[name]) for name in ours)
    cards = [(path / "README.md").read_text() for path in (plain, average)]
    assert ["| Weights | their average over training (EMA) |" in card for card in cards] == [False, True]
    assert ["at step 4, of the weights themselves, not of their average:" in card for card in cards] == [False, True]
    with pytest.raises(UserError, match=r"has no average of the weights: leave --weights ema out"):
        export(ExportConfig(run=str(run), weights="ema"))


def test_the_code_of_the_card_paints_with_the_exported_folder_in_a_fresh_process(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = export(ExportConfig(run=str(run), out=str(tmp_path / "out")))
    [code] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    for given, here in (
        ("YOUR-NAME/YOUR-MODEL", str(out)), (f'"{tiny_model.name}"', f'"{tiny_model}"'), ('"cuda"', '"cpu"'),
        ("torch.bfloat16", "torch.float32"), ("num_inference_steps=28", "num_inference_steps=1"),
    ):  # fmt: skip
        assert given in code
        code = code.replace(given, here)
    Image.new("RGB", (64, 64)).save(tmp_path / "drawing.png")
    code += f"""
from safetensors.torch import load_file
read = load_file("{out}/first.safetensors")
held = controlnet.state_dict()
assert read.keys() == held.keys() and all(torch.equal(read[name], held[name]) for name in held)
assert any(tensor.abs().sum() > 0 for name, tensor in held.items() if name.startswith("controlnet_blocks."))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (64, 64)


@pytest.mark.parametrize("depth", [(1, 1), (2, 0), (2, 2)])
def test_comfyui_finds_every_tensor_of_its_model_in_the_single_file_and_no_other(
    depth: tuple[int, int], tiny_model: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_model, steps=(1,), depth=depth)
    read = shapes(export(ExportConfig(run=str(run), name="mine")) / "mine.safetensors")
    assert comfyui.is_read_as_diffusers_flux({*read})
    found = comfyui.converted(read)
    assert found == comfyui.expected(found, TINY)
    counted = [comfyui.count({*found}, blocks) for blocks in ("double_blocks", "single_blocks")]
    assert counted == list(depth)


def test_a_controlnet_of_flux_1_dev_has_the_sizes_that_comfyui_takes_for_granted(run: Path) -> None:
    # What training makes and export copies has the names of the family's own class, here at its full size.
    full = families.get("flux").make_empty_controlnet(2, 4)
    found = comfyui.converted({name: tuple(tensor.shape) for name, tensor in full.state_dict().items()})
    assert found == comfyui.expected(found, comfyui.Sizes())
    small = families.get("flux").make_empty_controlnet(1, 1)
    exported = shapes(checkpoints.path_of(run, 4) / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert {*small.state_dict()} == {*exported}


def test_comfyui_s_logic_sees_what_is_missing_misshapen_or_unknown(run: Path) -> None:
    read = shapes(checkpoints.path_of(run, 4) / "controlnet" / "diffusion_pytorch_model.safetensors")
    for changed in (
        {name: shape for name, shape in read.items() if name != "controlnet_single_blocks.0.bias"},
        {**read, "input_hint_block.0.weight": (16, 3, 3, 3)},
        {**read, "controlnet_x_embedder.weight": (32, 128)},
    ):
        found = comfyui.converted(changed)
        assert found != comfyui.expected(found, TINY)
    with pytest.raises(ValueError, match="qkv"):
        comfyui.converted({**read, "transformer_blocks.0.attn.to_q.weight": (16, 32)})
    assert not comfyui.is_read_as_diffusers_flux({*read} - {"controlnet_blocks.0.weight"})


def test_without_double_blocks_there_is_no_single_file_and_a_warning_says_why(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", tiny_model, steps=(1,), depth=(0, 2))
    out = export(ExportConfig(run=str(run)))
    assert [path.name for path in out.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert not comfyui.is_read_as_diffusers_flux({*shapes(out / "diffusion_pytorch_model.safetensors")})
    assert "gets no single file" in capsys.readouterr().err
    assert "ComfyUI" not in (out / "README.md").read_text()


def test_the_card_says_base_licence_data_figures_of_its_step_and_shows_pictures_that_are_there(
    run: Path, tmp_path: Path
) -> None:
    out = export(
        ExportConfig(
            run=str(run), step=2, out=str(tmp_path / "out"), base="black-forest-labs/FLUX.1-dev",
            data="Twelve pictures of boxes.", name="boxes",
        )
    )  # fmt: skip
    card = (out / "README.md").read_text()
    stated = metadata(out)
    assert stated["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert (stated["license"], stated["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert stated["tags"] == ["controlnet", "canny"]
    assert "# boxes" in card
    assert "Twelve pictures of boxes." in card
    assert "at step 2:" in card
    assert "0.2500" in card  # not the later look's 0.45
    assert "0.4500" not in card
    assert "1 double and 1 single blocks" in card
    shown = re.findall(r"!\[\]\((.*?)\)", card)
    assert shown == ["pictures/step-00000002.png"]  # step 4 is another checkpoint's
    assert all((out / path).is_file() for path in shown)
    assert "/secret" not in card  # nothing of the machine


def test_what_is_not_known_about_a_local_base_is_said_and_can_be_given(
    run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = export(ExportConfig(run=str(run), out=str(tmp_path / "unknown")))
    said = capsys.readouterr().err
    assert "--base" in said
    assert "--licence" in said
    assert metadata(unknown)["license"] == "unknown"
    assert "base_model" not in metadata(unknown)
    assert str(tiny_model.parent) not in (unknown / "README.md").read_text()
    given = ExportConfig(run=str(run), out=str(tmp_path / "given"), base="me/tiny", licence="apache-2.0", pictures=0)
    known = export(given)
    assert capsys.readouterr().err == ""
    assert (metadata(known)["license"], metadata(known)["base_model"]) == ("apache-2.0", "me/tiny")
    assert not (known / "pictures").exists()


def test_bf16_halves_the_weights_and_rounds_each_to_nearest(run: Path, tmp_path: Path) -> None:
    out = export(ExportConfig(run=str(run), out=str(tmp_path / "out"), precision="bf16"))
    saved = load_file(checkpoints.path_of(run, 4) / "controlnet" / "diffusion_pytorch_model.safetensors")
    written = load_file(out / "first.safetensors")
    assert {*written} == {*saved}
    assert all(torch.equal(written[name], saved[name].to(torch.bfloat16)) for name in saved)
    assert "in bfloat16" in (out / "README.md").read_text()
    with safe_open(out / "diffusion_pytorch_model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # diffusers refuses a file without it


def test_the_folder_a_controlnet_was_started_from_stays_at_home(tiny_model: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model, steps=(1,))
    checkpoint = checkpoints.path_of(run, 1)
    settings = json.loads((checkpoint / "controlnet" / "config.json").read_text())
    settings["_name_or_path"] = "/home/someone/start"
    saved = run.parent / "controlnet"
    shutil.copytree(checkpoint / "controlnet", saved)
    (saved / "config.json").write_text(json.dumps(settings))

    def save(path: Path) -> None:
        shutil.copytree(saved, path)

    checkpoints.save(run, 2, save, {}, {}, keep=0)
    out = export(ExportConfig(run=str(run), step=2))
    assert "/home" not in (out / "config.json").read_text()
    assert json.loads((out / "config.json").read_text())["num_layers"] == 1


def test_what_cannot_be_exported_is_refused_in_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model)
    with pytest.raises(UserError, match="is no run"):
        export(ExportConfig(run=str(tmp_path)))
    with pytest.raises(UserError, match="no checkpoint of step 3; there is: 2, 4"):
        export(ExportConfig(run=str(run), step=3))
    out = export(ExportConfig(run=str(run), step=2))
    assert out == run / "export" / "step-00000002"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="is already there"):
        export(ExportConfig(run=str(run), step=2))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    weights = checkpoints.path_of(run, 4) / "controlnet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(.*was altered\).*there is: 2, 4"):
        export(ExportConfig(run=str(run), step=4))
    assert not (run / "export" / "step-00000004").exists()
    assert export(ExportConfig(run=str(run), out=str(tmp_path / "newest"))).is_dir()  # of step 2, the newest undamaged
    assert "at step 2:" in (tmp_path / "newest" / "README.md").read_text()
    for options, said in (
        (ExportConfig(run="r", name="a/b"), "must be one word"),
        (ExportConfig(run="r", base="tiny"), "is no hub id"),
        (ExportConfig(run="r", pictures=-1), "pictures must be 0 or more"),
    ):
        with pytest.raises(UserError, match=said):
            options.check()


@pytest.mark.parametrize("changes", [{}, {"prediction": "v", "zero_terminal_snr": True}], ids=str)
def test_the_card_of_a_controlnet_for_stable_diffusion_paints_with_its_pipeline_and_with_what_training_changed(
    changes: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    sd15 = families.get("sd15")
    model = sd15.tiny(tmp_path / "sd15")
    run = make_run(tmp_path / "run", tiny_model, steps=(2,), family="sd15", text_length=77)
    facts, trained = (path.read_text() for path in (run / "run.json", run / "config.yaml"))
    (run / "run.json").write_text(json.dumps({**json.loads(facts), "model": {"name": str(model), "revision": None}}))
    options = yaml.safe_load(trained)
    options["objective"] |= changes
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    weights = sd15.make_controlnet(ModelFolder(str(model), None, model), 0, 0, "copy", torch.float32)
    checkpoints.save(run, 4, weights.save_pretrained, {}, {}, keep=0)  # type: ignore[arg-type]
    out = export(ExportConfig(run=str(run), step=4))
    card = (out / "README.md").read_text()
    for absent in ("max_sequence_length", "Guidance while training", "Text tokens", "double"):
        assert absent not in card
    assert "| Timesteps | uniform |\n| " in card
    assert ("| Prediction | v |" in card) == bool(changes)
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for given, here in (
        ("YOUR-NAME/YOUR-MODEL", str(out)), ('"sd15"', f'"{model}"'), ('"cuda"', '"cpu"'),
        ("torch.bfloat16", "torch.float32"), ("num_inference_steps=28", "num_inference_steps=2"),
    ):  # fmt: skip
        assert given in code
        code = code.replace(given, here)
    Image.new("RGB", (64, 64)).save(tmp_path / "drawing.png")
    code += f"""
config = pipeline.scheduler.config
assert config.prediction_type == {"v_prediction" if changes else "epsilon"!r}
assert bool(config.rescale_betas_zero_snr) == {bool(changes)}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
