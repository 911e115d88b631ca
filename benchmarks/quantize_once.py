"""What it takes to quantize the frozen base once, and to start from what was kept.

    python -m benchmarks.quantize_once [--folder /fast/disk] [--device cuda]

A model of FLUX's own classes with random weights (2 GB in bf16: 12 heads, 4 double and 17 single blocks) is written to
a folder. Then, each in a process of its own: the first start, which quantizes it; the second, after the kernel was
asked to forget the files; a first start into another folder; and for comparison the whole model loaded and then
quantized in memory. Reported are seconds, the peak of the process's memory above what its imports took (mapped files
count), and the bytes read: by calls, and from the disk. The last line reads

    quantize_once peak_ratio=... second_peak_ratio=... second_reads=... identical=yes

peaks over the bytes of the int8 base; what the second start asked to read, over them too. The exit code is 1 where a
peak is 1.5 or more, the second start reads more than once, or two bases differ by a byte.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import page_cache
from shared import families
from shared.cache.schema import file_checksum
from shared.families.flux import FLUX_1_DEV
from shared.model_folder import resolve
from shared.report import quiet_libraries, say, table
from train.base_store import open_base
from train.quantize import BaseOptions, place_base

FAMILY = families.get("flux")
SHARD_BYTES = 1 << 30
PEAK_LIMIT = 1.5
"""Peak memory over the bytes of the int8 base."""


@dataclass(frozen=True)
class Size:
    """How large the model is."""

    num_attention_heads: int = 12
    """128 features each."""
    num_layers: int = 4
    num_single_layers: int = 17


@dataclass(frozen=True)
class Start:
    """What one process saw."""

    seconds: float
    peak_bytes: int
    """Above what was there before."""
    asked_bytes: int
    """By read calls."""
    disk_bytes: int


@dataclass(frozen=True)
class Figures:
    """All of them, and the sizes of the files."""

    model_bytes: int
    base_bytes: int
    starts: dict[str, Start]
    identical: bool

    @property
    def peak_ratio(self) -> float:
        """The first start's peak over the int8 base."""
        return self.starts["first"].peak_bytes / self.base_bytes

    @property
    def second_peak_ratio(self) -> float:
        """The second start's."""
        return self.starts["second"].peak_bytes / self.base_bytes

    @property
    def second_reads(self) -> float:
        """How often the second start read the base."""
        return max(self.starts["second"].asked_bytes, self.starts["second"].disk_bytes) / self.base_bytes

    @property
    def hold(self) -> bool:
        """Whether all that is promised is so. 1 %: the lists of files, and pages that the kernel reads ahead."""
        return max(self.peak_ratio, self.second_peak_ratio) < PEAK_LIMIT and self.second_reads < 1.01 and self.identical


def write_model(folder: Path, size: Size, **facts: int) -> int:
    """A transformer folder with random weights in bf16; its bytes come back. `facts` replace what its config says."""
    place = folder / FAMILY.base_component
    place.mkdir(parents=True)
    config = {**FLUX_1_DEV, **vars(size), **facts}
    (place / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: dict[str, int] = {}
    draw, room = torch.Generator().manual_seed(0), SHARD_BYTES
    shapes = {name: tensor.shape for name, tensor in FAMILY.make_base(resolve(str(folder), ())).state_dict().items()}
    total = -(-sum(2 * shape.numel() for shape in shapes.values()) // SHARD_BYTES)

    def path(number: int) -> Path:
        return place / f"diffusion_pytorch_model-{number:05d}-of-{total:05d}.safetensors"

    for name, shape in shapes.items():
        if room <= 0:
            save_file(shards[-1], path(len(shards)), metadata={"format": "pt"})
            shards[-1], room = {}, SHARD_BYTES
            shards.append({})
        shards[-1][name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=draw)
        room -= 2 * shape.numel()
        names[name] = len(shards)
    save_file(shards[-1], path(len(shards)), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: path(number).name for name, number in names.items()}}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))


