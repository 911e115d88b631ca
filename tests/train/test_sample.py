"""Painting with a trained run: the whole way from its folder and a drawing to pictures, and its refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.errors import UserError
from train.checkpoints import CheckpointOptions
from train.config import TrainConfig
from train.sample import SampleConfig, fit, read_drawing, read_run, sample
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
        validation=ValidationOptions(every=0, pictures_every=0),
        checkpoint=CheckpointOptions(every=2),
    )
    assert train(options) == 0
    return runs / "first"


def test_a_drawing_and_a_prompt_become_a_picture_and_a_grid(run: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "drawing.png"
    Image.fromarray(np.zeros((70, 66, 3), np.uint8)).save(drawing)
    options = SampleConfig(run=str(run), image=str(drawing), prompt="a box", steps=2, device="cpu", seed=3)
    assert sample(options) == 0
    with Image.open(run / "samples" / "drawing-3.png") as picture:
        assert picture.size == (64, 64)
        first = np.asarray(picture)
    with Image.open(run / "samples" / "drawing-3-grid.png") as sheet:
        assert sheet.size[0] > 3 * 64
    assert sample(options) == 0
    assert np.array_equal(first, np.asarray(Image.open(run / "samples" / "drawing-3.png")))  # same seed, same picture


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
        SampleConfig(run=str(run), image="a.png", prompt="x", steps=0).check()
