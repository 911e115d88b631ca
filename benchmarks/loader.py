"""What reading a FLUX sample costs: `python -m benchmarks.loader`.

Writes samples of FLUX.1-dev's sizes (512 px: moments of latents and condition, T5 at 512 tokens, CLIP; bf16, random)
in several layouts, then reads all of them in random order (sequentially for the layout that can do no better), tensors
copied into fresh memory as batching does. One process, one thread, warm page cache, layouts interleaved; the figures
are medians over rounds, and the ratios are of figures of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file

from shared.cache import writer
from shared.cache.reader import Layer, LayerSummary
from shared.report import table

SHAPES = {
    "latents.mean": (16, 64, 64),
    "latents.std": (16, 64, 64),
    "condition_latents.mean": (1, 16, 64, 64),
    "condition_latents.std": (1, 16, 64, 64),
    "t5.prompt_embeds": (512, 4096),
    "clip.pooled_prompt_embeds": (768,),
}


def sample(i: int) -> dict[str, torch.Tensor]:
    """Random tensors of one sample."""
    generator = torch.Generator().manual_seed(i)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def write_layouts(folder: Path, count: int) -> dict[str, Callable[[int], dict[str, torch.Tensor]]]:
    """Write `count` samples in each layout; a function for each that reads sample number i."""
    with writer.ShardWriter(folder / "layer", 0) as shard:
        for i in range(count):
            tensors = sample(i)
            shard.add(f"{i:05d}", "x", {"safetensors": save(tensors)})
            save_file(tensors, folder / f"{i:05d}.safetensors")
            torch.save(tensors, folder / f"{i:05d}.pt")
            arrays: dict[str, Any] = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            np.savez(folder / f"{i:05d}.npz", **arrays)
    shards = tuple(shard for shard, _ in writer.finished_shards(folder / "layer"))
    summary = LayerSummary("all", "layer", "caption", "", {}, (), shards)
    layer = Layer(folder / "layer", summary, {f"{i:05d}": "x" for i in range(count)})

    def npz(i: int) -> dict[str, torch.Tensor]:
        with np.load(folder / f"{i:05d}.npz") as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    return {
        "this cache (mapped tar)": lambda i: {name: t.clone() for name, t in layer.tensors(f"{i:05d}").items()},
        "one safetensors file a sample": lambda i: {
            name: t.clone() for name, t in load_file(folder / f"{i:05d}.safetensors").items()
        },
        "one .pt a sample": lambda i: torch.load(folder / f"{i:05d}.pt", weights_only=True),
        "one fp32 .npz a sample": npz,
    }


def read_by_webdataset(folder: Path) -> float:
    """Milliseconds a sample of iterating over the shard with webdataset, in order."""
    import webdataset
    from safetensors.torch import load

    began, count = time.perf_counter(), 0
    for found in webdataset.WebDataset(str(folder / "layer" / "00000.tar"), shardshuffle=False):
        load(found["safetensors"])
        count += 1
    return (time.perf_counter() - began) / count * 1e3


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="samples")
    parser.add_argument("--rounds", type=int, default=5, help="times that each layout is read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layouts = write_layouts(folder, options.count)
        times: dict[str, list[float]] = {layout: [] for layout in [*layouts, "webdataset, sequential"]}
        for turn in range(options.rounds + 1):  # the first round warms the page cache and verifies checksums
            order = np.random.default_rng(turn).permutation(options.count)
            for layout, read in layouts.items():
                began = time.perf_counter()
                for i in order:
                    read(int(i))
                if turn:
                    times[layout].append((time.perf_counter() - began) / options.count * 1e3)
            if turn:
                times["webdataset, sequential"].append(read_by_webdataset(folder))
    medians = {layout: statistics.median(each) for layout, each in times.items()}
    ours = medians["this cache (mapped tar)"]
    rows = [(layout, f"{ms:.2f}", f"{ms / ours:.1f}x") for layout, ms in medians.items()]
    print(table(("layout", "ms a sample", "ratio"), rows, right=1))


if __name__ == "__main__":
    main()
