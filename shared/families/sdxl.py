"""Stable Diffusion XL: a UNet that attends to two CLIP encoders and is told a pooled embedding and the picture's sizes.

Facts that the rest of the project need not know, with their source: arXiv 2307.01952, and stabilityai's
stable-diffusion-xl-base-1.0 as diffusers runs it (StableDiffusionXLControlNetPipeline).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from shared.cache.schema import Field
from shared.errors import UserError
from shared.families.base import Batch, Inputs, LayerKind, TextToImage
from shared.families.parts import clip, sizes
from shared.families.parts.latent_diffusion import LatentDiffusion
from shared.model_folder import ModelFolder


@final
class StableDiffusionXL(LatentDiffusion):
    """SDXL's base and its relatives of the same classes."""

    name = "sdxl"
    default_model = "stabilityai/stable-diffusion-xl-base-1.0"
    pipeline_class = "StableDiffusionXLControlNetPipeline"
    pipeline_options: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    licences: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "stabilityai/stable-diffusion-xl-base-1.0": {"license": "openrail++"},
    }
    size_multiple = 32  # VAE 8x, then halved twice
    guidance_scale = 5.0
    lora_prefixes: ClassVar[Mapping[str, str]] = {
        "unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2",
    }  # fmt: skip
    text_to_image = TextToImage("StableDiffusionXLPipeline", num_steps=50, guidance=5.0)
    unet: ClassVar[Mapping[str, Any]] = {
        "_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "in_channels": 4, "layers_per_block": 2, "out_channels": 4, "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128, "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    layers = (
        *LatentDiffusion.image_layers,
        sizes.LAYER,
        LayerKind("clip", "caption", ("text_encoder", "tokenizer"), (
            Field("prompt_embeds", "as encoded", "L D", "CLIP's hidden states but the last layer's; L 77, SDXL: D 768"),
        ), shard_rows=1024),
        LayerKind("clip_2", "caption", ("text_encoder_2", "tokenizer_2"), (
            Field("prompt_embeds", "as encoded", "L D", "the second CLIP's, likewise; SDXL: D 1280"),
            Field("pooled_prompt_embeds", "as encoded", "P", "its embedding of the whole, projected; SDXL: P 1280"),
        ), shard_rows=1024),
    )  # fmt: skip
    text_encoders = (clip.Clip(clip.inner, clip.L_14), clip.Clip(clip.inner_and_projected, clip.BIG_G, second=True))

    def text_facts(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int, str]]:
        if config.get("addition_embed_type") != "text_time":
            raise UserError("this cache is for sdxl, but the model's UNet is told no sizes: it is none of SDXL's")
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return {"clip_2.pooled_prompt_embeds": (0, pooled, "features of the pooled CLIP embedding")}

    def check_base(
        self, model: ModelFolder, fields: Mapping[str, tuple[int, ...]], recipes: Mapping[str, Any]
    ) -> str | None:
        remark = super().check_base(model, fields, recipes)
        cached = sum(fields[f"{layer}.prompt_embeds"][1] for layer in ("clip", "clip_2"))
        if (expected := model.config(self.base_component)["cross_attention_dim"]) != cached:
            raise UserError(
                f"this cache was made for another model: it has {cached} features of both CLIP embeddings, "
                f"{model.name} takes {expected}; preprocess again with MODEL={model.name}"
            )
        return remark

    def sample_shapes(
        self, height: int, width: int, text_length: int, model: ModelFolder | None = None
    ) -> dict[str, tuple[int, ...]]:
        config = self.base_config(model)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        second = min(pooled, config["cross_attention_dim"] - 1)  # the second encoder is as wide as what it is pooled to
        return {
            **self.image_shapes(height, width, config),
            "sizes.time_ids": (6,),
            "clip.prompt_embeds": (text_length, config["cross_attention_dim"] - second),
            "clip_2.prompt_embeds": (text_length, second),
            "clip_2.pooled_prompt_embeds": (pooled,),
        }

    def inputs(self, batch: Batch, condition: torch.Tensor | None, dtype: torch.dtype) -> Inputs:
        both = [batch.tensors[f"{layer}.prompt_embeds"].to(dtype) for layer in ("clip", "clip_2")]
        embeds = {
            "encoder_hidden_states": torch.cat(both, dim=-1),
            "text_embeds": batch.tensors["clip_2.pooled_prompt_embeds"].to(dtype),
            "time_ids": batch.tensors[f"{sizes.LAYER.name}.{sizes.FIELD}"].float(),  # bf16 would round them by up to 4
        }
        return Inputs(condition=condition, embeds=embeds, height=batch.height, width=batch.width)

    def guided_from(self, model: ModelFolder, uncaptioned: Inputs) -> Inputs:
        """Zeros in the place of both embeddings, where the model's pipeline has them so (SDXL's base has)."""
        if not model.index().get("force_zeros_for_empty_prompt", True):
            return uncaptioned
        words = ("encoder_hidden_states", "text_embeds")
        zeros = {name: torch.zeros_like(uncaptioned.embeds[name]) for name in words}
        return replace(uncaptioned, embeds={**uncaptioned.embeds, **zeros})

    def conditioning(self, inputs: Inputs) -> dict[str, Any]:
        added = {name: inputs.embeds[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": inputs.embeds["encoder_hidden_states"], "added_cond_kwargs": added}

    def tiny(self, folder: Path, seed: int = 0) -> Path:
        from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

        words = clip.tiny_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            StableDiffusionXLPipeline(
                vae=self.tiny_vae(0.13025),
                text_encoder=clip.tiny_encoder(words, num_layers=2),
                tokenizer=words,
                text_encoder_2=clip.tiny_encoder(words, num_layers=2, projected=True),
                tokenizer_2=words,
                unet=UNet2DConditionModel(
                    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=48,
                    attention_head_dim=(2, 4), sample_size=8, use_linear_projection=True,
                    transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=24 + 6 * 8,
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                ),
                scheduler=self.tiny_scheduler(),
                add_watermarker=False,
            ).save_pretrained(folder)  # fmt: skip
        return folder


FAMILY = StableDiffusionXL()
