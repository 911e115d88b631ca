"""The VAE: trained from nothing on drawings, their outlines and some textures.

Colours must get through from the first step, or minutes go by with gray pictures: residual branches start at zero,
resizing convolutions as an average or an identity, every activation at standard deviation 1 (`make_easy`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from examples.shapes import pictures
from examples.tiny_flux.architecture import LATENT_CHANNELS, make_vae, pack, unpack
from examples.tiny_flux.learning_rate import cosine


@dataclass
class VaeOptions:
    """How the VAE is trained."""

    num_crop_steps: int = 1700
    """Steps on crops of 64 x 64 pixels around an outline, 8 at a time: the bulk, at a quarter of the cost."""
    num_full_steps: int = 450
    """Steps on whole pictures, 4 at a time: what happens at the border, and the middle attention at its real length."""
    learning_rate: float = 1.5e-3
    """The highest, after 50 steps of warm-up."""
    kl_weight: float = 2e-4
    """Pull of the latents towards N(0, 1)."""
    edge_weight: float = 2.0
    """How much more a pixel near an outline counts."""
    num_pictures: int = 3000
    """Drawings to crop from."""
    seed: int = 0
    """Of the drawings, the crops and the latents' noise."""


def canny(image: np.ndarray) -> np.ndarray:
    """The outline condition: (H, W, 3) uint8, white lines on black, three equal channels."""
    return np.repeat(cv2.Canny(np.ascontiguousarray(image), 100, 200)[..., None], 3, axis=2)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).byte().cpu().numpy()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 25) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> image tokens (B, T, 64) of the posterior's mean, float32 on the CPU."""
    chunks = (to_tensor(images[i : i + batch_size]).to(vae.device) for i in range(0, len(images), batch_size))
    return torch.cat([pack(vae.encode(chunk).latent_dist.mean).cpu() for chunk in chunks])


