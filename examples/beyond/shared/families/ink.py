"""Ink: a toy. Pictures of 1/8 size are its latents, a caption's words look their embeddings up in a table, and the base
is two blocks of attention and feed-forward that learned a flow. It answers every question that a family is asked.

Letters: B batch, H W pixels, h = H/8, w = W/8, T = h w tokens, D features, L words of a caption.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, final

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn.functional import conv2d, interpolate, scaled_dot_product_attention

from shared.cache.schema import Field
from shared.errors import UserError
from shared.families.base import Batch, Decode, Encode, Family, Inputs, LayerKind, Order, Paint, Posterior, Tensors
from shared.families.parts import pixels
from shared.families.parts.component import check_shapes, loaded
from shared.model_folder import ModelFolder

PATCH = 8
CONFIG: Mapping[str, Any] = {"features": 32, "num_blocks": 2, "text_features": 16}
"""Of `default_model`: there is none but those that `tiny` makes."""


class InkBlock(torch.nn.Module):
    """Attention of the tokens to each other, and a feed-forward layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(features)
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(features, features) for _ in range(3))
        self.to_out = torch.nn.Linear(features, features)
        self.up, self.down = torch.nn.Linear(features, 2 * features), torch.nn.Linear(2 * features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        normal = self.norm(x)
        q, k, v = (to(normal).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class _Ink(ModelMixin, ConfigMixin):
    """What base and ControlNet have in common: how x_t, t and the words come in."""

    def begin(self, features: int, num_blocks: int, text_features: int) -> None:
        self.enter = torch.nn.Conv2d(3, features, 3, padding=1)
        self.time, self.text = torch.nn.Linear(2, features), torch.nn.Linear(text_features, features)
        self.blocks = torch.nn.ModuleList(InkBlock(features) for _ in range(num_blocks))

    def tokens(self, x_t: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """(B, 3, h, w), (B,), (B, L, D) -> (B, T, D)."""
        angle = t.float()[:, None] * torch.pi
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1).to(x_t.dtype))
        return self.enter(x_t).flatten(2).transpose(1, 2) + (time + self.text(embeds.mean(dim=1)))[:, None]


class InkBase(_Ink):
    @register_to_config
    def __init__(self, features: int = 32, num_blocks: int = 2, text_features: int = 16) -> None:
        super().__init__()
        self.begin(features, num_blocks, text_features)
        self.leave = torch.nn.Linear(features, 3)

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, residuals: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """-> (B, 3, h, w)."""
        x = self.tokens(x_t, t, embeds)
        for i, block in enumerate(self.blocks):
            x = block(x) if residuals is None else block(x) + residuals[i]
        return self.leave(x).transpose(1, 2).unflatten(2, x_t.shape[2:])


class InkControlNet(_Ink):
    """The base's blocks, shown the drawing; what leaves is zero at first."""

    @register_to_config
    def __init__(self, features: int = 32, num_blocks: int = 2, text_features: int = 16) -> None:
        super().__init__()
        self.begin(features, num_blocks, text_features)
        self.look = torch.nn.Conv2d(3, features, PATCH, stride=PATCH)
        self.leave = torch.nn.ModuleList(torch.nn.Linear(features, features) for _ in range(num_blocks))

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, condition: torch.Tensor
    ) -> list[torch.Tensor]:
        """-> for each block (B, T, D)."""
        x = self.tokens(x_t, t, embeds) + self.look(condition).flatten(2).transpose(1, 2)
        found = []
        for block, leave in zip(self.blocks, self.leave, strict=True):
            x = block(x)
            found.append(leave(x))
        return found


