"""FLUX.1: a rectified-flow transformer over packed VAE latents, CLIP's pooled and T5's token embeddings.

Facts that the rest of the project need not know, with their source: Black Forest Labs' FLUX.1-dev as diffusers runs it
(FluxPipeline, FluxControlNetPipeline). B batch, H W pixels, h = H/8, w = W/8, T = h/2 * w/2 image tokens, C = 64
channels of a token, L text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from shared.cache.schema import Field
from shared.errors import UserError
from shared.families.base import (
    Batch,
    Decode,
    Encode,
    Family,
    Inputs,
    LayerKind,
    Order,
    Paint,
    Posterior,
    Tensors,
    TextToImage,
)
from shared.families.parts import autoencoder, clip, first_blocks, painter, t5
from shared.families.parts.component import check_shapes, checked_config, count_tokens, encoder_facts, on_meta
from shared.families.parts.controlnet_folder import controlnet_folder
from shared.model_folder import ModelFolder

FLUX_1_DEV: Mapping[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "guidance_embeds": True, "in_channels": 64,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
    "pooled_projection_dim": 768,
}  # fmt: skip
"""`transformer/config.json` of black-forest-labs/FLUX.1-dev: what is planned and measured where the model is not."""

_DOUBLE_NORMS = ("norm1", "norm1_context")
_CONTROLNETS_OWN = ("controlnet_blocks.", "controlnet_single_blocks.", "controlnet_x_embedder.")
"""What a ControlNet has and its base has not: zero at first, so that it changes nothing."""


class Flux(Family):
    """FLUX.1-dev and its relatives of the same classes."""

    name = "flux"
    base_class = "FluxTransformer2DModel"
    base_component = "transformer"
    default_model = "black-forest-labs/FLUX.1-dev"
    pipeline_class = "FluxControlNetPipeline"
    controlnet_class = "FluxControlNetModel"
    single_file_needs = "controlnet_blocks.0.weight"  # ComfyUI: comfy/controlnet.py, load_controlnet_state_dict
    licences: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "black-forest-labs/FLUX.1-dev": {
            "license": "other",
            "license_name": "flux-1-dev-non-commercial-license",
            "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        },
        "black-forest-labs/FLUX.1-schnell": {"license": "apache-2.0"},
    }
    size_multiple = 16  # VAE 8x, then 2x2 latents to a token
    max_text_length = 512
    objective = "flow"
    drawing_argument = "control_image"
    lora_targets = (  # as in diffusers' own DreamBooth training
        "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
        "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    text_to_image = TextToImage("FluxPipeline", num_steps=28, guidance=3.5, text_length="max_sequence_length")
    pooled = "clip.pooled_prompt_embeds"
    text_encoders = (clip.Clip(clip.pooled, clip.L_14),)  # T5 is never trained, nor loaded for training
    layers = (
        *autoencoder.layers(channels=16, condition=True),
        LayerKind("clip", "caption", ("text_encoder", "tokenizer"), (
            Field("pooled_prompt_embeds", "as encoded", "P", "CLIP's pooled output of 77 tokens; FLUX.1-dev: P = 768"),
        ), shard_rows=4096),
        LayerKind("t5", "caption", ("text_encoder_2", "tokenizer_2"), (
            Field("prompt_embeds", "as encoded", "L D", "T5's output with padding, unmasked; FLUX.1-dev: D = 4096"),
        ), shard_rows=64),
    )  # fmt: skip

    # Stage 1

    def check_encoders(self, model: ModelFolder) -> None:
        vae = model.config("vae")
        if vae.get("latent_channels") != 16 or None in (vae.get("shift_factor"), vae.get("scaling_factor")):
            raise UserError(
                f"the VAE of model {model.name} is not FLUX's: it has {vae.get('latent_channels')} latent channels, "
                f"shift_factor {vae.get('shift_factor')}, scaling_factor {vae.get('scaling_factor')}, where FLUX.1-dev "
                "has 16, 0.1159 and 0.3611"
            )
        for component, expected in (("text_encoder", "clip_text_model"), ("text_encoder_2", "t5")):
            if (found := model.config(component).get("model_type")) != expected:
                raise UserError(f"{component} of model {model.name} is a '{found}', where FLUX.1-dev has '{expected}'")
        for component in ("vae", "text_encoder", "text_encoder_2"):
            model.tensor_names(component)
        clip.tokenizer(model)
        t5.tokenizer(model)

    def fields(self, layer: LayerKind, posterior: Posterior) -> tuple[Field, ...]:
        return autoencoder.fields(layer, posterior) if layer.components[0] == "vae" else layer.fields

    def encoder_recipe(
        self, layer: LayerKind, model: ModelFolder, text_length: int, posterior: Posterior = "moments"
    ) -> dict[str, Any]:
        recipe = encoder_facts(self, layer, model)
        if layer.components[0] == "vae":
            recipe |= autoencoder.recipe(model, posterior)
        if layer.name == "t5":
            recipe["text_length"] = text_length
        return recipe

    def open_encoder(
        self, layer: LayerKind, model: ModelFolder, device: str, dtype: torch.dtype, text_length: int
    ) -> Encode:
        if layer.components[0] == "vae":
            return autoencoder.open_encoder(model, device, dtype)
        if (encode := clip.opened(self.text_encoders, layer, model, device, dtype)) is not None:
            return encode
        return t5.open_tokens(model, device, dtype, text_length)

    def keep(self, layer: LayerKind, tensors: Tensors, posterior: Posterior, seed: str) -> Tensors:
        return autoencoder.keep(tensors, posterior, seed) if layer.components[0] == "vae" else tensors

    def row_bytes(
        self, layer: LayerKind, model: ModelFolder, dtype: torch.dtype, pixels: int, text_length: int,
        posterior: Posterior = "moments",
    ) -> int:  # fmt: skip
        if layer.fields[0].name == clip.IDS:
            return clip.TOKENS_BYTES
        if layer.name == "t5":
            numbers = text_length * model.config("text_encoder_2")["d_model"]
        elif layer.name == "clip":
            numbers = model.config("text_encoder")["hidden_size"]
        else:
            numbers = len(self.fields(layer, posterior)) * 16 * pixels // 64
        return numbers * dtype.itemsize + 1024  # two tar blocks: the member's header, and the tensors' own

    def count_tokens(self, model: ModelFolder, captions: Sequence[str]) -> list[int]:
        return count_tokens(t5.tokenizer(model), list(captions))

    # Stage 2

    def check_base(
        self, model: ModelFolder, fields: Mapping[str, tuple[int, ...]], recipes: Mapping[str, Any]
    ) -> str | None:
        config = checked_config(self, model)
        [latents, *_] = [field for field in fields if field.startswith("latents.")]
        facts = {
            latents: (0, config["in_channels"] // 4, "latent channels"),
            "t5.prompt_embeds": (1, config["joint_attention_dim"], "features of the T5 embeddings"),
            "clip.pooled_prompt_embeds": (0, config["pooled_projection_dim"], "features of the CLIP embedding"),
        }
        check_shapes(model, fields, facts)
        return autoencoder.check_decoder(model, recipes["latents"])

    def load_base(self, model: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        from diffusers import FluxTransformer2DModel

        model.weights("transformer")
        return _tabled(FluxTransformer2DModel.from_pretrained(model.path / "transformer", dtype=dtype).eval())

    def make_base(self, model: ModelFolder | None = None) -> torch.nn.Module:
        from diffusers import FluxTransformer2DModel

        config = FLUX_1_DEV if model is None else model.config("transformer")
        return _tabled(on_meta(FluxTransformer2DModel, config))

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        lists = (module.get_submodule(name) for name in ("transformer_blocks", "single_transformer_blocks"))
        return [block for blocks in lists for block in blocks.children()]

    def modulations(self, base: torch.nn.Module) -> dict[str, torch.nn.Module]:
        num_layers, num_single_layers = _config(base)["num_layers"], _config(base)["num_single_layers"]
        names = [f"transformer_blocks.{i}.{norm}.linear" for i in range(num_layers) for norm in _DOUBLE_NORMS]
        names += [f"single_transformer_blocks.{i}.norm.linear" for i in range(num_single_layers)]
        return {name: base.get_submodule(name) for name in [*names, "norm_out.linear"]}

    def time_embedding(
        self, base: torch.nn.Module, t: torch.Tensor, guidance: float, pooled: torch.Tensor
    ) -> torch.Tensor:
        # Rounded to the model's dtype before the multiplication, as the model does: in bf16 another time, else.
        dtype = base.get_parameter("x_embedder.weight").dtype
        times = [t.to(dtype) * 1000]
        if _config(base)["guidance_embeds"]:
            times.append(_guidance(guidance, t).to(dtype) * 1000)
        return torch.nn.functional.silu(base.get_submodule("time_text_embed")(*times, pooled))

    def attention_shape(self, base: torch.nn.Module, height: int, width: int, text_length: int) -> tuple[int, int, int]:
        num_tokens = (height // 16) * (width // 16) + text_length
        return _config(base)["num_attention_heads"], num_tokens, _config(base)["attention_head_dim"]

    def max_depth(self, model: ModelFolder | None = None) -> tuple[int, int]:
        config = FLUX_1_DEV if model is None else model.config("transformer")
        return config["num_layers"], config["num_single_layers"]

    def sample_shapes(
        self, height: int, width: int, text_length: int, model: ModelFolder | None = None
    ) -> dict[str, tuple[int, ...]]:
        config = FLUX_1_DEV if model is None else model.config("transformer")
        latents = (config["in_channels"] // 4, height // 8, width // 8)
        return {
            **{f"{role}.{moment}": latents for role in ("latents", "condition_latents") for moment in ("mean", "std")},
            "clip.pooled_prompt_embeds": (config["pooled_projection_dim"],),
            "t5.prompt_embeds": (text_length, config["joint_attention_dim"]),
        }

    def make_empty_controlnet(
        self, num_layers: int, num_single_layers: int, model: ModelFolder | None = None
    ) -> torch.nn.Module:
        from diffusers import FluxControlNetModel

        config = dict(_config(self.make_base(model)))  # with the defaults of the base's own class
        config |= {"num_layers": num_layers, "num_single_layers": num_single_layers}
        with torch.device("meta"):
            return _tabled(FluxControlNetModel.from_config(config))

    def make_controlnet(
        self,
        model: ModelFolder,
        num_layers: int,
        num_single_layers: int,
        embedder: Literal["copy", "zero"],
        dtype: torch.dtype,
    ) -> torch.nn.Module:
        copied = ["time_text_embed.", "context_embedder.", "x_embedder."]
        copied += [f"transformer_blocks.{i}." for i in range(num_layers)]
        copied += [f"single_transformer_blocks.{i}." for i in range(num_single_layers)]
        # With both ends zero no gradient reaches the condition until the output layers have moved. The outputs stay
        # zero, so the first step is the same exact no-op.
        twice = {"controlnet_x_embedder.weight": "x_embedder.weight"} if embedder == "copy" else {}
        return first_blocks.begun(
            self.make_empty_controlnet(num_layers, num_single_layers, model), model, self.base_component,
            copied=copied, zero=_CONTROLNETS_OWN, dtype=dtype, twice=twice,
        )  # fmt: skip

    def load_controlnet(self, source: str, dtype: torch.dtype) -> torch.nn.Module:
        from diffusers import FluxControlNetModel

        return _tabled(FluxControlNetModel.from_pretrained(controlnet_folder(source), dtype=dtype))

    def controlnet_depth(self, source: str) -> tuple[int, int]:
        path = controlnet_folder(source) / "config.json"
        try:
            config = json.loads(path.read_text())
            return config["num_layers"], config["num_single_layers"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is not the configuration of a FLUX ControlNet ({error!r})") from error

    def check_controlnet(self, controlnet: torch.nn.Module, base: torch.nn.Module, control_mode: int | None) -> None:
        for key in ("in_channels", "joint_attention_dim", "pooled_projection_dim", "num_attention_heads"):
            theirs, ours = _config(controlnet)[key], _config(base)[key]
            if theirs != ours:
                raise UserError(
                    f"the ControlNet to start from does not fit the base: its {key} is {theirs}, not {ours}"
                )
        if controlnet.input_hint_block is not None:
            raise UserError(
                "the ControlNet to start from takes pixels (an XLabs model); only latents are cached for FLUX"
            )
        num_modes = _config(controlnet)["num_mode"]
        if num_modes is not None and (control_mode is None or not 0 <= control_mode < num_modes):
            raise UserError(
                f"the ControlNet to start from is a union of {num_modes} modes: "
                f"set control_mode from 0 to {num_modes - 1}"
            )
        if num_modes is None and control_mode is not None:
            raise UserError("control_mode is set, but this ControlNet is not a union: leave it out")

    def unread_residuals(self, model: ModelFolder, depth: tuple[int, int]) -> tuple[int, int]:
        return _unread(self.max_depth(model), depth)

    def has_idle_parameters(self, base: torch.nn.Module, controlnet: torch.nn.Module) -> bool:
        blocks, depth = ((_config(m)["num_layers"], _config(m)["num_single_layers"]) for m in (base, controlnet))
        # Without single blocks the text half of the last double block feeds nothing.
        return depth[1] == 0 or any(_unread(blocks, depth))

    def model_latents(
        self, raw: Tensors, recipe: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return pack(autoencoder.final_latents(raw, recipe, generator)).to(dtype)

    def condition(
        self, batch: Batch, recipes: Mapping[str, Any], generator: torch.Generator | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return self.model_latents(batch.role("condition_latents"), recipes["condition_latents"], generator, dtype)

    def inputs(self, batch: Batch, condition: torch.Tensor | None, dtype: torch.dtype) -> Inputs:
        prompt_embeds = batch.tensors["t5.prompt_embeds"].to(dtype)
        device = prompt_embeds.device
        embeds = {
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": batch.tensors["clip.pooled_prompt_embeds"].to(dtype),
            "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=device),
            # Made where they are used: a copy from the host would wait for all that the GPU has been asked to do.
            "img_ids": image_ids(batch.height // 8, batch.width // 8, device).to(torch.float32),
        }
        assert max(batch.height, batch.width) <= 16 * _NUM_POSITIONS, "a position would lie outside of the table"
        return Inputs(condition=condition, embeds=embeds, height=batch.height, width=batch.width)

    def residuals(
        self, controlnet: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float,
        control_mode: int | None, scale: float = 1.0,
    ) -> Any:  # fmt: skip
        assert inputs.condition is not None
        mode = None
        if control_mode is not None:
            mode = torch.full((len(x_t), 1), control_mode, device=x_t.device, dtype=torch.long)
        return controlnet(
            hidden_states=x_t,
            controlnet_cond=inputs.condition,
            controlnet_mode=mode,
            conditioning_scale=scale,
            timestep=t,
            # A wrapper for several processes keeps the model, and so its config, in `module`. schnell has no guidance.
            guidance=_guidance(guidance, t)
            if _config(getattr(controlnet, "module", controlnet))["guidance_embeds"]
            else None,
            return_dict=False,
            **inputs.embeds,
        )

    def predict(
        self, base: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, inputs: Inputs, guidance: float, residuals: Any
    ) -> torch.Tensor:
        double, single = residuals if residuals is not None else (None, None)
        return base(
            hidden_states=x_t,
            timestep=t,
            guidance=_guidance(guidance, t) if _config(base)["guidance_embeds"] else None,
            controlnet_block_samples=double,
            controlnet_single_block_samples=single,
            return_dict=False,
            **inputs.embeds,
        )[0]

    def sample(
        self,
        model: ModelFolder,
        noise: torch.Tensor,
        num_steps: int,
        step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scheduler: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        assert not scheduler, "flow matching changes nothing of the scheduler"
        from diffusers import FlowMatchEulerDiscreteScheduler

        if model.has("scheduler"):
            euler = FlowMatchEulerDiscreteScheduler.from_pretrained(model.path / "scheduler")
        else:  # FLUX.1-dev's own settings
            euler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        euler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / num_steps, num_steps),
            device=noise.device,
            mu=resolution_shift(noise.shape[1], euler.config) if euler.config["use_dynamic_shifting"] else None,
        )
        x_t = noise
        for timestep in euler.timesteps:
            t = timestep.expand(len(x_t)).to(x_t.dtype) / 1000
            x_t = euler.step(step(x_t, t), timestep, x_t, return_dict=False)[0]
        return x_t

    def open_decoder(self, model: ModelFolder, device: str, dtype: torch.dtype) -> Decode:
        to_pixels = autoencoder.open_decoder(model, device, dtype)

        def decode(x_0: torch.Tensor, height: int, width: int) -> torch.Tensor:
            return to_pixels(unpack(x_0, height // 8, width // 8))

        return decode

    def open_painter(self, model: ModelFolder, controlnet: Path, device: str, dtype: torch.dtype) -> Paint:
        def told(order: Order) -> dict[str, Any]:
            return {"control_mode": order.control_mode, "max_sequence_length": order.text_length}

        return painter.open_painter(self, model, controlnet, device, dtype, told)

    def tiny(self, folder: Path, seed: int = 0) -> Path:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
        from transformers import T5Config, T5EncoderModel

        clip_tokenizer, t5_tokenizer = clip.tiny_tokenizer(), t5.tiny_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            FluxPipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
                vae=AutoencoderKL(
                    latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                    scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
                ),
                text_encoder=clip.tiny_encoder(clip_tokenizer),
                tokenizer=clip_tokenizer,
                text_encoder_2=T5EncoderModel(T5Config(
                    vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
                    feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
                )),
                tokenizer_2=t5_tokenizer,
                transformer=FluxTransformer2DModel(
                    in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                    joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
                ),
            ).save_pretrained(folder)  # fmt: skip
        return folder


def _unread(blocks: tuple[int, int], depth: tuple[int, int]) -> tuple[int, int]:
    """Double and single residuals that no block of the base adds. diffusers gives each residual to as many blocks in a
    row as the quotient of their numbers, rounded up, so the blocks may be used up before the residuals: of 8 over 19
    blocks, 7 serve three blocks each (the last one fewer) and one none."""
    double, single = (
        0 if count == 0 else count - 1 - (num_blocks - 1) // -(-num_blocks // count)
        for num_blocks, count in zip(blocks, depth, strict=True)
    )
    return double, single


def _config(model: torch.nn.Module) -> Mapping[str, Any]:
    """What a diffusers model was made with."""
    config = model.config
    assert isinstance(config, Mapping)
    return config


def _guidance(guidance: float, t: torch.Tensor) -> torch.Tensor:
    return torch.full((len(t),), guidance, device=t.device, dtype=torch.float32)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) -> (B, h/2 * w/2, 64): each token is a 2x2 patch, channels outermost."""
    B, c, h, w = latents.shape
    patches = latents.view(B, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, (h // 2) * (w // 2), c * 4)


def unpack(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(B, h/2 * w/2, 64) -> (B, 16, h, w): the inverse of `pack`."""
    B, _, C = tokens.shape
    patches = tokens.view(B, h // 2, w // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(B, C // 4, h, w)


def image_ids(h: int, w: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(h/2 * w/2, 3) positions of the image tokens for the rotary embedding: (0, row, column)."""
    rows, columns = torch.meshgrid(
        torch.arange(h // 2, device=device), torch.arange(w // 2, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


_NUM_POSITIONS = 1024
"""Rows and columns of tokens that a picture may have: 16384 pixels."""


class _TabledPositions(torch.nn.Module):
    """The model's rotary embedding, looked up: computing it anew takes forty small kernels in float64 in each call."""

    def __init__(self, computed: torch.nn.Module) -> None:
        super().__init__()
        self.computed = computed
        axes_dim = computed.axes_dim
        assert isinstance(axes_dim, (list, tuple))
        self.axes = [axis for axis, dim in enumerate(axes_dim) for _ in range(dim)]
        """Which of a token's three positions each feature turns with."""
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole positions (S, 3) from 0 to `_NUM_POSITIONS` - 1 -> cosines and sines, fp32 (S, D) each."""
        if type(ids) is not torch.Tensor or ids.is_meta:  # a stand-in, for counting: nothing to look up
            return self.computed(ids)
        if ids.device not in self._tables:
            with torch.inference_mode(False), torch.no_grad():
                axes = torch.tensor(self.axes, device=ids.device)
                every = torch.arange(_NUM_POSITIONS, device=ids.device)[:, None].expand(-1, ids.shape[1])
                self._tables[ids.device] = (axes, *self.computed(every))
        axes, cosines, sines = self._tables[ids.device]
        places = ids.long().index_select(1, axes)  # (S, D)
        return cosines.gather(0, places), sines.gather(0, places)


def _tabled(model: torch.nn.Module) -> torch.nn.Module:
    model.pos_embed = _TabledPositions(model.get_submodule("pos_embed")).train(model.training)
    return model


def resolution_shift(num_tokens: int, scheduler: Mapping[str, Any]) -> float:
    """mu of the time shift: linear in the number of image tokens, through the scheduler's two anchors."""
    n_0, n_1 = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    mu_0, mu_1 = scheduler["base_shift"], scheduler["max_shift"]
    return mu_0 + (num_tokens - n_0) * (mu_1 - mu_0) / (n_1 - n_0)


FAMILY = Flux()

__all__ = ["FAMILY", "FLUX_1_DEV", "Flux", "image_ids", "pack", "resolution_shift", "unpack"]
