"""A folder of a pretrained pipeline, loaded whole or refused: libraries fill what is missing with random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shared.errors import UserError
from shared.families.base import Family, LayerKind
from shared.model_folder import ModelFolder


def loaded(kind: Any, model: ModelFolder, component: str, dtype: torch.dtype) -> Any:
    """A component with all its weights, frozen, on the CPU. Raises `UserError`: one that the files lack would be left
    at random without a word."""
    model.weights(component)
    module, info = kind.from_pretrained(
        model.path / component, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model {model.name}: the weights of {component} are not whole: {len(missing)} tensors of {kind.__name__} "
            f"are not there (as {missing[0]}); download the model again"
        )
    return module.eval().requires_grad_(False)


def tokenizer(kind: Any, model: ModelFolder, component: str, encoder: str, files: tuple[str, ...]) -> Any:
    """A tokenizer with its vocabulary (tokenizer.json, or `files`), made for the component `encoder`. Raises
    `UserError`: without a vocabulary it would be loaded all the same, and every word would be the unknown one."""
    folder = model.path / component
    if not folder.is_dir():
        raise UserError(f"model {model.name} has no folder '{component}'; expected diffusers' layout")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise UserError(f"model {model.name}: {folder} lacks {' and '.join(missing)}; download the model again")
    try:
        found = kind.from_pretrained(folder)
    except Exception as error:  # whatever a parser trips over in these files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model {model.name}: {folder} is not a tokenizer that can be loaded ({reason[:200]}); "
            "download the model again"
        ) from error
    known, expected = len(found), model.config(encoder)["vocab_size"]
    if not 0.9 * expected <= known <= expected:  # T5 has 28 rows of its table to spare
        raise UserError(
            f"model {model.name}: {component} knows {known} tokens, but {encoder} expects {expected}: they are not of "
            "one model; download it again"
        )
    return found


def encoder_facts(family: Family, layer: LayerKind, model: ModelFolder) -> dict[str, Any]:
    """What of every layer's recipe is its encoder's: whose it is, and the digests of its components."""
    return {
        "family": family.name,
        "encoder": {component: model.sha256(component) for component in layer.components},
    }


def on_meta(kind: Any, config: Mapping[str, Any]) -> torch.nn.Module:
    """A base of diffusers' class `kind` without its weights, frozen: see `Family.make_base`."""
    with torch.device("meta"):
        base = kind.from_config(config)
    assert not list(base.buffers()), "what is in no file would stay without numbers"
    return base.eval().requires_grad_(False)


def checked_config(family: Family, model: ModelFolder) -> dict[str, Any]:
    """The configuration of a model's base. Raises `UserError` where that is none of the family's."""
    config = model.config(family.base_component)
    if (found := config.get("_class_name")) != family.base_class:
        raise UserError(f"this cache is for {family.name}, but model {model.name} has a {found}")
    return config


def check_shapes(
    model: ModelFolder, fields: Mapping[str, tuple[int, ...]], facts: Mapping[str, tuple[int, int, str]]
) -> None:
    """Refuse (`UserError`) a base that cannot use a cache's tensors. `fields`: "layer.field" to the shape of one
    sample; `facts`: of those the axis that decides, what the base takes there, and what that is."""
    for field, (axis, expected, what) in facts.items():
        if (cached := fields[field][axis]) != expected:
            raise UserError(
                f"this cache was made for another model: it has {cached} {what}, "
                f"{model.name} takes {expected}; preprocess again with MODEL={model.name}"
            )


def count_tokens(tokenizer: Any, captions: list[str]) -> list[int]:
    """Tokens of each caption, its beginning and end included, nothing cut off."""
    counts: list[int] = []
    for i in range(0, len(captions), 1000):  # a tokenizer's answer takes some KB for each caption
        ids = tokenizer(captions[i : i + 1000], truncation=False, verbose=False).input_ids
        counts += map(len, ids)
    return counts
