"""The options of preprocessing: recipes, the command line, and what is refused before anything is read."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml

from preprocess import conditions
from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.geometry import GeometryOptions
from shared.config import field_names, load
from shared.errors import UserError


def loaded(*words: str) -> PreprocessConfig:
    config = load(PreprocessConfig, ["--data", "pictures", *words], command="python -m preprocess")
    assert config is not None
    return config


def test_the_defaults_are_flux_dev_at_512_pixels_and_tokens() -> None:
    config = loaded()
    assert (config.family, config.model, config.condition) == ("flux", None, ("lineart",))
    assert (config.geometry.resolution, config.text_length, config.precision) == (512, None, "bf16")


def test_nested_options_come_from_the_command_line() -> None:
    config = loaded(
        *("--condition", "lineart", "canny", "--geometry.resolution", "1024", "--encode.image-batch", "2"),
        *("--conditions.lineart.detect-resolutions", "128", "512", "--conditions.canny.low", "50"),
    )
    assert config.condition == ("lineart", "canny")
    assert (config.geometry.resolution, config.encode.image_batch) == (1024, 2)
    assert config.conditions.lineart.detect_resolutions == (128, 512)
    assert config.conditions.canny.low == 50


def test_a_recipe_with_nested_keys_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "condition: [canny, lineart]\ntext_length: 77\n"
        "geometry: {resolution: 256, flip: true, crop: random, crops: 2}\n"
        "conditions:\n  lineart: {detect_resolutions: [128, 256], coarse: true}\n  canny: {low: 10}\n"
        "encode:\n  shard_rows: 7\n"
    )
    config = loaded("--recipe", str(recipe), "--text-length", "128", "--encode.workers", "3")
    assert config.condition == ("canny", "lineart")
    assert config.text_length == 128
    assert config.geometry == GeometryOptions(resolution=256, flip=True, crop="random", crops=2)
    assert (config.conditions.lineart.detect_resolutions, config.conditions.lineart.coarse) == ((128, 256), True)
    assert config.conditions.canny.low == 10
    assert config.encode == EncodeOptions(shard_rows=7, workers=3)


def test_an_unknown_key_of_a_recipe_is_refused_with_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("conditions:\n  lineart:\n    detect_resolution: 128\n")
    with pytest.raises(UserError, match=r"did you mean 'conditions\.lineart\.detect_resolutions'"):
        loaded("--recipe", str(recipe))


def test_a_dry_run_prints_a_recipe_that_reads_back_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "x", "--condition", "canny", "--geometry.flip", "True", "--text-length", "99"]
    assert load(PreprocessConfig, [*words, "--dry-run"], command="preprocess") is None
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["geometry"]["flip"] is True
    recipe = tmp_path / "printed.yaml"
    recipe.write_text(printed)
    assert load(PreprocessConfig, ["--recipe", str(recipe)], command="preprocess") == load(
        PreprocessConfig, words, command="preprocess"
    )


def test_a_dry_run_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preprocess.__main__ import main

    words = ["preprocess", "--data", str(tmp_path / "none"), "--cache", str(tmp_path / "cache"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    assert list(tmp_path.iterdir()) == []


def test_no_condition_is_asked_for_in_words_or_with_none(tmp_path: Path) -> None:
    for written in ("condition: []", "condition: none", "condition: [none]"):
        (tmp_path / "recipe.yaml").write_text(written)
        assert loaded("--recipe", str(tmp_path / "recipe.yaml")).condition == ()
    assert loaded("--condition", "none").condition == loaded("--condition").condition == ()


def test_every_condition_has_its_options() -> None:
    assert [name for name in field_names(PreprocessConfig) if name.startswith("conditions.canny")] == [
        "conditions.canny.low",
        "conditions.canny.high",
    ]
    assert [field.name for field in dataclasses.fields(loaded().conditions)] == conditions.names()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--condition", "linart"], "unknown condition 'linart': did you mean 'lineart'"),
        (["--condition", "canny", "none"], "condition: none stands alone"),
        (["--condition", "canny", "canny"], "condition: canny is named twice"),
        (["--family", "flx"], "unknown model family 'flx': did you mean 'flux'"),
        (["--geometry.resolution", "500"], "resolution=500 is not a multiple of 16, .* use 496 or 512"),
        (["--geometry.crops", "2"], "crops=2 would all be the same centre crop"),
        (["--text-length", "513"], "text_length must be from 1 to 512, not 513"),
        (["--text-length", "0"], "text_length must be from 1 to 512, not 0"),
        (["--validation-fraction", "1"], "validation_fraction is a share from 0 to below 1"),
        (["--encode.image-batch", "0"], "encode.image_batch must be 1 or more"),
        (["--encode.shard-rows", "0"], "encode.shard_rows must be 1 or more"),
        (["--conditions.canny.low", "300"], "canny: low=300, high=200"),
        (["--condition", "lineart", "--conditions.lineart.detect-resolutions", "100"], "multiples of 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_options_are_refused_in_one_sentence(words: list[str], sentence: str) -> None:
    if "--conditions.canny.low" in words:
        words = ["--condition", "canny", *words]
    with pytest.raises(UserError, match=sentence) as refused:
        loaded(*words)
    assert "\n" not in str(refused.value)
