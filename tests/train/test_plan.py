"""`python -m train.plan`: what it reads, what it says, what it refuses."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.cache.reader import Cache
from shared.config import load
from shared.errors import UserError
from train import plan
from train.plan import PlanConfig, subject_of

ROOT = Path(__file__).parents[2]
LAST = re.compile(r"plan fits=(yes|no) peak_gib=([0-9.]+) step_ms=([0-9]+) disk_gib=([0-9.]+)")


@pytest.fixture
def configured(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model without a single weight."""
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["plan", *words])
    assert plan.main() == 0
    return capsys.readouterr().out.splitlines()


def test_a_plan_reads_configurations_alone_and_ends_with_a_line_for_scripts(
    configured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(configured), "--cache", str(tmp_path / "none"), "--depth", "1-1", "--resolution", "64"]
    lines = planned(capsys, monkeypatch, *words, "--text-length", "24", "--samples", "1000000")
    match = LAST.fullmatch(lines[-1])
    assert match is not None
    fits, _, _, disk = match.groups()
    assert fits == "yes"
    sample_bytes = 2 * (4 * 16 * 8 * 8 + 24 + 24 * 32)  # moments of two latents, the pooled and the long embedding
    assert float(disk) == pytest.approx(sample_bytes * 1e6 / 2**30, abs=0.06)
    assert any(line.startswith("recomputed: nothing") for line in lines)
    assert any("may be off by 25%" in line for line in lines)


def test_what_does_not_fit_is_said(
    configured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(configured), "--cache", str(tmp_path / "none"), "--depth", "1-1", "--resolution", "64"]
    lines = planned(capsys, monkeypatch, *words, "--memory.budget", "0.0000001GiB")
    match = LAST.fullmatch(lines[-1])
    assert match is not None
    assert match[1] == "no"
    assert any("does not fit: " in line and "every block recomputed" in line for line in lines)


def test_of_several_cards_each_has_a_share_of_the_batch_and_perhaps_of_the_base(
    configured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(configured), "--cache", str(tmp_path / "none"), "--depth", "1-1", "--resolution", "64"]
    words += ["--loader.global-batch", "4"]
    alone, together = (planned(capsys, monkeypatch, *words, "--cards", cards) for cards in ("1", "2"))
    assert "batch 4, on one A100" in alone[0]
    assert "batch 2, on each of 2 A100" in together[0]
    spread = planned(capsys, monkeypatch, *words, "--cards", "2", "--memory.shard", "yes")
    assert any("its blocks spread over 2 cards" in line for line in spread)
    refused = planned(capsys, monkeypatch, *words, "--memory.shard", "yes")
    assert any("does not fit: memory.shard yes: there is one process on this machine" in line for line in refused)


def test_without_a_depth_there_is_a_row_for_each(
    configured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(configured), "--cache", str(tmp_path / "none"), "--resolution", "64"]
    lines = planned(capsys, monkeypatch, *words)
    assert any(line.startswith("2-0 ") for line in lines)
    assert not any(line.startswith("2-4 ") for line in lines)  # the tiny base has 2-2
    assert LAST.fullmatch(lines[-1])


def test_a_cache_that_is_there_says_what_is_planned_for(tiny_cache: Path, tiny_model: Path) -> None:
    subject = subject_of(_options("--cache", str(tiny_cache)))
    sizes = {(sample.width, sample.height) for sample in _samples(tiny_cache)}
    assert subject.width * subject.height == max(width * height for width, height in sizes)
    assert subject.text_length == 24
    assert subject.num_samples == sum(sample.split == "train" for sample in _samples(tiny_cache))
    assert subject.model_name == str(tiny_model)
    other = subject_of(_options("--cache", str(tiny_cache), "--model", str(tiny_model), "--resolution", "128"))
    assert (other.width, other.height, other.num_samples) == (128, 128, plan.SAMPLES)


def test_impossible_plans_are_refused(configured: Path) -> None:
    with pytest.raises(UserError, match="RESOLUTION is a multiple of 16, not 100"):
        subject_of(_options("--cache", "none", "--resolution", "100"))
    options = _options("--cache", "none", "--model", str(configured), "--depth", "3-1", "--resolution", "64")
    with pytest.raises(UserError, match=r"DEPTH 3-1 is deeper than the base: .* has 2-2 blocks"):
        plan.plan(options, subject_of(options), options.depth)
    with pytest.raises(UserError, match="not 'deep'"):
        _options("--depth", "deep")
    with pytest.raises(UserError, match="samples must be 1 or more"):
        _options("--samples", "0")
    with pytest.raises(UserError, match="somewhere/else is not on this machine"):
        subject_of(_options("--cache", "none", "--model", "somewhere/else"))


def test_a_training_recipe_is_a_plan_too() -> None:
    recipe = str(ROOT / "train" / "recipes" / "demo.yaml")
    assert _options("--recipe", recipe, "--gpu", "h200").gpu == "h200"


def test_make_plan_passes_its_variables_on() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", "plan", "DEPTH=5-10", "RESOLUTION=1024",
         "BATCH=2", "MEMORY=40GB", "GPU=h200", "SAMPLES=9", "TEXT_LENGTH=77", "CACHE=c"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[1:3] == ["-m", "train.plan"]
    options = _options(*words[3:])
    assert (options.depth, options.resolution, options.loader.batch_size) == ("5-10", 1024, 2)
    assert (options.memory.budget, options.gpu, options.samples, options.text_length) == ("40GB", "h200", 9, 77)


def _options(*words: str) -> PlanConfig:
    options = load(PlanConfig, list(words), command="plan")
    assert options is not None
    return options


def _samples(cache: Path) -> list[Any]:
    return [sample for sample in Cache(str(cache)).samples.values() if sample.status != "error"]
