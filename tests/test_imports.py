"""Imports run one way: preprocess -> shared <- train. From the source, and from what a fresh process has loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("preprocess", "train")
HEAVY = ("diffusers", "transformers", "controlnet_aux", "accelerate", "optimum", "bitsandbytes")


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no source in {folder}"
    return found


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, anywhere in it: `from a import b` gives a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def imports_of(folder: str) -> list[tuple[str, str]]:
    """(file, imported name) pairs of a folder."""
    return [(str(path.relative_to(ROOT)), name) for path in sources(folder) for name in imported(path)]


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize(("folder", "forbidden"), [
    ("preprocess", "train"),
    ("train", "preprocess"),
    ("shared", "preprocess"),
    ("shared", "train"),
    ("shared/cache", "shared.families"),
    *((folder, other) for folder in ("preprocess", "train", "shared") for other in ("tests", "examples", "benchmarks")),
    *((folder, "pickle") for folder in ("preprocess", "train", "shared", "examples")),
])  # fmt: skip
def test_no_file_of_one_room_imports_the_other(folder: str, forbidden: str) -> None:
    assert [(file, name) for file, name in imports_of(folder) if under(name, forbidden)] == []


def test_what_the_trainer_knows_does_not_know_the_trainer() -> None:
    knowing = {file for file, name in imports_of("train") if under(name, "train.trainer")}
    assert knowing == {"train/__main__.py", "train/together.py"}


def test_the_four_words_do_not_know_each_other_s_machinery() -> None:
    # An adapter or an objective that read the cache, or a loader that knew either, could not be exchanged alone.
    for file, forbidden in (
        *(
            (f"train/objectives/{name}.py", ("train.adapters", "train.loader", "shared.families", "shared.cache"))
            for name in ("__init__", "base", "options", "timesteps", "flow", "ddpm")
        ),
        ("train/adapters/controlnet.py", ("train.objectives", "train.loader", "shared.cache")),
        *(
            (f"train/{name}.py", ("train.objectives", "train.adapters"))
            for name in ("loader", "samples", "rows", "order")
        ),
    ):
        assert [name for name in imported(ROOT / file) if any(under(name, other) for other in forbidden)] == [], file


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh process has loaded after a statement."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint('modules:', *sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.rpartition("modules: ")[2].split())


def test_training_loads_no_encoder_of_text_no_detector_and_nothing_of_preprocessing() -> None:
    loaded = loaded_by(
        "import train.trainer\nfrom shared import families\nfor name in families.names(): families.get(name)"
    )
    assert {"train.loader", "shared.families.flux"} <= loaded
    for forbidden in ("controlnet_aux", "transformers.models.t5", "transformers.models.clip", "preprocess"):
        assert sorted(name for name in loaded if under(name, forbidden)) == []


def test_preprocessing_loads_nothing_of_training_and_no_detector_before_it_draws() -> None:
    loaded = loaded_by("import preprocess.pipeline")
    assert "preprocess.plan" in loaded
    assert sorted(name for name in loaded if under(name, "train") or under(name, "controlnet_aux")) == []


def test_the_cache_s_contract_loads_without_torch_and_any_family() -> None:
    loaded = loaded_by("import shared.cache.writer, shared.config, shared.atomic, shared.report")
    assert "shared.cache.schema" in loaded
    assert sorted(name for name in loaded if under(name, "torch") or under(name, "shared.families")) == []


@pytest.mark.parametrize(("command", "forbidden"), [
    ("preprocess", ("torch", *HEAVY)),
    # The options of training stand beside the code that they are for, which computes with torch.
    ("train", HEAVY),
])  # fmt: skip
def test_help_comes_without_loading_what_only_work_needs(command: str, forbidden: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", command, "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert "--recipe FILE" in " ".join(done.stdout.split())
    loaded = [line.split("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "shared.config" in loaded
    assert sorted(name for name in loaded if any(under(name, package) for package in forbidden)) == []
