"""Every recipe that ships is read, says for whom it is, and fits the card that it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from preprocess.config import PreprocessConfig
from shared.config import load
from tests.prepared import ROOT
from train.memory_plan import GIB
from train.plan import PlanConfig, plan, subject_of

TRAIN = sorted((ROOT / "train" / "recipes").glob("*.yaml"))
PREPROCESS = sorted((ROOT / "preprocess" / "recipes").glob("*.yaml"))
CARDS = {"lora": "24GB", "full": "40GB", "tile": "24GB"}
"""Of recipes whose name does not say it."""
RESOLUTIONS = {"tile": "256", "sdxl-24gb": "1024"}


def title(recipe: Path) -> str:
    lines = recipe.read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in TRAIN if recipe.stem != "demo"], ids=lambda recipe: recipe.stem
)
def test_a_recipe_fits_the_card_that_it_is_for(recipe: Path, tmp_path: Path) -> None:
    named = re.search(r"([0-9]+)gb$", recipe.stem)
    card = f"{named[1]}GB" if named else CARDS[recipe.stem]
    family = {"sd15": "sd15", "sdxl": "sdxl", "tile": "sd15"}.get(recipe.stem.partition("-")[0], "flux")
    words = ["--recipe", str(recipe), "--family", family, "--memory.budget", card, "--cache", str(tmp_path / "none")]
    words += ["--resolution", RESOLUTIONS.get(recipe.stem, "512")]
    options = load(PlanConfig, words, command="python -m train.plan")
    assert options is not None
    depth = options.depth if options.depth != "all" else "2-4"
    planned = plan(options, subject_of(options), depth)
    assert planned.refusal is None
    peak = planned.counted.peak_bytes
    assert peak <= planned.budget_bytes
    said = re.search(r"([0-9]+) GiB", title(recipe))
    assert said is not None, f"what does {recipe.name} take?"
    assert int(said[1]) == pytest.approx(peak / GIB, abs=0.51)
    assert card.replace("GB", " GB") in title(recipe)
    if options.adapter == "lora":
        assert options.lora.rank == 16


def test_a_recipe_for_training_names_the_card_that_it_keeps_to() -> None:
    for recipe in TRAIN:
        if (named := re.search(r"([0-9]+)gb$", recipe.stem)) is not None:
            assert f"budget: {named[1]}GB" in recipe.read_text()


@pytest.mark.parametrize("recipe", PREPROCESS, ids=lambda recipe: recipe.stem)
def test_a_recipe_of_a_cache_is_read_and_begins_with_what_it_is(recipe: Path) -> None:
    options = load(PreprocessConfig, ["--recipe", str(recipe), "--data", "pictures"], command="python -m preprocess")
    assert options is not None
    assert len(title(recipe)) > 40


@pytest.mark.parametrize("launch", sorted((ROOT / "examples" / "launch").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_each_launch_file(launch: Path) -> None:
    config = load_config_from_file(str(launch))
    assert config.num_processes >= 1
    assert config.mixed_precision == "no"  # training's own business
    assert "accelerate launch" in title(launch)
    assert f"--config_file examples/launch/{launch.name}" in title(launch)


def test_steps_of_sd15_recipes_are_of_as_many_samples_on_every_card() -> None:
    sizes = set()
    for recipe in TRAIN:
        if recipe.stem.startswith("sd15-"):
            options = load(PlanConfig, ["--recipe", str(recipe)], command="python -m train.plan")
            assert options is not None
            sizes.add(options.loader.batch_size * options.loader.accumulation)
    assert sizes == {32}
