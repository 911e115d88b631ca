"""A cache of pictures and captions alone: what reads no condition is trained from it, and one can be added later."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from preprocess.pipeline import preprocess, tell_status
from shared.cache.prune import leftovers
from shared.cache.reader import Cache
from shared.cache.verify import verify
from shared.errors import UserError
from shared.inspect.config import InspectConfig
from shared.inspect.gather import gather
from shared.inspect.page import page
from tests.conftest import preprocess_options
from tests.preprocess.runs import ran
from tests.train.conftest import metrics, train_options
from train.preparation import ground_of
from train.trainer import train


def test_a_cache_without_a_condition_trains_a_lora_and_takes_one_up_later(
    tiny_data: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = preprocess_options(tiny_data, tmp_path / "cache", tiny_model, condition=())
    made = ran(options, capsys)
    assert (made.code, set(made.made)) == (0, {"latents", "clip", "t5"})
    assert "conditions none" in made.out
    assert tell_status(options) == 0
    assert "all is fresh" in capsys.readouterr().out
    cache = Cache(tmp_path / "cache")
    assert (cache.conditions, cache.manifest["condition"]) == ([], None)
    verdict = verify(tmp_path / "cache")
    assert (verdict.sound, verdict.unlisted, leftovers(cache)) == (True, [], [])
    shown = page(gather(InspectConfig(str(tmp_path / "cache"), samples=2, decode=0, device="cpu")), datetime.now())
    assert "for FLUX, without a condition." in shown

    looks = {"every": 2, "samples": 2, "timesteps": 2, "pictures_every": 2, "pictures": 1}
    lora = train_options(tmp_path / "cache", tmp_path, adapter="lora", steps=2, validation=looks)
    assert train(lora) == 0
    assert metrics(tmp_path / "run")[-1]["held_out"]["loss"] > 0
    with pytest.raises(
        UserError, match=r"holds no condition, .* CONDITION=lineart; or train what reads none: --adapter"
    ):
        ground_of(replace(lora, adapter="controlnet"))

    added = ran(replace(options, condition=("canny",)), capsys)
    assert {name for name, count in added.made.items() if count} == {"canny", "canny_latents"}
    assert preprocess(options) == 0  # what was asked for once is no longer asked for, and stays
    assert Cache(tmp_path / "cache").manifest["condition"] == "canny"
    assert ground_of(replace(lora, adapter="controlnet")).facts["condition"] == ["canny"]
