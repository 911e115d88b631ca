"""The options of looking into a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.errors import UserError


@dataclass(frozen=True)
class InspectConfig:
    """See into a cache: writes one HTML page, complete in itself, with totals, histograms, the latents' statistics,
    failures, and a gallery of samples that can be searched and filtered."""

    cache: str = "cache"
    """The cache to look into, a folder or a URL; nothing in it is changed."""
    out: str | None = None
    """Where the page goes. Default: beside the cache's folder, CACHE.html."""
    samples: int = 500
    """Samples drawn for the gallery; failures and outliers come on top, at most as many of each. Raise it to browse
    more: a page of 500 samples has 5 to 30 MB."""
    statistics_samples: int = 10_000
    """Samples and captions that are read for the latents' statistics and the captions' tokens. Raise it to look for
    outliers in all of a larger cache; it reads all their latents."""
    model: str | None = None
    """A folder or hub id whose VAE decodes the latents and whose tokenizer counts tokens. Default: the one that the
    cache was made with. Only what is on this machine is used, nothing is downloaded."""
    decode: int | None = None
    """The most samples whose latents are decoded into pictures; the others show their first drawing, 0 decodes none.
    Default: all on a GPU, on a CPU as many as take some minutes."""
    picture_side: int | None = None
    """The long side of the embedded pictures in pixels, at most. Default: 512, or less where there are many."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""

    def check(self) -> None:
        """Refuse impossible values."""
        for name, least in (("samples", 1), ("statistics_samples", 1), ("decode", 0), ("picture_side", 16)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be {least} or more, not {value}")
