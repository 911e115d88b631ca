"""What a budget and a number of blocks mean, and which are refused."""

from __future__ import annotations

import os

import pytest

from shared.errors import UserError
from train.budget import ALL, ALLOCATOR, GIB, MemoryOptions, grow_segments, parse_budget, parse_recompute


@pytest.mark.parametrize(
    ("budget", "gib"),
    [
        ("22.9GiB", 22.9), ("38.3 GiB", 38.3), ("8gib", 8), ("40GB", 38.3), ("24GB", 22.9), ("24 gb", 22.9),
        ("80GB", 76.4), ("24.5GB", 23.3975),
    ],
)  # fmt: skip
def test_gib_is_exact_and_gb_is_a_card_of_that_name_without_what_its_driver_keeps(budget: str, gib: float) -> None:
    assert parse_budget(budget) == pytest.approx(gib * GIB, abs=1)


@pytest.mark.parametrize("budget", ["", "40", "40MB", "GB", "-40GB", "0GB", "0.0GiB", "4 0GB", "1e3GB", "forty GB"])
def test_a_budget_that_is_none_is_refused(budget: str) -> None:
    with pytest.raises(UserError, match=r"MEMORY is 40GB \(as a card is sold\) or 38\.3GiB \(exactly\), or auto"):
        MemoryOptions(budget=budget).check()


def test_a_number_of_blocks_is_the_base_s_and_after_a_plus_the_controlnet_s() -> None:
    given = {word: parse_recompute(word) for word in ("auto", "none", "all", "12", "12+2", "0", "0+6")}
    assert given == {
        "auto": None, "none": (0, 0), "all": (ALL, ALL), "12": (12, 0), "12+2": (12, 2), "0": (0, 0), "0+6": (0, 6),
    }  # fmt: skip


@pytest.mark.parametrize("recompute", ["", "some", "-1", "12+", "+2", "1.5", "12 + 2", "1+2+3"])
def test_a_number_of_blocks_that_is_none_is_refused(recompute: str) -> None:
    with pytest.raises(UserError, match=r"memory\.recompute is auto, none, all, or a number"):
        MemoryOptions(recompute=recompute).check()


def test_no_rows_ahead_is_refused() -> None:
    with pytest.raises(UserError, match=r"memory\.hoist_steps must be 1 or more, not 0"):
        MemoryOptions(hoist_steps=0).check()


def test_the_defaults_are_sound_and_used() -> None:
    MemoryOptions().check()
    assert MemoryOptions().unused() == MemoryOptions(hoist="no").unused() == []


def test_rows_ahead_of_a_base_that_is_not_hoisted_have_no_effect() -> None:
    assert MemoryOptions(hoist="no", hoist_steps=8).unused() == ["hoist_steps"]
    assert MemoryOptions(hoist="yes", hoist_steps=8).unused() == []


def test_the_allocator_s_segments_grow_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    grow_segments()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that what is set next is undone
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    grow_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
