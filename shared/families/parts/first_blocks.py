"""A ControlNet begins as a copy of the base's own first blocks, with outputs that are zero: it changes nothing at first
(arXiv 2302.05543)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shared.errors import UserError
from shared.families.base import Tensors
from shared.model_folder import ModelFolder


def begun(
    controlnet: torch.nn.Module,
    model: ModelFolder,
    component: str,
    *,
    copied: Sequence[str],
    zero: Sequence[str],
    dtype: torch.dtype,
    drawn: Tensors | None = None,
    twice: Mapping[str, str] | None = None,
) -> torch.nn.Module:
    """The ControlNet, which has no weights yet, with the base's where their names begin with one of `copied`, of which
    `component` holds the files and nothing else is read; zeros where they begin with one of `zero`, and of what is
    neither the `drawn` ones. `twice`: a weight's name to that of the one which it is a copy of, too.

    Raises `UserError` where the files lack one of them."""
    expected = controlnet.state_dict()
    weights = {
        name: torch.zeros(tensor.shape, dtype=dtype)
        for name, tensor in expected.items()
        if name.startswith(tuple(zero))
    }
    weights |= drawn or {}
    for prefix in copied:
        for name, tensor in model.tensors(component, prefix):
            weights[name] = tensor.to(dtype, copy=True)  # not the file's own pages: they shall be trained
    for name, other in (twice or {}).items():
        if other in weights:
            weights[name] = weights[other].clone()
    wrong = [n for n, tensor in expected.items() if n not in weights or weights[n].shape != tensor.shape]
    if wrong:
        raise UserError(
            f"model {model.name}: its {component}'s weights do not fit its config.json: {len(wrong)} tensors of the "
            f"first blocks are missing or of another shape (as {wrong[0]}); download the model again"
        )
    controlnet.load_state_dict(weights, assign=True)
    return controlnet
