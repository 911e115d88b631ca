"""What is measured, one cell after the other: the most telling first, so that a short lease tells most."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.step.ways import WAYS

A100_40GB, RTX_24GB = 39.4, 22.9
"""GiB that a card of 40 and of 24 GB gives one process."""

LARGEST = 0
"""As a batch size: the largest that fits below the cap."""

Part = Literal["ceilings", "forward", "step", "fidelity"]


@dataclass(frozen=True)
class Cell:
    """One measurement, in a process of its own."""

    part: Part
    """The card's ceilings; the base's forward alone, compiled, in bf16; a whole step; or the ControlNet's gradients
    beside those on the base in bf16."""
    way: str = ""
    """Of `WAYS`, for a step and for fidelity."""
    depth: str = "2-4"
    resolution: int = 512
    text_length: int = 512
    batch: int = 1
    cap_gib: float | None = None
    """Memory that the process may take."""
    round: int = 0
    """Cells that are compared closely are measured in turn, several times."""

    def __post_init__(self) -> None:
        assert not self.way or self.way in WAYS, self.way

    @property
    def depths(self) -> tuple[int, int]:
        """Double and single blocks of the ControlNet."""
        double, _, single = self.depth.partition("-")
        return int(double), int(single)

    @property
    def name(self) -> str:
        """One line that tells it from all others."""
        if self.part == "ceilings":
            return "ceilings"
        batch = "largest batch" if self.batch == LARGEST else f"batch {self.batch}"
        cap = f" below {self.cap_gib} GiB" if self.cap_gib else ""
        turn = f" round {self.round}" if self.round else ""
        depth = "" if self.part == "forward" else f" {self.depth}"
        way = f" {self.way}" if self.way else ""
        return f"{self.part}{way}{depth} {self.resolution} px T5 {self.text_length} {batch}{cap}{turn}"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the results."""
        return dataclasses.asdict(self)


def plan() -> list[Cell]:
    """The whole protocol, the most telling first."""
    return _unique([*_headline(), *_memory(), *_grid()])


TINY_WAYS = ("ours", "ours-int8-backward", "ours-streamed", "seed", "quanto-compiled", "diffusers-recomputed")


def tiny_plan() -> list[Cell]:
    """Every kind of cell at a size that says nothing: shows that all of it runs."""
    at: dict[str, Any] = {"depth": "1-1", "resolution": 64, "text_length": 16}
    return [
        Cell("ceilings"),
        Cell("forward", **at),
        *(Cell("step", way, **at) for way in TINY_WAYS),
        Cell("step", "quanto", batch=LARGEST, **at),
        Cell("fidelity", "ours", **at),
    ]


def _headline() -> Iterator[Cell]:
    """Ceilings, and 2-4 and 5-10 at 512 px below the memory of a 40 GB card, beside the baselines."""
    yield Cell("ceilings")
    yield Cell("step", "ours", batch=LARGEST, cap_gib=A100_40GB)
    yield Cell("step", "quanto", batch=LARGEST, cap_gib=A100_40GB)
    yield Cell("forward", batch=3)
    yield Cell("step", "ours", "5-10", batch=LARGEST, cap_gib=A100_40GB)
    yield Cell("step", "ours", resolution=1024, batch=LARGEST, cap_gib=A100_40GB)
    yield Cell("step", "quanto-online", batch=LARGEST, cap_gib=A100_40GB)
    yield Cell("step", "ours", cap_gib=RTX_24GB)
    yield Cell("step", "ours-cpu-states", "5-10", cap_gib=RTX_24GB)
    yield Cell("fidelity", "ours")
    for batch in (1, 2, 4):
        yield Cell("forward", batch=batch)
    for turn, way in itertools.product(range(1, 3), ("ours", "quanto")):  # in turn
        yield Cell("step", way, batch=LARGEST, cap_gib=A100_40GB, round=turn)
    for way, depth in itertools.product(("ours", "ours-cpu-states", "ours-streamed"), ("2-4", "5-10")):
        yield Cell("step", way, depth, cap_gib=RTX_24GB)
    for way in ("ours-int8-backward", "ours-int8"):
        yield Cell("fidelity", way)
        yield Cell("step", way, batch=LARGEST, cap_gib=A100_40GB)
    for depth in ("2-4", "5-10"):
        for way in WAYS:
            # What a card of 40 GB cannot hold is measured without the cap.
            cap = None if way.startswith("diffusers") else A100_40GB
            yield Cell("step", way, depth, cap_gib=cap)
    for way in ("seed", "quanto-compiled", "bf16-compiled", "quanto-online"):
        yield Cell("step", way, batch=LARGEST, cap_gib=A100_40GB)
    for way in ("ours-lean", "quanto", "quanto-compiled", "ours-bf16"):
        yield Cell("fidelity", way)


def _memory() -> Iterator[Cell]:
    """1024 px, and the memory of a 24 GB card."""
    for depth, way, batch in itertools.product(("2-4", "5-10"), ("ours", "ours-int8-backward", "quanto"), (1, LARGEST)):
        yield Cell("step", way, depth, resolution=1024, batch=batch, cap_gib=A100_40GB)
    for batch in (1, 2):
        yield Cell("forward", resolution=1024, batch=batch)
    for depth, resolution in (("2-4", 512), ("5-10", 512), ("2-4", 1024), ("5-10", 1024)):
        for way, batch in itertools.product(("ours", "ours-cpu-states", "ours-streamed"), (1, LARGEST)):
            yield Cell("step", way, depth, resolution, batch=batch, cap_gib=RTX_24GB)


def _grid() -> Iterator[Cell]:
    """depth x px x T5 x batch, of ours and of quanto."""
    for depth, resolution, text_length, batch in itertools.product(
        ("2-4", "5-10"), (512, 1024), (77, 512), (1, 2, 4, LARGEST)
    ):
        for way in ("ours", "quanto"):
            yield Cell("step", way, depth, resolution, text_length, batch, A100_40GB)


def _unique(cells: list[Cell]) -> list[Cell]:
    return list(dict.fromkeys(cells))
