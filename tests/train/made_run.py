"""A run with checkpoints, made without training: what is handed over does not care how the numbers came about."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from shared import atomic, config, families
from shared.model_folder import ModelFolder
from train import checkpoints
from train.adapters.controlnet import write_model
from train.config import TrainConfig
from train.ema import Ema, EmaOptions


def make_run(
    folder: Path,
    model: Path,
    steps: tuple[int, ...] = (2, 4),
    depth: tuple[int, int] = (1, 1),
    *,
    averaged: bool = False,
    **facts: Any,
) -> Path:
    """A run on the tiny base at `model` with a checkpoint, a look at held-out samples and a picture at each step.
    `averaged`: with an average of the weights, half of each. `facts` replace what run.json says."""
    base = ModelFolder(str(model), None, model)
    folder.mkdir(parents=True)
    stated = {
        "family": "flux", "model": {"name": str(model), "revision": None}, "condition": ["canny"],
        "cache": {"latents": "1f3a9c02" * 8}, "sizes": [[64, 64], [96, 48]], "text_length": 24,
        "starts": [{"step": 0, "versions": {"python": "3", "torch": "2.15.0", "diffusers": "0.42.1"}}], **facts,
    }  # fmt: skip
    atomic.write_json(folder / "run.json", stated)
    options = config.to_dict(TrainConfig(cache="/secret/cache", depth="1-1"))
    atomic.write_bytes(folder / "config.yaml", yaml.safe_dump(options).encode())
    lines = []
    (folder / "pictures").mkdir()
    for step in steps:
        controlnet = families.get("flux").make_controlnet(base, *depth, "copy", torch.float32)
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in controlnet.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        average = Ema(EmaOptions(profile="power"), dict(controlnet.named_parameters()))
        for tensor in average.average.values():
            tensor.mul_(0.5)  # so that it is not the weights
        beside = {"ema": partial(average.save, write=partial(write_model, controlnet))} if averaged else {}
        checkpoints.save(folder, step, controlnet.save_pretrained, {}, {}, keep=0, beside=beside)  # type: ignore[arg-type]
        lines.append(f'{{"step": {step}, "held_out": {{"loss": 0.{step}5, "condition_gap": 0.0{step}1}}}}\n')
        Image.fromarray(np.full((8, 8, 3), step, np.uint8)).save(folder / "pictures" / f"step-{step:08d}.png")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 5, "held')  # a kill cut the last line off
    return folder
