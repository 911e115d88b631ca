"""The comparison of loss curves runs, and tells what is equal from what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import equal_curves
from benchmarks.equal_curves import BF16, Curve, Trained, compare, difference, kept, picture, smoothed


def trained(losses: list[float], **weights: list[float]) -> Trained:
    return Trained(np.array(losses), {name: torch.tensor(values) for name, values in weights.items()})


def test_the_difference_of_two_curves_is_that_of_their_worst_step() -> None:
    assert difference(trained([1.0, 2.2, 3.0]), trained([1.0, 2.0, 3.0])) == pytest.approx(0.1)


def test_what_is_kept_is_the_share_of_the_reference_s_own_movement() -> None:
    start = {"w": torch.tensor([1.0, 1.0])}
    reference = trained([0.0], w=[3.0, 1.0])
    assert kept(reference, reference, start) == 1
    assert kept(trained([0.0], w=[2.0, 9.0]), reference, start) == 0.5  # sideways does not count
    assert kept(trained([0.0], w=[1.0, 1.0]), reference, start) == 0


def test_curves_are_smoothed_and_drawn_with_their_names() -> None:
    assert smoothed(np.array([1.0, 2.0, 3.0, 4.0]), width=2).tolist() == [1.5, 2.5, 3.5]
    assert smoothed(np.array([1.0]), width=25).tolist() == [1.0]
    sheet = np.asarray(picture([{"a": np.array([1.0, 2.0]), "b": np.array([2.0, 1.0])}]))
    assert sheet.shape == (360, 640, 3)
    assert ((sheet == (255, 0, 0)).all(axis=-1)).any()  # the second curve


def test_ways_are_trained_on_one_cache_and_compared(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equal_curves, "SMALL_LEARNING_RATE", 1e-5)
    exact = (
        Curve("quanto", {"base": {"weights": "quanto"}}),
        Curve("lean", {"base": {"weights": "int8"}}, "quanto"),
        Curve("other", {"": {"seed": 1}}, "quanto"),
    )
    rounded = (
        Curve("fp32", {"": {"precision": "bf16"}, "controlnet": {"weights": "fp32"}}),
        Curve("nearest", {**BF16, "optimizer": {"rounding": "nearest"}}, "fp32"),
    )
    problems = compare(tmp_path, tiny_model, 3, count=8, batch=2, exact=exact, rounded=rounded)
    assert [problem.split()[0] for problem in problems] == ["other"]  # other noise is another curve
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("curve ")]
    assert [line.split()[1] for line in lines] == ["lean", "other", "nearest"]
    assert Image.open(tmp_path / "curves.png").size == (640, 720)
    assert "trained to step 3" in (tmp_path / "log").read_text()
