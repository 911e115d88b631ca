"""The measures know alike from unlike; a run logs them, resumes with them, and says where they cannot be had."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.shapes import pictures
from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from shared.cache.reader import Cache
from shared.errors import UserError
from tests.conftest import preprocess_options, write_data
from tests.train.conftest import content, metrics, train_options
from train import adherence, looks
from train.adherence import compare, edge_f1, enclosed, figures, region_iou, ssim, thinned, tolerance
from train.baseline import Baseline
from train.detector import Detector, NoDetectorError
from train.trainer import train
from train.validation import Validation

# The measures


def canny(image: np.ndarray) -> np.ndarray:
    return np.repeat(cv2.Canny(np.ascontiguousarray(image), 100, 200)[..., None], 3, axis=2)


def drawn(mask: np.ndarray) -> np.ndarray:
    return np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)


def ring(size: int, radius: float, x: float = 0.5, y: float = 0.5) -> np.ndarray:
    drawing = np.zeros((size, size, 3), np.uint8)
    cv2.circle(drawing, (round(x * size), round(y * size)), round(radius * size), (255, 255, 255), 1)
    return drawing


@pytest.fixture(scope="module")
def outlines() -> list[np.ndarray]:
    return [canny(drawing.image) for drawing in pictures(12, 5)]


def test_a_drawing_is_like_itself_and_less_like_what_is_further_off(outlines: list[np.ndarray]) -> None:
    for drawing in outlines:
        assert compare(drawing, drawing) == {"edge_f1": 1, "ssim": pytest.approx(1), "region_iou": 1}
        moved = [compare(np.roll(drawing, by, axis=1), drawing) for by in (0, 2, 4, 8, 16)]
        assert moved[0]["edge_f1"] == moved[1]["edge_f1"] == 1  # within the tolerance
        for name in adherence.LINES:
            values = [each[name] for each in moved[1:]]
            assert values == sorted(values, reverse=True)
            assert values[-1] < values[0]
            assert all(0 <= value <= 1 for value in values)


def test_another_s_drawing_an_empty_one_and_noise_are_far_below(outlines: list[np.ndarray]) -> None:
    noise = drawn(np.random.default_rng(0).random(outlines[0].shape[:2]) > 0.5)
    for drawing, other in zip(outlines, [*outlines[1:], outlines[0]], strict=True):
        assert compare(other, drawing)["edge_f1"] < 0.5
        assert compare(np.zeros_like(drawing), drawing)["edge_f1"] == 0
        assert compare(np.zeros_like(drawing), drawing)["region_iou"] == 0
        assert compare(noise, drawing)["edge_f1"] < 0.5
        assert compare(noise, drawing)["ssim"] < 0.1


def test_edge_f1_is_the_harmonic_mean_of_what_is_right_and_what_is_found() -> None:
    wanted = np.zeros((128, 128), bool)
    wanted[20, 10:110] = True
    found = wanted.copy()
    found[20, 60:] = False  # half of it is missing
    found[90, 60:110] = True  # and as much is where nothing should be
    near = 2 / 100  # of the missing half, what is within the tolerance of the rest
    precision, recall = 0.5, 0.5 + near
    assert edge_f1(drawn(found), drawn(wanted)) == pytest.approx(
        2 * precision * recall / (precision + recall), abs=0.01
    )
    empty = drawn(np.zeros((128, 128)))
    assert (edge_f1(empty, empty), edge_f1(drawn(wanted), empty), edge_f1(empty, drawn(wanted))) == (1, 0, 0)


def test_bold_lines_weigh_as_much_as_fine_ones_and_faint_ones_do_not_count() -> None:
    wanted = ring(128, 0.3)
    bold = cv2.dilate(wanted, np.ones((3, 3), np.uint8))
    assert edge_f1(bold, wanted) > 0.99
    assert edge_f1(wanted, bold) > 0.99
    assert edge_f1(wanted // 3, wanted) == 0
    assert edge_f1(wanted // 3, wanted // 3) == 1  # as strong as was wanted


def test_the_tolerance_grows_with_the_picture() -> None:
    assert [tolerance(side, side) for side in (64, 128, 512, 1024)] == [1, 2, 6, 11]
    scores = [edge_f1(ring(size, 0.3, x=0.5 + 0.012), ring(size, 0.3)) for size in (128, 512)]
    assert scores == pytest.approx([1, 1], abs=0.01)


def test_thinned_lines_are_a_pixel_wide_and_whole() -> None:
    thick = np.zeros((64, 64), np.uint8)
    cv2.circle(thick, (32, 32), 20, 1, 5)
    line = thinned(thick > 0)
    assert 2 * math.pi * 20 * 0.8 < line.sum() < 2 * math.pi * 20 * 1.1
    assert cv2.connectedComponents((~line).astype(np.uint8), connectivity=4)[0] == 3  # the line, inside, outside
    assert np.array_equal(thinned(line), line)
    assert not thinned(np.zeros((5, 5), bool)).any()


def test_ssim_is_that_of_the_paper() -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 12, (40, 30, 3), np.uint8) for _ in range(2))  # dark: the constants weigh
    b = (0.3 * a + 0.2 * b).astype(np.uint8)
    kernel = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(kernel, kernel) / np.outer(kernel, kernel).sum()
    values = []
    for y in range(5, 35):
        for x in range(5, 25):
            for c in range(3):
                p, q = (each[y - 5 : y + 6, x - 5 : x + 6, c].astype(float) for each in (a, b))
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                both = (window * (p - mean_p) * (q - mean_q)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                top = (2 * mean_p * mean_q + c1) * (2 * both + c2)
                values.append(top / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=0.01)  # ours has the borders too


def test_region_iou_is_that_of_what_the_outlines_enclose() -> None:
    truth = pictures(12, 5)
    for drawing in truth:
        if drawing.shape == "ring":
            continue  # its hole is enclosed too
        region = enclosed(canny(drawing.image)[..., 0] > 0)
        assert (region & drawing.mask).sum() / (region | drawing.mask).sum() > 0.85  # the line itself is outside
    small, large = ring(256, 0.2), ring(256, 0.3)
    assert region_iou(small, large) == pytest.approx((0.2 / 0.3) ** 2, abs=0.03)
    broken = large.copy()
    broken[:, 127:129] = 0  # gaps of two pixels
    assert region_iou(broken, large) > 0.97
    open_ = large.copy()
    open_[:, 100:150] = 0
    assert region_iou(open_, large) == 0


def test_drawings_that_are_no_outlines_have_no_region() -> None:
    line = np.zeros((128, 128), bool)
    line[64, 10:110] = True
    grid = np.zeros((128, 128), bool)
    grid[4:-4:20, 4:-4], grid[4:-4, 4:-4:20] = True, True
    for drawing in (line, grid, np.zeros((128, 128))):
        assert math.isnan(region_iou(drawn(drawing), drawn(drawing)))


def test_figures_are_means_with_the_errors_of_the_paintings() -> None:
    nan = math.nan
    own = [
        {"edge_f1": 0.4, "region_iou": nan},
        {"edge_f1": 0.6, "region_iou": nan},
        {"edge_f1": 0.8, "region_iou": 0.5},
    ]
    without = [{"edge_f1": value, "region_iou": nan} for value in (0.1, nan, 0.3)]
    found = figures({"": own, "without": without})
    assert found == {
        "edge_f1": pytest.approx(0.6),
        "edge_f1_error": pytest.approx(0.2 / math.sqrt(3)),
        "edge_f1_without": pytest.approx(0.2),
    }  # the region's applies to too few
    assert math.isnan(figures({"": own[:1]})["edge_f1_error"])


# The run

EVERY = {"every": 2, "adherence_every": 2, "pictures_every": 4, "samples": 4, "adherence_samples": 3, "pictures": 2}


@dataclass
class Trained:
    cache: Path
    runs: Path


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A cache with half of its samples held out, and a run of four steps, looked at after every second one."""
    folder = tmp_path_factory.mktemp("adherence")
    data = write_data(folder / "data", 12, sizes=((64, 64),))
    options = preprocess_options(
        data, folder / "cache", tiny_model, geometry=GeometryOptions(resolution=64), validation_fraction=0.5,
        condition=("canny", "tile"),
    )  # fmt: skip
    assert preprocess(options) == 0
    assert train(options_of(folder / "cache", folder / "runs")) == 0
    return Trained(folder / "cache", folder / "runs")


