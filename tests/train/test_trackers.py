"""Trackers get the same figures and the same pictures as the run's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.conftest import metrics, train_options
from train.trainer import train

LOOKS = {
    "every": 2, "adherence_every": 2, "pictures_every": 2, "samples": 2, "adherence_samples": 1, "pictures": 1,
}  # fmt: skip


def shown_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tracker's name -> (step, value) of each, from the run's own file."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(run):
        for part, figures in {"train": line, **line}.items():
            for name, value in figures.items() if isinstance(figures, dict) else ():
                if isinstance(value, int | float) and name != "step":
                    if part == "train" and "loss" not in line:
                        continue
                    found.setdefault(f"{part}/{name}", []).append((line["step"], value))
    return found


def test_tensorboard_shows_every_figure_and_picture_of_the_run(tiny_cache: Path, tmp_path: Path) -> None:
    assert train(train_options(tiny_cache, tmp_path, steps=2, tracker="tensorboard", validation=LOOKS)) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = shown_of(tmp_path / "run")
    assert {"train/loss", "held_out/loss_error", "adherence/edge_f1", "adherence/ssim_ceiling"} <= shown.keys()
    for name, expected in shown.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in expected], name
    assert {"looks/look_share", "looks/look_seconds"} <= set(events.Tags()["scalars"])
    [image] = events.Images("held_out")
    picture = Image.open(tmp_path / "run" / "pictures" / "step-00000002.png")
    assert (image.step, image.width, image.height) == (2, *picture.size)


def test_wandb_gets_every_figure_and_picture_of_the_run(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train(train_options(tiny_cache, tmp_path, steps=2, tracker="wandb", validation=LOOKS)) == 0
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    [log] = folder.glob("*.wandb")
    written = log.read_bytes()
    for name in shown_of(tmp_path / "run"):
        assert name.encode() in written, name
    [media] = (folder / "files" / "media" / "images").glob("held_out_2_*.png")
    ours = Image.open(tmp_path / "run" / "pictures" / "step-00000002.png")
    assert np.array_equal(np.asarray(Image.open(media).convert("RGB")), np.asarray(ours))
