"""A run's folder says what it is, refuses another experiment, and keeps the figures that a checkpoint stands on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from shared import config
from shared.errors import UserError
from shared.report import Component
from train.config import TrainConfig
from train.run import Run

FACTS: dict[str, Any] = {
    "family": "flux",
    "model": {"name": "m", "revision": None},
    "cache": {"latents": "1f" * 32, "t5": "2e" * 32},
    "text_length": 24,
}
COMPONENTS = [Component("base", "int8", "cpu", 10, 0, 10)]


def begun(tmp_path: Path, options: TrainConfig | None = None) -> Run:
    run = Run(tmp_path / "run")
    assert run.refuse_other(options or TrainConfig(), FACTS) is None
    run.begin(options or TrainConfig(), FACTS, 0, COMPONENTS)
    return run


def test_a_run_states_its_options_its_ground_and_each_start(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == config.to_dict(TrainConfig())
    more = dataclasses.replace(TrainConfig(), steps=20_000)
    assert run.refuse_other(more, FACTS) == config.to_dict(TrainConfig())
    run.begin(more, FACTS, 500, COMPONENTS)
    stated = json.loads((run.folder / "run.json").read_text())
    assert {name: stated[name] for name in FACTS} == FACTS
    assert [start["step"] for start in stated["starts"]] == [0, 500]
    for start in stated["starts"]:
        assert start["versions"]["torch"]
        assert start["git_revision"]
        assert start["components"] == [dataclasses.asdict(COMPONENTS[0])]
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["steps"] == 20_000


def test_another_experiment_is_refused_naming_every_changed_option_and_nothing_is_written(tmp_path: Path) -> None:
    run = begun(tmp_path)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    other = dataclasses.replace(TrainConfig(), depth="1-1", seed=4, steps=7)
    with pytest.raises(UserError, match=r"holds another experiment \(depth was 2-4, is 1-1; seed was 0, is 4\)"):
        run.refuse_other(other, FACTS)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_a_run_from_before_an_option_existed_is_the_same_experiment_while_the_option_has_its_default(
    tmp_path: Path,
) -> None:
    run = begun(tmp_path)
    recorded = yaml.safe_load((run.folder / "config.yaml").read_text())
    del recorded["optimizer"]["survival_every"], recorded["optimizer"]["beta2"], recorded["objective"]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert run.refuse_other(TrainConfig(), FACTS) == config.to_dict(TrainConfig())
    optimizer = dataclasses.replace(TrainConfig().optimizer, beta2=0.9)
    with pytest.raises(UserError, match=r"holds another experiment \(optimizer.beta2 was 0.999, is 0.9\)"):
        run.refuse_other(dataclasses.replace(TrainConfig(), optimizer=optimizer), FACTS)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"cache": {"latents": "1f" * 32, "t5": "3d" * 32}}, r"cache\.t5 was 2e2e2e2e, is 3d3d3d3d"),
        ({"cache": {"latents": "1f" * 32}}, r"cache\.t5 was 2e2e2e2e, is None"),
        ({"model": {"name": "other", "revision": None}}, r"model\.name was m, is other"),
        ({"text_length": 77}, "text_length was 24, is 77"),
    ],
)
def test_a_changed_cache_or_base_is_refused_by_name(facts: dict[str, Any], named: str, tmp_path: Path) -> None:
    run = begun(tmp_path)
    with pytest.raises(
        UserError, match=rf"was trained on something else \({named}\)\. Give this experiment its own NAME"
    ):
        run.refuse_other(TrainConfig(), {**FACTS, **facts})


@pytest.mark.parametrize("content", ["", "{", "[1]", ": :"])
def test_a_damaged_run_folder_is_one_sentence(content: str, tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run.folder / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"is damaged, config\.yaml or run\.json cannot be read"):
        run.refuse_other(TrainConfig(), FACTS)


def test_figures_are_lines_and_those_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.log(1, {"loss": 0.5, "gap": math.nan})
    run.log(1, {"held_out": {"loss": 0.25, "error": math.inf}})
    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 1, "held_out": {"loss": 0.25}}]
    run.sync_metrics()


def test_figures_after_the_checkpoint_and_a_line_that_a_kill_cut_off_are_dropped(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for step in range(5):
        run.log(step, {"loss": 1.0})
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    run.keep_metrics_until(3)
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 3]
    run.log(4, {"loss": 2.0})
    assert run.metrics()[-1] == {"step": 4, "loss": 2.0}


@pytest.mark.parametrize("torn", [b'{"step": 1, "loss": 0.5}', b"\0\0\0\0", b'{"step": 1, "loss"', '{"ü'.encode()[:-1]])
def test_any_torn_end_is_dropped(torn: bytes, tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.log(0, {"loss": 1.0})
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(torn)
    run.keep_metrics_until(9)
    assert run.metrics() == [{"step": 0, "loss": 1.0}]


def test_a_run_that_never_logged_has_nothing_to_drop_or_flush(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.keep_metrics_until(3)
    run.sync_metrics()
    assert not (run.folder / "metrics.jsonl").exists()


def test_a_picture_is_written_under_its_step(tmp_path: Path) -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    path = begun(tmp_path).save_picture(12, picture)
    assert path.name == "step-00000012.png"
    assert np.array_equal(np.asarray(Image.open(path)), picture)
