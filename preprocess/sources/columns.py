"""Which column holds the images, which the captions, which the drawings: as the options say, else by custom."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from preprocess.sources.base import SourceOptions
from shared.errors import UserError

IMAGE = ("file_name", "image", "image_file_name", "target", "jpg", "jpeg", "png", "webp", "img", "image_path")
CAPTION = ("text", "caption", "captions", "prompt", "texts", "txt", "description")
CONDITIONING = (
    "conditioning_image", "conditioning_image_file_name", "conditioning", "conditioning_file_name", "condition",
    "condition_image", "control_image", "control", "cond", "hint",
)  # fmt: skip
"""In the order of preference. `source` beside `target` is a drawing, too: fill50k has it so."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read."""

    image: str
    caption: str | None
    """None: nothing has captions."""
    conditioning: str | None
    """None: no drawings come with the images."""

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return (name for name in (self.image, self.caption, self.conditioning) if name is not None)


def choose(
    there: Collection[str], where: str, options: SourceOptions, images: Collection[str] | None = None
) -> Columns:
    """The columns among those `there`. `images`: those that can hold images, where their type tells.

    Raises `UserError`, with the columns there are, where one that the options name is missing and where no column of
    images is found.
    """
    listed = f"its columns: {', '.join(there) or 'none'}"
    for option in ("image_column", "caption_column", "conditioning_column"):
        name = getattr(options, option)
        if name is not None and name not in there:
            raise UserError(f"{where} has no column '{name}' (source.{option}); {listed}")
    image = options.image_column
    if image is None:
        held = [name for name in there if images is None or name in images]
        rest = [name for name in held if name not in CONDITIONING and name != options.conditioning_column]
        image = next((name for name in IMAGE if name in rest), None)
        if image is None and images is not None and len(rest) == 1:
            image = rest[0]
        if image is None:
            if images is None:
                raise UserError(
                    f"{where} has no 'file_name', which names the images; or say which column does: "
                    f"source.image_column; {listed}"
                )
            raise UserError(f"{where} has {len(rest)} columns of images; choose one: source.image_column; {listed}")
    conditioning = options.conditioning_column
    if conditioning is None:
        names: tuple[str, ...] = (*CONDITIONING, "source") if image == "target" else CONDITIONING
        held = [name for name in there if name != image and (images is None or name in images)]
        conditioning = next((name for name in names if name in held), None)
    caption = options.caption_column or next((name for name in CAPTION if name in there), None)
    return Columns(image, caption, conditioning)
