"""The frozen base's modulation, computed ahead and not on the device.

Every block of a FLUX base scales and shifts by the output of a linear that sees one vector per sample: of the time,
the guidance and the pooled text. These linears are 27 % of the base's weights and a ten-thousandth of its arithmetic,
and nothing trained comes before them. So they are taken out, and their outputs put in their place.
"""

from __future__ import annotations

import torch

from shared.families.base import Family


class HoistedLinear(torch.nn.Module):
    """In the place of a linear whose outputs are known before it is called. It has no weights."""

    rows: torch.Tensor | None

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        # A buffer, since compiled code takes buffers as inputs: other rows of the same shape compile nothing anew.
        self.register_buffer("rows", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the present batch, (B, out_features); of x (B, ...) nothing but B matters."""
        assert self.rows is not None, "the modulation of this batch has not been set"
        assert self.rows.shape[0] == x.shape[0], "the modulation is another batch's"
        return self.rows


def hoist(family: Family, base: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Put a `HoistedLinear` in the place of each linear that is the base's modulation, in place. The linears come back
    by their names in the base, with their weights if they have some; on the meta device they have none."""
    taken: dict[str, torch.nn.Linear] = {}
    for name, linear in family.modulations(base).items():
        assert isinstance(linear, torch.nn.Linear), f"{name} is a {type(linear).__name__}"
        taken[name] = linear
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, HoistedLinear(linear.out_features))
    return taken
