"""The questions that a model family answers. Nobody else asks which family it is.

Letters: B batch, H W pixels, h w latents (H/8, W/8), L text tokens, D features, P features of a pooled embedding.
Latents as the base takes them, x_t, are (B, ...): for FLUX (B, T, C), T image tokens of C channels; for Stable
Diffusion (B, C, h, w).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cache.schema import Field
from shared.model_folder import ModelFolder

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]

Posterior = Literal["moments", "mean", "sample"]
"""What of a VAE's posterior is kept: its mean and standard deviation, its mean, or one draw."""


@dataclass(frozen=True)
class LayerKind:
    """A layer that this family needs: what it is made from, by which component, and what one member holds."""

    name: str
    """`latents`; for a layer made from the condition, the condition's name comes before it: `lineart_latents`."""
    reads: Literal["image", "condition", "caption"]
    components: tuple[str, ...]
    """Folders of the model whose content decides the bytes. The first holds the encoder's weights. None: no encoder has
    a say in it, and the preprocessing stage makes it: `parts.pixels` of a condition's drawings, `parts.sizes` of
    images."""
    fields: tuple[Field, ...]
    """What the encoder gives; of a posterior, its moments."""
    shard_rows: int
    """Rows of one shard, the unit of work: some hundred MB, some minutes."""

    @property
    def rows(self) -> Literal["samples", "captions"]:
        """What the layer has one member for."""
        return "captions" if self.reads == "caption" else "samples"

    def name_in_cache(self, condition: str) -> str:
        """What this layer is called in a cache: `condition_latents` of canny is `canny_latents`."""
        return self.name.replace("condition", condition) if self.reads == "condition" else self.name


@dataclass
class Batch:
    """Samples of one shape, on the device: raw tensors as they are cached, stacked.

    `tensors` maps "role.field" to (B, ...); roles are the family's layer names, with the condition's own name left
    out: "latents.mean", "condition_latents.mean" or "condition_pixels.pixels", "t5.prompt_embeds".
    """

    keys: list[str]
    height: int
    """Pixels."""
    width: int
    tensors: Tensors
    step_samples: int = 0
    """Samples of the whole optimizer step that this batch is part of, over all processes."""
    position: int = 0
    """Number of this batch in the endless stream of the run: seeds its noise."""
    prior_weight: float | None = None
    """Of class images: of their losses in the step's. None: these are pictures."""

    def __len__(self) -> int:
        return len(self.keys)

    def role(self, name: str) -> Tensors:
        """The tensors of one layer under its fields' names: of "latents", "mean" and what else is cached."""
        return {key.split(".", 1)[1]: tensor for key, tensor in self.tensors.items() if key.split(".", 1)[0] == name}


@dataclass
class Inputs:
    """What the model is called with beside x_t and t: prepared once per batch, final."""

    condition: torch.Tensor | None
    """What `Family.condition` makes: FLUX's packed latents (B, T, C), Stable Diffusion's pixels (B, 3, H, W)."""
    embeds: Tensors
    """The text embeddings under the model's own argument names."""
    height: int
    width: int


Encode = Callable[[Any], Tensors]
"""uint8 (B, H, W, 3), or a list of captions -> tensors (B, ...) under the layer's field names, on the CPU."""


