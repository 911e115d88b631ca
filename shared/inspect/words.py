"""Facts of a cache in readable words: recipes, placements, sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import gcd
from typing import Any, NamedTuple

_SAID_ELSEWHERE = ("layer", "schema_version", "family")
"""Entries of a recipe that the page says in other places."""
_DIGEST = re.compile(r"[0-9a-f]{32,}")
_SHORT_DIGEST = 8


class Word(NamedTuple):
    """One setting of a recipe."""

    label: str
    value: str
    whole: str
    """The value uncut, where `value` is not."""


def recipe(content: Mapping[str, Any], fingerprints: Mapping[str, str]) -> list[Word]:
    """A layer's recipe as settings in words. `fingerprints`: layer to fingerprint, so that a layer is called by its
    name."""
    names = {fingerprint: name for name, fingerprint in fingerprints.items()}
    return [word for key, value in content.items() if key not in _SAID_ELSEWHERE for word in _words(key, value, names)]


def _words(key: str, value: Any, names: Mapping[str, str]) -> list[Word]:
    if isinstance(value, Mapping):
        return [word for inner, part in value.items() for word in _words(inner, part, names)]
    label = key.replace("_", " ").removesuffix(" sha256")
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return [Word(label, names.get(value, value[:_SHORT_DIGEST]), value)]
    if isinstance(value, bool):
        return [Word(label, "yes" if value else "no", "")]
    if isinstance(value, list):
        return [Word(label, ", ".join(str(item) for item in value), "")]
    return [Word(label, "none" if value is None else str(value), "")]


def size(width: int, height: int) -> str:
    """`512 x 768`, with the sign that is meant."""
    return f"{width:,} \u00d7 {height:,}"


def placement(text: str | None) -> str:
    """How a sample was cut from its image, where its placement says so in words that are known here."""
    if text is None:
        return ""
    found = json.loads(text)
    if not {"resize_width", "resize_height", "crop_left", "crop_top", "bucket_width", "bucket_height"} <= found.keys():
        return text
    parts = [f"resized to {size(found['resize_width'], found['resize_height'])}"]
    cropped = [
        f"{found[offset]} of {found[whole] - found[kept]} px {where}"
        for offset, whole, kept, where in (
            ("crop_left", "resize_width", "bucket_width", "left"),
            ("crop_top", "resize_height", "bucket_height", "at the top"),
        )
        if found[whole] > found[kept]
    ]
    parts.append(f"cut off {' and '.join(cropped)}" if cropped else "nothing cut off")
    return ", ".join([*parts, *(["mirrored"] if found.get("flip") else [])])


def num_bytes(count: int) -> str:
    """`1.2 GB`: powers of ten, as disks are sold."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= one:
            return f"{count / one:,.1f} {unit}"
    return f"{count:,} bytes"


def aspect(width: int, height: int) -> str:
    """`3:2`, or as a decimal where the terms are large."""
    divisor = gcd(width, height)
    w, h = width // divisor, height // divisor
    return f"{w}:{h}" if max(w, h) <= 32 else f"{width / height:.2f}:1"


def plural(count: int, noun: str) -> str:
    """`1 sample`, `1,200 samples`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def cut(text: str, most: int) -> str:
    """At most so many characters, with an ellipsis where some are missing."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
