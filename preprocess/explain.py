"""Why a row has to be made, or is no longer wanted: in words, from what the cache was and what it shall be.

Nothing is decided here. What is missing follows from fingerprints and input digests alone; this says what a person has
changed that made them differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shared.cache.schema import Caption, Reads, Sample

_WORDS = {
    "text_length": "text length",
    "precision": "precision",
    "posterior": "posterior",
    "encoder.vae": "the VAE",
    "encoder.text_encoder": "CLIP",
    "encoder.text_encoder_2": "T5",
    "encoder.tokenizer": "CLIP's tokenizer",
    "encoder.tokenizer_2": "T5's tokenizer",
    "decoder_sha256": "the VAE's decoder",
    "shift": "the latents' shift",
    "scale": "the latents' scale",
    "schema_version": "cache schema version",
    "resampling": "resampling",
    "family": "family",
    "weights_sha256": "the detector's weights",
    "detect_resolutions": "detect resolutions",
    "channels": "the drawings' channels",
}
"""What the keys of recipes are called."""
_MAX_REASONS = 3
LOST = "not made yet, or lost"
DRAWINGS_CHANGED = "the drawings changed"


@dataclass(frozen=True)
class State:
    """Samples and captions as one run knew them, by key and id."""

    samples: Mapping[str, Sample] = field(default_factory=dict)
    captions: Mapping[str, Caption] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Iterable[Sample], captions: Iterable[Caption]) -> State:
        return cls({sample.key: sample for sample in samples}, {caption.id: caption for caption in captions})

    @cached_property
    def sources(self) -> set[str]:
        """The images that the samples show."""
        return {sample.source for sample in self.samples.values()}

    def users(self) -> dict[str, list[Sample]]:
        """Caption id to the sound samples that have it."""
        found: dict[str, list[Sample]] = {}
        for sample in self.samples.values():
            if sample.status == "ok":
                for caption in sample.captions:
                    found.setdefault(caption, []).append(sample)
        return found


def recipe_changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What differs between two recipes of a layer: "text length 77 -> 512", "the VAE changed"."""
    new, old = _flat(now), _flat(before)
    changes = []
    for key in [*new, *(key for key in old if key not in new)]:
        if new.get(key) != old.get(key) and key != "drawings":
            changes.append(_change(key, old.get(key), new.get(key)))
    if not changes and now.get("drawings") != before.get("drawings"):
        changes = [DRAWINGS_CHANGED]
    return ", ".join(changes) or "nothing changed"


def _change(key: str, old: Any, new: Any) -> str:
    words = _WORDS.get(key, key.replace("_", " ").replace("encoder.", "").replace(".", " "))
    if any(isinstance(value, str) and len(value) >= 32 for value in (old, new)):
        return f"{words} changed"
    return f"{words} {_text(old)} -> {_text(new)}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def missing(reads: Reads, key: str, now: State, before: State, users: Mapping[str, Sequence[Sample]]) -> str:
    """Why a layer that is made of `reads` lacks a row, where its recipe is the same as before. `users` are those of
    `now`."""
    if reads == "caption":
        return _caption_missing(key, before, users)
    sample, old = now.samples[key], before.samples.get(key)
    if old is None:
        return "variant added" if sample.source in before.sources else "image added"
    return input_changed(reads, sample, old) or LOST


def _caption_missing(key: str, before: State, users: Mapping[str, Sequence[Sample]]) -> str:
    if key in before.captions:
        return LOST
    mine = users.get(key, ())
    earlier = [(sample, before.samples[sample.key]) for sample in mine if sample.key in before.samples]
    if not earlier:
        return "image added" if mine else "the empty caption"
    kept_all = all(set(old.captions) <= set(sample.captions) for sample, old in earlier)
    return "caption added" if kept_all else "caption edited"


def stale(reads: Reads, key: str, now: State) -> str:
    """Why a row that a layer has is wanted no more."""
    if reads == "caption":
        return "caption no longer used"
    sample = now.samples.get(key)
    if sample is None:
        return "image or variant removed"
    return "image can no longer be used" if sample.status == "error" else "an earlier state of the image"


def input_changed(reads: Reads, sample: Sample, old: Sample) -> str | None:
    """What made a sample's input another one; None where it is the same."""
    if old.status == "error" and sample.status == "ok":
        return "image can be used now"
    file, was = (
        (sample.conditioning_sha256, old.conditioning_sha256)
        if reads == "conditioning_image"
        else (sample.sha256, old.sha256)
    )
    if file != was:
        what = "conditioning image" if reads == "conditioning_image" else "image"
        if was is None:
            return f"{what} added"
        return f"{what} removed" if file is None else f"{what} bytes changed"
    if sample.placement != old.placement:
        return _placement_changed(sample, old)
    return None


def _placement_changed(sample: Sample, old: Sample) -> str:
    new_size, old_size = (f"{s.bucket_width}x{s.bucket_height}" for s in (sample, old))
    if new_size != old_size:
        return f"resolution or buckets changed ({old_size} -> {new_size})"
    new, was = (json.loads(s.placement or "{}") for s in (sample, old))
    if new.get("flip") != was.get("flip"):
        return "flip changed"
    return "crop changed"


def summary(reasons: Mapping[str, int]) -> str:
    """Reasons with their numbers in one line, the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{reason} ({count:,})" for reason, count in ordered[:_MAX_REASONS]]
    if rest := sum(count for _, count in ordered[_MAX_REASONS:]):
        texts.append(f"other reasons ({rest:,})")
    return "; ".join(texts)
