"""Tokens of captions are added to a cache without encoding anything again, and are the tokenizer's own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from preprocess.config import PreprocessConfig
from shared import families
from shared.cache.reader import Cache
from shared.errors import UserError
from tests.conftest import preprocess_options
from tests.preprocess.runs import ran


def test_tokens_are_added_alone_and_are_the_tokenizer_s_whatever_the_precision(
    tiny_data: Path, tiny_model: Path, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    before = Cache(cache).fingerprints
    options = preprocess_options(tiny_data, cache, tiny_model, text_tokens=True)
    made = ran(options, capsys).made
    assert {name for name, rows in made.items() if rows} == {"clip_tokens"}

    opened = Cache(cache)
    layer = opened.layer("clip_tokens")
    assert {name: opened.fingerprints[name] for name in before} == before
    [field] = layer.summary.fields
    assert (field.name, field.dtype) == ("input_ids", "int32")
    words = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    assert "" in {caption.text for caption in opened.captions.values()}
    for key, caption in opened.captions.items():
        expected = words(caption.text, padding="max_length", max_length=77, truncation=True).input_ids
        tokens = layer.tensors(key)["input_ids"]
        assert tokens.dtype == torch.int32
        assert tokens.tolist() == expected

    capsys.readouterr()
    again = ran(dataclasses.replace(options, precision="bf16"), capsys).made
    assert again["clip"] == again["t5"] == len(opened.captions)
    assert again["clip_tokens"] == 0
    without = ran(dataclasses.replace(options, text_tokens=False), capsys)
    assert "tokens are left out of the cache" in without.err
    assert "clip_tokens" not in Cache(cache).fingerprints


def test_a_family_without_a_text_encoder_to_train_has_no_tokens(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(families.get("flux")), "text_encoders", ())
    with pytest.raises(UserError, match="text_tokens: flux has no text encoder that can be trained"):
        PreprocessConfig(data=str(tiny_data), cache=str(tmp_path), text_tokens=True).check()
