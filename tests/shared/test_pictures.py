"""Grids of pictures."""

from __future__ import annotations

import numpy as np
import pytest

from shared.pictures import grid


def plain(height: int, width: int, value: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_every_picture_lies_unchanged_in_its_cell() -> None:
    random = np.random.default_rng(0)
    pictures = [[random.integers(0, 256, (8, 40, 3), np.uint8) for _ in range(3)] for _ in range(2)]
    sheet = grid(pictures, ["a", "b", "c"])
    assert sheet.dtype == np.uint8
    assert sheet.shape == (18 + 2 * 8 + 2, 3 * 40 + 2 * 2, 3)
    for row in range(2):
        for column in range(3):
            top, left = 18 + row * 10, column * 42
            assert np.array_equal(sheet[top : top + 8, left : left + 40], pictures[row][column])


def test_headings_are_drawn_above_and_nowhere_else() -> None:
    named, bare = grid([[plain(8, 60, 7)]], ["heading"]), grid([[plain(8, 60, 7)]], [""])
    assert (named[:18] != bare[:18]).any()
    assert np.array_equal(named[18:], bare[18:])


def test_smaller_pictures_are_set_into_the_largest_one_s_cell() -> None:
    sheet = grid([[plain(4, 6, 0), plain(9, 12, 0)]], ["", ""])
    assert sheet.shape == (18 + 9, 2 * 12 + 2, 3)
    assert (sheet[18:22, :6] == 0).all()
    assert (sheet[22:, :12] == 255).all()


def test_a_row_of_another_length_than_the_headings_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        grid([[plain(4, 4, 0)]], ["a", "b"])
    with pytest.raises(AssertionError):
        grid([], ["a"])
