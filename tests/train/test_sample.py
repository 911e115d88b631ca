"""Painting with a trained run: the whole way from its folder and a drawing to pictures, and its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared import families
from shared.errors import UserError
from tests.train.made_run import make_run
from train import checkpoints
from train.checkpoints import CheckpointOptions
from train.config import TrainConfig
from train.export import ExportConfig, export
from train.sample import SampleConfig, fit, read_drawing, read_pairs, read_run, sample
from train.validation import ValidationOptions


@pytest.fixture(scope="module")
def run(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    from train.trainer import train

    runs = tmp_path_factory.mktemp("runs")
    options = TrainConfig(
        cache=str(tiny_cache),
        runs=str(runs),
        name="first",
        depth="1-1",
        steps=2,
        device="cpu",
        tracker="none",
        validation=ValidationOptions(every=0, pictures_every=0, adherence_every=0),
        checkpoint=CheckpointOptions(every=2),
    )
    assert train(options) == 0
    return runs / "first"


def test_a_drawing_and_a_prompt_become_a_picture_and_a_grid(run: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "drawing.png"
    Image.fromarray(np.zeros((70, 66, 3), np.uint8)).save(drawing)
    options = SampleConfig(run=str(run), image=(str(drawing),), prompt=("a box",), steps=2, device="cpu", seed=3)
    assert sample(options) == 0
    with Image.open(run / "samples" / "drawing-3.png") as picture:
        assert picture.size == (64, 64)
        first = np.asarray(picture)
    with Image.open(run / "samples" / "drawing-3-grid.png") as sheet:
        assert sheet.size[0] > 3 * 64
    assert sample(options) == 0
    assert np.array_equal(first, np.asarray(Image.open(run / "samples" / "drawing-3.png")))  # same seed, same picture


def test_the_average_of_the_weights_paints_where_it_is_asked_for(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = make_run(tmp_path / "averaged", tiny_model, steps=(4,), averaged=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "drawing.png")
    opened: list[Path] = []

    def open_painter(self: object, model: object, controlnet: Path, *rest: object) -> None:
        opened.append(controlnet)
        raise UserError("far enough")

    monkeypatch.setattr(type(families.get("flux")), "open_painter", open_painter)
    given: dict[str, Any] = {"image": (str(tmp_path / "drawing.png"),), "prompt": ("a box",), "device": "cpu"}
    for weights in ("trained", "ema"):
        with pytest.raises(UserError, match="far enough"):
            sample(SampleConfig(run=str(averaged), weights=weights, **given))
    checkpoint = checkpoints.path_of(averaged, 4)
    assert opened == [checkpoint / "controlnet", checkpoint / "ema"]
    with pytest.raises(UserError, match=r"has no average of the weights: leave --weights ema out"):
        sample(SampleConfig(run=str(run), weights="ema", **given))


def test_many_pairs_become_a_picture_each_and_one_grid_and_a_line_s_seed_counts(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.fromarray(np.full((64, 64, 3), 60 * (name == "b"), np.uint8)).save(tmp_path / f"{name}.png")
    lines = [{"image": "a.png", "prompt": "a box"}, {"image": "b.png", "prompt": "box number 2", "seed": 5}]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    options = SampleConfig(
        run=str(run), pairs=str(pairs), steps=1, device="cpu", seed=3, out=str(tmp_path / "many.png")
    )
    assert sample(options) == 0
    assert sorted(path.name for path in tmp_path.glob("many*")) == ["many-1.png", "many-2.png", "many-grid.png"]
    assert Image.open(tmp_path / "many-grid.png").size == (3 * 64 + 4, 18 + 2 * 64 + 2)
    second = np.asarray(Image.open(tmp_path / "many-2.png"))
    alone = SampleConfig(
        run=str(run), image=(str(tmp_path / "b.png"),), prompt=("box number 2",), steps=1, device="cpu", seed=5,
        out=str(tmp_path / "alone"), without=False,
    )  # fmt: skip
    assert sample(alone) == 0
    assert np.array_equal(second, np.asarray(Image.open(tmp_path / "alone.png")))
    assert Image.open(tmp_path / "alone-grid.png").size == (2 * 64 + 2, 18 + 64)


def test_images_and_prompts_pair_up_or_one_serves_for_all(tmp_path: Path) -> None:
    def pairs(image: tuple[str, ...], prompt: tuple[str, ...]) -> list[tuple[str, str]]:
        options = SampleConfig(run="r", image=image, prompt=prompt)
        options.check()
        return [(str(pair.image), pair.prompt) for pair in read_pairs(options)]

    assert pairs(("a", "b"), ("x", "y")) == [("a", "x"), ("b", "y")]
    assert pairs(("a", "b"), ("x",)) == [("a", "x"), ("b", "x")]
    assert pairs(("a",), ("x", "y")) == [("a", "x"), ("a", "y")]
    with pytest.raises(UserError, match="2 images and 3 prompts do not pair up"):
        pairs(("a", "b"), ("x", "y", "z"))
    for options in (SampleConfig(run="r"), SampleConfig(run="r", image=("a",))):
        with pytest.raises(UserError, match="give a drawing and what to paint"):
            options.check()
    with pytest.raises(UserError, match="not both"):
        SampleConfig(run="r", image=("a",), pairs="p.jsonl").check()


@pytest.mark.parametrize(("line", "said"), [
    ("{", "line 2 is not JSON"),
    ('["a.png"]', "line 2: it needs an image and a prompt"),
    ('{"image": "a.png"}', "line 2: it needs an image and a prompt"),
    ('{"image": "a.png", "prompt": "x", "sed": 1}', "line 2: unknown key 'sed'"),
    ('{"image": "a.png", "prompt": "x", "seed": "1"}', "line 2: seed must be a whole number"),
])  # fmt: skip
def test_a_line_of_pairs_that_cannot_be_read_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"image": "a.png", "prompt": "x"}}\n{line}\n')
    with pytest.raises(UserError, match=said):
        read_pairs(SampleConfig(run="r", pairs=str(path)))
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_pairs(SampleConfig(run="r", pairs=str(path)))
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(SampleConfig(run="r", pairs=str(tmp_path / "absent.jsonl")))


def test_the_controlnet_acts_from_control_start_to_control_end_only(run: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from shared import families
    from shared.families.base import Order
    from shared.model_folder import ModelFolder

    facts, _ = read_run(run)
    controlnet = run.parent / "strong"
    shutil.copytree(run / "controlnet", controlnet, dirs_exist_ok=True)
    weights = load_file(controlnet / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key in weights:  # far from zero, so that it is seen whether it acts
        if key.startswith(("controlnet_blocks.", "controlnet_single_blocks.")):
            weights[key] = torch.randn(weights[key].shape, generator=generator)
    save_file(weights, controlnet / "diffusion_pytorch_model.safetensors")
    model = ModelFolder(facts["model"]["name"], None, Path(facts["model"]["name"]))
    paint = families.get("flux").open_painter(model, controlnet, "cpu", torch.float32)

    def painted(scale: float, start: float, end: float) -> bytes:
        order = Order(
            drawings=[np.full((64, 64, 3), 90, np.uint8)], prompts=["a box"], seeds=[0], num_steps=4, guidance=3.5,
            scale=scale, text_length=facts["text_length"], control_start=start, control_end=end,
        )  # fmt: skip
        return paint(order)[0].tobytes()

    # Of four steps the first ends at a quarter: before it ends, a ControlNet that stops at 0.2 has no whole step.
    without = painted(0.0, 0.0, 1.0)
    assert painted(1.0, 0.0, 0.2) == without
    assert painted(1.0, 0.8, 1.0) == without
    assert len({without, painted(1.0, 0.0, 1.0), painted(1.0, 0.0, 0.5), painted(1.0, 0.5, 1.0)}) == 4
    for start, end in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(UserError, match="shares of the denoising"):
            SampleConfig(run="r", image=("a",), prompt=("x",), control_start=start, control_end=end).check()


def test_a_drawing_is_cut_to_the_training_size_of_nearest_aspect() -> None:
    sizes = [(64, 64), (96, 48), (48, 96)]
    assert fit(Image.new("RGB", (300, 310)), sizes).size == (64, 64)
    assert fit(Image.new("RGB", (300, 160)), sizes).size == (96, 48)
    assert fit(Image.new("RGB", (100, 300)), sizes).size == (48, 96)


def test_a_transparent_drawing_lies_on_white_and_can_be_inverted(tmp_path: Path) -> None:
    path = tmp_path / "ink.png"
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[2:4, :, 3] = 255  # black ink, the rest transparent
    Image.fromarray(picture).save(path)
    plain, inverted = (np.asarray(read_drawing(path, invert)) for invert in (False, True))
    assert plain[0, 0].tolist() == [255, 255, 255]
    assert plain[2, 0].tolist() == [0, 0, 0]
    assert np.array_equal(inverted, 255 - plain)


def test_what_is_no_run_or_no_picture_is_refused_in_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint yet"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such IMAGE"):
        read_drawing(tmp_path / "absent.png", invert=False)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_drawing(tmp_path / "text.png", invert=False)
    with pytest.raises(UserError, match="steps must be 1 or more"):
        SampleConfig(run=str(run), image=("a.png",), prompt=("x",), steps=0).check()


@pytest.mark.parametrize(
    ("adapter", "change", "said"),
    [
        ("lora", {"control_end": 0.5}, "control_end is for drawings, .* adapter lora: leave it out"),
        ("full", {"invert": True}, "invert is for drawings, .* adapter full: leave it out"),
    ],
)
def test_what_is_for_drawings_is_refused_where_words_alone_are_painted(
    adapter: str, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.sample.read_run", lambda folder: ({}, {"adapter": adapter}))
    with pytest.raises(UserError, match=said):
        sample(SampleConfig(run="runs/words", prompt=("a dog",), **change))


def test_what_only_a_program_of_its_own_can_read_is_neither_painted_with_nor_exported(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = SimpleNamespace(name="offset", conditioned=False, keeps_base=True)
    monkeypatch.setattr("train.adapters.get", lambda name: offset)
    with pytest.raises(UserError, match="run of adapter offset, which diffusers' pipelines do not read"):
        sample(SampleConfig(run=str(run), prompt=("a dog",)))
    with pytest.raises(UserError, match="adapter offset, which neither diffusers nor ComfyUI reads: hand over"):
        export(ExportConfig(run=str(run)))
