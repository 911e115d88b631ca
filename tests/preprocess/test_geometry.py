"""Buckets, crops and mirrors: invariants for all sizes, and alignment of image and conditioning image."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from preprocess.geometry import GeometryOptions, Placement, apply, bucket_sizes, place, recipe
from shared.errors import UserError

RESOLUTIONS = [16, 32, 64, 96, 128, 256, 320, 512, 528, 592, 768, 1024]
SIZES = [(512, 512), (640, 427), (300, 451), (3000, 2000), (17, 1200), (1200, 17), (1, 1), (511, 513), (4032, 2268)]


def picture(width: int, height: int) -> NDArray[np.uint8]:
    """Discs of several colours: smooth enough to compare across sizes, different everywhere."""
    image = Image.new("RGB", (width * 4, height * 4), (30, 60, 90))
    draw = ImageDraw.Draw(image)
    for x, y, radius, colour in ((0.3, 0.3, 0.2, "red"), (0.7, 0.6, 0.25, "white"), (0.45, 0.8, 0.1, "yellow")):
        box = [(x - radius) * width * 4, (y - radius) * height * 4, (x + radius) * width * 4, (y + radius) * height * 4]
        draw.ellipse(box, fill=colour)
    return np.array(image.resize((width, height), Image.Resampling.BOX))


# --- buckets ---


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("multiple", [8, 16])
def test_buckets_are_multiples_of_about_the_same_area(resolution: int, multiple: int) -> None:
    options = GeometryOptions(resolution=resolution)
    sizes = bucket_sizes(options, multiple)
    assert (resolution, resolution) in sizes
    assert sizes == sorted(set(sizes))
    for width, height in sizes:
        assert width % multiple == 0
        assert height % multiple == 0
        assert abs(width * height / resolution**2 - 1) <= 0.15
        assert max(width / height, height / width) <= options.max_aspect
        assert (height, width) in sizes
    assert len(sizes) >= 3 or resolution < 4 * multiple


def test_the_buckets_of_512_are_these() -> None:
    tall = [(384, 640), (384, 704), (448, 576)]
    wide = [(576, 448), (640, 384), (704, 384)]
    assert bucket_sizes(GeometryOptions(), 16) == [*tall, (512, 512), *wide]


def test_a_larger_max_aspect_adds_buckets_and_keeps_the_others() -> None:
    panorama = set(bucket_sizes(GeometryOptions(max_aspect=4), 16))
    assert panorama > set(bucket_sizes(GeometryOptions(), 16))
    assert bucket_sizes(GeometryOptions(max_aspect=1), 16) == [(512, 512)]


def test_without_buckets_everything_is_square() -> None:
    assert bucket_sizes(GeometryOptions(resolution=256, buckets=False), 16) == [(256, 256)]


def test_a_resolution_that_is_no_multiple_is_refused_with_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"resolution=500 is not a multiple of 16.*496 or 512"):
        bucket_sizes(GeometryOptions(resolution=500), 16)
    with pytest.raises(UserError, match="use 16"):
        bucket_sizes(GeometryOptions(resolution=8), 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 0}, "resolution=0"),
        ({"bucket_step": 0}, "bucket_step=0"),
        ({"max_aspect": 0.5}, "max_aspect=0.5"),
        ({"max_aspect": float("nan")}, "max_aspect=nan"),
        ({"max_aspect": float("inf")}, "max_aspect=inf"),
        ({"crops": 0, "crop": "random"}, "crops=0"),
        ({"crops": 2}, "add crop=random"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(GeometryOptions(), **change).check()  # type: ignore[arg-type]


def test_the_defaults_are_possible() -> None:
    GeometryOptions().check()
    GeometryOptions(crop="random", crops=3, flip=True).check()


# --- placements ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("resolution", [64, 512])
def test_the_crop_lies_inside_the_resized_image_which_just_covers_the_bucket(
    size: tuple[int, int], crop: str, resolution: int
) -> None:
    options = GeometryOptions(resolution=resolution, crop=crop, crops=3 if crop == "random" else 1)  # type: ignore[arg-type]
    for p in place(*size, "name", options, 16):
        assert (p.bucket_width, p.bucket_height) in bucket_sizes(options, 16)
        assert 0 <= p.crop_left <= p.resize_width - p.bucket_width
        assert 0 <= p.crop_top <= p.resize_height - p.bucket_height
        assert p.resize_width == p.bucket_width or p.resize_height == p.bucket_height
        # the aspect ratio is kept to half a pixel
        assert abs(p.resize_width * size[1] / size[0] - p.resize_height) <= 0.5 * max(1, size[1] / size[0]) + 1e-6


def test_an_image_of_a_buckets_size_is_placed_whole_in_that_bucket() -> None:
    for width, height in bucket_sizes(GeometryOptions(), 16):
        assert place(width, height, "a", GeometryOptions(), 16) == [
            Placement(width, height, width, height, 0, 0, False)
        ]


def test_no_other_bucket_would_keep_more_of_the_picture() -> None:
    def kept(width: int, height: int, bucket: tuple[int, int]) -> float:
        scale = max(bucket[0] / width, bucket[1] / height)
        return bucket[0] * bucket[1] / (width * height * scale**2)

    for size in SIZES:
        chosen = place(*size, "a", GeometryOptions(), 16)[0]
        best = max(kept(*size, bucket) for bucket in bucket_sizes(GeometryOptions(), 16))
        assert kept(*size, (chosen.bucket_width, chosen.bucket_height)) == pytest.approx(best)


def test_variants_are_ordered_crops_outer_flips_inner() -> None:
    options = GeometryOptions(crop="random", crops=3, flip=True)
    variants = place(1000, 750, "a", options, 16)
    assert [v.flip for v in variants] == [False, True] * 3
    assert [dataclasses.replace(v, flip=False) for v in variants[1::2]] == variants[::2]
    assert len({(v.crop_left, v.crop_top) for v in variants}) == 3
    fewer = place(1000, 750, "a", dataclasses.replace(options, crops=2), 16)
    assert variants[:4] == fewer, "another crop leaves the earlier ones as they are"


def test_random_crops_depend_on_seed_and_name_and_reach_both_edges() -> None:
    def left(name: str, seed: int = 0) -> int:
        return place(1000, 1000, name, GeometryOptions(crop="random", seed=seed, max_aspect=1), 16)[0].crop_left

    assert left("a") == left("a")
    lefts = {
        place(532, 512, f"{i}", GeometryOptions(crop="random", buckets=False), 16)[0].crop_left for i in range(500)
    }
    assert lefts == set(range(21))
    wide = [
        place(2000, 512, name, GeometryOptions(crop="random", seed=seed), 16)[0]
        for name, seed in (("a", 0), ("a", 1), ("b", 0))
    ]
    assert len({p.crop_left for p in wide}) == 3


def test_random_crops_are_the_same_in_another_process() -> None:
    code = (
        "from preprocess.geometry import *; "
        "print(place(2000, 900, 'x/ä.png', GeometryOptions(crop='random', seed=7), 16))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == str(place(2000, 900, "x/ä.png", GeometryOptions(crop="random", seed=7), 16))


# --- pixels ---


def test_an_image_that_fits_comes_out_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(apply(image, Placement(64, 64, 64, 64, 0, 0, False)), image)


def test_a_crop_without_resizing_cuts_the_very_pixels_out() -> None:
    image = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    np.testing.assert_array_equal(apply(image, Placement(64, 48, 100, 80, 30, 20, False)), image[20:68, 30:94])


@pytest.mark.parametrize("size", [(100, 80), (300, 451), (1000, 600), (40, 30)])
def test_resizing_and_cropping_in_one_step_equals_doing_one_after_the_other(size: tuple[int, int]) -> None:
    image = picture(*size)
    for p in place(*size, "a", GeometryOptions(resolution=128, crop="random", crops=3), 16):
        resized = np.array(Image.fromarray(image).resize((p.resize_width, p.resize_height), Image.Resampling.LANCZOS))
        cut = resized[p.crop_top : p.crop_top + p.bucket_height, p.crop_left : p.crop_left + p.bucket_width]
        assert np.abs(apply(image, p).astype(int) - cut).max() <= 1


def test_flip_mirrors_the_finished_crop() -> None:
    image = picture(300, 200)
    plain, mirrored = place(300, 200, "a", GeometryOptions(resolution=128, crop="random", flip=True), 16)
    flipped = apply(image, mirrored)
    np.testing.assert_array_equal(flipped, apply(image, plain)[:, ::-1])
    assert flipped.flags["C_CONTIGUOUS"]
    assert flipped.flags["WRITEABLE"]


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    small = apply(stripes, place(512, 512, "a", GeometryOptions(resolution=64), 16)[0])
    assert np.abs(small.astype(int) - 128).max() < 20


@pytest.mark.parametrize("size", SIZES)
def test_every_size_gives_an_array_of_the_buckets_shape(size: tuple[int, int]) -> None:
    image = np.zeros((size[1], size[0], 3), np.uint8)
    for p in place(*size, "a", GeometryOptions(resolution=64, crop="random", crops=2, flip=True), 16):
        pixels = apply(image, p)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (p.bucket_height, p.bucket_width, 3)


def test_a_very_long_picture_is_never_resized_whole() -> None:
    long = np.zeros((2, 40_000, 3), np.uint8)
    p = place(40_000, 2, "a", GeometryOptions(), 16)[0]
    assert p.resize_width > 5_000_000, "as a whole it would be 5 gigapixels"
    assert apply(long, p).shape == (p.bucket_height, p.bucket_width, 3)


# --- conditioning images ---


def test_a_conditioning_image_of_the_images_size_goes_the_same_way() -> None:
    image = picture(300, 200)
    for p in place(300, 200, "a", GeometryOptions(resolution=128, crop="random", crops=2, flip=True), 16):
        np.testing.assert_array_equal(apply(image.copy(), p), apply(image, p))


@pytest.mark.parametrize("conditioning_size", [(300, 200), (900, 600), (450, 300), (512, 512), (150, 300)])
def test_a_conditioning_image_of_another_size_aligns_with_the_image(conditioning_size: tuple[int, int]) -> None:
    image, conditioning = picture(600, 400), picture(*conditioning_size)
    for p in place(600, 400, "a", GeometryOptions(resolution=128, crop="random", crops=3, flip=True), 16):
        a, b = apply(image, p).astype(float), apply(conditioning, p).astype(float)
        here = np.abs(a - b).mean()
        shifted = [np.abs(np.roll(a, shift, axis) - b).mean() for shift in (-1, 1) for axis in (0, 1)]
        assert here < 4
        assert here < 0.7 * min(shifted), "a shift by one pixel would fit better"


def test_one_pixel_lines_survive_shrinking() -> None:
    drawing = np.zeros((512, 512, 3), np.uint8)
    drawing[101::64] = 255
    small = apply(drawing, place(512, 512, "a", GeometryOptions(resolution=128), 16)[0])
    assert (small[:, 64, 0] > 40).sum() == len(range(101, 512, 64))


# --- the recipe ---


def test_the_recipe_changes_with_what_the_pixels_depend_on_and_with_nothing_else() -> None:
    base = recipe(GeometryOptions(), 16)
    assert json.loads(json.dumps(base)) == base
    for same in ({"seed": 5}, {"bucket_step": 100}):
        assert recipe(dataclasses.replace(GeometryOptions(), **same), 16) == base, same  # type: ignore[arg-type]
    assert recipe(GeometryOptions(), 8) == base, "the multiple matters through the buckets only"
    for other in ({"resolution": 256}, {"bucket_step": 32}, {"buckets": False}, {"max_aspect": 4.0}, {"flip": True}):
        assert recipe(dataclasses.replace(GeometryOptions(), **other), 16) != base, other
    random = GeometryOptions(crop="random")
    assert recipe(random, 16) != base
    assert recipe(dataclasses.replace(random, seed=1), 16) != recipe(random, 16)
    assert recipe(dataclasses.replace(random, crops=2), 16) != recipe(random, 16)
