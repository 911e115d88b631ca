"""What it saves to train two ControlNets side by side on one frozen base.

    python -m benchmarks.shared_base [--folder /fast/disk] [--steps 3]

A model of FLUX's own classes with random weights is written to a folder (6 heads, 2 double and 8 single blocks: 470 MB
as float32, in which it is held), with a small cache for it. Two ControlNets of different depth are trained for a few
steps: each in a process of its own, as a sweep does, then both in one process (`train.together`). Reported is of each
process the peak of its memory above what its imports took (the model's file, mapped while it is read, counts), and the
largest difference between the losses. The last line reads

    shared_base saved_mib=... base_mib=... ratio=... largest_difference=...

saved: the two processes' peaks, less that of the one. The exit code is 1 where less than the base is saved, or losses
differ by more than 1e-6.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.quantize_once import FAMILY, Size, write_model
from shared.report import quiet_libraries, say, table

DEPTHS = ("1-1", "0-2")
IMPORTED = (
    "bitsandbytes.optim",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet_flux",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "train.together",
)
SIZE = Size(num_attention_heads=6, num_layers=2, num_single_layers=8)
MOST_DIFFERENCE = 1e-6


@dataclass(frozen=True)
class Trained:
    """What one process saw."""

    peak_bytes: int
    """Above what was there before."""
    base_bytes: int
    losses: dict[str, list[float]]
    """Of each run, by its name."""


@dataclass(frozen=True)
class Figures:
    """All of them."""

    alone: list[Trained]
    shared: Trained

    @property
    def base_bytes(self) -> int:
        """Of the frozen base, as it is held."""
        return self.shared.base_bytes

    @property
    def saved_bytes(self) -> int:
        """By one process instead of several."""
        return sum(each.peak_bytes for each in self.alone) - self.shared.peak_bytes

    @property
    def largest_difference(self) -> float:
        """Between a loss side by side and the same one alone."""
        alone = {name: losses for each in self.alone for name, losses in each.losses.items()}
        assert alone.keys() == self.shared.losses.keys(), "they are the same runs"
        return max(
            abs(one - other)
            for name, losses in alone.items()
            for one, other in zip(losses, self.shared.losses[name], strict=True)
        )

    @property
    def hold(self) -> bool:
        """Whether what is promised is so."""
        return self.saved_bytes >= self.base_bytes and self.largest_difference <= MOST_DIFFERENCE


def make(folder: Path, size: Size) -> Path:
    """Below `folder` a model, pictures and their cache; the cache's folder comes back."""
    from preprocess.config import EncodeOptions, PreprocessConfig
    from preprocess.geometry import GeometryOptions
    from preprocess.pipeline import preprocess

    model = FAMILY.tiny(folder / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    for file in (model / "transformer").iterdir():
        file.unlink()
    (model / "transformer").rmdir()
    facts = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    write_model(model, size, **{name: config[name] for name in facts})
    pictures = folder / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"noise number {i}"}) + "\n")
    (pictures / "metadata.jsonl").write_text("".join(lines))
    options = PreprocessConfig(
        data=str(pictures), cache=str(folder / "cache"), model=str(model), condition=("canny",), text_length=24,
        precision="fp32", device="cpu", validation_fraction=0.0, geometry=GeometryOptions(resolution=64),
        encode=EncodeOptions(image_batch=3, text_batch=4),
    )  # fmt: skip
    assert preprocess(options) == 0
    return folder / "cache"


def train_here(cache: Path, runs: Path, depths: Sequence[str], steps: int) -> Trained:
    """Train these depths in this process, side by side."""
    quiet_libraries()
    for name in IMPORTED:
        importlib.import_module(name)  # what they take is not the runs'
    from train.config import TrainConfig
    from train.loader import LoaderOptions
    from train.optimizer import OptimizerOptions
    from train.quantize import BaseOptions
    from train.together import train_together
    from train.validation import ValidationOptions

    options = TrainConfig(
        cache=str(cache), runs=str(runs), steps=steps, device="cpu", tracker="none", base=BaseOptions(weights="none"),
        loader=LoaderOptions(workers=1, prefetch=1), validation=ValidationOptions(every=0, pictures_every=0),
        optimizer=OptimizerOptions(learning_rate=1e-3, warmup_steps=1),
    )  # fmt: skip
    options = replace(options, validation=replace(options.validation, adherence_every=0))
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    code = train_together([replace(options, depth=depth, name=f"depth-{depth}") for depth in depths])
    assert code == 0
    peak = _status("VmHWM") - before
    names = [f"depth-{depth}" for depth in depths]
    stated = json.loads((runs / names[0] / "run.json").read_text())
    lines = {name: (runs / name / "metrics.jsonl").read_text().splitlines() for name in names}
    return Trained(
        peak,
        stated["starts"][-1]["components"][0]["num_bytes"],
        {name: [json.loads(line)["loss"] for line in each] for name, each in lines.items()},
    )


def _status(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def in_a_fresh_process(cache: Path, runs: Path, depths: Sequence[str], steps: int) -> Trained:
    """What `train_here` saw there."""
    command = [sys.executable, "-m", __spec__.name, "--train", str(cache), str(runs), str(steps), *depths]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Trained(**json.loads(out.splitlines()[-1]))


Train = Callable[[Path, Path, Sequence[str], int], Trained]


def measure(folder: Path, size: Size, steps: int, train: Train = in_a_fresh_process) -> Figures:
    """Make what is trained on below `folder`, and train as the module says."""
    cache = make(folder, size)
    alone = [train(cache, folder / "alone", [depth], steps) for depth in DEPTHS]
    return Figures(alone, train(cache, folder / "shared", DEPTHS, steps))


def report(figures: Figures) -> str:
    """The table, and the last line."""
    rows = [
        *((f"depth {depth} alone", each) for depth, each in zip(DEPTHS, figures.alone, strict=True)),
        ("both on one base", figures.shared),
    ]
    words = [(name, f"{each.peak_bytes / 2**20:,.0f}") for name, each in rows]
    return (
        f"{table(('process', 'peak MiB'), words, right=1)}\n"
        f"shared_base saved_mib={figures.saved_bytes / 2**20:.0f} base_mib={figures.base_bytes / 2**20:.0f} "
        f"ratio={figures.saved_bytes / figures.base_bytes:.2f} largest_difference={figures.largest_difference:.1e}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """0 where everything promised holds, 1 where not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_base", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--folder", type=Path, help="where 1 GB may be written for a while; default: the system's own")
    parser.add_argument("--steps", type=int, default=3, help="of each run")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options: Any = parser.parse_args(words)
    if options.train:
        cache, runs, steps, *depths = options.train
        print(json.dumps(vars(train_here(Path(cache), Path(runs), depths, int(steps)))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), SIZE, options.steps)
    say(report(figures))
    return 0 if figures.hold else 1


if __name__ == "__main__":
    sys.exit(main())
