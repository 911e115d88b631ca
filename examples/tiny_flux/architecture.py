"""The tiny FLUX' architecture: the classes of FLUX.1-dev at a thousandth of its size.

Letters in this package: B = batch, H, W = pixels, h, w = H/8, W/8 (latents), T = h/2 * w/2 image tokens, L = T5 tokens.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

LATENT_CHANNELS = 16
TEXT_WIDTH = 64
CLIP_LENGTH = 77


def make_vae() -> AutoencoderKL:
    """The VAE, 0.88 M parameters: (B, 3, H, W) in [-1, 1] <-> latents (B, 16, h, w).

    Two groups per normalisation and not more: with one channel per group it would be an instance normalisation, which
    wipes out a flat colour, and flat colours are all there is to these pictures.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        mid_block_add_attention=True,
    )


def make_transformer() -> FluxTransformer2DModel:
    """The transformer (2.4 M parameters, 2 double + 4 single blocks): tokens (B, T, 64) -> velocity (B, T, 64)."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of FLUX.1-dev, unchanged."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The CLIP text encoder, 0.1 M parameters: ids (B, 77) -> pooled (B, 64).

    It takes its special ids from the tokenizer, because pooling looks for the end-of-sequence id.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """The T5 encoder, 0.1 M parameters: ids (B, L) -> (B, L, 64)."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) -> image tokens (B, T, 4C), as FLUX does: each token is a 2 x 2 patch."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Image tokens (B, T, 4C) -> latents (B, C, h, w): the inverse of `pack`."""
    b, _, c = tokens.shape
    return tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def image_ids(h: int, w: int) -> torch.Tensor:
    """Positions (T, 3) of the image tokens: (0, row, column)."""
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None, :]
    return ids.reshape(-1, 3)


def num_parameters(model: torch.nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())
