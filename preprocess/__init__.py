"""Stage 1: images and captions become a cache of latents, drawings and embeddings."""
