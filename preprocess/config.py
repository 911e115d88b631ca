"""The options of the preprocessing stage, composed from those of its parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from preprocess import conditions
from preprocess.engine import EngineOptions
from preprocess.geometry import GeometryOptions, bucket_sizes
from preprocess.prior import PriorOptions
from preprocess.sources import SourceOptions
from shared import families
from shared.cache.storage import RemoteOptions, is_remote
from shared.errors import UserError

# One group of options per file in conditions/: a new condition brings its own.
ConditionOptions: Any = dataclasses.make_dataclass(
    "ConditionOptions",
    [
        (name, conditions.get(name).Options, field(default_factory=conditions.get(name).Options))
        for name in conditions.names()
    ],
    namespace={"__doc__": "How each condition is drawn.", "__module__": __name__},
    frozen=True,
)


NO_CONDITION = "none"
"""As in `--condition none`: the same as no name at all."""


@dataclass(frozen=True)
class EncodeOptions:
    """How the encoders are run. Nothing here is part of a layer's fingerprint."""

    image_batch: int = 8
    """Images of one call of the VAE or a detector. Lower it if memory runs out."""
    text_batch: int = 32
    """Captions of one call of a text encoder."""
    workers: int = 4
    """Threads that read, decode and crop images."""
    shard_rows: int | None = None
    """Rows of one shard, the unit of work that an interruption can lose. Default: by layer, some hundred MB."""
    retry_errors: bool = False
    """Try again what had no result in an earlier run (an encoder gave NaN, a drawing was broken) though nothing that it
    depends on has changed. Touch it after mending what was at fault: a driver, memory, a library."""

    def check(self) -> None:
        """Refuse impossible values."""
        for name in ("image_batch", "text_batch", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"encode.{name} must be 1 or more, not {getattr(self, name)}")
        if self.shard_rows is not None and self.shard_rows < 1:
            raise UserError(f"encode.shard_rows must be 1 or more, not {self.shard_rows}")


@dataclass(frozen=True)
class PreprocessConfig:
    """Encode a data set once: line art, VAE latents and text embeddings go into a cache that every training run
    reads. Running the same command again resumes; with changed data or options it redoes only what they change."""

    data: str
    """A folder of images with metadata.jsonl (file_name, text; optional conditioning_image, split), or with NAME.txt
    beside each image. Or WebDataset tars (`laion/{00000..00099}.tar`), Parquet files or a data set that save_to_disk
    wrote, by a path, a pattern or a folder; the first two also at a URL."""
    cache: str = "cache"
    """Where the cache is made, or brought up to date: a folder, or a URL (s3://, gs://, hf://)."""
    family: str = "flux"
    """The model family whose encoders are run."""
    model: str | None = None
    """A folder in diffusers' layout or a hub id. Default: the family's own, FLUX.1-dev."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    condition: tuple[str, ...] = ("lineart",)
    """What the ControlNet will follow; several are kept side by side. `precomputed` takes the conditioning_image;
    `none` draws nothing: a LoRA or a whole base is trained on pictures and captions alone."""
    text_length: int | None = None
    """T5 tokens, with FLUX. Padding is part of what it sees, so use the same length at inference. Default: the model's
    own, 512; at 77 the cache is a sixth of the size. Stable Diffusion's 77 are no choice."""
    text_tokens: bool = False
    """Keep CLIP's tokens of each caption too, some hundred bytes: for training CLIP along with a LoRA
    (lora.train_text_encoder), which reads them in the place of what CLIP says."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the encoders and of the cache. bf16 is what pipelines are run in."""
    posterior: Literal["moments", "mean", "sample"] = "moments"
    """What is kept of the VAE's posterior. moments: its mean and standard deviation, so that training draws anew in
    each epoch; mean: half the bytes, and nothing is drawn; sample: half the bytes, one draw, the same in each epoch.
    Touch it where latents are most of the cache, as with a short text_length."""
    validation_fraction: float = 0.05
    """Share of images that are held out for validation where the data set does not say. Each name's hash decides for
    itself, so that it is roughly this share, and added images change nothing for the others."""
    validation_max: int = 64
    """The most images that are held out."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    source: SourceOptions = field(default_factory=SourceOptions)
    geometry: GeometryOptions = field(default_factory=GeometryOptions)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    prior: PriorOptions = field(default_factory=PriorOptions)
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    remote: RemoteOptions = field(default_factory=RemoteOptions)

    def __post_init__(self) -> None:
        if self.condition == (NO_CONDITION,):  # the word that a command line can say; a recipe may write []
            object.__setattr__(self, "condition", ())

    def check(self) -> None:
        """Refuse impossible values, of the parts too."""
        family = families.get(self.family)
        if NO_CONDITION in self.condition:
            raise UserError(f"condition: {NO_CONDITION} stands alone; leave it out, or the others")
        for name in self.condition:
            conditions.get(name)
            if self.condition.count(name) > 1:
                raise UserError(f"condition: {name} is named twice")
            getattr(self.conditions, name).check()
        least, most = family.min_text_length, family.max_text_length
        if self.text_length is not None and not least <= self.text_length <= most:
            allowed = f"from {least} to {most}" if least < most else f"{most} with {family.name}, or left out"
            raise UserError(f"text_length must be {allowed}, not {self.text_length}")
        if self.text_tokens and not family.text_encoders:
            raise UserError(f"text_tokens: {family.name} has no text encoder that can be trained; leave it out")
        if not 0 <= self.validation_fraction < 1 or self.validation_max < 0:
            raise UserError("validation_fraction is a share from 0 to below 1, validation_max 0 or more")
        for part in (self.source, self.geometry, self.prior, self.encode, self.engine, self.remote):
            part.check()
        self._check_prior()
        if self.device == "cpu" and self.engine.gpus:
            raise UserError("engine.gpus names GPUs, but device is cpu: leave one of them out")
        bucket_sizes(self.geometry, family.size_multiple)

    def _check_prior(self) -> None:
        if self.prior.prompt is None:
            return
        for name in self.condition:
            if conditions.get(name).reads == "conditioning_image":
                raise UserError(
                    f"condition '{name}' takes the drawings that come with the images, and class images have none: "
                    "leave prior.prompt out, or choose another condition"
                )
        if is_remote(self.cache) and self.engine.chosen == "ray":
            raise UserError(
                "prior.prompt with engine.kind=ray: workers on other machines do not see class images in a cache at a "
                "URL; make it with another engine, or in a folder that all machines share"
            )
