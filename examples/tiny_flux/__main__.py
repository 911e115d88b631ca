"""Make the tiny FLUX from nothing: `python -m examples.tiny_flux --out examples/tiny-flux`.

Each part is kept in the work folder as soon as it is whole, and is not made again if it is there: an interrupted run is
continued by the same command. Remove a part's folder to make it, and give other options to make it differently.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_progress
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress

from examples.tiny_flux.base import BaseOptions, train_base
from examples.tiny_flux.guidance import GuidanceOptions, distill_guidance
from examples.tiny_flux.quality import measure_pipeline, versions
from examples.tiny_flux.ship import ship
from examples.tiny_flux.text import TextOptions, TextSide, train_text
from examples.tiny_flux.vae import VaeOptions, train_vae

PARTS = {"text": TextOptions, "vae": VaeOptions, "base": BaseOptions, "guidance": GuidanceOptions}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: folders and device, and every field of the parts' options as --PART-FIELD."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_flux", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-flux"), help="folder of the parts in the making")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quality-pictures", type=int, default=48, help="test drawings to measure on")
    for part, options in PARTS.items():
        group = parser.add_argument_group(part)
        for field in fields(options):
            name = f"--{part}-{field.name.replace('_', '-')}"
            group.add_argument(name, type=type(field.default), default=field.default, help=f"default {field.default}")
    return parser.parse_args(arguments)


def options_of(part: str, arguments: argparse.Namespace) -> Any:
    """The options of a part, from the command line."""
    kind = PARTS[part]
    return kind(**{field.name: getattr(arguments, f"{part}_{field.name}") for field in fields(kind)})


def once(folder: Path, make: Callable[[Path], None]) -> float:
    """Make a part into `folder` unless it is there; return the seconds that making it took, then or now.

    It is made under another name and renamed when whole, so a folder with its final name can be trusted.
    """
    record = folder / "made.json"
    if record.exists():
        print(f"{folder.name}: is there already", flush=True)
        return json.loads(record.read_text())["seconds"]
    unfinished = folder.with_name(folder.name + ".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    make(unfinished)
    seconds = round(time.monotonic() - began, 1)
    (unfinished / record.name).write_text(json.dumps({"seconds": seconds}))
    unfinished.rename(folder)
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """Make the parts, write the pipeline, measure it."""
    args = parse(arguments)
    disable_diffusers_progress()
    disable_transformers_progress()
    device = torch.device(args.device)
    options = {part: options_of(part, args) for part in PARTS}
    text_folder, vae_folder, base_folder, guidance_folder = (args.work / part for part in PARTS)

    def load_vae() -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(vae_folder).to(device).eval()

    def make_base(folder: Path) -> None:
        text = TextSide.load(text_folder, device)
        snapshot = args.work / "base_snapshot"
        train_base(load_vae(), text, options["base"], device, snapshot).save_pretrained(folder)

    def make_guidance(folder: Path) -> None:
        teacher, text = FluxTransformer2DModel.from_pretrained(base_folder), TextSide.load(text_folder, device)
        distill_guidance(teacher, load_vae(), text, options["guidance"], device).save_pretrained(folder)

    seconds = {
        "text": once(text_folder, lambda folder: train_text(options["text"], device).save(folder)),
        "vae": once(vae_folder, lambda folder: train_vae(options["vae"], device).save_pretrained(folder)),
        "base": once(base_folder, make_base),
        "guidance": once(guidance_folder, make_guidance),
    }
    transformer = FluxTransformer2DModel.from_pretrained(guidance_folder)
    size_bytes = ship(load_vae(), TextSide.load(text_folder, device), transformer, args.out)
    print(f"ship: {args.out}, {size_bytes / 1e6:.2f} MB", flush=True)

    quality = {
        "made_with": {part: asdict(value) for part, value in options.items()},
        "seconds": seconds,
        "device": f"{device.type}, {os.cpu_count()} CPU cores",
        "versions": versions(),
        "pipeline_bytes": size_bytes,
        **measure_pipeline(args.out, device, args.quality_pictures),
    }
    (args.out / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")


if __name__ == "__main__":
    main()
