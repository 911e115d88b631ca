"""Put the trained parts together into a pipeline folder laid out as FLUX.1-dev, in bfloat16 and safetensors."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from examples.tiny_flux.architecture import make_scheduler
from examples.tiny_flux.text import TextSide

MAX_BYTES = 15_000_000


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ship(vae: AutoencoderKL, text: TextSide, transformer: FluxTransformer2DModel, out: Path) -> int:
    """Write the pipeline to `out` in bfloat16 and return its size in bytes."""
    pipeline = FluxPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        text_encoder_2=text.text_encoder_2,
        tokenizer_2=text.tokenizer_2,
        transformer=transformer,
    ).to("cpu", torch.bfloat16)
    pipeline.save_pretrained(out)
    _forget_paths(out)
    size = folder_bytes(out)
    assert size <= MAX_BYTES, f"{out} has {size} bytes, more than {MAX_BYTES}"
    return size


def _forget_paths(out: Path) -> None:
    """Remove from the configurations where a part was loaded from: the folder is the same wherever it was made."""
    for path in out.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")
