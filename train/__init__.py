"""Stage 2: cache -> trained weights. Never loads T5, CLIP, the VAE encoder or a detector."""
