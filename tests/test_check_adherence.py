"""The control experiment, small: the same code that `make check-adherence` runs, on the tiny FLUX that ships."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from examples import check_adherence as module
from examples.check_adherence import SHUFFLED, TRAINED, UNTRAINED, CheckConfig, Figure, check_adherence, inseparable
from shared.errors import UserError
from tests.stages import run_stage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[str]]:
    """The folder, the exit code and the lines printed of a check whose ControlNets have had two steps."""
    folder = tmp_path_factory.mktemp("check") / "demo-adherence"
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(module, "stage", run_stage)
        patch.setattr(module, "say", printed.append)
        patch.setattr("builtins.print", lambda *words, **more: printed.append(" ".join(map(str, words))))
        code = check_adherence(CheckConfig(folder=str(folder), count=8, held_out=2, test=3, steps=2))
    return folder, code, "\n".join(printed).splitlines()


def test_a_check_of_hardly_trained_controlnets_fails_and_still_ends_with_the_three_figures(
    checked: tuple[Path, int, list[str]],
) -> None:
    folder, code, printed = checked
    assert code == module.EXIT_INSEPARABLE
    number = r"(\d\.\d\d)"
    found = re.fullmatch(f"adherence trained={number} untrained={number} shuffled={number}", printed[-1])
    assert found, printed[-1]
    stated = json.loads((folder / "report.json").read_text())["adherence"]
    for name, value in zip((TRAINED, UNTRAINED, SHUFFLED), found.groups(), strict=True):
        assert f"{stated['iou'][name]['mean']:.2f}" == value
        assert stated["iou"][name]["interval"] > 0
        assert any(line.startswith(f"{name} ") and f"{value} +- " in line for line in printed)
    for measure in module.MEASURES:
        assert stated[measure][module.CEILING]["mean"] > 0.8  # what the VAE gives back does not depend on the two steps
    assert np.asarray(Image.open(folder / "grid.png")).std() > 10


def test_what_is_trained_on_exchanged_drawings_differs_in_its_drawings_alone(
    checked: tuple[Path, int, list[str]],
) -> None:
    folder, _, _ = checked
    trained, shuffled = (
        yaml.safe_load((folder / "runs" / name / "config.yaml").read_text()) for name in (TRAINED, SHUFFLED)
    )
    assert {key for key in trained if trained[key] != shuffled[key]} == {"name", "condition"}
    facts = [json.loads((folder / "runs" / name / "run.json").read_text()) for name in (TRAINED, SHUFFLED)]
    ours, theirs = (fact["cache"].items() for fact in facts)
    assert {layer for layer, _ in ours ^ theirs} == {"canny_latents", "precomputed_latents"}
    lines = [json.loads(line) for line in (folder / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert any(line["conditioning_image"] != f"drawing-of-{line['file_name']}" for line in lines)


def test_the_untrained_one_is_the_one_that_training_begins_with(checked: tuple[Path, int, list[str]]) -> None:
    config = json.loads((checked[0] / UNTRAINED / "config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == (1, 1)
    stated = json.loads((checked[0] / "report.json").read_text())["adherence"]["iou"]
    assert stated[UNTRAINED]["mean"] > 0.05  # it paints shapes: it changes nothing at first


@pytest.mark.parametrize(("untrained", "shuffled", "expected"), [
    (Figure(0.30, 0.05), Figure(0.28, 0.05), True),
    (Figure(0.70, 0.05), Figure(0.28, 0.05), False),
    (Figure(0.30, 0.05), Figure(0.70, 0.05), False),
    (Figure(0.95, 0.01), Figure(0.28, 0.05), False),
])  # fmt: skip
def test_a_measure_separates_where_intervals_do_not_overlap(
    untrained: Figure, shuffled: Figure, expected: bool
) -> None:
    sound = {TRAINED: Figure(0.9, 0.1), UNTRAINED: Figure(0.1, 0.1), SHUFFLED: Figure(0.1, 0.1)}
    tried = {TRAINED: Figure(0.78, 0.04), UNTRAINED: untrained, SHUFFLED: shuffled}
    assert inseparable({"iou": sound, "ssim": tried}) == ([] if expected else ["ssim"])


def test_an_interval_is_of_the_mean_over_the_drawings_to_which_the_measure_applies() -> None:
    figure = Figure.of([0.2, 0.4, np.nan, 0.6, 0.8])
    assert figure.mean == pytest.approx(0.5)
    assert figure.interval == pytest.approx(3.182 * np.std([0.2, 0.4, 0.6, 0.8], ddof=1) / 2, rel=1e-3)
    assert str(figure) == "0.50 +- 0.41"


@pytest.mark.parametrize("values", [[0.9], [np.nan, 0.9], [np.nan]])
def test_what_too_few_drawings_say_separates_nothing(values: list[float]) -> None:
    low = Figure(0.1, 0.01)
    assert inseparable({"iou": {TRAINED: Figure.of(values), UNTRAINED: low, SHUFFLED: low}}) == ["iou"]


def test_impossible_options_are_refused_before_anything_is_drawn() -> None:
    with pytest.raises(UserError, match="2 or more"):
        CheckConfig(test=1).check()
    with pytest.raises(UserError, match="DEPTH"):
        CheckConfig(depth="deep").check()