class TextEncoder(ABC):
    """A text encoder that can be trained along: of captions' tokens it makes, with gradients, what a layer holds."""

    layer: str
    """The layer that holds what it says of each caption, as it was before it was trained."""
    component: str
    """Folder of the model."""
    tokens: LayerKind
    """The layer of the captions' tokens, which training reads in the place of `layer`; its one field is `input_ids`."""
    lora_targets: tuple[str, ...]
    """Ends of the names of the linears that a LoRA acts on."""

    @abstractmethod
    def load(self, model: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        """The encoder on the CPU, frozen. Raises `UserError`."""

    @abstractmethod
    def make(self, model: ModelFolder | None = None) -> torch.nn.Module:
        """The same without its weights, on the meta device. Without a `model`: as the family's default model has it."""

    @abstractmethod
    def shapes(self, model: ModelFolder) -> dict[str, tuple[int, ...]]:
        """ "layer.field" of `layer` to the shape of what it says of one caption."""

    @abstractmethod
    def encode(self, encoder: torch.nn.Module, ids: torch.Tensor) -> Tensors:
        """Tokens (B, L) -> tensors (B, ...) under the names of `layer`'s fields, in the encoder's dtype."""

    @abstractmethod
    def is_heard(self, encoder: torch.nn.Module, name: str) -> bool:
        """Whether what `encode` gives depends on the module of this name."""

    @abstractmethod
    def name_in_file(self, name: str) -> str:
        """What programs that read a LoRA call the linear of this name, below the component."""

    @abstractmethod
    def name_to_match(self, name: str) -> str:
        """An end of that linear's name that is its alone, and the same in every version of the library."""


Decode = Callable[[torch.Tensor, int, int], torch.Tensor]
"""x_0 (B, ...), height, width -> uint8 (B, H, W, 3) on the CPU."""


@dataclass(frozen=True)
class Order:
    """What to paint: drawings with their prompts, and how."""

    drawings: list[NDArray[np.uint8]]
    """uint8 (H, W, 3) each, all of one size, as the ControlNet saw them in training."""
    prompts: list[str]
    seeds: list[int]
    num_steps: int
    guidance: float
    scale: float
    """How strongly the ControlNet acts: 0 paints without it."""
    text_length: int
    """Text tokens: the length of the training cache."""
    control_mode: int | None = None
    control_start: float = 0.0
    """Share of the denoising before which the ControlNet does not act, in [0, 1)."""
    control_end: float = 1.0
    """Share of the denoising after which the ControlNet no longer acts, in (0, 1]."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model's scheduler that training has changed: see `Family.sample`."""


Paint = Callable[[Order], list[NDArray[np.uint8]]]
"""Drawings and prompts -> pictures, uint8 (H, W, 3) each."""


@dataclass(frozen=True)
class TextToImage:
    """diffusers' pipeline that paints from text alone: the class images of prior preservation come from it."""

    pipeline: str
    """Its class."""
    num_steps: int
    """Unless the user says otherwise."""
    guidance: float
    """Likewise."""
    text_length: str | None = None
    """The argument by which it is told how many text tokens to use, where that is a choice."""


class Family(ABC):
    """One model family: facts, how its encoders run (stage 1), and how it is trained and sampled (stage 2)."""

    name: ClassVar[str]
    base_class: ClassVar[str]
    """`_class_name` in the base model's config."""
    base_component: ClassVar[str]
    """Folder of the model that holds the trained base."""
    default_model: ClassVar[str]
    pipeline_class: ClassVar[str]
    """diffusers' pipeline that paints with a ControlNet."""
    drawing_argument: ClassVar[str] = "image"
    """What that pipeline calls the drawing."""
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    """What the family's pipelines are loaded with beside the model: None for components that painting does without."""
    controlnet_class: ClassVar[str]
    """diffusers' class of this family's ControlNets."""
    single_file_needs: ClassVar[str]
    """The tensor by which programs that read a ControlNet from a single file know this family's."""
    licences: ClassVar[Mapping[str, Mapping[str, str]]]
    """Hub id of a base to its licence, as a model card's metadata states it."""
    size_multiple: ClassVar[int]
    """Height and width are multiples of this many pixels."""
    layers: ClassVar[tuple[LayerKind, ...]]
    min_text_length: ClassVar[int] = 1
    max_text_length: ClassVar[int]
    objective: ClassVar[Literal["flow", "ddpm"]]
    """What the base has learned to predict. flow: the velocity between data and noise, at t in [0, 1]; ddpm: the noise
    (or v) of a chain of steps, at t = 0, 1, ... 999, whose `noise_schedule` it has."""
    guidance_scale: ClassVar[float | None] = None
    """How far pictures are moved away from what the empty caption gives (classifier-free guidance). None: the base was
    distilled, one call does."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the base's linears that a LoRA acts on where nothing else is said."""
    lora_prefixes: ClassVar[Mapping[str, str]] = {}
    """Component to how the names of its LoRA begin in a single file for other programs, where they do not know it by
    diffusers' names."""
    has_depths: ClassVar[bool] = True
    """Whether a ControlNet may have more or fewer of the base's blocks. Where it may not, every depth is (0, 0)."""
    text_to_image: ClassVar[TextToImage | None] = None
    """What paints class images. None: a cache of this family has none."""
    pooled: ClassVar[str] = ""
    """The "layer.field" that `time_embedding` takes beside t. Only with `modulations`."""
    text_encoders: ClassVar[tuple[TextEncoder, ...]] = ()
    """Those that can be trained along with what is trained of the base."""

    def layers_read(self, *, tokens: bool) -> tuple[LayerKind, ...]:
        """The layers that training reads. `tokens`: the tokens for the trained text encoders, not what they said."""
        spoken = {encoder.layer: encoder.tokens for encoder in self.text_encoders} if tokens else {}
        return tuple(spoken.get(kind.name, kind) for kind in self.layers)

    # Stage 1: samples -> layers

    @abstractmethod
    def check_encoders(self, model: ModelFolder) -> None:
        """Refuse (`UserError`) a model whose encoders are incomplete or not this family's, before any image is read.
        Reads configuration files, tokenizers and the weights' headers only."""

    @abstractmethod
    def fields(self, layer: LayerKind, posterior: Posterior) -> tuple[Field, ...]:
        """What one row of this layer holds. Layers that are no VAE's have the same fields with every `posterior`."""

    @abstractmethod
    def encoder_recipe(
        self, layer: LayerKind, model: ModelFolder, text_length: int, posterior: Posterior = "moments"
    ) -> dict[str, Any]:
        """All that this layer's bytes depend on in the encoder but its precision: weights (digests), settings."""

    @abstractmethod
    def open_encoder(
        self, layer: LayerKind, model: ModelFolder, device: str, dtype: torch.dtype, text_length: int
    ) -> Encode:
        """Load the layer's encoder, which gives the layer kind's `fields`. Dropping the returned callable frees it."""

    @abstractmethod
    def keep(self, layer: LayerKind, tensors: Tensors, posterior: Posterior, seed: str) -> Tensors:
        """Of what the encoder gave for one row, what the cache keeps: `fields`, in the same dtype, on the CPU.

        A draw is a function of the moments and of `seed` alone: neither the batch nor the order nor the device
        matters. The seed is to name the layer and the row's input."""

    @abstractmethod
    def row_bytes(
        self, layer: LayerKind, model: ModelFolder, dtype: torch.dtype, pixels: int, text_length: int,
        posterior: Posterior = "moments",
    ) -> int:  # fmt: skip
        """Bytes that one row of this layer will take on disk, for an image of `pixels` pixels."""

    @abstractmethod
    def count_tokens(self, model: ModelFolder, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, its end included and nothing cut off: what the text length is to hold. Reads the
        tokenizer only."""

    def count_truncated(self, model: ModelFolder, captions: Sequence[str], text_length: int) -> int:
        """How many captions have more tokens than the text length, so that their end is not seen."""
        return sum(num_tokens > text_length for num_tokens in self.count_tokens(model, captions))

    # Stage 2: layers -> a trained ControlNet

    @abstractmethod
    def check_base(
        self, model: ModelFolder, fields: Mapping[str, tuple[int, ...]], recipes: Mapping[str, Any]
    ) -> str | None:
        """Refuse (`UserError`) a base that cannot use a cache's tensors (`fields`: "layer.field" to shape of one
        sample; `recipes`: layer to recipe). Reads configuration files and small digests only. A remark comes back
        where something can go on but is not as it should be."""

    @abstractmethod
    def load_base(self, model: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        """The frozen base on the CPU, not quantized."""

    @abstractmethod
    def make_base(self, model: ModelFolder | None = None) -> torch.nn.Module:
        """The base without its weights: frozen, on the meta device, what is not in the weights' files made for good.
        Reads `config.json` alone; without a `model` it is `default_model`'s, which then need not be on this machine."""

    @abstractmethod
    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The transformer blocks of a base or of a ControlNet, in the order in which they run."""

    def modulations(self, base: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """Qualified name to module of the layers that act on the time embedding alone: nothing that is trained comes
        before them, so that what they give can be computed ahead. By default there are none."""
        return {}

    def time_embedding(
        self, base: torch.nn.Module, t: torch.Tensor, guidance: float, pooled: torch.Tensor
    ) -> torch.Tensor:
        """(B, D): what the `modulations` are called with, for t (B,) in [0, 1] and the pooled text embedding (B, P) in
        the base's dtype. Computed as the base's own forward does it, to the bit. Asked for with `modulations` only."""
        raise AssertionError(f"{self.name} has no modulations")

    def noise_schedule(self, model: ModelFolder | None = None) -> torch.Tensor:
        """(1000,) fp32: the share of the data's variance that is left at each t (alphas_cumprod), where `objective` is
        ddpm. From the configuration of the model's scheduler; without a `model`, or one, of `default_model`."""
        raise AssertionError(f"{self.name} is not trained on a chain of steps")

    def prediction_type(self, model: ModelFolder | None = None) -> Literal["epsilon", "v_prediction"]:
        """What the base predicts, in the words of its scheduler's configuration, where `objective` is ddpm."""
        raise AssertionError(f"{self.name} is not trained on a chain of steps")

    @abstractmethod
    def attention_shape(self, base: torch.nn.Module, height: int, width: int, text_length: int) -> tuple[int, int, int]:
        """(heads, tokens, features of a head) of the base's attention over a picture of this many pixels and a text of
        this many tokens."""

    def max_depth(self, model: ModelFolder | None = None) -> tuple[int, int]:
        """The deepest ControlNet that this base can initialise: (num_layers, num_single_layers), (0, 0) without
        `has_depths`. Without a `model`: of `default_model`, which then need not be on this machine."""
        assert not self.has_depths
        return 0, 0

    @abstractmethod
    def sample_shapes(
        self, height: int, width: int, text_length: int, model: ModelFolder | None = None
    ) -> dict[str, tuple[int, ...]]:
        """ "role.field" (see `Batch`) to the shape of one cached sample, latents as moments. Without a `model`: for
        `default_model`, which then need not be on this machine."""

    @abstractmethod
    def make_empty_controlnet(
        self, num_layers: int, num_single_layers: int, model: ModelFolder | None = None
    ) -> torch.nn.Module:
        """A ControlNet for this base without its weights, on the meta device. Without a `model`: for `default_model`,
        which then need not be on this machine."""

    @abstractmethod
    def make_controlnet(
        self,
        model: ModelFolder,
        num_layers: int,
        num_single_layers: int,
        embedder: Literal["copy", "zero"],
        dtype: torch.dtype,
    ) -> torch.nn.Module:
        """A ControlNet on the CPU with the base's own first blocks. Of the base's files only these are read.

        Raises `UserError` where the files lack one of them."""

    @abstractmethod
    def load_controlnet(self, source: str, dtype: torch.dtype) -> torch.nn.Module:
        """An existing ControlNet from a folder or a hub id."""

    def controlnet_depth(self, source: str) -> tuple[int, int]:
        """(num_layers, num_single_layers) of an existing ControlNet in a folder or under a hub id, from its
        configuration; (0, 0) without `has_depths`. Raises `UserError`."""
        assert not self.has_depths
        return 0, 0

    @abstractmethod
    def check_controlnet(self, controlnet: torch.nn.Module, base: torch.nn.Module, control_mode: int | None) -> None:
        """Refuse (`UserError`) an existing ControlNet that does not fit the base."""

    def unread_residuals(self, model: ModelFolder, depth: tuple[int, int]) -> tuple[int, int]:
        """Of a ControlNet of this depth, how many residuals of each kind the base never adds: blocks that are computed
        and, in part, trained for nothing. By default none."""
        return 0, 0

    @abstractmethod
    def has_idle_parameters(self, base: torch.nn.Module, controlnet: torch.nn.Module) -> bool:
        """Whether some of the ControlNet's parameters never get a gradient."""

    @abstractmethod
    def model_latents(
        self, raw: Tensors, recipe: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Raw latents, (B, C, h, w) under the layer's field names -> final latents (B, ...): shifted and scaled as the
        layer's recipe says, packed where the base takes tokens. Of "mean" and "std" a draw of the posterior, without a
        generator the mean; a lone "mean" or "sample" as it is. Computed in fp32, rounded once."""

    @abstractmethod
    def condition(
        self, batch: Batch, recipes: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """What the ControlNet is shown of this batch, final: `Inputs.condition`. `recipes`: layer to recipe, by the
        family's names. Latents are drawn as in `model_latents`; of pixels nothing is drawn."""

    @abstractmethod
    def inputs(self, batch: Batch, condition: torch.Tensor | None, dtype: torch.dtype) -> Inputs:
        """Everything but x_t and t for the model calls on this batch."""

    @abstractmethod
    def residuals(
        self, controlnet: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float,
        control_mode: int | None, scale: float = 1.0,
    ) -> Any:  # fmt: skip
        """What the ControlNet adds to the base's blocks: groups of tensors, each a list or None."""

    @abstractmethod
    def predict(
        self, base: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float, residuals: Any
    ) -> torch.Tensor:
        """The base's prediction for x_t, in its shape (B, ...), at t (B,) as the `objective` counts it."""

    @abstractmethod
    def sample(
        self,
        model: ModelFolder,
        noise: torch.Tensor,
        num_steps: int,
        step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scheduler: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Integrate from noise (B, ...) to x_0 as the pipeline does; `step(x_t, t)` predicts. `scheduler`: settings of
        the model's scheduler that training has changed, as its prediction_type."""

    def guided_from(self, model: ModelFolder, uncaptioned: Inputs) -> Inputs:
        """What pictures are guided away from, with a `guidance_scale`, as the model's pipeline has it where it is given
        no negative prompt. `uncaptioned`: the inputs with the empty caption, which it is by default."""
        return uncaptioned

    def scheduler_for(self, own: Any, changed: Mapping[str, Any]) -> Any:
        """The scheduler to paint with in a pipeline that has its `own`: training has `changed` settings of it."""
        assert not changed, f"training changes nothing of {self.name}'s scheduler"
        return own

    @abstractmethod
    def open_decoder(self, model: ModelFolder, device: str, dtype: torch.dtype) -> Decode:
        """Load the decoder alone: the encoder's weights are not read."""

    @abstractmethod
    def open_painter(self, model: ModelFolder, controlnet: Path, device: str, dtype: torch.dtype) -> Paint:
        """Load the whole pipeline for inference, text encoders and all. Training never calls this."""

    @abstractmethod
    def tiny(self, folder: Path, seed: int = 0) -> Path:
        """Write a pipeline of the same classes with a few thousand random parameters, for tests."""
