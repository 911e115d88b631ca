"""The frozen base in int8: weights through optimum-quanto, per output channel; activations stay as they are.

The only file that knows the backend. Make the ControlNet from the base first: a quantized base has no weights to copy.
"""

from __future__ import annotations

from typing import Literal

import torch

from shared.errors import UserError

Quantization = Literal["int8", "none"]


def place_base(base: torch.nn.Module, device: torch.device, quantization: Quantization) -> torch.nn.Module:
    """Put the base on the device, its blocks' linears in int8 if asked, frozen. In place; the base comes back.

    Block after block is moved and quantized there, so that the device never holds the whole model unquantized. The
    embedders and the output layer, 0.6 % of FLUX's parameters, keep their precision.
    """
    if quantization == "int8":
        from optimum.quanto import freeze, qint8, quantize

        blocks = [block for child in base.children() if isinstance(child, torch.nn.ModuleList) for block in child]
        if not blocks:
            raise UserError(f"nothing to quantize: {type(base).__name__} has no list of blocks")
        for block in blocks:
            block.to(device)
            quantize(block, weights=qint8)
            freeze(block)
    base.to(device)
    # quanto's freeze() makes new parameters, and new parameters require gradients: 22 GiB of them at full size.
    base.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    return base.eval()
