"""The demo from beginning to end, small: the same code that `make demo` runs, on the tiny FLUX that ships."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import demo as module
from examples.demo import DemoConfig, demo
from examples.tiny_world import draw_pictures
from shared import config
from shared.errors import UserError
from tests.stages import run_stage

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stage", run_stage)
    monkeypatch.chdir(ROOT)


def test_the_demo_ends_with_the_adherence_and_leaves_a_grid_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = DemoConfig(folder=str(tmp_path / "demo"), count=8, held_out=2, test=2, steps=2)
    assert demo(options) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(r"adherence without=(\d\.\d\d) with=(\d\.\d\d) ceiling=(\d\.\d\d)", last)
    assert found, last
    assert float(found[3]) > 0.85  # what the VAE gives back does not depend on the two steps
    assert np.asarray(Image.open(tmp_path / "demo" / "grid.png")).std() > 10
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "with control" in report
    assert found[2] in report
    assert (tmp_path / "demo" / "runs" / "demo" / "controlnet" / "config.json").is_file()


def test_in_the_control_experiment_every_picture_has_anothers_drawing(tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    draw_pictures(data, 6, 2, 777, exchanged=True)
    lines = config.yaml.safe_load_all((data / "metadata.jsonl").read_text().replace("\n", "\n---\n"))
    pairs = [(line["file_name"], line["conditioning_image"]) for line in lines if line]
    assert len(pairs) == 8
    assert sum(f"drawing-of-{name}" != drawing for name, drawing in pairs) >= 6
    assert len({drawing for _, drawing in pairs}) == 8


def test_a_failed_stage_ends_the_demo_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match="preprocess ended with exit code 1"):
        module.stage("preprocess", "recipe.yaml")
