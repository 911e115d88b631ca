"""The encoders that training without a cache runs at every step: T5-XXL, CLIP and the VAE, of their real size, random,
in int8 by optimum-quanto, as in the trainer that this project starts from."""

from __future__ import annotations

import torch

from benchmarks.step.sizes import Size
from shared.families.base import Batch
from train.quantize import quantize_block

T5_VOCABULARY, CLIP_VOCABULARY, CLIP_LENGTH = 32_128, 49_408, 77


class Encoders:
    """Captions and pictures -> what a cache would hold of them."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        self.device, self.dtype = device, dtype
        heads = max(1, size.text_dim // 64)
        t5 = T5Config(
            vocab_size=T5_VOCABULARY, d_model=size.text_dim, d_kv=64, d_ff=size.text_dim * 5 // 2,
            num_layers=size.t5_layers, num_heads=heads, feed_forward_proj="gated-gelu", is_encoder_decoder=False,
            use_cache=False,
        )  # fmt: skip
        clip = CLIPTextConfig(
            vocab_size=CLIP_VOCABULARY, hidden_size=size.pooled_dim, intermediate_size=4 * size.pooled_dim,
            num_hidden_layers=size.clip_layers, num_attention_heads=max(1, size.pooled_dim // 64),
            projection_dim=size.pooled_dim,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):  # their own initialisation, made there
                self.t5 = T5EncoderModel(t5)
                self.clip = CLIPTextModel(clip)
                self.vae = AutoencoderKL(
                    latent_channels=16, block_out_channels=size.vae_channels, layers_per_block=2,
                    norm_num_groups=min(32, size.vae_channels[0] // 4), down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.3611, shift_factor=0.1159,
                    use_quant_conv=False, use_post_quant_conv=False,
                )  # fmt: skip
        finally:
            torch.set_default_dtype(before)
        for module in (self.t5, self.clip, self.vae):
            quantize_block(module.to(dtype).eval(), "quanto")
            module.requires_grad_(False)

    @torch.no_grad()
    def encode(self, batch: Batch, text_length: int, generator: torch.Generator) -> None:
        """Put fresh encodings of random captions and pictures into `batch`: the T5 and CLIP embeddings, and the
        posterior's moments of each picture and its drawing."""
        B, device = len(batch), self.device

        def ids(vocabulary: int, length: int) -> torch.Tensor:
            return torch.randint(0, vocabulary, (B, length), generator=generator, device=device)

        def moments(role: str) -> dict[str, torch.Tensor]:
            pixels = torch.rand(B, 3, batch.height, batch.width, generator=generator, device=device) * 2 - 1
            posterior = self.vae.encode(pixels.to(self.dtype)).latent_dist
            return {f"{role}.mean": posterior.mean, f"{role}.std": posterior.std}

        batch.tensors["t5.prompt_embeds"] = self.t5(ids(T5_VOCABULARY, text_length))[0]
        batch.tensors["clip.pooled_prompt_embeds"] = self.clip(ids(CLIP_VOCABULARY, CLIP_LENGTH)).pooler_output
        for role in ("latents", "condition_latents"):
            batch.tensors |= moments(role)
