"""The base: the transformer, trained from nothing to paint what a caption says (flow matching, Lipman et al. 2022).

x_t = (1 - t) x_0 + t noise, and the model learns the velocity noise - x_0. What is kept is an average of the weights
over the last steps (EMA).

The pipelines of diffusers pad captions to 512 T5 tokens unless told otherwise, and nothing masks the pads. So training
draws the length anew for each step, mostly short ones (cheap), now and then up to 512: then the pads are learned to be
overlooked.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn

from examples.shapes import GENERIC_SHAPE, TEMPLATES, Drawing, caption, pictures
from examples.tiny_flux.architecture import image_ids, make_transformer, num_parameters
from examples.tiny_flux.learning_rate import cosine
from examples.tiny_flux.text import SHORT_LENGTH, TextSide, invented_word
from examples.tiny_flux.vae import encode

SIZE = 128
LENGTHS = {SHORT_LENGTH: 0.66, 32: 0.12, 77: 0.1, 128: 0.05, 256: 0.03, 512: 0.04}
"""T5 length -> how often a step uses it."""


@dataclass
class BaseOptions:
    """How the base is trained."""

    num_steps: int = 4500
    """Most of the time goes here: about half a second a step on two busy CPU cores."""
    schedule_steps: int = 6500
    """Length of the learning rate's cosine. Its end is left out: distillation brings the rate down anew."""
    batch_size: int = 32
    """Pictures per step at the short T5 length; fewer at longer ones, for about the same number of tokens."""
    num_pictures: int = 20_000
    """Drawings, encoded once at the start."""
    matrix_learning_rate: float = 3e-3
    """For the blocks' matrices, by Muon."""
    learning_rate: float = 2e-3
    """For all else, by AdamW."""
    t_mean: float = 0.5
    """Timesteps are sigmoid(N(t_mean, t_std)). Where the shape will be is decided near t = 1: hence above 0."""
    t_std: float = 1.2
    """Wider than diffusers' 1.0, for more steps at both ends."""
    empty_caption: float = 0.05
    """How often the caption is the empty one."""
    ema_steps: int = 300
    """Over about how many steps the weights are averaged."""
    seed: int = 0
    """Of the drawings, the captions, the weights and the noise."""


def start_from_zero(transformer: FluxTransformer2DModel) -> None:
    """Zero the modulations and the output layer, so that every block begins as the identity (DiT's adaLN-Zero)."""
    modulations = ("norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear")
    for name, module in transformer.named_modules():
        if name == "proj_out" or name.endswith(modulations):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def make_optimizers(
    transformer: FluxTransformer2DModel, matrix_learning_rate: float, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for modulations, embedders, the output layer, norms and biases."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        inside = "transformer_blocks." in name and ".linear." not in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]


class Velocity:
    """The model's answer, with what never changes (positions) filled in."""

    def __init__(self, transformer: FluxTransformer2DModel, device: torch.device) -> None:
        self.transformer = transformer
        self.image_ids = image_ids(SIZE // 8, SIZE // 8).to(device)

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor], guidance: torch.Tensor
    ) -> torch.Tensor:
        """Velocity (B, T, 64) at x_t (B, T, 64), t (B,), text = prompt (B, L, 64) and pooled (B, 64), guidance (B,)."""
        prompt_embeds, pooled = text
        return self.transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=x_t.device),
            return_dict=False,
        )[0]


def worded(rng: np.random.Generator, drawing: Drawing, empty: float) -> str:
    """A training caption: one of the paraphrases, at times with a generic or invented word for the shape, or empty."""
    if rng.random() < empty:
        return ""
    shape = drawing.shape
    kind = rng.random()
    if kind < 0.06:
        shape = GENERIC_SHAPE
    elif kind < 0.1:
        shape = invented_word(rng)
    return caption(drawing.foreground, shape, drawing.background, int(rng.integers(len(TEMPLATES))))


