"""Training from caches that hold the posterior's mean or one draw of it: nothing is drawn, all else is as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preprocess.pipeline import preprocess
from tests.conftest import preprocess_options
from tests.train.conftest import flux, losses, metrics, train_options, trainer_of
from train.trainer import train


@pytest.fixture(scope="module", params=["mean", "sample"])
def kept(
    request: pytest.FixtureRequest, tiny_data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """What is kept of the posterior, and a cache of it."""
    cache = tmp_path_factory.mktemp("cache") / request.param
    assert preprocess(preprocess_options(tiny_data, cache, tiny_model, posterior=request.param)) == 0
    return request.param, cache


def test_final_latents_are_the_cached_ones_shifted_scaled_and_packed(kept: tuple[str, Path], tmp_path: Path) -> None:
    posterior, cache = kept
    trainer = trainer_of(train_options(cache, tmp_path))
    batch = next(iter(trainer.loader))[0]
    for role in ("latents", "condition_latents"):
        raw, recipe = batch.role(role), trainer.samples.recipes[role]
        assert list(raw) == [posterior]
        assert recipe["posterior"] == posterior
        seeded = torch.Generator().manual_seed(0)
        drawn = flux().model_latents(raw, recipe, seeded, torch.float32)
        assert torch.equal(drawn, flux().model_latents(raw, recipe, None, torch.float32))
        assert torch.equal(drawn, flux().model_latents({"mean": raw[posterior]}, recipe, None, torch.float32))
        assert torch.equal(seeded.get_state(), torch.Generator().manual_seed(0).get_state()), "nothing was drawn"


def test_a_run_trains_looks_and_paints(kept: tuple[str, Path], tmp_path: Path) -> None:
    _, cache = kept
    looking = {"every": 2, "pictures_every": 2, "samples": 2, "timesteps": 1, "pictures": 1}
    assert train(train_options(cache, tmp_path, steps=2, validation=looking)) == 0
    assert len(losses(tmp_path / "run")) == 2
    assert "held_out" in metrics(tmp_path / "run")[-1]
    assert list((tmp_path / "run" / "pictures").iterdir())


def test_condition_draw_without_effect_is_said(
    kept: tuple[str, Path], tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cache, expected in (("moments", tiny_cache, False), ("kept", kept[1], True)):
        capsys.readouterr()
        options = train_options(
            cache, tmp_path, name=name, steps=1, loader={"condition_draw": False},
            optimizer={"warmup_steps": 0},
        )  # fmt: skip
        assert train(options) == 0
        said = capsys.readouterr().err
        assert ("option loader.condition_draw has no effect" in said) is expected