@final
class Ink(Family):
    """The toy."""

    name = "ink"
    base_class = "InkBase"
    base_component = "base"
    default_model = "ink"
    pipeline_class = "InkPipeline"
    controlnet_class = "InkControlNet"
    single_file_needs = "look.weight"
    licences: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    size_multiple = PATCH
    max_text_length = 16
    objective = "flow"
    has_depths = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out")
    layers = (
        LayerKind("latents", "image", ("vae",), (
            Field("mean", "as encoded", "3 h w", "means of 8x8 pixels, from -1 to 1"),
        ), shard_rows=512),
        LayerKind("words", "caption", ("words",), (
            Field("prompt_embeds", "as encoded", "L D", "of each word; zeros after the last"),
        ), shard_rows=1024),
        pixels.LAYER,
    )  # fmt: skip

    # Stage 1

    def check_encoders(self, model: ModelFolder) -> None:
        if (found := model.config("vae").get("patch")) != PATCH:
            raise UserError(f"model {model.name} is none of ink's: its vae has a patch of {found}, not {PATCH}")
        for component in ("vae", "words"):
            model.tensor_names(component)

    def fields(self, layer: LayerKind, posterior: Posterior) -> tuple[Field, ...]:
        return layer.fields

    def encoder_recipe(
        self, layer: LayerKind, model: ModelFolder, text_length: int, posterior: Posterior = "moments"
    ) -> dict[str, Any]:
        encoder = {component: model.sha256(component) for component in layer.components}
        of_text = {"text_length": text_length} if layer.reads == "caption" else {}
        return {"family": self.name, "encoder": encoder, **of_text}

    def open_encoder(
        self, layer: LayerKind, model: ModelFolder, device: str, dtype: torch.dtype, text_length: int
    ) -> Encode:
        def latents(images: NDArray[np.uint8]) -> Tensors:
            colours = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, H, W)
            return {"mean": conv2d(colours, table.expand(3, 1, PATCH, PATCH), stride=PATCH, groups=3).to(dtype)}

        def words(captions: list[str]) -> Tensors:
            rows = torch.stack([_embeds(table, caption, text_length) for caption in captions])
            return {"prompt_embeds": rows.to(dtype)}

        [(_, table)] = model.tensors(layer.components[0])
        return latents if layer.reads == "image" else words

    def keep(self, layer: LayerKind, tensors: Tensors, posterior: Posterior, seed: str) -> Tensors:
        return tensors

    def row_bytes(
        self, layer: LayerKind, model: ModelFolder, dtype: torch.dtype, pixels: int, text_length: int,
        posterior: Posterior = "moments",
    ) -> int:  # fmt: skip
        of_text = text_length * model.config(self.base_component)["text_features"]
        numbers = 3 * pixels // PATCH**2 if layer.reads == "image" else of_text
        return numbers * dtype.itemsize + 1024

    def count_tokens(self, model: ModelFolder, captions: Sequence[str]) -> list[int]:
        return [len(caption.split()) for caption in captions]

    def count_truncated(self, model: ModelFolder, captions: Sequence[str], text_length: int) -> int:
        return sum(count > text_length for count in self.count_tokens(model, captions))

    # Stage 2: the base

    def check_base(
        self, model: ModelFolder, fields: Mapping[str, tuple[int, ...]], recipes: Mapping[str, Any]
    ) -> str | None:
        config = model.config(self.base_component)
        if (found := config.get("_class_name")) != self.base_class:
            raise UserError(f"this cache is for {self.name}, but model {model.name} has a {found}")
        check_shapes(model, fields, {"words.prompt_embeds": (1, config["text_features"], "features of a word")})
        return None

    def load_base(self, model: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        base: torch.nn.Module = loaded(InkBase, model, self.base_component, dtype)
        return base

    def make_base(self, model: ModelFolder | None = None) -> torch.nn.Module:
        with torch.device("meta"):
            return cast(torch.nn.Module, InkBase.from_config(self._config(model))).eval().requires_grad_(False)

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        return list(module.get_submodule("blocks").children())

    def attention_shape(self, base: torch.nn.Module, height: int, width: int, text_length: int) -> tuple[int, int, int]:
        features = int(base.get_submodule("leave").in_features)  # type: ignore[arg-type]
        return 1, (height // PATCH) * (width // PATCH), features

    def sample_shapes(
        self, height: int, width: int, text_length: int, model: ModelFolder | None = None
    ) -> dict[str, tuple[int, ...]]:
        return {
            "latents.mean": (3, height // PATCH, width // PATCH),
            "words.prompt_embeds": (text_length, self._config(model)["text_features"]),
            "condition_pixels.pixels": (3, height, width),
        }

    def predict(
        self, base: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float, residuals: Any
    ) -> torch.Tensor:
        [added] = residuals if residuals is not None else [None]
        return base(x_t, t, inputs.embeds["embeds"], added)

    def sample(
        self,
        model: ModelFolder,
        noise: torch.Tensor,
        num_steps: int,
        step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scheduler: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """By Euler's steps of equal size from t = 1 to 0."""
        x_t = noise
        for i in range(num_steps, 0, -1):
            t = torch.full((len(x_t),), i / num_steps, device=x_t.device)
            x_t = x_t - step(x_t, t) / num_steps
        return x_t

    def open_decoder(self, model: ModelFolder, device: str, dtype: torch.dtype) -> Decode:
        def decode(x_0: torch.Tensor, height: int, width: int) -> torch.Tensor:
            large = interpolate(x_0.float(), size=(height, width)).permute(0, 2, 3, 1)
            return ((large + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

        return decode

    def _config(self, model: ModelFolder | None) -> Mapping[str, Any]:
        return CONFIG if model is None else model.config(self.base_component)

    # Stage 2: a batch

    def model_latents(
        self, raw: Tensors, recipe: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return raw["mean"].to(dtype)

    def condition(
        self, batch: Batch, recipes: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return pixels.picture(batch.tensors[f"{pixels.LAYER.name}.{pixels.FIELD}"], dtype)

    def inputs(self, batch: Batch, condition: torch.Tensor | None, dtype: torch.dtype) -> Inputs:
        return Inputs(condition, {"embeds": batch.tensors["words.prompt_embeds"].to(dtype)}, batch.height, batch.width)

    # Stage 2: the ControlNet

    def make_empty_controlnet(
        self, num_layers: int, num_single_layers: int, model: ModelFolder | None = None
    ) -> torch.nn.Module:
        with torch.device("meta"):
            return cast(torch.nn.Module, InkControlNet.from_config(self._config(model)))

    def make_controlnet(
        self,
        model: ModelFolder,
        num_layers: int,
        num_single_layers: int,
        embedder: Literal["copy", "zero"],
        dtype: torch.dtype,
    ) -> torch.nn.Module:
        controlnet = self.make_empty_controlnet(num_layers, num_single_layers, model)
        of_base = {name: tensor.clone() for name, tensor in model.tensors(self.base_component)}
        look = torch.Generator().manual_seed(0)  # the same at the beginning of every run
        weights = {
            name: 0.05 * torch.randn(tensor.shape, generator=look)
            if name.startswith("look.")
            else torch.zeros(tensor.shape)
            if name.startswith("leave.")
            else of_base[name]
            for name, tensor in controlnet.state_dict().items()
        }
        controlnet.load_state_dict(weights, assign=True)
        return controlnet.to(dtype)

    def load_controlnet(self, source: str, dtype: torch.dtype) -> torch.nn.Module:
        return cast(torch.nn.Module, InkControlNet.from_pretrained(source, dtype=dtype))

    def check_controlnet(self, controlnet: torch.nn.Module, base: torch.nn.Module, control_mode: int | None) -> None:
        theirs, ours = (module.get_submodule("enter").out_channels for module in (controlnet, base))
        if theirs != ours:
            raise UserError(f"the ControlNet to start from does not fit the base: it has {theirs} features, not {ours}")

    def has_idle_parameters(self, base: torch.nn.Module, controlnet: torch.nn.Module) -> bool:
        return False

    def residuals(
        self, controlnet: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float,
        control_mode: int | None, scale: float = 1.0,
    ) -> Any:  # fmt: skip
        found = controlnet(x_t, t, inputs.embeds["embeds"], inputs.condition)
        return ([scale * residual for residual in found],)

    # Inference, and tests

    def open_painter(self, model: ModelFolder, controlnet: Path, device: str, dtype: torch.dtype) -> Paint:
        base, control = self.load_base(model, dtype).to(device), self.load_controlnet(str(controlnet), dtype).to(device)
        [(_, table)] = model.tensors("words")
        decode = self.open_decoder(model, device, dtype)

        @torch.no_grad()
        def paint(order: Order) -> list[NDArray[np.uint8]]:
            height, width = order.drawings[0].shape[:2]
            shown = pixels.picture(torch.from_numpy(np.stack(order.drawings)).permute(0, 3, 1, 2), dtype).to(device)
            embeds = torch.stack([_embeds(table, prompt, order.text_length) for prompt in order.prompts])
            inputs = Inputs(shown, {"embeds": embeds.to(device, dtype)}, height, width)
            shape = (3, height // PATCH, width // PATCH)
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in order.seeds]

            def step(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                acts = order.control_start <= 1 - float(t[0]) < order.control_end
                added = self.residuals(control, x_t, t, inputs, order.guidance, None, order.scale) if acts else None
                return self.predict(base, x_t, t, inputs, order.guidance, added)

            x_0 = self.sample(model, torch.stack(noise).to(device, dtype), order.num_steps, step)
            return list(decode(x_0, height, width).numpy())

        return paint

    def tiny(self, folder: Path, seed: int = 0) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            InkBase(**CONFIG).save_pretrained(folder / "base")
            table = torch.randn(256, CONFIG["text_features"])
        means = torch.full((1, 1, PATCH, PATCH), 1 / PATCH**2)
        for name, config, tensor in (("vae", {"patch": PATCH}, means), ("words", {"num_words": len(table)}, table)):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(config))
            save_file({"table": tensor}, folder / name / "model.safetensors")
        return folder


def _embeds(table: torch.Tensor, caption: str, length: int) -> torch.Tensor:
    """(L, D): a row of the table for each word, zeros after the last."""
    rows = [table[zlib.crc32(word.encode()) % len(table)] for word in caption.split()[:length]]
    rows += [torch.zeros_like(table[0])] * (length - len(rows))
    return torch.stack(rows)


FAMILY = Ink()
