"""CLIP's text encoder: captions to the embedding of each token, and to one of the whole.

B captions, L tokens with padding (77 by CLIP's nature), D features.
"""

from __future__ import annotations

from typing import Any

import torch

from shared.families.base import Encode, Tensors
from shared.families.parts.component import loaded
from shared.families.parts.component import tokenizer as load_tokenizer
from shared.model_folder import ModelFolder


def tokenizer(model: ModelFolder, component: str = "tokenizer", encoder: str = "text_encoder") -> Any:
    """The tokenizer of a CLIP text encoder. Raises `UserError`."""
    from transformers import CLIPTokenizer

    return load_tokenizer(CLIPTokenizer, model, component, encoder, ("vocab.json", "merges.txt"))


def open_pooled(model: ModelFolder, device: str, dtype: torch.dtype) -> Encode:
    """Captions -> "pooled_prompt_embeds" (B, D)."""
    words, encoder = _load(model, device, dtype)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensors:
        return {"pooled_prompt_embeds": encoder(_ids(words, captions, device)).pooler_output.to(dtype).cpu()}

    return encode


def open_tokens(model: ModelFolder, device: str, dtype: torch.dtype) -> Encode:
    """Captions -> "prompt_embeds" (B, L, D): the last layer's output, normalised, with its padding."""
    words, encoder = _load(model, device, dtype)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensors:
        return {"prompt_embeds": encoder(_ids(words, captions, device)).last_hidden_state.to(dtype).cpu()}

    return encode


def open_inner_tokens(model: ModelFolder, device: str, dtype: torch.dtype) -> Encode:
    """Captions -> "prompt_embeds" (B, L, D): the output of the last layer but one, not normalised (SDXL)."""
    words, encoder = _load(model, device, dtype)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensors:
        found = encoder(_ids(words, captions, device), output_hidden_states=True)
        return {"prompt_embeds": found.hidden_states[-2].to(dtype).cpu()}

    return encode


def open_second(model: ModelFolder, device: str, dtype: torch.dtype) -> Encode:
    """The same of a model's second encoder, with "pooled_prompt_embeds" (B, P), projected, of the whole (SDXL)."""
    words, encoder = _load(model, device, dtype, second=True)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensors:
        found = encoder(_ids(words, captions, device), output_hidden_states=True)
        return {
            "prompt_embeds": found.hidden_states[-2].to(dtype).cpu(),
            "pooled_prompt_embeds": found.text_embeds.to(dtype).cpu(),
        }

    return encode


def _load(model: ModelFolder, device: str, dtype: torch.dtype, *, second: bool = False) -> tuple[Any, Any]:
    """The tokenizer and the encoder."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    part = "_2" if second else ""
    kind = CLIPTextModelWithProjection if second else CLIPTextModel
    words = tokenizer(model, f"tokenizer{part}", f"text_encoder{part}")
    return words, loaded(kind, model, f"text_encoder{part}", dtype).to(device)


def _ids(words: Any, captions: list[str], device: str) -> torch.Tensor:
    """(B, L), padded and cut to CLIP's length."""
    ids = words(
        captions, padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(device)


def tiny_tokenizer() -> Any:
    """A tokenizer of single bytes, for tests."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(f"{letter}</w>" for letter in alphabet), *special])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def tiny_encoder(words: Any, *, num_layers: int = 1, projected: bool = False) -> Any:
    """An encoder of 24 features with random weights for this tokenizer, for tests. `projected`: as a second one is."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=num_layers,
            num_attention_heads=2,
            projection_dim=24, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
