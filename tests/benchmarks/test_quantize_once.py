"""The benchmark of the base that is quantized once runs, and what it promises holds for a small model too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import quantize_once
from benchmarks.quantize_once import Figures, Size, Start, measure, report
from tests import forked


def test_the_benchmark_measures_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_once, "subprocess", forked)
    figures = measure(tmp_path, Size(num_attention_heads=2, num_layers=2, num_single_layers=8), "cpu", compare=False)
    assert list(figures.starts) == ["first", "second", "elsewhere"]
    assert figures.identical
    assert 0.99 < figures.second_reads < 1.1  # lists of files weigh more beside a small base
    assert figures.starts["first"].asked_bytes > figures.model_bytes / 2
    line = report(figures).splitlines()[-1]
    assert line.startswith("quantize_once peak_ratio=")
    assert line.endswith("identical=yes")


def test_what_does_not_hold_is_said() -> None:
    good = Start(1.0, 100, 100, 90)
    figures = Figures(200, 100, {"first": good, "second": good}, identical=True)
    assert figures.hold
    assert not dataclasses.replace(figures, identical=False).hold
    for name, bad in (
        ("first", Start(1.0, 150, 100, 100)),
        ("second", Start(1.0, 150, 100, 100)),
        ("second", Start(1.0, 100, 202, 100)),
        ("second", Start(1.0, 100, 100, 202)),
    ):
        assert not dataclasses.replace(figures, starts={**figures.starts, name: bad}).hold
