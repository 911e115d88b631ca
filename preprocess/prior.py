"""Which class images a cache shall have: the options of prior preservation. Light: what paints is `class_images`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from shared.errors import UserError


@dataclass(frozen=True)
class PriorOptions:
    """Pictures of a subject's class that the model paints before it is trained on the subject, so that it does not
    forget the class."""

    prompt: str | None = None
    """What they show, as "a photo of a dog" where the subject is "a photo of sks dog". Default: there are none."""
    images: int = 100
    """How many; raising it paints only the new ones."""
    seed: int = 0
    """Draws the noise that each begins as, together with its number."""
    steps: int | None = None
    """Steps of denoising. Default: the family's, 28 with FLUX, 50 with Stable Diffusion."""
    guidance: float | None = None
    """Default: the family's, 3.5 with FLUX, 7.5 with SD 1.5, 5.0 with SDXL."""

    def check(self) -> None:
        """Refuse impossible values and those that would have no effect."""
        if self.prompt is None:
            if idle := [name for name, value in asdict(self).items() if value != getattr(PriorOptions, name)]:
                raise UserError(f"prior.{idle[0]} has no effect without prior.prompt: say what class images show")
            return
        if not self.prompt.strip():
            raise UserError("prior.prompt is blank; leave it out, and there are no class images")
        if self.images < 1:
            raise UserError(f"prior.images must be 1 or more, not {self.images}")
        if self.seed < 0:
            raise UserError(f"prior.seed must be 0 or more, not {self.seed}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"prior.steps must be 1 or more, not {self.steps}")
        if self.guidance is not None and self.guidance < 0:
            raise UserError(f"prior.guidance must be 0 or more, not {self.guidance}")
