"""What the documents promise: commands, options, files and recipes that the README names are there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import pytest

from examples.check_adherence import CheckConfig
from examples.demo import DemoConfig
from preprocess.config import PreprocessConfig
from shared.config import field_names, load
from train.config import TrainConfig
from train.export import ExportConfig
from train.grid import SweepConfig
from train.sample import SampleConfig
from train.upload import UploadConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
FENCED = re.findall(r"^```.*?\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE))
STAGES: dict[str, type[Any]] = {"preprocess": PreprocessConfig, "train": TrainConfig}


def test_every_make_command_in_the_readme_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    commands = [*INLINE, *(line for block in FENCED for line in block.splitlines() if line.startswith("make "))]
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)\b", "\n".join(commands)))
    assert {"demo", "test", "preprocess", "train", "sample", "verify"} <= named
    assert named <= targets


def test_every_option_in_the_readme_exists() -> None:
    known = {
        name.replace("_", "-")
        for config in (PreprocessConfig, SweepConfig, SampleConfig, ExportConfig, UploadConfig, DemoConfig, CheckConfig)
        for name in field_names(config)
    }
    commands = [*INLINE, *re.findall(r"""ARGS=(".*?"|'.*?')""", "\n".join(FENCED), re.DOTALL)]
    named = {word for code in commands for word in re.findall(r"--([a-z][a-zA-Z0-9.-]*)", code) if "NAME" not in word}
    assert {"controlnet.embedder", "source.caption"} <= named
    named -= {"conditions.stipple.dot"}  # from beyond the tree
    of_others = {"logdir", "help", "dry-run", "recipe", "quick", "only", "rows", "machine"}
    of_others |= {"table", "plan", "minutes", "tiny"}  # of the benchmarks
    assert named - known - of_others == set()


def test_every_recipe_and_launch_file_in_the_readme_exists() -> None:
    named = set(re.findall(r"\b(?:train|preprocess)/recipes/[\w-]+\.yaml|\bexamples/launch/\w+\.yaml", README))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_what_the_readme_s_python_takes_from_diffusers_is_there() -> None:
    taken = {
        name for line in re.findall(r"^from diffusers import (.+)$", README, re.MULTILINE) for name in line.split(", ")
    }
    assert {"FluxControlNetPipeline", "StableDiffusionControlNetPipeline", "FluxTransformer2DModel"} <= taken
    assert taken <= {*dir(diffusers)}


def test_every_file_in_the_map_of_the_code_exists() -> None:
    tree = README.split("## The code")[1].split("```")[1]
    folder = ""
    count = 0
    for line in tree.strip().splitlines():
        words = line.split("  ")[0 if not line.startswith("  ") else 1].split()
        if line.startswith("  "):
            names = [word for word in line.split() if re.fullmatch(r"[a-z_]+(\.py|/)", word.rstrip(":"))]
            base = names[0] if names[0].endswith("/") else ""
            for name in names:
                candidates = [ROOT / folder / name.rstrip(":"), ROOT / folder / base / name.rstrip(":")]
                assert any(path.exists() for path in candidates), f"{folder}{name}"
                count += 1
        else:
            folder = words[0]
            assert (ROOT / folder).is_dir(), folder
    assert count > 25


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [(stage, path) for stage in STAGES for path in sorted((ROOT / stage / "recipes").iterdir())],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_recipe_is_accepted(stage: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "x"] if stage == "preprocess" else []
    assert load(STAGES[stage], ["--recipe", str(recipe), *data, "--dry-run"], command=stage) is None
    assert capsys.readouterr().out


def test_make_alone_prints_help_and_targets_call_the_stages() -> None:
    printed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "make demo" in printed
    assert "DEPTH=2-4" in printed
    planned = subprocess.run(
        [
            "make",
            "--no-print-directory",
            "-n",
            "-o",
            ".venv/.installed",
            "train",
            "CACHE=c d",
            "DEPTH=5-10",
            "NAME=big",
            "STEPS=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = shlex.split(planned.replace("\\\n", " "))
    assert words[1:] == ["-m", "train", "--cache", "c d", "--depth", "5-10", "--name", "big", "--steps", "3"]


@pytest.mark.parametrize(("given", "words"), [
    ("preprocess DATA=d FAMILY=sd15", "-m preprocess --data d --cache cache --family sd15"),
    ("train ADAPTER=lora", "-m train --cache cache --adapter lora"),
    ("sweep ADAPTER=lora SEEDS='0 1'", "-m train.sweep --cache cache --seeds 0 1 --adapter lora"),
    ("plan FAMILY=sd15 ADAPTER=full", "-m train.plan --cache cache --family sd15 --adapter full"),
])  # fmt: skip
def test_the_targets_pass_family_and_adapter_on(given: str, words: str) -> None:
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", *shlex.split(given)]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shlex.split(planned.replace("\\\n", " "))[1:] == words.split()


@pytest.mark.parametrize(("given", "words"), [
    ("sample RUN=r/a IMAGE=d.png PROMPT='a big dog'", "train.sample --run r/a --image d.png --prompt|a big dog"),
    ("sample RUN=r/a PAIRS=p.jsonl ARGS='--seed 2'", "train.sample --run r/a --pairs p.jsonl --seed 2"),
    ("export RUN=r/a STEP=40", "train.export --run r/a --step 40"),
    ("upload RUN=r/a REPO=me/it", "train.upload --run r/a --repo me/it"),
])  # fmt: skip
def test_the_targets_that_hand_over_pass_their_variables_on(given: str, words: str) -> None:
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", *shlex.split(given)]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    called, _, prompt = words.partition("|")
    [line] = [line for line in planned.replace("\\\n", " ").splitlines() if "-m train." in line]
    assert shlex.split(line)[2:] == [*called.split(), *([prompt] if prompt else [])]


@pytest.mark.parametrize(
    "given", ["sample RUN=a IMAGE=b", "sample PAIRS=b", "export", "upload RUN=a", "upload REPO=a/b"]
)
def test_the_targets_that_hand_over_say_what_they_need(given: str) -> None:
    command = ["make", "--no-print-directory", "-o", ".venv/.installed", *given.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"error: make {given.split()[0]} needs RUN=" in done.stderr
