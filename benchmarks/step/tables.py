"""The results as tables: steps beside their plans, ceilings, fidelity, and the goals with what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.step.cells import A100_40GB, LARGEST, RTX_24GB, Cell
from benchmarks.step.planned import Planned
from benchmarks.step.results import DONE, FAILED, TOO_LONG, Results
from benchmarks.step.sizes import SIZES, flops
from shared.report import table

DENSE_BF16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "4090": 165}
"""By the cards' data sheets."""
COMMAND = "make bench"
SLOPE_PARTS = ("way", "depth", "resolution", "text_length", "cap_gib", "round")


def report(results: Results, cells: list[Cell], planned: Planned) -> str:
    """All tables, and how many of `cells` are still to be measured."""
    records = [record for record in results.records.values() if record["outcome"] == DONE]
    parts = [
        _environment(results),
        _steps(results, planned),
        _forwards(records),
        _slopes(results, records),
        _fidelity(records),
        _ceilings(records),
        _not_measured(results),
        goals(results, planned),
    ]
    left = len(results.left(cells))
    parts.append(f"bench cells={len(cells)} done={len(cells) - left} left={left}")
    return "\n\n".join(part for part in parts if part)


def _environment(results: Results) -> str:
    found = {
        f"{e.get('gpu', 'cpu')}, torch {e.get('torch')}, commit {e.get('commit')}": None
        for record in results.records.values()
        if (e := record["environment"])
    }
    return "\n".join(f"measured on {line}" for line in found)


def _steps(results: Results, planned: Planned) -> str:
    rows: list[tuple[str, ...]] = []
    for record in results.records.values():
        cell = Cell(**record["cell"])
        if cell.part != "step" or record["outcome"] in (FAILED, TOO_LONG):
            continue
        head: tuple[str, ...] = (
            cell.way,
            cell.depth,
            str(cell.resolution),
            str(cell.text_length),
            f"{record.get('batch', cell.batch)}{'*' if cell.batch == LARGEST else ''}",
            f"{cell.cap_gib:g}" if cell.cap_gib else "-",
        )
        if record["outcome"] != DONE:
            rows.append((*head, record["outcome"], *[""] * 8))
            continue
        rate = gemm_rate(results)
        rows.append((
            *head,
            "+".join(map(str, record["recomputed_blocks"])),
            f"{record['step_ms']:.1f}",
            f"{record['images_per_second']:.2f}",
            _share(record["tflops"], data_sheet_rate(record)),
            _share(record["tflops"], rate),
            _number(r_forward(results, cell), ".2f"),
            _number(record.get("peak_allocated_gib"), ".2f"),
            _number(record.get("peak_reserved_gib"), ".2f"),
            _number(planned.peak_gib(record), ".2f"),
        ))  # fmt: skip
    if not rows:
        return ""
    head = (
        "way", "depth", "px", "T5", "batch", "cap GiB", "recomputed", "ms", "images/s", "of data sheet", "of measured",
        "R_fwd", "peak GiB", "reserved", "planned",
    )  # fmt: skip
    notes = (
        "batch *: the largest that fits. recomputed: blocks of base + ControlNet whose forward is done twice. Shares "
        "are of model operations (attention's backward 2.5 forwards; what is recomputed does not count), of the data "
        "sheet's dense bf16 rate and of the product of 8192 x 8192 matrices measured in the same run. R_fwd: the "
        "step's time over its operations' multiple of a compiled bf16 forward of the base at the same batch."
    )
    return f"{table(head, rows, right=2)}\n{notes}"


def _forwards(records: list[dict[str, Any]]) -> str:
    rows = [
        (
            str(cell.resolution), str(cell.text_length), str(cell.batch), f"{record['forward_ms']:.1f}",
            f"{record['tflops']:.0f}",
        )
        for record in records
        if (cell := Cell(**record["cell"])).part == "forward"
    ]  # fmt: skip
    return table(("base forward px", "T5", "batch", "ms", "TFLOP/s"), rows, right=1) if rows else ""


