"""What a FLUX.1-dev ControlNet of each depth weighs: `python -m benchmarks.sizes`. Exact, on any machine, in seconds.

Counts the real classes at full size on the meta device. Activations, some GiB per sample, come on top.
"""

from __future__ import annotations

import argparse

import torch

from shared.report import quiet_libraries, table
from train.adapters.controlnet import parse_depth

GIB = 2**30


def parameters(depth: str) -> tuple[int, int, int]:
    """Parameters of (base, the part of it that is quantized, ControlNet of this depth)."""
    from diffusers import FluxControlNetModel, FluxTransformer2DModel

    num_layers, num_single_layers = parse_depth(depth)
    with torch.device("meta"):
        base = FluxTransformer2DModel(guidance_embeds=True)
        controlnet = FluxControlNetModel(
            num_layers=num_layers, num_single_layers=num_single_layers, guidance_embeds=True
        )
    blocks = [base.transformer_blocks, base.single_transformer_blocks]
    quantized = sum(
        module.weight.numel() for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)
    )
    return _count(base), quantized, _count(controlnet)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depths", nargs="*", default=["2-0", "2-4", "4-4", "4-10", "5-10"])
    quiet_libraries()
    rows = []
    for depth in parser.parse_args().depths:
        base, quantized, controlnet = parameters(depth)
        base_bytes = quantized + 2 * (base - quantized)  # int8 weights; scales are a ten-thousandth
        trained_bytes = 2 * controlnet + 2 * controlnet + 2 * controlnet  # bf16 weights, bf16 gradients, 8-bit moments
        rows.append(
            (
                depth,
                f"{controlnet / 1e9:.3f}",
                f"{base_bytes / GIB:.1f}",
                f"{trained_bytes / GIB:.1f}",
                f"{(base_bytes + trained_bytes) / GIB:.1f}",
            )
        )
    head = ("depth", "ControlNet, B parameters", "int8 base, GiB", "weights+gradients+8-bit Adam, GiB", "sum, GiB")
    print(table(head, rows, right=1))


if __name__ == "__main__":
    main()
