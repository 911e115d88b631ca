"""Training from a cache alone: what it needs and what not, what it refuses, and that it learns."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from shared import atomic
from shared.cache import schema
from shared.errors import UserError
from tests.conftest import preprocess_options, write_data
from tests.train.conftest import content, controlnet_tensors, flux, losses, metrics, train_options, trainer_of
from train import checkpoints, trainer
from train.config import TrainConfig
from train.objectives import FlowMatching, Noised
from train.trainer import train


def cache_of(data: Path, folder: Path, model: Path, **changes: Any) -> Path:
    from preprocess.pipeline import preprocess

    assert preprocess(preprocess_options(data, folder, model, **changes)) == 0
    return folder


def sealed(cache: Path, **changes: Any) -> Path:
    """The cache with a manifest that says something else, and vouches for it."""
    manifest = schema.read_sealed(cache / schema.MANIFEST)
    atomic.write_json(cache / schema.MANIFEST, schema.seal({**manifest, **changes}))
    return cache


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading anything heavy is an error."""

    def heavy(*_: Any) -> None:
        raise AssertionError("loaded before it was refused")

    for name in ("load_base", "make_base", "make_controlnet", "load_controlnet", "open_decoder"):
        monkeypatch.setattr(type(flux()), name, heavy)


# --- what training needs --------------------------------------------------------------------------------------------


def without_encoders(model: Path, folder: Path) -> Path:
    """A model folder of the base, the scheduler and the VAE's decoder."""
    shutil.copytree(model, folder)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
    [weights] = (folder / "vae").glob("*.safetensors")
    decoder = {k: v for k, v in safetensors.torch.load_file(weights).items() if k.startswith("decoder.")}
    assert decoder
    safetensors.torch.save_file(decoder, weights)
    return folder


def test_training_and_its_pictures_need_no_encoder(tiny_cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = without_encoders(tiny_model, tmp_path / "model")
    with_pictures = {"every": 3, "pictures_every": 6}
    for name, path in (("whole", tiny_model), ("part", model)):
        assert train(train_options(tiny_cache, tmp_path, name=name, model=str(path), validation=with_pictures)) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    pictures = [content(tmp_path / name / "pictures") for name in ("whole", "part")]
    assert pictures[0] == pictures[1]
    assert {"step-00000006.png", "step-00000006/00.png", "held-out.json"} <= pictures[0].keys()


def test_without_a_vae_it_trains_and_says_that_there_will_be_no_pictures(
    tiny_cache: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = without_encoders(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "vae")
    options = train_options(tiny_cache, tmp_path, model=str(model), validation={"every": 3, "pictures_every": 3})
    assert train(options) == 0
    assert "has no vae folder: no pictures will be made" in capsys.readouterr().err
    assert not (tmp_path / "run" / "pictures").exists()
    assert len([line for line in metrics(tmp_path / "run") if "held_out" in line]) == 3


def test_a_cache_without_held_out_samples_trains_and_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(write_data(tmp_path / "data", 4), tmp_path / "cache", tiny_model, validation_fraction=0.0)
    assert train(train_options(cache, tmp_path, validation={"every": 2, "pictures_every": 2})) == 0
    assert "no held-out samples: no held-out loss and no pictures" in capsys.readouterr().err


def test_experiments_leave_every_byte_of_the_cache_as_it_is_and_import_no_encoder(
    tiny_cache: Path, tmp_path: Path
) -> None:
    before = content(tiny_cache)
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.train.conftest import train_options\nfrom train.trainer import train\n"
        "cache, runs = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "looks = {'every': 3, 'pictures_every': 6, 'adherence_every': 6, 'adherence_samples': 1}\n"
        "for name, depth, rate in (('one', '1-1', 1e-3), ('two', '2-0', 1e-4)):\n"
        "    train(train_options(cache, runs, name=name, depth=depth, optimizer={'learning_rate': rate},\n"
        "                        validation=looks, tracker='tensorboard'))\n"
        "encoders = ('modeling_t5', 'modeling_clip', 'controlnet_aux', 'preprocess')\n"
        "found = [name for name in sys.modules if any(word in name for word in encoders)]\n"
        "assert not found, found\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", program, str(tiny_cache), str(tmp_path)],
        check=True, cwd=Path(__file__).parents[2], env=environment,
    )  # fmt: skip
    assert content(tiny_cache) == before
    assert losses(tmp_path / "one") != losses(tmp_path / "two")
    assert any("tfevents" in name for name in content(tmp_path / "one" / "tensorboard"))


