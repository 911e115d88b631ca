"""The VAE of latent diffusion (diffusers' AutoencoderKL): pixels to the moments of a posterior, and latents to pixels.

B images, H W pixels, C latent channels, h = H/8, w = W/8. What is cached is raw; final latents are
(latents - shift) * scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shared import drawn
from shared.cache.schema import Field
from shared.errors import UserError
from shared.families.base import Encode, LayerKind, Posterior, Tensors
from shared.families.parts.component import loaded
from shared.model_folder import ModelFolder, tensors_sha256

_RENAMED: Mapping[str, str] = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the parts of an attention were called when SD 1.5's VAE was saved; diffusers renames them as it loads."""


def settings(model: ModelFolder) -> dict[str, Any]:
    """The VAE's configuration. That of SD 1.5 is older than its scaling factor, which diffusers has by default."""
    return {"scaling_factor": 0.18215, **model.config("vae")}


def _tensors(model: ModelFolder, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """`ModelFolder.tensors` of the VAE under the names of now."""
    for name, tensor in model.tensors("vae", prefix):
        attention, _, rest = name.rpartition(".attentions.0.")
        part, _, kind = rest.partition(".")
        yield f"{attention}.attentions.0.{_RENAMED[part]}.{kind}" if attention and part in _RENAMED else name, tensor


def layers(channels: int, *, condition: bool) -> tuple[LayerKind, ...]:
    """The layer of the images' latents; with `condition` that of the drawings' latents, too."""
    moments = (
        Field("mean", "as encoded", f"{channels} h w", "mean of the VAE's posterior, raw: neither shifted nor scaled"),
        Field("std", "as encoded", f"{channels} h w", "standard deviation of the posterior, raw"),
    )
    of_drawings = tuple(
        Field(f.name, f.dtype, f"R {f.shape}", f"{f.meaning}; R drawings of the sample") for f in moments
    )
    kinds = (
        LayerKind("latents", "image", ("vae",), moments, shard_rows=256),
        LayerKind("condition_latents", "condition", ("vae",), of_drawings, shard_rows=256),
    )
    return kinds if condition else kinds[:1]


def fields(layer: LayerKind, posterior: Posterior) -> tuple[Field, ...]:
    """What one row holds."""
    if posterior == "moments":
        return layer.fields
    [mean] = [field for field in layer.fields if field.name == "mean"]
    if posterior == "mean":
        return (mean,)
    return (replace(mean, name="sample", meaning=mean.meaning.replace("mean of", "one draw of", 1)),)


def recipe(model: ModelFolder, posterior: Posterior) -> dict[str, Any]:
    """What latents depend on beside the encoder's weights, and what training needs to know of them."""
    config = settings(model)
    found = {
        "shift": config.get("shift_factor") or 0.0,  # Stable Diffusion's latents are not shifted
        "scale": config["scaling_factor"],
        # Training loads the decoder alone and recognises by this that it belongs to the latents.
        "decoder_sha256": decoder_sha256(model),
    }
    return found if posterior == "moments" else {**found, "posterior": posterior}


def decoder_sha256(model: ModelFolder) -> str:
    """Digest of the VAE's decoder tensors alone."""
    return tensors_sha256(_tensors(model, "decoder."))


def check_decoder(model: ModelFolder, recipe: Mapping[str, Any]) -> str | None:
    """Refuse (`UserError`) a model whose VAE is not the one that made these latents; without one a remark comes
    back. `recipe`: of the latents."""
    if not model.has("vae"):
        return f"model {model.name} has no vae folder: no pictures will be made while training"
    stated = recipe.get("decoder_sha256")
    if (found := decoder_sha256(model)) != stated:
        raise UserError(
            f"this cache was encoded with another VAE than the one in {model.name} (decoder {found[:8]}, cache "
            f"{str(stated)[:8]}); preprocess again with MODEL={model.name}, or train on the model it was made with"
        )
    return None


def open_encoder(model: ModelFolder, device: str, dtype: torch.dtype) -> Encode:
    """Images, uint8 (B, H, W, 3) or (B, R, H, W, 3) -> "mean" and "std", (B, C, h, w) or (B, R, C, h, w)."""
    from diffusers import AutoencoderKL

    vae = loaded(AutoencoderKL, model, "vae", dtype)
    del vae.decoder
    vae.to(device)

    @torch.no_grad()
    def encode(images: np.ndarray) -> Tensors:
        lead = images.shape[:-3]  # (B,) or, for a condition with several drawings, (B, R)
        pixels = torch.from_numpy(images).flatten(0, -4).permute(0, 3, 1, 2).contiguous()
        # The pipelines' own preprocessing: [0, 1] in fp32, then [-1, 1], then the VAE's precision.
        pixels = (2.0 * (pixels.float() / 255.0) - 1.0).to(device=device, dtype=dtype)
        # cuDNN's own choice for fp32 convolutions is TF32, with 10 bits of mantissa: fp32 shall be fp32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            posterior = vae.encode(pixels).latent_dist
        return {
            name: moment.cpu().unflatten(0, lead) for name, moment in (("mean", posterior.mean), ("std", posterior.std))
        }

    return encode


def keep(tensors: Tensors, posterior: Posterior, seed: str) -> Tensors:
    """Of the moments of one row, what the cache keeps. A draw is a function of the moments and of `seed` alone."""
    if posterior == "moments":
        return tensors
    mean = tensors["mean"]
    if posterior == "mean":
        return {"mean": mean}
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    noise = torch.randn(mean.shape, generator=generator)
    return {"sample": (mean.float() + tensors["std"].float() * noise).to(mean.dtype)}


def final_latents(raw: Tensors, recipe: Mapping[str, Any], generator: torch.Generator | None) -> torch.Tensor:
    """Raw latents (B, C, h, w) -> final latents (B, C, h, w), fp32. Of "mean" and "std" a draw of the posterior,
    without a generator the mean; a lone "mean" or "sample" as it is."""
    latents = (raw["sample"] if "sample" in raw else raw["mean"]).float()
    if "std" in raw and generator is not None:
        latents = latents + raw["std"].float() * drawn.normal(latents.shape, generator, latents.device)
    return (latents - recipe["shift"]) * recipe["scale"]


def open_decoder(model: ModelFolder, device: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load the decoder alone: final latents (B, C, h, w) -> uint8 (B, H, W, 3) on the CPU."""
    from diffusers import AutoencoderKL

    config = settings(model)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    del vae.encoder, vae.quant_conv
    weights = {name: tensor for prefix in ("decoder.", "post_quant_conv.") for name, tensor in _tensors(model, prefix)}
    vae.load_state_dict(weights, assign=True)
    vae.to(device=device, dtype=dtype).eval().requires_grad_(False)
    shift = config.get("shift_factor") or 0.0

    @torch.no_grad()
    def decode(x_0: torch.Tensor) -> torch.Tensor:
        latents = x_0.to(device=device, dtype=dtype)
        pixels = vae.decode(latents / config["scaling_factor"] + shift, return_dict=False)[0]
        return (pixels.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    return decode
