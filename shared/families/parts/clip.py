"""CLIP's text encoder: captions to the embedding of each token, and to one of the whole.

B captions, L tokens with padding (77 by CLIP's nature), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shared.cache.schema import Field
from shared.families.base import Encode, LayerKind, Tensors, TextEncoder
from shared.families.parts.component import loaded
from shared.families.parts.component import tokenizer as load_tokenizer
from shared.model_folder import ModelFolder

L_14: Mapping[str, Any] = {
    "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 77,
    "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
"""`text_encoder/config.json` of FLUX.1-dev, SD 1.5 and SDXL: openai/clip-vit-large-patch14's text half."""
BIG_G: Mapping[str, Any] = {
    "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "max_position_embeddings": 77,
    "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280, "vocab_size": 49408,
}  # fmt: skip
"""`text_encoder_2/config.json` of SDXL: laion/CLIP-ViT-bigG-14's text half."""


def tokenizer(model: ModelFolder, component: str = "tokenizer", encoder: str = "text_encoder") -> Any:
    """The tokenizer of a CLIP text encoder. Raises `UserError`."""
    from transformers import CLIPTokenizer

    return load_tokenizer(CLIPTokenizer, model, component, encoder, ("vocab.json", "merges.txt"))


IDS = "input_ids"
"""The field of a layer of tokens."""
TOKENS_BYTES = 77 * 4 + 1024
"""Of one caption's on disk: with two tar blocks, the member's header and the tensors' own."""
Says = Callable[[Any, torch.Tensor], Tensors]
"""A CLIP encoder and tokens (B, L) -> what the base takes of what it says, under the fields' names."""


def pooled(encoder: Any, ids: torch.Tensor) -> Tensors:
    """ "pooled_prompt_embeds" (B, D)."""
    return {"pooled_prompt_embeds": encoder(ids).pooler_output}


def last(encoder: Any, ids: torch.Tensor) -> Tensors:
    """ "prompt_embeds" (B, L, D): the last layer's output, normalised, with its padding."""
    return {"prompt_embeds": encoder(ids).last_hidden_state}


def inner(encoder: Any, ids: torch.Tensor) -> Tensors:
    """ "prompt_embeds" (B, L, D): the output of the last layer but one, not normalised (SDXL)."""
    return {"prompt_embeds": encoder(ids, output_hidden_states=True).hidden_states[-2]}


def inner_and_projected(encoder: Any, ids: torch.Tensor) -> Tensors:
    """The same of a model's second encoder, with "pooled_prompt_embeds" (B, P), projected, of the whole (SDXL)."""
    found = encoder(ids, output_hidden_states=True)
    return {"prompt_embeds": found.hidden_states[-2], "pooled_prompt_embeds": found.text_embeds}


class Clip(TextEncoder):
    """One CLIP text encoder of a pipeline with its tokenizer."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")  # as in diffusers' own DreamBooth training

    def __init__(self, says: Says, config: Mapping[str, Any], *, second: bool = False) -> None:
        """`config`: that of the family's default model. `second`: the pipeline's second one, with a projection."""
        self._says, self._config, self._second = says, config, second
        part = "_2" if second else ""
        self.layer, self.component, self._tokenizer = f"clip{part}", f"text_encoder{part}", f"tokenizer{part}"
        self.tokens = LayerKind(f"clip{part}_tokens", "caption", (self._tokenizer,), (
            Field(IDS, "int32", "L", "CLIP's tokens with beginning, end and padding; L 77"),
        ), shard_rows=16384)  # fmt: skip

    def open(self, model: ModelFolder, device: str, dtype: torch.dtype) -> Encode:
        """Captions -> what it says of them. Raises `UserError`."""
        words, encoder = self._words(model), self.load(model, dtype).to(device)

        @torch.no_grad()
        def encode(captions: list[str]) -> Tensors:
            said = self.encode(encoder, _ids(words, captions).to(device))
            return {name: tensor.to(dtype).cpu() for name, tensor in said.items()}

        return encode

    def open_tokens(self, model: ModelFolder) -> Encode:
        """Captions -> "input_ids" int32 (B, L). Raises `UserError`."""
        words = self._words(model)
        return lambda captions: {IDS: _ids(words, captions).to(torch.int32)}

    def load(self, model: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        return loaded(self._kind, model, self.component, dtype)

    def make(self, model: ModelFolder | None = None) -> torch.nn.Module:
        from transformers import CLIPTextConfig

        config = self._config if model is None else model.config(self.component)
        with torch.device("meta"):
            return self._kind(CLIPTextConfig.from_dict(dict(config))).eval().requires_grad_(False)

    def shapes(self, model: ModelFolder) -> dict[str, tuple[int, ...]]:
        encoder = self.make(model)
        ids = torch.zeros(1, _config(encoder).max_position_embeddings, dtype=torch.int32, device="meta")
        said = self.encode(encoder, ids)
        return {f"{self.layer}.{name}": tuple(tensor.shape[1:]) for name, tensor in said.items()}

    def encode(self, encoder: torch.nn.Module, ids: torch.Tensor) -> Tensors:
        return self._says(encoder, ids)

    def is_heard(self, encoder: torch.nn.Module, name: str) -> bool:
        last_layer = _config(encoder).num_hidden_layers - 1
        return self._says is not inner or f".layers.{last_layer}." not in f".{name}."

    def name_in_file(self, name: str) -> str:
        return f"text_model.{name.removeprefix('text_model.')}"  # which newer versions of transformers leave out

    def name_to_match(self, name: str) -> str:
        return name[name.index("layers.") :]

    def _words(self, model: ModelFolder) -> Any:
        return tokenizer(model, self._tokenizer, self.component)

    @property
    def _kind(self) -> Any:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        return CLIPTextModelWithProjection if self._second else CLIPTextModel


def opened(
    encoders: Sequence[TextEncoder], layer: LayerKind, model: ModelFolder, device: str, dtype: torch.dtype
) -> Encode | None:
    """`Family.open_encoder` of a layer that one of these encoders makes, or its tokens; None for any other."""
    for encoder in encoders:
        assert isinstance(encoder, Clip)
        if layer.name == encoder.layer:
            return encoder.open(model, device, dtype)
        if layer.name == encoder.tokens.name:
            return encoder.open_tokens(model)
    return None


def _config(encoder: torch.nn.Module) -> Any:
    """What an encoder was made with."""
    return encoder.config


def _ids(words: Any, captions: list[str]) -> torch.Tensor:
    """(B, L), padded and cut to CLIP's length."""
    ids: torch.Tensor = words(
        captions, padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


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