def start(model: Path, folder: Path | None, device: torch.device) -> Start:
    """Open the base in this process and touch all of it; without a folder, load it whole and quantize it in memory."""
    quiet_libraries()
    for name in ("diffusers.models.transformers.transformer_flux", "optimum.quanto"):
        importlib.import_module(name)  # what they take is not the base's
    found = resolve(str(model), ())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, read_before, began = _status("VmRSS"), _io(), time.perf_counter()
    if folder is None:
        base = place_base(FAMILY.load_base(found, torch.bfloat16), device, "int8")
    else:
        base = open_base(FAMILY, found, BaseOptions(), folder=folder, device=device, dtype=torch.bfloat16, hoist=False)
    checked = sum(int(tensor.view(torch.uint8).sum()) for tensor in base.state_dict().values())
    assert checked > 0
    seconds, read = time.perf_counter() - began, _io()
    return Start(
        seconds,
        _status("VmHWM") - before,
        read["rchar"] - read_before["rchar"],
        read["read_bytes"] - read_before["read_bytes"],
    )


def _status(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def _io() -> dict[str, int]:
    pairs = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in pairs}


def measure(folder: Path, size: Size, device: str, *, compare: bool = True) -> Figures:
    """Write the model below `folder` and start from it as the module says."""
    model_bytes = write_model(folder / "model", size)
    starts: dict[str, Start] = {}

    def run(name: str, *where: str) -> None:
        page_cache.drop(file for file in folder.rglob("*.safetensors"))
        command = [sys.executable, "-m", __spec__.name, "--device", device, "--start", str(folder / "model"), *where]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        starts[name] = Start(**json.loads(out.splitlines()[-1]))

    run("first", str(folder / "one"))
    run("second", str(folder / "one"))
    run("elsewhere", str(folder / "other"))
    if compare:
        run("whole, in memory")
    one, other = (_content(folder / name) for name in ("one", "other"))
    base_bytes = sum(file.stat().st_size for file in (folder / "one").rglob("*.safetensors"))
    return Figures(model_bytes, base_bytes, starts, identical=bool(one) and one == other)


def _content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_checksum(path) for path in sorted(folder.glob("flux-*/*"))}


def report(figures: Figures) -> str:
    """The table, and the last line."""
    rows = [
        (
            name,
            f"{each.seconds:.1f}",
            f"{each.peak_bytes / 2**20:,.0f}",
            f"{each.peak_bytes / figures.base_bytes:.2f}",
            f"{each.asked_bytes / 2**20:,.0f}",
            f"{each.disk_bytes / 2**20:,.0f}",
        )
        for name, each in figures.starts.items()
    ]
    head = ("start", "seconds", "peak MiB", "over int8", "asked to read MiB", "from disk MiB")
    return (
        f"model {figures.model_bytes / 2**20:,.0f} MiB in bf16, int8 base {figures.base_bytes / 2**20:,.0f} MiB\n"
        f"{table(head, rows, right=1)}\n"
        f"quantize_once peak_ratio={figures.peak_ratio:.2f} second_peak_ratio={figures.second_peak_ratio:.2f} "
        f"second_reads={figures.second_reads:.3f} identical={'yes' if figures.identical else 'no'}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """0 where everything promised holds, 1 where not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize_once", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--folder", type=Path, help="where 5 GB may be written for a while; default: the system's own")
    parser.add_argument("--device", default="cpu", help="where tensors are quantized and the base goes")
    parser.add_argument("--start", nargs="+", type=Path, help=argparse.SUPPRESS)
    options: Any = parser.parse_args(words)
    if options.start:
        model, folder = (*options.start, None)[:2]
        print(json.dumps(vars(start(model, folder, torch.device(options.device)))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), Size(), options.device)
    say(report(figures))
    return 0 if figures.hold else 1


if __name__ == "__main__":
    sys.exit(main())
