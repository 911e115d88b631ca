"""Guidance distillation: what makes the guidance input of FLUX.1-dev mean something (Meng et al. 2023).

Classifier-free guidance paints clearer shapes and costs two passes per step: v = v_empty + g (v_caption - v_empty).
Here a copy of the base learns to give that v in one pass, with g as its guidance input. The base itself is the teacher;
its answer holds no noise, so a few hundred steps are enough.
"""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn

from examples.shapes import pictures
from examples.tiny_flux.base import Velocity, draw_length, make_optimizers, worded
from examples.tiny_flux.learning_rate import cosine
from examples.tiny_flux.text import TextSide
from examples.tiny_flux.vae import encode


@dataclass
class GuidanceOptions:
    """How guidance is distilled."""

    num_steps: int = 600
    """Each costs about 1.7 times a step of the base with as many pictures."""
    batch_size: int = 24
    """Pictures per step at the short T5 length; fewer at longer ones."""
    num_pictures: int = 4000
    """Drawings, encoded once at the start. Other ones than the base's."""
    matrix_learning_rate: float = 1e-3
    """For the blocks' matrices, by Muon."""
    learning_rate: float = 1e-3
    """For all else, by AdamW."""
    lowest: float = 1.0
    """Guidance is drawn uniformly from here ..."""
    highest: float = 5.0
    """... to here. Outside of this range the result extrapolates."""
    t_mean: float = 1.0
    """Timesteps are sigmoid(N(t_mean, t_std)); guidance matters most where the layout is decided, near t = 1."""
    t_std: float = 1.2
    """As for the base."""
    seed: int = 1
    """Of the drawings, the captions and the noise."""


def distill_guidance(
    teacher: FluxTransformer2DModel, vae: AutoencoderKL, text: TextSide, options: GuidanceOptions, device: torch.device
) -> FluxTransformer2DModel:
    """Train a copy of `teacher` to answer as the teacher with classifier-free guidance would, and return it."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    drawings = list(pictures(options.num_pictures, options.seed))
    latents = encode(vae, np.stack([drawing.image for drawing in drawings])).to(device)
    teacher = teacher.to(device).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    ask_teacher, ask_student = Velocity(teacher, device), Velocity(student, device)
    optimizers = make_optimizers(student, options.matrix_learning_rate, options.learning_rate)
    peaks = (options.matrix_learning_rate, options.learning_rate)
    parameters = list(student.parameters())

    began, losses = time.monotonic(), []
    for step in range(options.num_steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * cosine(step, options.num_steps, num_warmup=30)
        length, count = draw_length(rng, options.batch_size, latents.shape[1])
        chosen = rng.integers(len(latents), size=count)
        captions = [worded(rng, drawings[index], empty=0.02) for index in chosen]
        prompt_embeds, pooled = text.embed([*captions, *[""] * count], length)

        x = latents[torch.from_numpy(chosen).to(device)]
        noise = torch.randn_like(x)
        t = torch.sigmoid(options.t_mean + options.t_std * torch.randn(count, device=device))
        x_t = (1 - t[:, None, None]) * x + t[:, None, None] * noise
        guidance = options.lowest + (options.highest - options.lowest) * torch.rand(count, device=device)
        with torch.no_grad():
            both = ask_teacher(x_t.repeat(2, 1, 1), t.repeat(2), (prompt_embeds, pooled), guidance.repeat(2))
            v_caption, v_empty = both.chunk(2)
            target = v_empty + guidance[:, None, None] * (v_caption - v_empty)
        answer = ask_student(x_t, t, (prompt_embeds[:count], pooled[:count]), guidance)
        loss = ((answer - target) ** 2).mean()

        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        assert np.isfinite(losses[-1]), f"step {step + 1}: the loss is {losses[-1]}"
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            print(
                f"guidance: step {step + 1}/{options.num_steps} {seconds:.0f} s loss {np.mean(losses[-50:]):.4f}",
                flush=True,
            )
    return student.eval()
