"""The benchmark of a shared base runs, and what it promises holds for a small model too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from benchmarks.quantize_once import Size
from benchmarks.shared_base import Figures, Trained, measure, report, train_here
from tests.train.conftest import processes

__all__ = ["processes"]


def write_what_it_saw(out: Path, cache: Path, runs: Path, depths: Sequence[str], steps: int) -> None:
    out.write_text(json.dumps(vars(train_here(cache, runs, depths, steps))))


def test_two_controlnets_on_one_base_take_less_by_the_base_and_learn_the_same(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    def train(cache: Path, runs: Path, depths: Sequence[str], steps: int) -> Trained:
        out = tmp_path / "out.json"
        process = processes.Process(target=write_what_it_saw, args=(out, cache, runs, list(depths), steps))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        return Trained(**json.loads(out.read_text()))

    figures = measure(tmp_path, Size(num_attention_heads=2, num_layers=2, num_single_layers=8), 2, train)
    print(report(figures))
    assert figures.hold
    assert figures.base_bytes > 40e6
    # What a process takes beside (it was forked from one with imports) is no part of the claim.
    assert figures.shared.peak_bytes - max(each.peak_bytes for each in figures.alone) < figures.base_bytes / 2
    assert {name: len(losses) for name, losses in figures.shared.losses.items()} == {"depth-1-1": 2, "depth-0-2": 2}
    assert report(figures).splitlines()[-1].startswith("shared_base saved_mib=")


def test_what_does_not_hold_is_said() -> None:
    one, other = Trained(300, 100, {"a": [1.0, 2.0]}), Trained(200, 100, {"b": [3.0]})
    both = Trained(400, 100, {"b": [3.0], "a": [1.0, 2.0]})
    good = Figures([one, other], both)
    assert (good.saved_bytes, good.base_bytes, good.largest_difference, good.hold) == (100, 100, 0.0, True)
    assert not dataclasses.replace(good, shared=dataclasses.replace(both, peak_bytes=401)).hold
    changed = dataclasses.replace(both, losses={"b": [3.0], "a": [1.0, 2.00001]})
    assert not dataclasses.replace(good, shared=changed).hold