def test_weights_can_be_bf16_over_an_int8_base_in_bf16(tiny_cache: Path, tmp_path: Path) -> None:
    before = trainer_of(train_options(tiny_cache, tmp_path, precision="bf16")).adapter.trained.state_dict()
    assert train(train_options(tiny_cache, tmp_path, precision="bf16", optimizer={"learning_rate": 1e-4})) == 0
    after = controlnet_tensors(tmp_path / "run")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    base = json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["components"][0]
    assert set(base["dtypes"].split("+")) == {"int8", "bfloat16"}
    assert sum(int((tensor != before[name]).sum()) for name, tensor in after.items()) > 1000


# --- it learns ------------------------------------------------------------------------------------------------------


def test_it_learns_the_loss_on_four_samples_falls(tiny_model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 4, sizes=((64, 64),))
    cache = cache_of(data, tmp_path / "cache", tiny_model, validation_fraction=0.0)
    options = train_options(
        cache, tmp_path, steps=60, loader={"batch_size": 4, "caption_dropout": 0.0},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 5},
    )  # fmt: skip
    assert train(options) == 0
    learned = trainer_of(options)
    untrained = noise_losses(learned)
    learned.adapter.load(tmp_path / "run" / "controlnet")
    trained = noise_losses(learned)
    share = 1 - trained / untrained
    print(f"training loss on fixed noise: {untrained:.4f} before, {trained:.4f} after 60 steps: {share:.1%} less")
    assert share > 0.1


def noise_losses(trainer: trainer.Trainer) -> float:
    """The training loss over the same 32 batches of noise and times."""
    batches = [trainer.loader.make(position) for position in range(32)]
    with torch.no_grad():
        return torch.cat([trainer.step.loss(batch) for batch in batches]).mean().item()


# --- non-finite -----------------------------------------------------------------------------------------------------


