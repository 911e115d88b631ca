"""One page that answers which of several runs is best: `write`, and `python -m train.compare`."""

from __future__ import annotations

from pathlib import Path


def write(runs: list[Path], out: Path) -> Path:
    """Write the page that compares these runs (their folders, or folders of them) to `out`, which comes back. Runs may
    lack anything: what is there is shown. `UserError` where there is no run."""
    from datetime import datetime

    from shared import atomic
    from train.compare.gather import gather, named
    from train.compare.page import page
    from train.compare.pictures import album
    from train.compare.read import find

    folders = named(find(runs))
    comparison = gather([*folders.values()])
    above = {folder.resolve().parent for folder in folders.values()}
    name = above.pop().name if len(above) == 1 else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    html = page(comparison, album(comparison, folders), name, datetime.now())
    atomic.write_bytes(out, html.encode())
    return out
