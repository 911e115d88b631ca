"""How the learning rate goes over a training."""

import math


def cosine(step: int, num_steps: int, num_warmup: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / num_warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))
