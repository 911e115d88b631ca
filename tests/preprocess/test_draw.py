"""The detectors as a process: it draws as the cache was drawn, refuses what it cannot, and ends with who asked it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocess import conditions, draw
from preprocess.conditions.canny import CannyOptions
from preprocess.conditions.tile import TileOptions
from shared import frames
from shared.cache import schema
from shared.cache.reader import Cache
from shared.errors import UserError


def recipe_of(name: str, options: Any = None) -> dict[str, Any]:
    """As preprocess/layers.py makes it."""
    condition = conditions.get(name)
    made = condition(condition.Options() if options is None else options)
    return {"layer": name, "schema_version": 2, "condition": name, "resampling": "lanczos", **made.recipe()}


def asked(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    name = recipe["layer"]
    return {"layers": {name: recipe}, "options": None, "stand_in": None, "device": "cpu", **changes}


def answers(*requests: tuple[dict[str, Any], np.ndarray | None]) -> list[tuple[dict[str, Any], np.ndarray | None]]:
    """What is said to these requests, in this process."""
    incoming, outgoing = io.BytesIO(), io.BytesIO()
    for request in requests:
        frames.write(incoming, *request)
    incoming.seek(0)
    draw.serve(incoming, outgoing)
    outgoing.seek(0)
    return list(iter(lambda: frames.read(outgoing), None))


@contextmanager
def served() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "preprocess.draw"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_the_process_draws_every_cached_drawing_again_to_the_bit_and_ends_with_its_pipe(
    tiny_cache: Path, tiny_data: Path
) -> None:
    cache = Cache(tiny_cache)
    recorded = schema.read_sealed(tiny_cache / schema.OPTIONS)
    with served() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        frames.write(process.stdin, asked(dict(cache.summary("canny").recipe), options=recorded["conditions"]))
        assert frames.read(process.stdout) == ({"lines": {"canny": True}}, None)
        for key, sample in cache.samples.items():
            picture = np.asarray(Image.open(tiny_data / sample.source).convert("RGB"))
            frames.write(process.stdin, {"layer": "canny"}, picture[None])
            answer = frames.read(process.stdout)
            assert answer is not None
            assert answer[1] is not None
            cached = Image.open(io.BytesIO(cache.layer("canny").read(key, "0.png"))).convert("RGB")
            assert np.array_equal(answer[1][0], np.asarray(cached))
        process.stdin.close()
        assert process.wait(20) == 0
        assert process.stdout.read() == b""


def test_it_draws_with_the_settings_of_the_layer_and_not_with_those_of_now() -> None:
    picture = np.random.default_rng(0).integers(0, 80, (1, 32, 32, 3), np.uint8)
    drawn = {}
    for low, high in ((10, 20), (100, 200)):
        recipe = recipe_of("canny", CannyOptions(low, high))
        # Of another layer since: the recipe says what this one was drawn with.
        [ready, (_, drawings)] = answers(
            (asked(recipe, options={"canny": {"low": 3, "high": 4}}), None), ({"layer": "canny"}, picture)
        )
        assert ready == ({"lines": {"canny": True}}, None)
        assert drawings is not None
        drawn[high] = drawings
        with conditions.get("canny")(CannyOptions(low, high)).open("cpu") as drawer:
            assert np.array_equal(drawings, drawer(picture)[:, -1])
    assert drawn[20].sum() > drawn[200].sum()


def test_a_layer_that_was_drawn_before_options_were_set_which_its_recipe_leaves_out_is_drawn_again_as_it_was() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), np.uint8)
    for made, since in (
        (TileOptions(), {"factors": [4], "jpeg": 50, "noise": 3.0}),
        (TileOptions(sizes=(8,)), {"factors": [4], "sizes": [], "jpeg": 0}),
    ):
        recipe = recipe_of("tile", made)
        [ready, (_, drawings)] = answers((asked(recipe, options={"tile": since}), None), ({"layer": "tile"}, picture))
        assert ready == ({"lines": {"tile": False}}, None)
        assert drawings is not None
        with conditions.get("tile")(made).open("cpu") as drawer:
            assert np.array_equal(drawings, drawer(picture)[:, -1])


def test_of_several_drawings_the_finest_comes_and_depth_and_tile_are_no_lines() -> None:
    tile, options = conditions.get("tile"), TileOptions(factors=(8, 2))
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), np.uint8)
    [ready, (_, drawings)] = answers((asked(recipe_of("tile", options)), None), ({"layer": "tile"}, picture))
    assert ready == ({"lines": {"tile": False}}, None)
    assert drawings is not None
    with tile(options).open("cpu") as drawer:
        assert np.array_equal(drawings, drawer(picture)[:, 1])
    assert [name for name in conditions.names() if not conditions.get(name).lines] == ["depth", "tile"]


@pytest.mark.parametrize(("recipe", "stand_in", "sentence"), [
    ({**recipe_of("canny"), "detector": "another's"}, None, r"that drew 'canny' is not here: its detector is"),
    (recipe_of("precomputed"), None, r"came with the images, no detector made them.*adherence-detector canny"),
    (recipe_of("precomputed"), "precomputed", r"precomputed detects nothing"),
    (recipe_of("precomputed"), "cany", r"unknown condition 'cany'"),
])  # fmt: skip
def test_a_detector_that_is_not_the_cache_s_is_refused(
    recipe: dict[str, Any], stand_in: str | None, sentence: str
) -> None:
    [(words, _)] = answers((asked(recipe, stand_in=stand_in), None))
    with pytest.raises(UserError, match=sentence):
        raise UserError(words["refused"])


def test_drawings_that_came_with_the_images_are_stood_in_for() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), np.uint8)
    requests = (asked(recipe_of("precomputed"), stand_in="canny"), None), ({"layer": "precomputed"}, picture)
    [ready, (_, drawings)] = answers(*requests)
    assert ready == ({"lines": {"precomputed": True}}, None)
    assert drawings is not None
    with conditions.get("canny")(CannyOptions()).open("cpu") as drawer:
        assert np.array_equal(drawings, drawer(picture)[:, 0])


def test_what_was_cut_off_counts_as_the_end() -> None:
    whole = io.BytesIO()
    frames.write(whole, {"layer": "canny"}, np.zeros((1, 4, 4, 3), np.uint8))
    for length in range(len(whole.getvalue())):
        assert frames.read(io.BytesIO(whole.getvalue()[:length])) is None
    words, pixels = frames.read(io.BytesIO(whole.getvalue())) or ({}, None)
    assert words == {"layer": "canny"}
    assert pixels is not None
    assert pixels.shape == (1, 4, 4, 3)


def test_what_libraries_print_does_not_get_into_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    told, answered = os.pipe()
    before = os.dup(1)
    os.dup2(answered, 1)
    try:

        def serve(incoming: Any, outgoing: Any) -> None:
            os.write(1, b"progress bar\n")
            frames.write(outgoing, {"lines": {}})

        monkeypatch.setattr(draw, "serve", serve)
        monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", closefd=False))
        monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", closefd=False))
        monkeypatch.setattr(draw.signal, "signal", lambda *rest: None)
        draw.main()
    finally:
        os.dup2(before, 1)
        for descriptor in (before, answered):
            os.close(descriptor)
    with os.fdopen(told, "rb") as stream:
        assert stream.read() == b'{"lines": {}}\n'
