"""Stable Diffusion 1.5: a UNet over VAE latents that attends to CLIP's token embeddings.

Facts that the rest of the project need not know, with their source: Runway's stable-diffusion-v1-5 as diffusers runs it
(StableDiffusionControlNetPipeline). Its relatives of the same classes (SD 1.4, 2.1, v-prediction) differ in their
configuration alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from shared.cache.schema import Field
from shared.errors import UserError
from shared.families.base import Batch, Inputs, LayerKind, TextToImage
from shared.families.parts import clip
from shared.families.parts.latent_diffusion import LatentDiffusion
from shared.model_folder import ModelFolder


@final
class StableDiffusion15(LatentDiffusion):
    """SD 1.5 and its relatives with one text encoder."""

    name = "sd15"
    default_model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pipeline_class = "StableDiffusionControlNetPipeline"
    pipeline_options: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    licences: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": {"license": "creativeml-openrail-m"},
        "CompVis/stable-diffusion-v1-4": {"license": "creativeml-openrail-m"},
        "stabilityai/stable-diffusion-2-1": {"license": "openrail++"},
    }
    size_multiple = 64  # VAE 8x, then halved three times
    guidance_scale = 7.5
    lora_prefixes: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    text_to_image = TextToImage("StableDiffusionPipeline", num_steps=50, guidance=7.5)
    unet: ClassVar[Mapping[str, Any]] = {
        "_class_name": "UNet2DConditionModel", "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768, "in_channels": 4, "layers_per_block": 2, "out_channels": 4, "sample_size": 64,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }  # fmt: skip
    layers = (
        *LatentDiffusion.image_layers,
        LayerKind("clip", "caption", ("text_encoder", "tokenizer"), (
            Field("prompt_embeds", "as encoded", "L D", "CLIP's last hidden states with padding; SD 1.5: L 77, D 768"),
        ), shard_rows=1024),
    )  # fmt: skip
    text_encoders = (clip.Clip(clip.last, clip.L_14),)

    def check_encoders(self, model: ModelFolder) -> None:
        super().check_encoders(model)
        if any(model.index().get("text_encoder_2") or ()):
            raise UserError(f"model {model.name} has two text encoders, where sd15 has one: is it SDXL's? FAMILY=sdxl")

    def text_facts(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int, str]]:
        return {"clip.prompt_embeds": (1, config["cross_attention_dim"], "features of the CLIP embeddings")}

    def sample_shapes(
        self, height: int, width: int, text_length: int, model: ModelFolder | None = None
    ) -> dict[str, tuple[int, ...]]:
        config = self.base_config(model)
        return {
            **self.image_shapes(height, width, config),
            "clip.prompt_embeds": (text_length, config["cross_attention_dim"]),
        }

    def inputs(self, batch: Batch, condition: torch.Tensor | None, dtype: torch.dtype) -> Inputs:
        embeds = {"encoder_hidden_states": batch.tensors["clip.prompt_embeds"].to(dtype)}
        return Inputs(condition=condition, embeds=embeds, height=batch.height, width=batch.width)

    def tiny(self, folder: Path, seed: int = 0) -> Path:
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        words = clip.tiny_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            StableDiffusionPipeline(
                vae=self.tiny_vae(0.18215),
                text_encoder=clip.tiny_encoder(words),
                tokenizer=words,
                unet=UNet2DConditionModel(
                    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=24,
                    attention_head_dim=2, sample_size=8,
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                ),
                scheduler=self.tiny_scheduler(),
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            ).save_pretrained(folder)  # fmt: skip
        return folder


FAMILY = StableDiffusion15()