def options_of(cache: Path, runs: Path, **changes: Any) -> Any:
    looks = {**EVERY, **changes.pop("validation", {})}
    return train_options(
        cache, runs, **{"steps": 4, "tracker": "tensorboard", "checkpoint": {"every": 2}, **changes}, validation=looks
    )


def looks_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "adherence" in line]


def test_a_run_logs_adherence_beside_what_is_known_of_it(trained: Trained) -> None:
    lines = looks_of(trained.runs / "run")
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        found = line["adherence"]
        for name in ("edge_f1", "ssim"):
            assert {name, *(f"{name}_{kind}" for kind in ("error", "without", "other", "ceiling"))} <= found.keys()
        assert all(0 <= value <= 1 for value in found.values())
    first, last = lines[0]["adherence"], lines[-1]["adherence"]
    assert first["edge_f1"] == first["edge_f1_without"]  # a new ControlNet changes nothing
    assert last["edge_f1_without"] == first["edge_f1_without"]
    written = [json.loads(line) for line in (trained.runs / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in written if "adherence" in line):
        assert line["look_seconds"] > 0
        assert 0 < line["look_share"] <= 1


def test_adherence_is_that_of_the_pictures_that_are_shown(trained: Trained) -> None:
    def opened(name: str) -> np.ndarray:
        picture = cv2.imread(str(trained.runs / "run" / "pictures" / name))
        assert picture is not None
        return picture[..., ::-1]

    options = options_of(trained.cache, trained.runs / "alone", validation={"adherence_samples": 2}, tracker="none")
    assert train(options) == 0
    found = looks_of(trained.runs / "alone" / "run")[-1]["adherence"]
    wanted = [opened(f"held-out/{i:02d}-drawing.png") for i in range(2)]
    painted = [opened(f"step-00000004/{i:02d}.png") for i in range(2)]
    assert found["edge_f1"] == pytest.approx(
        np.mean([edge_f1(canny(p), w) for p, w in zip(painted, wanted, strict=True)])
    )
    originals = [opened(f"held-out/{i:02d}-original.png") for i in range(2)]
    assert found["ssim_ceiling"] == pytest.approx(
        np.mean([ssim(canny(p), w) for p, w in zip(originals, wanted, strict=True)])
    )


def test_a_resumed_run_has_the_same_figures_and_works_the_base_out_no_second_time(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(options_of(trained.cache, tmp_path, steps=2)) == 0
    # A kill before the next checkpoint: what was shown of these steps is shown again.
    shutil.copytree(tmp_path / "run", tmp_path / "killed", symlinks=True)
    assert train(options_of(trained.cache, tmp_path, steps=4, checkpoint={"every": 9})) == 0
    killed = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shutil.rmtree(tmp_path / "killed" / "tensorboard")
    shutil.copytree(tmp_path / "run" / "tensorboard", tmp_path / "killed" / "tensorboard")
    asked: list[str] = []
    losses = Validation.losses

    def counted(self: Validation, adapter: Any, control: Any) -> torch.Tensor:
        asked.append(control)
        return losses(self, adapter, control)

    monkeypatch.setattr(Validation, "losses", counted)
    monkeypatch.setattr(Detector, "draw", drawn_counted := Counted(Detector.draw))
    assert train(options_of(trained.cache, tmp_path, name="killed")) == 0
    assert asked == ["own", "other"]
    assert drawn_counted.calls == 3  # what was painted, not what the base paints
    # The learning rate's schedule is that of 4 steps in one run, of 2 and then 4 in the other: compare what does not
    # depend on it.
    assert looks_of(tmp_path / "killed") == looks_of(tmp_path / "run")
    again = EventAccumulator(str(tmp_path / "killed" / "tensorboard")).Reload()
    for tag in ("train/loss", "held_out/loss", "adherence/edge_f1"):
        steps = [event.step for event in again.Scalars(tag)]
        assert steps == sorted(set(steps)) == [event.step for event in killed.Scalars(tag)]
    assert [event.step for event in again.Images("held_out")] == [2, 4]


class Counted:
    """A method that counts its calls."""

    def __init__(self, method: Any) -> None:
        self.method, self.calls = method, 0

    def __get__(self, instance: Any, owner: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            return self.method(instance, *arguments)

        return call


def test_the_baseline_is_worked_out_again_where_it_rests_on_something_else_or_is_damaged(tmp_path: Path) -> None:
    baseline, tensors = Baseline(tmp_path / "baseline"), {"without": torch.rand(2, 3)}
    assert baseline.find("losses", {"seed": 0}) is None
    baseline.keep("losses", {"seed": 0, "keys": ["a"]}, tensors)
    found = baseline.find("losses", {"keys": ["a"], "seed": 0})
    assert found is not None
    assert torch.equal(found["without"], tensors["without"])
    assert baseline.find("losses", {"seed": 1, "keys": ["a"]}) is None
    path = tmp_path / "baseline" / "losses.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert baseline.find("losses", {"seed": 0, "keys": ["a"]}) is None


def test_sudden_convergence_is_said_once_and_noted(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = iter([0.0, 0.001, 0.0, 0.0, 0.2, 0.2, 0.201, 0.2, 0.2, 0.2])

    def held_out(self: Validation, adapter: Any) -> dict[str, float]:
        return {"loss": 1.0, "loss_without_control": 1.0, "condition_gap": next(values), "condition_gap_error": 0.001}

    monkeypatch.setattr(Validation, "held_out", held_out)
    options = options_of(
        trained.cache, tmp_path, steps=9, tracker="none",
        validation={"every": 1, "adherence_every": 0, "pictures_every": 0},
    )  # fmt: skip
    assert train(options) == 0
    said = capsys.readouterr().out
    assert said.count("sudden convergence at step") == 1
    [noted] = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    found = noted["convergence"]["held_out/condition_gap"]
    assert found["begun"] <= 3 < 4 <= found["done"]
    assert found["step"] == 4
    assert "at step 4: held_out/condition_gap went from 0.000 to 0.200" in said


# The detector's process


def test_a_detector_that_dies_is_started_again_and_one_that_dies_again_ends_the_run(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(Cache(trained.cache), ["canny"])
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[8:20, 8:20] = 255
    expected = detector.draw("canny", [picture])
    assert np.array_equal(expected[0], canny(picture))
    assert detector._process is not None
    first = detector._process.pid
    detector._process.kill()
    assert np.array_equal(detector.draw("canny", [picture])[0], expected[0])
    assert detector._process.pid != first
    start = Detector.start

    def killed(self: Detector) -> None:
        start(self)
        assert self._process is not None
        self._process.kill()

    monkeypatch.setattr(Detector, "start", killed)
    with pytest.raises(
        UserError, match=r"ended twice while drawing 1 paintings: killed by signal 9.*adherence-every 0"
    ):
        detector.draw("canny", [picture])
    assert detector._process is None


def test_a_detector_that_is_not_here_is_said_once_and_training_goes_on(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks.Detector, "__init__", refusing(Detector.__init__))
    assert train(options_of(trained.cache, tmp_path, tracker="none")) == 0
    said = capsys.readouterr().err
    assert said.count("adherence is not measured: the detector that drew 'canny' is not here: its detector is") == 1
    assert looks_of(tmp_path / "run") == []
    held_out = [line["held_out"] for line in metrics(tmp_path / "run") if "held_out" in line]
    assert held_out == [line["held_out"] for line in metrics(trained.runs / "run") if "held_out" in line]
    assert content(tmp_path / "run" / "controlnet") == content(trained.runs / "run" / "controlnet")


def refusing(make: Any) -> Any:
    """A detector of a cache whose drawings another one made."""

    def made(self: Detector, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self._asked["layers"]["canny"]["detector"] = "another's"

    return made


def test_tones_are_compared_by_their_structure_alone(trained: Trained, tmp_path: Path) -> None:
    options = options_of(trained.cache, tmp_path, condition=("tile",), steps=1, tracker="none",
                         validation={"adherence_samples": 1, "every": 0, "pictures_every": 0})  # fmt: skip
    assert train(options) == 0
    for line in looks_of(tmp_path / "run"):
        assert line["adherence"].keys() == {"ssim", "ssim_without", "ssim_other", "ssim_ceiling"}


def test_a_crash_tells_its_last_words(trained: Trained) -> None:
    detector = Detector(Cache(trained.cache), ["canny"])
    detector._asked["layers"] = None
    with pytest.raises(NoDetectorError, match=r"cannot be started: exit code 1, and its last words were: .*Error"):
        detector.start()
    assert isinstance(NoDetectorError(""), UserError)
