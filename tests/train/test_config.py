"""Options are refused where they are impossible, read from recipes, and told apart: those that make another
experiment, and those that do not."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared import config
from shared.cache.storage import RemoteOptions
from shared.errors import UserError
from train.budget import MemoryOptions
from train.config import TrainConfig, changed_experiment
from train.loader import LoaderOptions
from train.optimizer import OptimizerOptions
from train.quantize import BaseOptions


@pytest.mark.parametrize("name", ["a/b", "../up", "..", ".", ".hidden", "", " ", "two words", "-x", "a\nb", "a\\b"])
def test_a_name_that_is_no_single_word_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be one word of letters, digits and"):
        TrainConfig(name=name).check()


@pytest.mark.parametrize("name", ["first", "depth-5-10", "lr.2e-5_b", "v1+", "Zürich"])
def test_a_name_of_one_word_is_taken(name: str) -> None:
    TrainConfig(name=name).check()
    assert TrainConfig(name=name).run_name == name


def test_a_run_without_a_name_is_called_after_its_depth() -> None:
    assert TrainConfig(depth="5-10").run_name == "depth-5-10"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": "two-four"}, "DEPTH is num_layers-num_single_layers.*not 'two-four'"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"loader": LoaderOptions(batch_size=0)}, r"loader\.batch_size"),
        ({"optimizer": OptimizerOptions(learning_rate=0)}, r"optimizer\.learning_rate"),
        ({"remote": RemoteOptions(downloads=0)}, r"remote\.downloads"),
        ({"condition": ("canny", "lineart", "canny")}, "condition: canny is named twice"),
    ],
)
def test_impossible_values_are_refused_those_of_the_parts_too(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TrainConfig(**changes).check()


def load(*words: str) -> TrainConfig:
    options = config.load(TrainConfig, words, command="python -m train")
    assert options is not None
    return options


def test_a_written_configuration_is_a_recipe_that_reads_back_to_the_same(tmp_path: Path) -> None:
    options = TrainConfig(
        depth="1-1",
        name="x",
        optimizer=OptimizerOptions(learning_rate=3e-5),
        loader=LoaderOptions(condition_draw=False),
        condition=("canny", "lineart"),
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml(options))
    given = {key: value for key, value in yaml.safe_load((tmp_path / "config.yaml").read_text()).items()}
    assert given["optimizer"]["learning_rate"] == 3e-5
    read = load("--recipe", str(tmp_path / "config.yaml"))
    assert read == options


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('depth = "1-1"\n[optimizer]\nlearning_rate = 1e-4\n')
    assert tomllib.loads((tmp_path / "r.toml").read_text())
    options = load("--recipe", str(tmp_path / "r.toml"), "--depth", "2-0")
    assert options.depth == "2-0"
    assert options.optimizer.learning_rate == 1e-4


def test_an_unknown_key_in_a_recipe_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("optimizer:\n  learning_rte: 1\n")
    with pytest.raises(
        UserError, match=r"unknown key 'optimizer\.learning_rte': did you mean 'optimizer\.learning_rate'"
    ):
        load("--recipe", str(tmp_path / "r.yaml"))


def changed(**changes: Any) -> dict[str, tuple[object, object]]:
    before, after = TrainConfig(), dataclasses.replace(TrainConfig(), **changes)
    return changed_experiment(config.differences(config.to_dict(before), config.to_dict(after)))


def test_where_how_long_and_how_it_is_watched_may_change() -> None:
    assert not changed(steps=5, cache="elsewhere", runs="r", name="n", device="cpu", tracker="none")
    assert not changed(memory=MemoryOptions(budget="24GB", recompute="all"))
    assert not changed(loader=LoaderOptions(prefetch=9, accumulation=2, workers=7, lookahead=5))
    assert not changed(remote=RemoteOptions(downloads=3, folder="elsewhere"))
    assert not changed(optimizer=OptimizerOptions(states="cpu", release=True, survival_every=7, one_pass="no"))


def test_what_decides_the_weights_makes_another_experiment() -> None:
    assert changed(depth="1-1") == {"depth": ("2-4", "1-1")}
    assert changed(seed=1, base=BaseOptions("none"), precision="fp32").keys() == {"seed", "base.weights", "precision"}
    assert changed(base=BaseOptions(folder="elsewhere")) == {}
    assert changed(loader=LoaderOptions(batch_size=2, caption_dropout=0.5)).keys() == {
        "loader.batch_size",
        "loader.caption_dropout",
    }
    assert changed(optimizer=OptimizerOptions(learning_rate=1.0)).keys() == {"optimizer.learning_rate"}