def draw_length(rng: np.random.Generator, batch_size: int, num_image_tokens: int) -> tuple[int, int]:
    """A T5 length, and how many pictures make about as many tokens with it as `batch_size` do at the short one."""
    length = int(rng.choice(list(LENGTHS), p=list(LENGTHS.values())))
    tokens = batch_size * (SHORT_LENGTH + num_image_tokens)
    return length, max(8, min(batch_size, tokens // (length + num_image_tokens)))


class HeldOutLoss:
    """The flow-matching loss on validation drawings with fixed noise and timesteps: comparable between runs."""

    def __init__(self, vae: AutoencoderKL, text: TextSide, count: int = 256) -> None:
        drawings = list(pictures(count, seed=1, split="validation"))
        generator = torch.Generator().manual_seed(5)
        device = vae.device
        self.x_0 = encode(vae, np.stack([drawing.image for drawing in drawings])).to(device)
        self.noise = torch.randn(self.x_0.shape, generator=generator).to(device)
        self.t = torch.sigmoid(torch.randn(count, generator=generator)).to(device)
        self.text = text.embed([drawing.caption for drawing in drawings], SHORT_LENGTH)

    @torch.no_grad()
    def __call__(self, velocity: Velocity) -> tuple[float, list[float]]:
        """The mean loss, and its means over t in [0, .25), [.25, .5), [.5, .75), [.75, 1)."""
        t = self.t[:, None, None]
        x_t = (1 - t) * self.x_0 + t * self.noise
        guidance = torch.full_like(self.t, 3.5)
        losses = []
        for part in torch.arange(len(self.t)).split(64):
            answer = velocity(x_t[part], self.t[part], (self.text[0][part], self.text[1][part]), guidance[part])
            losses.append(((answer - (self.noise - self.x_0)[part]) ** 2).mean((1, 2)))
        loss = torch.cat(losses)
        return float(loss.mean()), [float(loss[(self.t * 4).long() == quarter].mean()) for quarter in range(4)]


def _embed(
    rng: np.random.Generator, text: TextSide, drawings: Sequence[Drawing], options: BaseOptions, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return text.embed([worded(rng, drawing, options.empty_caption) for drawing in drawings], length)


def train_base(
    vae: AutoencoderKL, text: TextSide, options: BaseOptions, device: torch.device, snapshot: Path | None = None
) -> FluxTransformer2DModel:
    """Train the transformer on latents of `vae` and captions of `text`; return its averaged weights.

    Every 500 steps the averaged weights are written to the folder `snapshot`, if there is one: a usable base before the
    end.
    """
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    began = time.monotonic()
    drawings = list(pictures(options.num_pictures, options.seed))
    latents = encode(vae, np.stack([drawing.image for drawing in drawings])).to(device)
    seconds = time.monotonic() - began
    print(f"base: {len(latents)} pictures encoded in {seconds:.0f} s, std {latents.std():.2f}", flush=True)

    transformer = make_transformer().to(device)
    start_from_zero(transformer)
    average = copy.deepcopy(transformer).requires_grad_(False)
    velocity = Velocity(transformer, device)
    held_out = HeldOutLoss(vae, text)
    optimizers = make_optimizers(transformer, options.matrix_learning_rate, options.learning_rate)
    base_rates = [options.matrix_learning_rate, options.learning_rate]
    parameters = list(transformer.parameters())
    print(f"base: {num_parameters(transformer) / 1e6:.2f} M parameters", flush=True)

    began, losses = time.monotonic(), []
    for step in range(options.num_steps):
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * cosine(step, options.schedule_steps, num_warmup=100)
        length, count = draw_length(rng, options.batch_size, latents.shape[1])
        chosen = rng.integers(len(latents), size=count)
        embeds = _embed(rng, text, [drawings[index] for index in chosen], options, length)

        x = latents[torch.from_numpy(chosen).to(device)]
        noise = torch.randn_like(x)
        t = torch.sigmoid(options.t_mean + options.t_std * torch.randn(count, device=device))
        x_t = (1 - t[:, None, None]) * x + t[:, None, None] * noise
        # The guidance has no meaning yet, and is drawn so that the base works alike at any value of the usual range.
        guidance = 1 + 4 * torch.rand(count, device=device)
        loss = ((velocity(x_t, t, embeds, guidance) - (noise - x)) ** 2).mean()

        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        # Early on the average is over few steps, or it would remember the zeros that it started from.
        decay = min(1 - 1 / options.ema_steps, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)

        losses.append(loss.item())
        assert np.isfinite(losses[-1]), f"step {step + 1}: the loss is {losses[-1]}"
        if (step + 1) % 500 == 0 or step + 1 in (100, 250):
            value, by_t = held_out(Velocity(average, device))
            print(
                f"base: step {step + 1}/{options.num_steps} {time.monotonic() - began:.0f} s "
                f"loss {np.mean(losses[-100:]):.4f} held-out {value:.4f} by t {[round(part, 3) for part in by_t]}",
                flush=True,
            )
            if snapshot is not None:
                average.save_pretrained(snapshot)
    return average
