"""A sweep's runs, made without training: curves as real ones look, with a step of sudden convergence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from shared import atomic, config
from train.config import TrainConfig

KEYS = ("s004", "s009")


def make_run(
    folder: Path,
    *,
    depth: str = "2-4",
    rate: float = 1e-5,
    seed: int = 0,
    quality: float = 0.8,
    steps: int = 100,
    until: int | None = None,
    every: int = 10,
    adherence: bool = True,
    pictures: int = 2,
    side: int = 32,
    seconds: float = 0.4,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """A run that comes to an edge F1 of about `quality`, and has stopped `until` a step (default: its last).
    `changes` replace options by their full names; `seconds` are those of a step."""
    until = steps if until is None else until
    options: dict[str, Any] = config.to_dict(TrainConfig(depth=depth, seed=seed, steps=steps, name=folder.name))
    options["optimizer"]["learning_rate"] = rate
    options["validation"]["adherence_samples"] = 16
    for name, value in (changes or {}).items():
        part, _, last = name.rpartition(".")
        (options[part] if part else options)[last] = value
    folder.mkdir(parents=True)
    atomic.write_bytes(folder / "config.yaml", yaml.safe_dump(options).encode())
    start = {
        "step": 0, "versions": {"python": "3.12.1", "torch": "2.15.0"}, "git_revision": "0" * 40, "num_processes": 1,
        "global_batch": 4, "memory": {"batch_size": 2, "accumulation": 2, "allocated_gib": 20.1},
        "components": [
            {"name": "base", "dtypes": "int8", "devices": "cuda:0", "num_parameters": 12 * 10**9, "num_trainable": 0,
             "num_bytes": 12 * 10**9},
            {"name": "controlnet", "dtypes": "bfloat16", "devices": "cuda:0", "num_parameters": 1_350_000_000,
             "num_trainable": 1_350_000_000, "num_bytes": 2_700_000_000},
        ],
    }  # fmt: skip
    if until >= steps:
        start["ended"] = {"step": until, "why": "trained"}
    atomic.write_json(folder / "run.json", {
        "family": "flux", "model": {"name": "tiny", "revision": None}, "condition": ["canny"],
        "cache": {"latents": "1f3a9c02" * 8}, "sizes": [[side, side]], "text_length": 24, "starts": [start],
    })  # fmt: skip
    _write_metrics(folder, seed, quality, until, every, adherence, steps, seconds)
    if pictures:
        _write_pictures(folder / "pictures", seed, quality, until, max(1, steps // 4), KEYS[:pictures], side, steps)
    return folder


def followed(step: float, steps: int) -> float:
    """How far the drawing is followed: nothing, then suddenly nearly all."""
    return 1 / (1 + math.exp(-25 * (step / steps - 0.4)))


def _write_metrics(
    folder: Path, seed: int, quality: float, until: int, every: int, adherence: bool, steps: int, seconds: float
) -> None:
    random = np.random.default_rng([seed, int(1e6 * quality)])
    lines: list[dict[str, Any]] = []
    for step in range(until + 1):
        follows = followed(step, steps) * quality
        if step:
            noise = float(random.normal(0, 0.12))
            lines.append({
                "step": step, "loss": 0.5 - 0.08 * follows + noise, "gradient_norm": math.exp(noise),
                "update_norm": 0.01, "learning_rate": 1e-5, "samples_seen": 4 * step,
                "device_hours": step * seconds / 3600, "data_wait_seconds": 0.001, "step_seconds": seconds,
                "data_wait_share": 0.01,
            })  # fmt: skip
        if step % every == 0 or step == until:
            jitter = float(random.normal(0, 0.002))
            held_out = {
                "loss": 0.5 - 0.08 * follows + jitter, "loss_error": 0.01, "loss_without_control": 0.52,
                "control_gap": 0.02 + 0.08 * follows - jitter, "control_gap_error": 0.002,
                "condition_gap": 0.06 * follows + jitter, "condition_gap_error": 0.0015,
            }  # fmt: skip
            for t in (0.125, 0.375, 0.625, 0.875):
                held_out |= {f"loss_t{t}": 0.9 - t * (0.6 + 0.1 * follows) + jitter, f"loss_t{t}_error": 0.01}
            lines.append({"step": step, "held_out": held_out, "look_seconds": 1.0, "look_share": 0.04})
            if adherence and step:
                lines.append({"step": step, "adherence": {
                    "edge_f1": 0.15 + 0.8 * follows + 3 * jitter, "edge_f1_error": 0.012, "edge_f1_without": 0.17,
                    "edge_f1_other": 0.14, "edge_f1_ceiling": 0.96, "ssim": 0.3 + 0.5 * follows, "ssim_error": 0.01,
                    "ssim_without": 0.31, "ssim_ceiling": 0.93,
                }})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_pictures(
    folder: Path, seed: int, quality: float, until: int, every: int, keys: Sequence[str], side: int, steps: int
) -> None:
    (folder / "held-out").mkdir(parents=True)
    atomic.write_json(folder / "held-out.json", [
        {"key": key, "caption": f"a {colour} disc on a dark ground"}
        for key, colour in zip(keys, ("red", "green", "blue", "white"), strict=False)
    ])  # fmt: skip
    y, x = np.mgrid[:side, :side] / side - 0.5
    for i, _ in enumerate(keys):
        far = np.hypot(x - 0.1 * i, y)
        disc, edge = far < 0.3, np.abs(far - 0.3) < 0.02
        original = np.full((side, side, 3), 40) + disc[..., None] * np.roll([180, 20, 20], i)
        without = np.full((side, side, 3), 90)
        for what, picture in (("drawing", edge[..., None] * np.full(3, 255)), ("original", original),
                              ("without", without)):  # fmt: skip
            Image.fromarray(picture.astype(np.uint8)).save(folder / "held-out" / f"{i:02d}-{what}.png")
        for step in sorted({*range(every, until + 1, every), until}):
            share = followed(step, steps) * quality
            painted = share * original + (1 - share) * without
            painted += np.random.default_rng([seed, step, i]).normal(0, 12, painted.shape)
            path = folder / f"step-{step:08d}" / f"{i:02d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(painted.clip(0, 255).astype(np.uint8)).save(path)