def _slopes(results: Results, records: list[dict[str, Any]]) -> str:
    """GiB that each further sample takes, where at least two batches were measured with nothing recomputed."""
    peaks: dict[tuple[Any, ...], dict[int, float]] = {}
    for record in records:
        cell = Cell(**record["cell"])
        if cell.part == "step" and "peak_allocated_gib" in record and record["recomputed_blocks"] == [0, 0]:
            key = tuple(getattr(cell, name) for name in SLOPE_PARTS[:4])
            peaks.setdefault(key, {})[record["batch"]] = record["peak_allocated_gib"]
    rows = []
    for (way, depth, resolution, text_length), of in peaks.items():
        if len(of) > 1:
            least, most = min(of), max(of)
            slope = (of[most] - of[least]) / (most - least)
            rows.append((way, depth, str(resolution), str(text_length), f"{least}-{most}", f"{slope:.2f}"))
    return table(("GiB a sample of", "depth", "px", "T5", "batches", "GiB"), rows, right=2) if rows else ""


def _fidelity(records: list[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        cell = Cell(**record["cell"])
        for name, value in record.items():
            if cell.part == "fidelity" and isinstance(value, dict) and "cosine" in value:
                error = f"{value['relative_error']:.2e}"
                rows.append((f"{cell.way} {name}", cell.depth, f"{value['cosine']:.7f}", error))
    return table(("gradients of", "depth", "cosine", "relative error"), rows, right=2) if rows else ""


def _ceilings(records: list[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        if record["cell"]["part"] == "ceilings":
            for part, unit in (("gemm", "TFLOP/s"), ("int8", "TOP/s"), ("attention", "TFLOP/s"), ("copy", "TB/s")):
                rows += [(f"{part} {name}", f"{value:.2f}", unit) for name, value in record[part].items()]
    return table(("ceiling", "", ""), rows, right=1) if rows else ""


def _not_measured(results: Results) -> str:
    lines = [
        f"{name}: {record['outcome']}, {(record.get('printed') or [''])[-1]}"
        for name, record in results.records.items()
        if record["outcome"] in (FAILED, TOO_LONG)
    ]
    return "\n".join(["without a result:", *lines]) if lines else ""


@dataclass(frozen=True)
class Goal:
    """A figure that was promised, and how it is read from the results."""

    about: str
    aim: str
    must: float
    measured: Callable[[Results], float | None]
    at_most: bool = False
    """Whether small is good."""
    unit: str = ""


def goals(results: Results, planned: Planned) -> str:
    """Each goal with what was measured. Of what was not, the table says so and names the command."""
    rows = []
    plan = Goal(
        "planned against measured peak, largest error", "3", 8, lambda results: _plan_error(results, planned),
        at_most=True, unit=" %",
    )  # fmt: skip
    for goal in (*GOALS, plan):
        value = goal.measured(results)
        if value is None:
            verdict, shown = f"not measured: {COMMAND}", ""
        else:
            verdict = "kept" if (value <= goal.must if goal.at_most else value >= goal.must) else "missed"
            shown = f"{value:.3g}{goal.unit}"
        rows.append((goal.about, goal.aim, f"{goal.must:g}{goal.unit}", shown, verdict))
    return table(("goal", "aim", "must", "measured", ""), rows, right=1)


def _best(depth: str, resolution: int, ways: tuple[str, ...] = ("ours",)) -> Iterator[Cell]:
    for way in ways:
        for batch in (LARGEST, 1, 2, 4):
            for turn in range(3):
                yield Cell("step", way, depth, resolution, 512, batch, A100_40GB, turn)


def _fastest(depth: str, resolution: int, *ways: str) -> Callable[[Results], float | None]:
    return lambda results: max(_rates(results, depth, resolution, *ways), default=None)


def _rates(results: Results, depth: str, resolution: int, *ways: str) -> list[float]:
    found = [results.figures(cell) for cell in _best(depth, resolution, ways)]
    return [record["images_per_second"] for record in found if record is not None]


def _times_as_fast(way: str, *ours: str) -> Callable[[Results], float | None]:
    """Each at its own best batch below the cap."""

    def ratio(results: Results) -> float | None:
        mine, theirs = _rates(results, "2-4", 512, *ours), _rates(results, "2-4", 512, way)
        return max(mine) / max(theirs) if mine and theirs else None

    return ratio


def _peak(depth: str) -> Callable[[Results], float | None]:
    """Of batch 1 with nothing recomputed: measured by itself, or on the way to the largest batch."""

    def peak(results: Results) -> float | None:
        alone = results.figures(Cell("step", "ours", depth, cap_gib=A100_40GB))
        if alone is not None and alone["recomputed_blocks"] == [0, 0] and "peak_allocated_gib" in alone:
            return float(alone["peak_allocated_gib"])
        largest = results.figures(Cell("step", "ours", depth, batch=LARGEST, cap_gib=A100_40GB))
        return None if largest is None else largest["tried"].get("1")

    return peak


def _r_forward(results: Results) -> float | None:
    found = [r_forward(results, cell) for cell in _best("2-4", 512)]
    return min((value for value in found if value is not None), default=None)


def _small_card(depth: str) -> Callable[[Results], float | None]:
    """Images a second below a 24 GB card's memory, 0 where no way fits."""

    def fits(results: Results) -> float | None:
        cells = [
            Cell("step", way, depth, batch=batch, cap_gib=RTX_24GB)
            for way in ("ours", "ours-cpu-states", "ours-streamed")
            for batch in (1, LARGEST)
        ]
        tried = [cell for cell in cells if results.outcome(cell) is not None]
        rates = [record["images_per_second"] for cell in tried if (record := results.figures(cell)) is not None]
        return max(rates, default=0.0) if tried else None

    return fits


def _plan_error(results: Results, planned: Planned) -> float | None:
    """The largest difference between the planned and the measured peak, in percent."""
    errors = [
        abs(peak / record["peak_allocated_gib"] - 1) * 100
        for record in results.records.values()
        if record["outcome"] == DONE and (peak := planned.peak_gib(record)) is not None
    ]
    return max(errors, default=None)


GOALS = (
    Goal("2-4 at 512 px, exact, images/s below 39.4 GiB", "10.8", 8.5, _fastest("2-4", 512, "ours")),
    Goal("5-10 at 512 px, exact, images/s below 39.4 GiB", "8.6", 7, _fastest("5-10", 512, "ours")),
    Goal("2-4 at 1024 px, exact, images/s below 39.4 GiB", "3.0", 2.5, _fastest("2-4", 1024, "ours")),
    Goal("R_fwd of 2-4 at the best batch", "1.10", 1.25, _r_forward, at_most=True),
    Goal("2-4 exact beside quanto, cached", "1.3", 1.3, _times_as_fast("quanto", "ours"), unit="x"),
    Goal(
        "2-4 in 8-bit arithmetic beside quanto, cached", "1.6", 1.3,
        _times_as_fast("quanto", "ours-int8-backward", "ours-int8"), unit="x",
    ),
    Goal("2-4 beside quanto with encoders online", "3", 2, _times_as_fast("quanto-online", "ours"), unit="x"),
    Goal("peak of 2-4, batch 1, nothing recomputed", "20.1", 23.1, _peak("2-4"), at_most=True, unit=" GiB"),
    Goal("peak of 5-10, batch 1, nothing recomputed", "29.1", 32.1, _peak("5-10"), at_most=True, unit=" GiB"),
    Goal("2-4 at 512 px below 22.9 GiB, images/s", "", 0.01, _small_card("2-4")),
    Goal("5-10 at 512 px below 22.9 GiB, images/s", "", 0.01, _small_card("5-10")),
)  # fmt: skip


def r_forward(results: Results, cell: Cell) -> float | None:
    """A step's time over its operations' multiple of the base's compiled bf16 forward at the same batch."""
    record = results.figures(cell)
    if record is None or cell.part != "step":
        return None
    forward = results.figures(Cell("forward", "", "2-4", cell.resolution, cell.text_length, record["batch"]))
    if forward is None:
        return None
    size = SIZES[results.size]
    batches = record["images_per_second"] * record["step_ms"] / 1e3 / record["batch"]  # to a step
    multiple = flops(size, cell.depths, cell.resolution, cell.text_length).base_forwards
    return record["step_ms"] / (batches * multiple * forward["forward_ms"])


def gemm_rate(results: Results) -> float | None:
    """TFLOP/s of the square product of the ceilings."""
    record = results.figures(Cell("ceilings"))
    return None if record is None else float(next(iter(record["gemm"].values())))


def data_sheet_rate(record: dict[str, Any]) -> float | None:
    """Dense bf16 TFLOP/s of the card that a record was measured on, where it is known."""
    gpu = record["environment"].get("gpu", "")
    return next((float(rate) for name, rate in DENSE_BF16_TFLOPS.items() if name in gpu), None)


def _share(value: float, of: float | None) -> str:
    return "" if of is None else f"{value / of:.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