def test_every_step_says_how_long_it_waited_for_data_and_the_run_what_share_of_its_time(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(train_options(tiny_cache, tmp_path, steps=5)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert lines[0]["data_wait_share"] == 0  # nothing could be read ahead of the first step
    for count in range(1, 5):
        waited = sum(line["data_wait_seconds"] for line in lines[1 : count + 1])
        worked = sum(line["step_seconds"] for line in lines[1 : count + 1])
        assert lines[count]["data_wait_share"] == pytest.approx(waited / (waited + worked))
    assert re.search(r"; \d+\.\d% of the time went into waiting for data", capsys.readouterr().out)


def test_a_loss_that_is_not_finite_names_the_sample_and_moves_nothing(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer_of(train_options(tiny_cache, tmp_path, loader={"batch_size": 3, "accumulation": 2}))
    with closing(iter(made.loader)) as steps:
        made.step(next(steps), 1, 2e-5)
        weights = {name: p.detach().clone() for name, p in made.adapter.named_parameters()}
        state = {name: tensor.clone() for name, tensor in made.optimizer.state()[0].items()}
        batches = next(steps)
        batches[1].tensors["latents.mean"][-1, 0, 0, 0] = torch.nan
        with pytest.raises(UserError) as refusal:
            made.step(batches, 2, 2e-5)
    named = re.search(r"of sample\(s\) (\S+); the optimizer did not step", str(refusal.value))
    assert named is not None
    assert named[1] == batches[1].keys[-1]
    assert "step 2: the loss nan is not finite" in str(refusal.value)
    assert all(torch.equal(p, weights[name]) for name, p in made.adapter.named_parameters())
    after = made.optimizer.state()[0]
    assert after.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.items())


def test_a_gradient_that_is_not_finite_names_the_step_s_samples_and_moves_nothing(
    tiny_cache: Path, tmp_path: Path
) -> None:
    made = trainer_of(train_options(tiny_cache, tmp_path))
    weights = {name: p.detach().clone() for name, p in made.adapter.named_parameters()}
    bias = made.adapter.trained.get_parameter("controlnet_blocks.0.bias")
    bias.register_hook(lambda gradient: gradient * torch.inf)
    with closing(iter(made.loader)) as steps:
        batches = next(steps)
        with pytest.raises(UserError) as refusal:
            made.step(batches, 1, 2e-5)
    assert f"is not finite in a step of {', '.join(batches[0].keys)}; the optimizer did not step" in str(refusal.value)
    assert "gradient norm" in str(refusal.value)
    assert all(torch.equal(p, weights[name]) for name, p in made.adapter.named_parameters())


def test_a_run_that_stops_on_a_non_finite_loss_keeps_its_last_checkpoint(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = FlowMatching.loss, iter(range(100))

    def breaks(self: FlowMatching, prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
        return loss(self, prediction, noised) * (torch.nan if next(calls) == 4 else 1)

    monkeypatch.setattr(FlowMatching, "loss", breaks)
    options = train_options(tiny_cache, tmp_path, checkpoint={"every": 2})
    with pytest.raises(UserError, match="step 5: the loss nan is not finite of sample"):
        train(options)
    assert checkpoints.newest(tmp_path / "run") == checkpoints.path_of(tmp_path / "run", 4)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert train(options) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def cache_copy(tiny_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.usefixtures("no_loading")
class TestRefusedBeforeAnythingHeavyIsLoaded:
    def test_a_depth_beyond_the_base(self, tiny_cache: Path, tmp_path: Path) -> None:
        for depth in ("3-0", "0-3", "5-10"):
            with pytest.raises(UserError, match=rf"DEPTH {depth} is deeper than the base: .* has 2-2 blocks"):
                train(train_options(tiny_cache, tmp_path, depth=depth))
        assert not (tmp_path / "run").exists()

    def test_a_cache_of_another_family(self, cache_copy: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"unknown model family 'painter': there is: .*flux"):
            train(train_options(sealed(cache_copy, family="painter"), tmp_path))

    def test_a_base_of_another_family(self, tiny_cache: Path, model_copy: Path, tmp_path: Path) -> None:
        edit(model_copy / "transformer" / "config.json", _class_name="SD3Transformer2DModel")
        with pytest.raises(UserError, match=r"this cache is for flux, but model .* has a SD3Transformer2DModel"):
            train(train_options(tiny_cache, tmp_path, model=str(model_copy)))

    def test_a_cache_made_with_another_vae(self, tiny_cache: Path, tmp_path: Path) -> None:
        other = flux().tiny(tmp_path / "other", seed=1)
        with pytest.raises(UserError, match="this cache was encoded with another VAE"):
            train(train_options(tiny_cache, tmp_path, model=str(other)))

    @pytest.mark.parametrize(
        ("key", "sentence"),
        [
            ("joint_attention_dim", "it has 32 features of the T5 embeddings, .* takes 48; preprocess again"),
            ("pooled_projection_dim", "it has 24 features of the CLIP embedding, .* takes 48"),
            ("in_channels", "it has 16 latent channels, .* takes 12"),
        ],
    )
    def test_embeddings_of_another_width(
        self, key: str, sentence: str, tiny_cache: Path, model_copy: Path, tmp_path: Path
    ) -> None:
        edit(model_copy / "transformer" / "config.json", **{key: 48})
        with pytest.raises(UserError, match=sentence):
            train(train_options(tiny_cache, tmp_path, model=str(model_copy)))

    def test_a_model_without_a_transformer(self, tiny_cache: Path, model_copy: Path, tmp_path: Path) -> None:
        shutil.rmtree(model_copy / "transformer")
        with pytest.raises(UserError, match="has no folder 'transformer'"):
            train(train_options(tiny_cache, tmp_path, model=str(model_copy)))

    def test_a_model_that_is_nowhere(self, tiny_cache: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such model: '/no/such/model'"):
            train(train_options(tiny_cache, tmp_path, model="/no/such/model"))

    def test_a_condition_that_the_cache_does_not_hold(self, tiny_cache: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no condition 'cany': did you mean 'canny'"):
            train(train_options(tiny_cache, tmp_path, condition=("cany",)))

    def test_a_cache_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no such cache: .*make preprocess"):
            train(train_options(tmp_path / "none", tmp_path))

    def test_a_tracker_that_is_not_installed(
        self, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(UserError, match="pip install wandb"):
            train(train_options(tiny_cache, tmp_path, tracker="wandb"))

    def test_a_run_that_another_process_trains(self, tiny_cache: Path, tmp_path: Path) -> None:
        with (
            atomic.alone(tmp_path / "run", "training in"),
            pytest.raises(UserError, match=r"another process is training in .*run; wait for it"),
        ):
            train(train_options(tiny_cache, tmp_path))


@pytest.fixture(scope="module")
def finished(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with a run of 6 steps that is done."""
    runs = tmp_path_factory.mktemp("runs")
    assert train(train_options(tiny_cache, runs)) == 0
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run; nothing heavy may be loaded, nothing of it may change."""
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    before = content(tmp_path / "runs")
    yield tmp_path / "runs"
    assert content(tmp_path / "runs") == before


@pytest.mark.usefixtures("no_loading")
class TestAFinishedRunIsLeftAsItIs:
    def test_when_the_same_command_is_given_again(
        self, tiny_cache: Path, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for steps in (6, 3):  # asking for fewer steps than there are changes nothing either
            assert train(train_options(tiny_cache, runs, steps=steps)) == 0
            assert "is already trained to step 6: raise STEPS to go on" in capsys.readouterr().out

    def test_when_another_experiment_has_its_name(self, tiny_cache: Path, runs: Path) -> None:
        options = train_options(tiny_cache, runs, depth="2-1", optimizer={"learning_rate": 1.0})
        with pytest.raises(UserError, match=r"depth was 1-1, is 2-1; optimizer\.learning_rate was 0\.001, is 1\.0"):
            train(options)

    def test_when_the_cache_holds_other_embeddings(
        self, tiny_data: Path, tiny_model: Path, runs: Path, tmp_path: Path
    ) -> None:
        other = cache_of(tiny_data, tmp_path / "other", tiny_model, text_length=16)
        with pytest.raises(UserError, match=r"trained on something else \(cache\.t5 was \w{8}, is \w{8}; text_length"):
            train(train_options(other, runs, steps=8))

    def test_when_the_cache_holds_other_samples(self, tiny_model: Path, runs: Path, tmp_path: Path) -> None:
        other = cache_of(write_data(tmp_path / "data", 13), tmp_path / "other", tiny_model)
        with pytest.raises(UserError, match="the cache holds other samples than when this run began"):
            train(train_options(other, runs, steps=8))

    def test_when_accumulation_would_be_another_global_batch(self, tiny_cache: Path, runs: Path) -> None:
        with pytest.raises(UserError, match=r"processes x loader\.accumulation was 1, is 2"):
            train(train_options(tiny_cache, runs, steps=8, loader={"accumulation": 2}))


def test_a_moved_cache_is_the_same_cache(tiny_cache: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    moved = Path(shutil.copytree(tiny_cache, tmp_path / "moved"))
    assert train(train_options(moved, tmp_path / "runs", steps=8)) == 0
    assert len(losses(tmp_path / "runs" / "run")) == 8


# --- warnings -------------------------------------------------------------------------------------------------------


def warnings_of(options: TrainConfig, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert train(options) == 0
    return capsys.readouterr().err


def test_what_will_not_be_as_one_may_think_is_said(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = warnings_of(train_options(tiny_cache, tmp_path, name="quiet"), capsys)
    assert "warning" not in quiet
    odd: dict[str, Any] = {"objective": {"timesteps": "uniform", "logit_mean": 1.0}}
    short = {"warmup_steps": 6, "schedule": "constant", "final_fraction": 0.5}
    said = warnings_of(train_options(tiny_cache, tmp_path, name="odd", optimizer=short, **odd), capsys)
    assert "option objective.logit_mean has no effect" in said
    assert "option optimizer.final_fraction has no effect" in said
    assert (
        "after 6 steps the learning rate is 0.001, the peak of 0.001 comes at 6; lower optimizer.warmup_steps" in said
    )
    falling: dict[str, Any] = {"optimizer": {"schedule": "cosine"}}
    assert "warning" not in warnings_of(train_options(tiny_cache, tmp_path, name="cos", **falling), capsys)
    said = warnings_of(train_options(tiny_cache, tmp_path, name="cos", steps=8, **falling), capsys)
    assert "steps were 6, are 8: from here on the cosine schedule is that of the new number" in said
