"""T5's encoder: captions to the embedding of each token.

B captions, L tokens with padding, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from shared.families.base import Encode, Tensors
from shared.families.parts.component import loaded
from shared.families.parts.component import tokenizer as load_tokenizer
from shared.model_folder import ModelFolder


def tokenizer(model: ModelFolder) -> Any:
    """T5's tokenizer. Raises `UserError`."""
    from transformers import T5TokenizerFast

    return load_tokenizer(T5TokenizerFast, model, "tokenizer_2", "text_encoder_2", ("spiece.model",))


def open_tokens(model: ModelFolder, device: str, dtype: torch.dtype, text_length: int) -> Encode:
    """Captions -> "prompt_embeds" (B, L, D), padding and all, unmasked."""
    from transformers import T5EncoderModel

    words = tokenizer(model)
    encoder = loaded(T5EncoderModel, model, "text_encoder_2", dtype).to(device)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensors:
        ids = words(
            captions, padding="max_length", max_length=text_length, truncation=True, return_tensors="pt"
        ).input_ids
        return {"prompt_embeds": encoder(ids.to(device))[0].to(dtype).cpu()}

    return encode


def tiny_tokenizer() -> Any:
    """A tokenizer of single characters, for tests."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
