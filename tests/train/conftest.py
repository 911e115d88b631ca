"""Tiny training runs: the options that all tests of the trainer change from, and what to look at afterwards."""

from __future__ import annotations

import dataclasses
import json
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from shared import families
from shared.cache.reader import Cache
from shared.families.base import Family
from shared.model_folder import resolve
from tests import forked
from train.config import TrainConfig
from train.loader import Loader, LoaderOptions
from train.optimizer import OptimizerOptions
from train.preparation import Prepared, decide_fit
from train.run import Run
from train.samples import CachedSamples
from train.trainer import Trainer
from train.validation import ValidationOptions

TIMES = ("data_wait_seconds", "data_wait_share", "step_seconds", "device_hours", "look_seconds", "look_share")


def train_options(cache: Path, runs: Path, **changes: Any) -> TrainConfig:
    """A run of 6 steps at a learning rate that shows, on the CPU, without held-out losses and pictures. `changes`
    replace fields; a dictionary changes the fields of a part."""
    options = TrainConfig(
        cache=str(cache),
        runs=str(runs),
        name="run",
        depth="1-1",
        steps=6,
        device="cpu",
        tracker="none",
        loader=LoaderOptions(batch_size=2),
        optimizer=OptimizerOptions(learning_rate=1e-3, warmup_steps=2),
        validation=ValidationOptions(every=0, pictures_every=0, adherence_every=0, picture_steps=2),
    )
    parts = {
        name: dataclasses.replace(getattr(options, name), **change)
        for name, change in changes.items()
        if isinstance(change, dict)
    }
    options = dataclasses.replace(options, **{**changes, **parts})
    options.check()
    return options


@pytest.fixture(scope="session")
def token_cache(tiny_data: Path, tiny_model: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_cache` with the captions' tokens."""
    from preprocess.pipeline import preprocess
    from tests.conftest import preprocess_options  # here: a run that imports this file loads no encoder

    copied = tmp_path_factory.mktemp("cache") / "tokens"
    shutil.copytree(tiny_cache, copied)
    assert preprocess(preprocess_options(tiny_data, copied, tiny_model, text_tokens=True)) == 0
    return copied


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """For processes that begin with everything imported: forked from one that has computed nothing."""
    return forked.context()


def flux() -> Family:
    return families.get("flux")


def samples_of(cache: Path, split: str = "train") -> CachedSamples:
    return CachedSamples(Cache(cache), flux(), "canny", split)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def controlnet_bytes(run: Path) -> bytes:
    return (run / "controlnet" / "diffusion_pytorch_model.safetensors").read_bytes()


def controlnet_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "controlnet" / "diffusion_pytorch_model.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def trainer_of(options: TrainConfig) -> Trainer:
    """The trainer as `train` makes it, before its first step: for tests that take the steps themselves."""
    cache = Cache(Path(options.cache))
    samples, held_out = (CachedSamples(cache, flux(), "canny", split) for split in ("train", "validation"))
    accelerator = Accelerator(cpu=True)
    model = resolve(options.model or cache.manifest["model"]["name"], components=())
    fitted = decide_fit(options, accelerator, flux(), model, samples, None)
    loader = Loader(samples, fitted.loader, seed=options.seed, device=accelerator.device)
    run = Run(Path(options.runs) / options.run_name)
    return Trainer(Prepared(options, accelerator, run, {}, flux(), model, fitted, loader, held_out, None))
