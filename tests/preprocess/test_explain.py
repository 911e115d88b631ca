"""Reasons in words: of recipes that differ, and of samples and captions that did."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from preprocess import explain
from preprocess.explain import State
from shared.cache.schema import Caption, Sample
from tests.shared.small_cache import sample

BOX = Caption.of("a box")
EMPTY = Caption.of("")


def state(*samples: Sample, captions: tuple[str, ...] = ("a box",)) -> State:
    return State.of(samples, [EMPTY, *map(Caption.of, captions)])


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        ({"text_length": 512}, {"text_length": 77}, "text length 77 -> 512"),
        ({"encoder": {"vae": "a" * 64}}, {"encoder": {"vae": "b" * 64}}, "the VAE changed"),
        ({"precision": "float32"}, {"precision": "bfloat16"}, "precision bfloat16 -> float32"),
        ({"low": 50, "high": 200}, {"low": 100, "high": 200}, "low 100 -> 50"),
        ({"detect_resolutions": [256, 512]}, {"detect_resolutions": [512]}, "detect resolutions 512 -> 256, 512"),
        ({"posterior": "mean"}, {}, "posterior none -> mean"),
        ({"drawings": "a" * 64}, {"drawings": "b" * 64}, "the drawings changed"),
        ({"drawings": "a" * 64, "shift": 1}, {"drawings": "b" * 64, "shift": 2}, "the latents' shift 2 -> 1"),
        ({"x": 1}, {"x": 1}, "nothing changed"),
    ],
)
def test_a_changed_recipe_is_said_in_words(now: dict, before: dict, said: str) -> None:
    assert explain.recipe_changed(now, before) == said


def placed(width: int = 16, **placement: object) -> Sample:
    return replace(sample("a", "a box"), bucket_width=width, placement=json.dumps({"bucket_width": width, **placement}))


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        (sample("a", "a box"), None, "image added"),
        (replace(sample("a-1", "a box"), source="a.png"), sample("a", "a box"), "variant added"),
        (sample("a", "a box", content="2"), sample("a", "a box"), "image bytes changed"),
        (placed(32), placed(16), "resolution or buckets changed (16x16 -> 32x16)"),
        (placed(flip=True), placed(flip=False), "flip changed"),
        (placed(crop_left=1), placed(crop_left=0), "crop changed"),
        (sample("a", "a box"), replace(sample("a", "a box"), status="error"), "image can be used now"),
        (sample("a", "a box"), sample("a", "a box"), "not made yet, or lost"),
    ],
)
def test_a_missing_row_of_an_image_is_said_in_words(now: Sample, before: Sample | None, said: str) -> None:
    earlier = state() if before is None else state(before)
    assert explain.missing("image", now.key, state(now), earlier, {}) == said


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        ("b" * 64, "a" * 64, "conditioning image bytes changed"),
        ("b" * 64, None, "conditioning image added"),
        (None, "a" * 64, "conditioning image removed"),
    ],
)
def test_a_missing_row_of_a_conditioning_image_is_said_in_words(now: str | None, before: str | None, said: str) -> None:
    new, old = (replace(sample("a", "a box"), conditioning_sha256=sha256) for sha256 in (now, before))
    assert explain.missing("conditioning_image", "a", state(new), state(old), {}) == said


def test_a_missing_caption_is_an_edited_one_or_that_of_an_added_image() -> None:
    before = state(sample("a", "a box"))
    now = state(sample("a", "a ball"), sample("b", "a tree"), captions=("a ball", "a tree"))
    users = now.users()
    said = {text: explain.missing("caption", Caption.of(text).id, now, before, users) for text in ("a ball", "a tree")}
    assert said == {"a ball": "caption edited", "a tree": "image added"}
    more = state(sample("a", "a box", "a ball"), captions=("a box", "a ball"))
    assert explain.missing("caption", Caption.of("a ball").id, more, before, more.users()) == "caption added"
    assert explain.missing("caption", BOX.id, now, before, users) == "not made yet, or lost"
    assert explain.missing("caption", EMPTY.id, now, State(), users) == "the empty caption"


def test_a_stale_row_is_said_in_words() -> None:
    now = state(sample("a", "a box"), replace(sample("b", "a box"), status="error"))
    said = {key: explain.stale("image", key, now) for key in ("a", "b", "c")}
    assert said == {
        "a": "an earlier state of the image", "b": "image can no longer be used", "c": "image or variant removed",
    }  # fmt: skip
    assert explain.stale("caption", BOX.id, now) == "caption no longer used"


def test_reasons_are_counted_the_most_frequent_first() -> None:
    assert explain.summary({"x": 1, "y": 2000}) == "y (2,000); x (1)"
    assert explain.summary({str(i): 5 - i for i in range(5)}) == "0 (5); 1 (4); 2 (3); other reasons (3)"