@torch.no_grad()
def decode(vae: AutoencoderKL, tokens: torch.Tensor, size: int = 128, batch_size: int = 25) -> np.ndarray:
    """Image tokens (B, T, 64) -> uint8 (B, H, W, 3)."""
    chunks = (tokens[i : i + batch_size].to(vae.device) for i in range(0, len(tokens), batch_size))
    return np.concatenate([to_images(vae.decode(unpack(chunk, size // 8, size // 8)).sample) for chunk in chunks])


def psnr(images: np.ndarray, reconstructions: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of two uint8 arrays of one shape."""
    error = np.mean((images.astype(np.float64) - reconstructions) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth picture with a few random polygons, (H, W, 3) uint8: so that the VAE knows more than the drawn shapes."""
    corners = rng.uniform(0, 255, (2, 2, 3)).astype(np.float32)
    picture = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.4:
        cells = int(rng.integers(4, 24))
        noise = rng.normal(0, 40, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(0, 3))):
        polygon = rng.uniform(0, size, (int(rng.integers(3, 9)), 2))
        cv2.fillPoly(picture, [np.round(polygon).astype(np.int32)], rng.uniform(0, 255, 3).tolist())
    return np.clip(picture, 0, 255).astype(np.uint8)


class Crops:
    """Training pictures for the VAE: drawings (two thirds), their outlines (a quarter) and textures (a twelfth)."""

    def __init__(self, num_pictures: int, seed: int, size: int = 128) -> None:
        self.rng = np.random.default_rng(seed)
        self.size = size
        self.images = np.stack([drawing.image for drawing in pictures(num_pictures, seed)])
        self.outlines = np.stack([canny(image) for image in self.images])
        self.textures = np.stack([_texture(self.rng, size) for _ in range(400)])
        near = np.ones((7, 7), np.uint8)
        self.near_edge = np.stack([cv2.dilate(outline[..., 0], near) for outline in self.outlines]) > 0
        self.edge_points = [np.argwhere(outline[..., 0] > 0) for outline in self.outlines]

    def batch(self, count: int, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (count, 3, crop, crop) in [-1, 1] and where an outline is near (count, 1, crop, crop) in {0, 1}."""
        images, masks = [], []
        for _ in range(count):
            kind = self.rng.random()
            if kind < 1 / 12:
                image = self.textures[self.rng.integers(len(self.textures))]
                mask = np.zeros(image.shape[:2], bool)
                focus = self.rng.integers(0, self.size, 2)
            else:
                index = self.rng.integers(len(self.images))
                image = (self.outlines if kind < 1 / 3 else self.images)[index]
                mask = self.near_edge[index]
                focus = self.edge_points[index][self.rng.integers(len(self.edge_points[index]))]
            if crop < self.size:
                offset = self.rng.integers(4, crop - 4, 2)
                y, x = np.clip(focus - offset, 0, self.size - crop)
                image, mask = image[y : y + crop, x : x + crop], mask[y : y + crop, x : x + crop]
            for axis in (0, 1):
                if self.rng.random() < 0.5:
                    image, mask = np.flip(image, axis), np.flip(mask, axis)
            images.append(image)
            masks.append(mask)
        return to_tensor(np.stack(images)), torch.from_numpy(np.stack(masks)).float()[:, None]


@torch.no_grad()
def make_easy(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Re-initialise in place so that colours get through at once; `pixels` (B, 3, H, W) are typical training crops."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                nn.init.orthogonal_(module.conv_shortcut.weight.flatten(1))
                nn.init.zeros_(module.conv_shortcut.bias)
        elif isinstance(module, Downsample2D | Upsample2D):
            weight = module.conv.weight
            weight.mul_(0.1)
            nn.init.zeros_(module.conv.bias)
            channel = torch.arange(weight.shape[0])
            if isinstance(module, Downsample2D):
                weight[channel, channel, :2, :2] += 0.25
            else:
                weight[channel, channel, 1, 1] += 1
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)
    _scale_to_unit_activations(vae, pixels)


def _main_path(half: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that every signal passes, in order: in, shortcuts and resizing, out."""
    ends = ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
    middle = [module for name, module in half.named_modules() if name.endswith(ends)]
    return [half.conv_in, *middle, half.conv_out]


@torch.no_grad()
def _scale_to_unit_activations(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Scale each convolution of the main path by what it puts out on `pixels`, in order (LSUV, Mishkin & Matas 2015).

    Before the two last normalisations, channels with a constant of +-6 are put in: normalising a group divides by its
    spread, which for a flat colour is nearly nothing, and the constants give it a spread that does not depend on the
    colour.
    """
    encoder, decoder = vae.encoder, vae.decoder
    constants = {
        encoder.down_blocks[-1].resnets[0].conv_shortcut: ((0, 32), (6.0, -6.0, 6.0, -6.0)),
        decoder.up_blocks[-1].resnets[0].conv_shortcut: ((0, 8), (6.0, -6.0)),
    }
    # These channels take up the spread, so the others come out smaller by this factor, made up for here.
    encoder.conv_norm_out.weight.fill_(2.3)
    decoder.conv_norm_out.weight.fill_(3.1)
    for conv in [*_main_path(encoder), *_main_path(decoder)]:
        seen: list[torch.Tensor] = []
        hook = conv.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        vae.decode(vae.encode(pixels).latent_dist.mean)
        hook.remove()
        assert conv.bias is not None
        activation = seen[0] - conv.bias[:, None, None]
        if conv is encoder.conv_out:
            spread = activation[:, :LATENT_CHANNELS].std((0, 2, 3))
            conv.weight[:LATENT_CHANNELS] /= spread[:, None, None, None]
            conv.weight[LATENT_CHANNELS:] *= 0.1
            conv.bias[:LATENT_CHANNELS] = 0
            conv.bias[LATENT_CHANNELS:] = -4  # log-variance: nearly no noise at the start
        else:
            target = 0.7 if conv is decoder.conv_out else 1.0
            conv.weight *= target / activation.std().clamp(min=1e-3)
        if conv in constants:
            starts, values = constants[conv]
            for start in starts:
                conv.bias[start : start + len(values)] = torch.tensor(values, device=conv.bias.device)


@torch.no_grad()
def fold_latent_spread(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Give every latent channel standard deviation 1 on `images`: divide in the encoder, multiply in the decoder.

    The channels' spreads differ up to five times, and `scaling_factor` is one number for all. The reconstruction does
    not change. (The mean could not be moved so: the decoder pads with zeros, so a constant is not the same at the
    border.)
    """
    latents = unpack(encode(vae, images), images.shape[1] // 8, images.shape[2] // 8)
    mean, spread = latents.mean((0, 2, 3)).to(vae.device), latents.std((0, 2, 3)).to(vae.device)
    conv = vae.encoder.conv_out
    conv.weight[:LATENT_CHANNELS] /= spread[:, None, None, None]
    conv.bias[:LATENT_CHANNELS] = conv.bias[:LATENT_CHANNELS] / spread
    conv.bias[LATENT_CHANNELS:] -= 2 * spread.log()
    vae.decoder.conv_in.weight *= spread[None, :, None, None]
    shift = (mean / spread).abs().max()
    print(f"vae: latent spread {spread.min():.2f} to {spread.max():.2f} made 1, mean at most {shift:.2f}", flush=True)


def _reconstruction_report(vae: AutoencoderKL) -> Callable[[int], str]:
    """A function that says the PSNR on validation drawings and outlines, every 200 steps."""
    images = np.stack([drawing.image for drawing in pictures(24, seed=1, split="validation")])
    outlines = np.stack([canny(image) for image in images])

    def report(step: int) -> str:
        if (step + 1) % 200:
            return ""
        drawn, lined = (psnr(kind, decode(vae, encode(vae, kind))) for kind in (images, outlines))
        return f"psnr {drawn:.1f} dB, outlines {lined:.1f} dB"

    return report


def train_vae(options: VaeOptions, device: torch.device) -> AutoencoderKL:
    """Train encoder and decoder from nothing. Loss: edge-weighted L1 + edge-weighted squared error + KL."""
    torch.manual_seed(options.seed)
    crops = Crops(options.num_pictures, options.seed)
    vae = make_vae().to(device, memory_format=torch.channels_last)
    make_easy(vae, crops.batch(32, 64)[0].to(device))
    report = _reconstruction_report(vae)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    num_steps = options.num_crop_steps + options.num_full_steps
    began = time.monotonic()
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = options.learning_rate * cosine(step, num_steps, num_warmup=50)
        x, near_edge = crops.batch(8, 64) if step < options.num_crop_steps else crops.batch(4, 128)
        x, near_edge = x.to(device), near_edge.to(device)
        posterior = vae.encode(x).latent_dist
        difference = vae.decode(posterior.sample()).sample - x
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        weight = 1 + options.edge_weight * near_edge
        loss = (weight * difference.abs()).mean() + (weight * difference**2).mean() + options.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - began
            print(f"vae: step {step + 1}/{num_steps} {seconds:.0f} s loss {loss.item():.4f} {report(step)}", flush=True)
    fold_latent_spread(vae, crops.images[:256])
    return vae
