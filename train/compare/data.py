"""What a comparison says, apart from how it is shown: plain dataclasses that become JSON.

`figures` leaves out what two equal sweeps need not share (times, memory, versions), so that those can be held against
each other to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

MACHINE = "machine."
"""Before the names of differences that are no choice of the experiment's."""
_PLACES = ("runs", "cache", "base.folder", "remote.folder")
"""Options that say where files lie."""
State = Literal["trained", "early_stop", "stopped", "unfinished", "failed"]


@dataclass(frozen=True)
class Series:
    """A figure over steps."""

    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float | None] | None = None
    """Standard errors over held-out samples; None where the figure has none."""


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval, where one can be stated."""

    value: float
    low: float | None
    high: float | None
    over: Literal["seeds", "samples"]
    """What the interval is over: what another seed, or what other held-out samples would have given."""
    count: int | None
    """How many of them; None where nobody has stated it."""
    step: int | None = None
    """Of the look it comes from."""


@dataclass(frozen=True)
class Picture:
    """One painted held-out sample of a run, or its whole grid of them."""

    step: int
    key: str | None
    """Of the sample; None: a grid of all."""
    path: str
    """Below the run's folder."""
    sha256: str


@dataclass(frozen=True)
class Machine:
    """What depends on the machine and on how often it was interrupted: never part of `figures`."""

    device: str
    num_processes: int
    num_starts: int
    memory_gib: float | None
    memory_kind: Literal["measured", "counted", "loaded"] | None
    """measured: the largest step's peak; counted: the same, expected; loaded: what the weights take."""
    step_seconds: float | None
    """The median."""
    data_wait_share: float | None
    look_share: float | None
    hours: Series
    """Device hours at steps."""
    versions: Mapping[str, str]
    git_revision: str | None


@dataclass(frozen=True)
class RunData:
    """One run."""

    name: str
    setting: int
    """Index of its setting."""
    state: State
    why: str | None
    """Why it failed."""
    step: int
    steps: int | None
    """As many as it was to take."""
    seed: int | None
    depth: str | None
    num_parameters: int | None
    """Trained ones."""
    global_batch: int | None
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    """What it stands on: model, fingerprints of the cache, condition."""
    series: Mapping[str, Series]
    samples_seen: Series
    final: Mapping[str, Figure]
    """Of the last look that has it."""
    best_step: int | None
    """Where the figure ranked by was best."""
    best_value: float | None
    by_time: Sequence[tuple[float, float, float | None]]
    """(t, held-out loss, its standard error) of the last look."""
    references: Mapping[str, float]
    """What adherence is held against, by full name: `adherence/edge_f1_ceiling`."""
    convergence: Mapping[str, int]
    """By measure the step of sudden convergence, where there was one."""
    captions: Sequence[tuple[str, str]]
    """(key, caption) of the held-out samples that were painted."""
    pictures: Sequence[Picture]
    machine: Machine


@dataclass(frozen=True)
class Setting:
    """Runs that are equal but for their seed."""

    label: str
    differs: Mapping[str, Any]
    """Options that not all settings share, with this one's values."""
    runs: Sequence[int]
    final: Mapping[str, Figure]
    """Means over seeds; of a single seed its own figures."""


@dataclass(frozen=True)
class Lead:
    """By how much the first setting is ahead of the second."""

    first: int
    second: int
    difference: float
    """In the figure ranked by; positive is better."""
    half: float | None
    """Half of its 95 % interval; None where seeds and samples do not give one."""
    paired: bool
    """Whether it is of differences between runs of the same seed."""


@dataclass(frozen=True)
class Comparison:
    """All of it. Settings are in the order of their rank, runs in that of their settings and seeds."""

    ranked_by: str | None
    runs: Sequence[RunData]
    settings: Sequence[Setting]
    lead: Lead | None
    differences: Mapping[str, Sequence[Any]]
    """Option or fact -> each run's value, where not all are the same."""
    caveats: Sequence[str]
    """What stands in the way of comparing these runs."""
    notes: Sequence[str]
    """What could not be read, or should be known."""


def figures(comparison: Comparison) -> dict[str, Any]:
    """All that two equal sweeps must agree on, to the bit, as plain JSON values: without what belongs to the machine,
    to the number of its starts and to where files lie."""
    found = asdict(comparison)
    for run in found["runs"]:
        del run["machine"]
        run["options"] = {key: value for key, value in run["options"].items() if key not in _PLACES}
    found["differences"] = {
        key: values
        for key, values in found["differences"].items()
        if key not in _PLACES and not key.startswith(MACHINE)
    }
    return found
