"""Tile: the picture reduced and enlarged, with the degradations that pictures meet, each against its plain meaning."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from preprocess.conditions.tile import Reduction, Tile, TileOptions
from shared.errors import UserError
from tests.preprocess.test_conditions import REPOSITORY, photographs


def test_tile_keeps_the_colours_and_takes_the_detail_away() -> None:
    random = np.random.default_rng(0)
    flat = np.full((1, 64, 96, 3), (200, 30, 90), np.uint8)
    noisy = np.clip(flat + random.normal(0, 20, flat.shape), 0, 255).astype(np.uint8)
    drawings = Tile(TileOptions(factors=(2, 4, 8))).open("cpu")(np.concatenate([flat, noisy]))
    assert drawings.shape == (2, 3, 64, 96, 3)
    assert (drawings[0] == flat).all()
    spreads = [float(drawing.astype(float).std(axis=(0, 1)).max()) for drawing in drawings[1]]
    assert noisy.astype(float).std(axis=(1, 2)).max() > 15 > spreads[0] > spreads[1] > spreads[2]
    for drawing in drawings[1]:
        assert np.abs(drawing.mean(axis=(0, 1)) - noisy[0].mean(axis=(0, 1))).max() < 1


def test_tile_s_blur_goes_before_and_a_factor_of_one_only_blurs() -> None:
    images = photographs(2, 40, 56)
    only_blurred = Tile(TileOptions(factors=(1,), blur=2.0)).open("cpu")(images)
    for image, drawing in zip(images, only_blurred[:, 0], strict=True):
        np.testing.assert_array_equal(drawing, cv2.GaussianBlur(image, (0, 0), 2.0))
    np.testing.assert_array_equal(Tile(TileOptions(factors=(1,))).open("cpu")(images)[:, 0], images)


def test_tile_works_on_sides_that_are_no_multiples_of_its_factor_and_smaller_than_it() -> None:
    drawings = Tile(TileOptions(factors=(3, 64))).open("cpu")(photographs(1, 32, 50))
    assert drawings.shape == (1, 2, 32, 50, 3)
    assert drawings[0, 1].std(axis=(0, 1)).max() == 0, "one pixel's worth of colour"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TileOptions(factors=()), "is empty"),
        (TileOptions(factors=(0,)), "factors has 0"),
        (TileOptions(factors=(2, 2)), "twice"),
        (TileOptions(blur=-1.0), "blur=-1.0"),
        (TileOptions(blur=float("nan")), "blur=nan"),
        (TileOptions(sizes=(0,)), "sizes has 0"),
        (TileOptions(sizes=(64, 64)), "sizes has one twice"),
        (TileOptions(sizes=(64,), factors=(4,)), "leave one of them out"),
        (TileOptions(reduce=()), "reduce is empty"),
        (TileOptions(reduce=("bicubc",)), "did you mean 'bicubic'"),  # type: ignore[arg-type]
        (TileOptions(noise=-1.0), "noise=-1.0 must be 0"),
        (TileOptions(noise=float("inf")), "noise=inf must be 0"),
        (TileOptions(jpeg=101), "jpeg=101 must be a quality"),
        (TileOptions(jpeg=-1), "jpeg=-1 must be a quality"),
        (TileOptions(vary=True), "none of them is set"),
    ],
)
def test_impossible_tile_options_are_refused(options: TileOptions, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Tile(options)


def test_tile_of_a_size_is_what_others_prepare_64_of_256_and_another_shape_by_its_shorter_side() -> None:
    images = photographs(1, 256, 256)
    drawing = Tile(TileOptions(sizes=(64,))).open("cpu")(images)[0, 0]
    small = cv2.resize(images[0], (64, 64), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(drawing, cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC))
    np.testing.assert_array_equal(drawing, Tile(TileOptions(factors=(4,))).open("cpu")(images)[0, 0])
    wide = photographs(1, 192, 320)
    drawings = Tile(TileOptions(sizes=(32, 64, 500))).open("cpu")(wide)
    for drawing, (width, height) in zip(drawings[0], ((53, 32), (107, 64), (320, 192)), strict=True):
        small = cv2.resize(wide[0], (width, height), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(drawing, cv2.resize(small, (320, 192), interpolation=cv2.INTER_CUBIC))
    np.testing.assert_array_equal(drawings[0, 2], wide[0], "one with fewer pixels stays as it is")


REDUCTIONS: tuple[tuple[Reduction, ...], ...] = (("area",), ("bicubic",), ("area", "bicubic"))


def test_tile_reduces_as_pillow_s_bicubic_and_of_both_each_drawing_draws_one() -> None:
    images = photographs(12, 64, 64)
    area, bicubic, both = (
        Tile(TileOptions(sizes=(16,), reduce=reduce)).open("cpu")(images)[:, 0] for reduce in REDUCTIONS
    )
    small = np.asarray(Image.fromarray(images[0]).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(bicubic[0], cv2.resize(small, (64, 64), interpolation=cv2.INTER_CUBIC))
    drawn = [
        (bool((drawing == a).all()), bool((drawing == b).all()))
        for drawing, a, b in zip(both, area, bicubic, strict=True)
    ]
    assert set(drawn) == {(True, False), (False, True)}


def test_tile_adds_noise_of_the_stated_strength_to_the_small_image() -> None:
    grey = np.full((1, 128, 128, 3), 128, np.uint8)
    drawing = Tile(TileOptions(factors=(1,), noise=10.0)).open("cpu")(grey)[0, 0].astype(float)
    assert abs(drawing.mean() - 128) < 0.3
    assert abs(drawing.std() - 10) < 0.3
    small = Tile(TileOptions(factors=(8,), noise=10.0)).open("cpu")(grey)[0, 0].astype(float)
    assert np.abs(np.diff(small, axis=0)).mean() < 3 < 10 < np.abs(np.diff(drawing, axis=0)).mean(), "blots, not grain"
    edge = Tile(TileOptions(factors=(1,), noise=10.0)).open("cpu")(np.zeros_like(grey))[0, 0]
    assert edge.max() < 60, "cut off at black, not wrapped around to white"


def test_tile_s_jpeg_is_the_small_image_s_and_keeps_the_colours() -> None:
    images = photographs(1, 128, 128)
    with Tile(TileOptions(factors=(2,), jpeg=30)).open("cpu") as drawer:
        drawing = drawer(images)[0, 0]
    coded = io.BytesIO()
    small = cv2.resize(images[0], (64, 64), interpolation=cv2.INTER_AREA)
    Image.fromarray(small).save(coded, "JPEG", quality=30)
    theirs = cv2.resize(np.asarray(Image.open(coded)), (128, 128), interpolation=cv2.INTER_CUBIC)
    plain = Tile(TileOptions(factors=(2,))).open("cpu")(images)[0, 0]
    # Two programs' JPEG differ in a rounding here and there; JPEG and none differ everywhere.
    assert np.abs(drawing.astype(int) - theirs).mean() < 1 < 3 < np.abs(drawing.astype(int) - plain).mean()
    red = np.full((1, 64, 64, 3), (200, 30, 90), np.uint8)
    assert np.abs(Tile(TileOptions(jpeg=90)).open("cpu")(red)[0, 0].astype(int) - red[0]).max() <= 3
    coarse, fine = (
        np.abs(Tile(TileOptions(factors=(1,), jpeg=jpeg)).open("cpu")(images)[0, 0].astype(int) - images[0]).mean()
        for jpeg in (10, 95)
    )
    assert coarse > 2 * fine


DEGRADED = TileOptions(sizes=(16, 32), reduce=("area", "bicubic"), blur=1.0, noise=8.0, jpeg=40, vary=True)


def test_what_tile_draws_at_random_is_a_function_of_the_picture_alone() -> None:
    images = photographs(4, 64, 96)
    with Tile(DEGRADED).open("cpu") as drawer:
        together, alone = drawer(images), np.concatenate([drawer(image[None]) for image in images[::-1]])[::-1]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, Tile(DEGRADED).open("cpu")(images))
    code = (
        "import hashlib, numpy as np; from preprocess.conditions.tile import *; "
        f"images = np.frombuffer(bytes.fromhex('{images[0].tobytes().hex()}'), np.uint8).reshape(1, 64, 96, 3); "
        f"print(hashlib.sha256(Tile({DEGRADED!r}).open('cpu')(images)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == hashlib.sha256(together[0].tobytes()).hexdigest()


def test_tile_s_strengths_vary_from_none_to_what_is_stated() -> None:
    grey = np.stack([np.full((64, 64, 3), value, np.uint8) for value in range(100, 140)])
    spreads = Tile(TileOptions(factors=(1,), noise=20.0, vary=True)).open("cpu")(grey)[:, 0].astype(float)
    spread = spreads.std(axis=(1, 2, 3))
    assert spread.min() < 3 < 15 < spread.max() < 21
    assert 7 < spread.mean() < 13
    images = photographs(24, 64, 64)
    sharp = Tile(TileOptions(factors=(1,), blur=4.0, vary=True)).open("cpu")(images)[:, 0].astype(int)
    most = Tile(TileOptions(factors=(1,), blur=4.0)).open("cpu")(images)[:, 0].astype(int)
    shares = np.abs(sharp - images).mean(axis=(1, 2, 3)) / np.abs(most - images).mean(axis=(1, 2, 3))
    assert shares.min() < 0.2 < 0.8 < shares.max() <= 1
    coded = Tile(TileOptions(factors=(1,), jpeg=5, vary=True)).open("cpu")(images)[:, 0].astype(int)
    worst = Tile(TileOptions(factors=(1,), jpeg=5)).open("cpu")(images)[:, 0].astype(int)
    shares = np.abs(coded - images).mean(axis=(1, 2, 3)) / np.abs(worst - images).mean(axis=(1, 2, 3))
    assert shares.min() < 0.2 < 0.5 < shares.max() <= 1, "the worst qualities are far worse than the middle"


def test_tile_s_recipe_of_the_first_caches_stays_what_it_was_and_names_what_is_set() -> None:
    assert Tile(TileOptions(factors=(2, 4), blur=1.5)).recipe() == {
        "detector": "cv2.GaussianBlur, INTER_AREA, INTER_CUBIC", "factors": [2, 4], "blur": 1.5,
    }  # fmt: skip
    recipe = Tile(DEGRADED).recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe == {
        "detector": "cv2.GaussianBlur, INTER_AREA, INTER_CUBIC", "sizes": [16, 32], "blur": 1.0,
        "reduce": ["area", "bicubic"], "noise": 8.0, "jpeg": 40, "vary": True,
    }  # fmt: skip
    changed: tuple[dict[str, Any], ...] = (
        {"sizes": (16,)},
        {"reduce": ("area",)},
        {"noise": 0.0},
        {"jpeg": 0},
        {"vary": False},
    )
    for changes in changed:
        assert Tile(replace(DEGRADED, **changes)).recipe() != recipe


def test_tile_s_recipe_holds_its_settings() -> None:
    recipe = Tile(TileOptions(factors=(2, 4), blur=1.5)).recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert (recipe["factors"], recipe["blur"]) == ([2, 4], 1.5)
    assert Tile(replace(TileOptions(factors=(2, 4), blur=1.5), blur=0.0)).recipe() != recipe
