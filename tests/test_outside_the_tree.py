"""A family, a condition and an adapter in a folder beyond the tree are as good as the tree's own: `examples/beyond`,
copied somewhere else, goes through both stages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from shared import registry
from shared.errors import UserError
from tests.conftest import write_data
from tests.prepared import Prepared
from tests.train.conftest import content, losses, metrics

ROOT = Path(__file__).parent.parent
ROOMS = ("shared/families", "preprocess/conditions", "train/adapters")
STEPS = 30

PREPARED = ("shared.families.ink", "bitsandbytes.optim", "cv2", "preprocess.pipeline", "train.sample", "train.trainer")

Command = Callable[..., str]


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(ROOT / "examples" / "beyond", tmp_path_factory.mktemp("beyond") / "mine")


@pytest.fixture(scope="module")
def command(beyond: Path) -> Command:
    """A command line of the project in a process that knows that folder; back comes what it printed."""
    prepared = Prepared(PREPARED, {registry.VARIABLE: str(beyond), "COLUMNS": "100"})

    def run(module: str, *words: object) -> str:
        program = f"from {module} import main\nfrom shared.errors import run_command_line\nrun_command_line(main)"
        if module == "ink":  # which has no command line: its tiny model
            program = "import pathlib, sys, shared.families as f\nf.get('ink').tiny(pathlib.Path(sys.argv[1]))"
        done = prepared.run(program, [str(word) for word in words])
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def cache(command: Command, beyond: Path) -> Path:
    folder = beyond.parent
    data = write_data(folder / "data", 16, sizes=((64, 64),))
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["split"] = "validation" if i < 4 else "train"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "model").mkdir()
    command("ink", folder / "model")
    command(
        "preprocess.__main__", "--data", data, "--cache", folder / "cache", "--family", "ink", "--model",
        folder / "model", "--condition", "stipple", "--conditions.stipple.dot", 2, "--geometry.resolution", 64,
        "--precision", "fp32", "--device", "cpu",
    )  # fmt: skip
    return folder / "cache"


def trained(command: Command, cache: Path, name: str, *words: object, steps: int = STEPS) -> Path:
    command(
        "train.__main__", "--cache", cache, "--runs", cache.parent / "runs", "--name", name, "--steps", steps,
        "--device", "cpu", "--tracker", "none", "--loader.batch-size", 4, "--optimizer.learning-rate", 3e-3,
        "--optimizer.warmup-steps", 0, "--validation.every", steps, "--validation.pictures-every", 0,
        "--validation.adherence-every", 0, *words,
    )  # fmt: skip
    return cache.parent / "runs" / name


def fall(run: Path, to: float) -> bool:
    looks = [line["held_out"]["loss"] for line in metrics(run) if "held_out" in line]
    assert len(looks) == 2
    return looks[-1] < to * looks[0]


def test_a_family_and_a_condition_from_beyond_the_tree_are_preprocessed_trained_and_painted_with(
    command: Command, cache: Path
) -> None:
    layers = {path.name.rpartition("-")[0] for path in cache.iterdir() if path.is_dir() and "-" in path.name}
    assert layers >= {"latents", "words", "stipple", "stipple_pixels"}
    [recipe] = [json.loads(path.read_text())["recipe"] for path in cache.glob("stipple-*/layer.json")]
    assert recipe["dot"] == 2

    looks = ("--validation.adherence-every", STEPS, "--validation.pictures-every", STEPS, "--validation.pictures", 2)
    run = trained(command, cache, "controlnet", *looks)
    assert fall(run, 0.9)
    last: dict[str, Any] = next(line for line in reversed(metrics(run)) if "adherence" in line)
    assert last["adherence"]["ssim"] > 0, "the condition's own detector drew what was painted"
    assert (run / "pictures" / f"step-{STEPS:08d}.png").is_file()

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(cache.parent / "drawing.png")
    command(
        "train.sample", "--run", run, "--image", cache.parent / "drawing.png", "--prompt", "a box", "--steps", 3,
        "--out", cache.parent / "painted.png", "--device", "cpu",
    )  # fmt: skip
    assert Image.open(cache.parent / "painted.png").height >= 64


def test_an_adapter_from_beyond_the_tree_has_its_options_and_is_resumed_to_the_bit(
    command: Command, cache: Path
) -> None:
    adapter = ("--adapter", "offset", "--offset.scale", 4)
    whole = trained(command, cache, "whole", *adapter)
    assert fall(whole, 0.98)
    for steps in (STEPS // 2, STEPS):
        parts = trained(command, cache, "parts", *adapter, steps=steps)
    assert losses(parts) == losses(whole)
    assert content(parts / "offset") == content(whole / "offset")
    saved = load_file(whole / "offset" / "offset.safetensors")
    assert len(saved) == 12
    assert all(vector.any() for vector in saved.values())
    assert "offset:\n  scale: 4.0" in (whole / "config.yaml").read_text()
    gentle = trained(command, cache, "gentle", "--adapter", "offset", "--offset.scale", 0.01, steps=2)
    assert losses(gentle)[1] != losses(whole)[1]


def test_what_the_tree_s_own_adapters_and_plan_do_they_do_for_a_family_from_beyond(
    command: Command, cache: Path
) -> None:
    lora = trained(command, cache, "lora", "--adapter", "lora", "--lora.rank", 4)
    assert fall(lora, 0.98)
    full = trained(command, cache, "full", "--adapter", "full", "--base.weights", "none")
    assert fall(full, 0.9)
    assert "ink" in command("train.plan", "--cache", cache.parent / "none", "--family", "ink", "--resolution", 64)
    assert "16 of 16 samples" in command(
        "shared.inspect.__main__", "--cache", cache, "--out", cache.parent / "page.html"
    )


def test_what_is_beyond_the_tree_is_in_help_and_in_what_refusals_name(command: Command) -> None:
    assert "--conditions.stipple.dot" in command("preprocess.__main__", "--help")
    assert "--offset.scale" in command("train.__main__", "--help")


def test_the_tree_knows_nothing_of_them() -> None:
    names = {path.name for room in ROOMS for path in (ROOT / room).iterdir()}
    assert not names & {"ink.py", "stipple.py", "offset.py"}
    for package in ("shared", "preprocess", "train"):
        for path in (ROOT / package).rglob("*.py"):
            assert "InkBase" not in path.read_text()


@pytest.mark.parametrize(("files", "refused"), [
    (None, r"names .*mine, but there is no such folder"),
    (["stipple.py"], r"names .*mine, which adds nothing: .*preprocess/conditions"),
    (["preprocess/conditions/canny.py"], r"mine/preprocess/conditions/canny has the name of one in .*conditions/canny"),
    (["train/adapters/base.py"], r"has the name of one in"),
])  # fmt: skip
def test_a_folder_that_is_not_there_adds_nothing_or_takes_a_name_is_refused(
    files: list[str] | None, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files or []:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).touch()
    monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "mine"))
    with pytest.raises(UserError, match=refused):
        registry.check()


def test_two_folders_may_not_take_the_same_name_and_names_of_no_thing_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "shared/families/parts_of_it").mkdir(parents=True)
        for name in (f"{folder}.py", "_helpers.py", "parts_of_it/__init__.py"):
            (tmp_path / folder / "shared/families" / name).touch()
    monkeypatch.setenv(registry.VARIABLE, os.pathsep.join(str(tmp_path / folder) for folder in ("one", "two")))
    path: list[str] = []
    assert registry.Registry("shared.families", path, "family").names() == ["one", "two"]
    assert path == [str(tmp_path / folder / "shared/families") for folder in ("one", "two")]
    with pytest.raises(UserError, match=r"two/shared/families/_helpers has the name of one in .*one/shared"):
        registry.check()
