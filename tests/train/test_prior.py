"""Prior preservation: class images join each step, as DreamBooth has it; without them nothing changes."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preprocess.pipeline import preprocess
from preprocess.prior import PriorOptions
from shared import families
from shared.cache.reader import Cache
from shared.errors import UserError
from shared.families.base import Batch
from tests.conftest import preprocess_options, write_data
from tests.train import made_cache
from tests.train.conftest import content, flux, losses, metrics, train_options
from tests.train.test_distributed import World, exit_codes, started
from train.counting import Setting
from train.loader import Loader, LoaderOptions
from train.memory_plan import count
from train.order import Turns
from train.preparation import ground_of, prepare
from train.samples import CachedSamples
from train.step import NOISE
from train.trainer import Trainer, train
from train.validation import seed_of

NUM_PRIOR = 5


def mixed(count: int = 7, prior: int = NUM_PRIOR) -> list[Any]:
    """Samples of two shapes, one of them that of the class images, whose keys lie between the others'."""
    pictures = [made_cache.sample(f"s{i:03d}", size=((16, 16), (32, 16))[i % 2]) for i in range(count)]
    held_out = [made_cache.sample("s900", split="validation")]
    return [
        *pictures,
        *held_out,
        *(replace(made_cache.sample(f"s{i:03d}p", "a dog"), prior=True) for i in range(prior)),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_cache.write(tmp_path_factory.mktemp("made") / "cache", mixed())


def samples_of(cache: Path, split: str = "train") -> CachedSamples:
    return CachedSamples(Cache(cache), flux(), "canny", split)


def loader_of(cache: Path, rank: int = 0, num_ranks: int = 1, **options: Any) -> Loader:
    given = LoaderOptions(**{"batch_size": 2, "workers": 1, **options})
    return Loader(samples_of(cache), given, seed=3, device=torch.device("cpu"), rank=rank, num_ranks=num_ranks)


def steps_of(loader: Loader, count: int) -> list[list[Batch]]:
    stream = iter(loader)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def described(batches: list[Batch]) -> list[Any]:
    return [(batch.position, batch.keys, batch.prior_weight, batch.step_samples) for batch in batches]


# --- what comes when ---


def test_class_images_are_no_samples_and_never_held_out(made: Path, tmp_path: Path) -> None:
    samples = samples_of(made)
    assert (len(samples), samples.num_prior, samples.num_left_out) == (7, NUM_PRIOR, 0)
    assert [samples.key(index) for index in range(7)] == ["s000", "s002", "s004", "s006", "s001", "s003", "s005"]
    assert samples.prior is not None
    assert [samples.key(i) for i in range(7, 12)] == [f"s{i:03d}p" for i in range(NUM_PRIOR)]
    assert samples.batch(range(samples.prior.start, samples.prior.stop)).keys == [
        f"s{i:03d}p" for i in range(NUM_PRIOR)
    ]
    assert samples_of(made, "validation").prior is None
    assert len(samples_of(made, "validation")) == 1
    broken = made_cache.write(tmp_path / "broken", mixed(), broken={"latents": ["s001p", "s002"]})
    assert (len(samples_of(broken)), samples_of(broken).num_prior, samples_of(broken).num_left_out) == (6, 4, 2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_each_batch_is_followed_by_as_many_class_images(made: Path, num_ranks: int) -> None:
    loaders = [loader_of(made, rank, num_ranks, accumulation=2) for rank in range(num_ranks)]
    streams = [steps_of(loader, 4) for loader in loaders]
    for together in zip(*streams, strict=True):
        batches = [batch for of_rank in together for batch in of_rank]
        pictures = [batch for batch in batches if batch.prior_weight is None]
        classes = [batch for batch in batches if batch.prior_weight is not None]
        assert len(pictures) == len(classes) == 2 * num_ranks
        assert {batch.position + 1: len(batch) for batch in pictures} == {
            batch.position: len(batch) for batch in classes
        }
        turns = Turns(NUM_PRIOR, 2, seed=3)
        for batch in classes:
            drawn = turns.numbers(batch.position // 2, len(batch))
            assert batch.keys == [f"s{number:03d}p" for number in drawn]
        assert {batch.step_samples for batch in batches} == {sum(map(len, pictures))}
        assert all(key.endswith("p") == (batch.prior_weight == 1.0) for batch in batches for key in batch.keys)
        assert {(batch.width, batch.height) for batch in classes} == {(16, 16)}


def test_pictures_come_as_they_come_without_class_images_and_in_exact_epochs(made: Path, tmp_path: Path) -> None:
    plain = made_cache.write(tmp_path / "plain", [sample for sample in mixed() if not sample.prior])
    with_them = [batch for batches in steps_of(loader_of(made), 8) for batch in batches if batch.prior_weight is None]
    alone = [batch for batches in steps_of(loader_of(plain), 8) for batch in batches]
    assert [batch.keys for batch in with_them] == [batch.keys for batch in alone]
    assert Counter(key for batch in alone for key in batch.keys) == dict.fromkeys([f"s{i:03d}" for i in range(7)], 2)
    off = [batch for batches in steps_of(loader_of(made, prior_weight=0.0), 8) for batch in batches]
    assert described(off) == described(alone)
    assert [batch.position for batch in off] == list(range(8))


def test_class_images_come_in_turn_each_round_in_a_fresh_order() -> None:
    turns = Turns(NUM_PRIOR, 2, seed=3)
    drawn = np.concatenate([turns.numbers(position, 2) for position in range(10)]).reshape(4, NUM_PRIOR)
    assert all(sorted(round_) == list(range(NUM_PRIOR)) for round_ in drawn.tolist())
    assert len({tuple(round_) for round_ in drawn.tolist()}) > 1
    assert turns.numbers(4, 1).tolist() == turns.numbers(4, 2)[:1].tolist()
    assert Turns(1, 3, seed=0).numbers(7, 3).tolist() == [0, 0, 0]


def test_the_stream_goes_on_exactly_with_another_number_of_processes(made: Path) -> None:
    whole = steps_of(loader_of(made, accumulation=2), 6)
    first = loader_of(made, accumulation=2)
    steps_of(first, 3)
    state = {**first.state(), "step": 3}
    for rank in (0, 1):
        loader = loader_of(made, rank, 2)
        loader.load_state(state)
        for alone, shared in zip(whole[3:], steps_of(loader, 3), strict=True):
            assert described(alone[2 * rank : 2 * rank + 2]) == described(shared)


def test_class_images_of_several_shapes_are_refused(tmp_path: Path) -> None:
    odd = replace(made_cache.sample("odd", size=(32, 16)), prior=True)
    cache = made_cache.write(tmp_path / "cache", [*mixed(), odd])
    with pytest.raises(UserError, match="class images of several shapes; preprocess again"):
        samples_of(cache)
    with pytest.raises(UserError, match=r"loader\.prior_weight must be 0 or more, not -1"):
        LoaderOptions(prior_weight=-1).check()
    assert LoaderOptions(prior_weight=2).unused(remote=False, prior=False) == ["prior_weight"]


# --- what is learned ---


@pytest.fixture(scope="module", params=["flux", "sd15", "sdxl"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 5 pictures, one of them held out, and 3 class images, without a condition."""
    folder = tmp_path_factory.mktemp(request.param)
    model = families.get(request.param).tiny(folder / "model")
    data = write_data(folder / "data", 5, sizes=((64, 64),))
    changes: dict[str, Any] = {} if request.param == "flux" else {"text_length": None}
    options = preprocess_options(data, folder / "cache", model, family=request.param, condition=(), **changes)
    prior = PriorOptions(prompt="a photo of a box", images=3, steps=2)
    assert preprocess(replace(options, prior=prior)) == 0
    return folder / "cache"


def options_of(cache: Path, runs: Path, **changes: Any) -> Any:
    learning = {"learning_rate": 1e-2, "kind": "adamw"}
    return train_options(
        cache, runs, **{"adapter": "lora", "optimizer": learning, "base": {"weights": "none"}, **changes}
    )


def by_hand(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """The mean loss of a batch: latents, noise, times, the base's own call, as the papers have them."""
    step, family = trainer.step, trainer.family
    draw = torch.Generator().manual_seed(seed_of(0, batch.position, NOISE))
    x_0 = family.model_latents(batch.role("latents"), trainer.samples.recipes["latents"], draw, torch.float32)
    noise = torch.randn(x_0.shape, generator=draw)
    t = step.times(batch.position, len(batch))
    if family.objective == "flow":
        shape = (-1, *[1] * (x_0.dim() - 1))
        x_t, target = torch.lerp(x_0, noise, t.view(shape)), noise - x_0
    else:
        left = family.noise_schedule(trainer.model)[t.long()].view(-1, 1, 1, 1)
        x_t, target = left.sqrt() * x_0 + (1 - left).sqrt() * noise, noise
    inputs = family.inputs(batch, None, torch.float32)
    prediction = family.predict(trainer.adapter.base, x_t, t, inputs, trainer.adapter.guidance, None)
    return (prediction - target).square().flatten(1).mean(1).mean()


def test_a_step_learns_the_pictures_mean_loss_and_prior_weight_times_that_of_class_images(
    cache: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        prepared = prepare(
            options_of(cache, tmp_path, loader={"batch_size": 2, "prior_weight": 0.25}, objective={"snr_gamma": 0.0}),
            stack,
        )
        assert prepared is not None
        trainer = Trainer(prepared)
        with torch.no_grad():  # off the start, where a LoRA's second factors are zero
            for parameter in trainer.adapter.trained.parameters():
                parameter.add_(0.02)
        pictures, classes = steps_of(trainer.loader, 1)[0]
        assert (len(pictures), len(classes), classes.prior_weight) == (2, 2, 0.25)
        total, _ = trainer.step.backward([pictures, classes])
        found = {name: p.grad.clone() for name, p in trainer.adapter.named_parameters() if p.grad is not None}
        trainer.adapter.trained.zero_grad()
        loss, prior_loss = by_hand(trainer, pictures), by_hand(trainer, classes)
        (loss + 0.25 * prior_loss).backward()
        assert total.item() == pytest.approx((loss + 0.25 * prior_loss).item(), rel=1e-5)
        assert len(found) > 4
        for name, parameter in trainer.adapter.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)
        trainer.adapter.trained.zero_grad()
        figures = trainer.step([pictures, classes], 1, 1e-3)
        assert figures["prior_loss"] == pytest.approx(prior_loss.item(), rel=1e-5)
        assert figures["loss"] == pytest.approx((loss + 0.25 * prior_loss).item(), rel=1e-5)
        trainer.close()


def test_a_run_learns_from_both_resumes_to_the_bit_and_looks_at_pictures_alone(cache: Path, tmp_path: Path) -> None:
    looks = {"every": 3, "samples": 4, "timesteps": 2}
    common: dict[str, Any] = {"loader": {"batch_size": 2}, "validation": looks}
    for memory in ({"hoist": "no"}, {"hoist": "yes"}) if Cache(cache).family == "flux" else ({},):
        for name, steps in (("whole", 6), ("halves", 3), ("halves", 6)):
            run = f"{name}-{memory.get('hoist', '')}x"
            assert train(options_of(cache, tmp_path, name=run, steps=steps, memory=memory, **common)) == 0
        whole, halves = (tmp_path / f"{name}-{memory.get('hoist', '')}x" for name in ("whole", "halves"))
        assert losses(whole) == losses(halves)
        assert losses(whole) == losses(tmp_path / f"whole-{'no' if memory else ''}x")  # with times known ahead, too
        assert content(whole / "lora") == content(halves / "lora")
    lines = metrics(whole)
    assert all("prior_loss" in line for line in lines if "loss" in line)
    ground = ground_of(options_of(cache, tmp_path))
    assert not any("prior" in ground.held_out.key(index) for index in range(len(ground.held_out)))
    alone = options_of(
        cache, tmp_path, name="alone", steps=6, **common | {"loader": {"batch_size": 2, "prior_weight": 0}}
    )
    assert train(alone) == 0
    assert not any("prior_loss" in line for line in metrics(tmp_path / "alone"))
    assert losses(tmp_path / "alone") != losses(whole)


def test_two_processes_learn_what_one_learns(
    tiny_data: Path, tiny_model: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    options = preprocess_options(tiny_data, tmp_path / "cache", tiny_model, condition=())
    assert preprocess(replace(options, prior=PriorOptions(prompt="a box", images=3, steps=1))) == 0
    learning = {"kind": "adamw", "epsilon": 1.0, "learning_rate": 0.1}
    one, several = (
        options_of(
            tmp_path / "cache", tmp_path, name=name, steps=3, optimizer=learning,
            loader={"batch_size": 1, "accumulation": accumulation, "prior_weight": 0.5},
        )
        for name, accumulation in (("one", 2), ("several", 1))
    )  # fmt: skip
    assert train(one) == 0
    world = World(tmp_path / "ranks")
    assert exit_codes(started(processes, several, world), world) == [0, 0]
    for figure in ("loss", "prior_loss", "gradient_norm"):
        alone, together = ([line[figure] for line in metrics(tmp_path / name)] for name in ("one", "several"))
        assert together == pytest.approx(alone, rel=1e-5)


def test_a_step_is_counted_as_two_batches_whose_gradients_add_up() -> None:
    setting = Setting(depth=(1, 1), height=64, width=64, text_length=16, adapter="lora", dtype=torch.float32)
    with_them, accumulating = (count(replace(setting, **way)) for way in ({"prior": True}, {"accumulation": 2}))
    assert with_them.peak_bytes == accumulating.peak_bytes > count(setting).peak_bytes
    assert with_them.model_flops == accumulating.model_flops == 2 * count(setting).model_flops


def test_gradients_that_add_up_are_not_released(cache: Path, tmp_path: Path) -> None:
    releasing = {"release": True, "clip": "parameter", "kind": "adamw"}
    with (
        ExitStack() as stack,
        pytest.raises(UserError, match="cannot add up the gradients of pictures and class images"),
    ):
        prepare(options_of(cache, tmp_path, optimizer=releasing), stack)
