"""Results of the step's benchmarks: one JSON line a cell, added when it is done, read back to know what is left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.step.cells import Cell
from shared.errors import UserError

DONE, FAILED, TOO_LONG = "done", "failed", "too long"


class Results:
    """The lines of one file. The same cell may stand in it several times; its last line counts."""

    def __init__(self, path: Path, size: str) -> None:
        """`size`: the architecture whose lines are looked at; others' stay where they are. Raises `UserError` where
        the file is damaged anywhere but in a last line that was cut off."""
        self.path, self.size = path, size
        self.records: dict[str, dict[str, Any]] = {}
        for record in self._read():
            if record["size"] == size:
                self.records[Cell(**record["cell"]).name] = record

    def add(self, cell: Cell, outcome: str, figures: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write a cell's line to the file."""
        record = {
            "cell": cell.to_dict(), "size": self.size, "outcome": outcome, **figures, "environment": dict(environment),
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            # A line that a kill cut off shall not spoil this one.
            file.write(("\n" if text and not text.endswith("\n") else "") + json.dumps(record) + "\n")
        self.records[cell.name] = record

    def outcome(self, cell: Cell) -> str | None:
        """What came of a cell, None before it was tried."""
        record = self.records.get(cell.name)
        return None if record is None else str(record["outcome"])

    def left(self, cells: list[Cell]) -> list[Cell]:
        """Cells without a result: those never tried first, then those that failed or took too long."""
        tried = [cell for cell in cells if self.outcome(cell) in (FAILED, TOO_LONG)]
        return [cell for cell in cells if self.outcome(cell) is None] + tried

    def figures(self, cell: Cell) -> dict[str, Any] | None:
        """Of a cell that was measured: not one that failed or for which memory did not suffice."""
        record = self.records.get(cell.name)
        return record if record is not None and record["outcome"] == DONE else None

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line) if line.strip() else None
                if record is not None:
                    Cell(**record["cell"])
                    yield record
            except (ValueError, TypeError, KeyError, AssertionError) as error:
                if number < len(lines) and not _cut_off(line):
                    raise UserError(
                        f"{self.path}, line {number} is no result of these benchmarks ({error}); remove the line, or "
                        "choose another --results"
                    ) from error


def _cut_off(line: str) -> bool:
    """Whether a process was killed while it wrote the line."""
    return line.startswith('{"cell"') and not line.endswith("}")
