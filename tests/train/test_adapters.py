"""Every adapter trains on every family, through nothing but what the two answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from shared import families
from shared.errors import UserError
from tests.train.conftest import content, losses, metrics, train_options
from tests.train.test_latent_diffusion import cache  # noqa: F401
from train import adapters
from train.preparation import ground_of
from train.trainer import train

LOOKS = {"every": 8, "samples": 4, "timesteps": 4, "pictures_every": 8, "pictures": 1, "adherence_every": 0}


def options_of(adapter: str, cache: Path, runs: Path, **changes: Any) -> Any:  # noqa: F811
    base = {"weights": "none" if adapter == "full" else "int8"}
    rate = 1e-2 if adapter == "lora" else 1e-3
    optimizer = {"kind": "adamw", "learning_rate": rate, "warmup_steps": 0}
    return train_options(cache, runs, adapter=adapter, base=base, optimizer=optimizer, **changes)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_lora_and_a_whole_base_of_stable_diffusion_learn_resume_and_are_loaded_by_diffusers(
    adapter: str,
    cache: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert train(options_of(adapter, cache, tmp_path, name="whole", steps=8, validation=LOOKS)) == 0
    for steps in (4, 8):
        assert train(options_of(adapter, cache, tmp_path, name="resumed", steps=steps)) == 0
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    kind = adapters.get(adapter)
    assert content(tmp_path / "resumed" / kind.folder) == content(tmp_path / "whole" / kind.folder)
    looked = [line["held_out"]["loss"] for line in metrics(tmp_path / "whole") if "held_out" in line]
    assert looked[-1] < 0.99 * looked[0]
    assert (tmp_path / "whole" / "pictures" / "step-00000008.png").is_file()

    ground = ground_of(options_of(adapter, cache, tmp_path))
    if adapter == "full":
        trained = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "whole" / kind.folder)
        before = diffusers.UNet2DConditionModel.from_pretrained(ground.model.path / "unet")
        assert trained.config.keys() == before.config.keys()
        assert not torch.equal(trained.conv_in.weight, before.conv_in.weight)
        return
    pytest.importorskip("peft")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(ground.model.path)
    pipeline.load_lora_weights(tmp_path / "whole" / kind.folder)
    loaded = {name for name, p in pipeline.unet.named_parameters() if "lora_B" in name and p.any()}
    saved = [name for name in kind_names(tmp_path / "whole" / kind.folder) if "lora_B" in name]
    assert len(loaded) == len(saved) > 10


def kind_names(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    return list(load_file(folder / "pytorch_lora_weights.safetensors"))


def test_the_folder_is_the_registry() -> None:
    assert adapters.names() == ["controlnet", "full", "lora"]
    assert {adapters.get(name).name for name in adapters.names()} == set(adapters.names())
    assert len({adapters.get(name).folder for name in adapters.names()}) == 3
    with pytest.raises(UserError, match="unknown adapter 'lore': did you mean 'lora'"):
        adapters.get("lore")
    for family in families.names():
        assert families.get(family).lora_targets
