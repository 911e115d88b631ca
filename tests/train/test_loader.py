"""Every sample once per epoch, the same order from the same seed, from any position, whoever reads."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from shared.cache import schema, writer
from shared.cache.reader import Cache, CacheError
from shared.cache.schema import Caption, Field
from shared.errors import UserError
from shared.families.base import Batch
from tests.train.conftest import flux, samples_of
from train.loader import EMPTY_CAPTION, CachedSamples, Loader, LoaderOptions

CPU = torch.device("cpu")


def loader_of(samples: CachedSamples, seed: int = 0, rank: int = 0, num_ranks: int = 1, **options: Any) -> Loader:
    chosen = LoaderOptions(**options)
    chosen.check()
    return Loader(samples, chosen, seed=seed, device=CPU, rank=rank, num_ranks=num_ranks)


def steps(loader: Loader, count: int) -> list[list[Batch]]:
    with closing(iter(loader)) as iterator:
        return list(itertools.islice(iterator, count))


def keys(batches: list[list[Batch]]) -> list[list[str]]:
    return [batch.keys for step in batches for batch in step]


def same(one: list[list[Batch]], other: list[list[Batch]]) -> bool:
    pairs = list(zip(itertools.chain(*one), itertools.chain(*other), strict=True))
    return all(
        a.keys == b.keys
        and a.position == b.position
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
        for a, b in pairs
    )


@pytest.fixture(scope="module")
def samples(tiny_cache: Path) -> CachedSamples:
    return samples_of(tiny_cache)


@pytest.fixture(scope="module")
def several_drawings(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedSamples:
    """The cache with three drawings of each sample: the one there is, plus 1, plus 2."""
    path = shutil.copytree(tiny_cache, tmp_path_factory.mktemp("three") / "cache")
    cache = Cache(path)
    layer = cache.layer("canny_latents")
    recipe = {**layer.summary.recipe, "drawings": 3}
    folder = path / schema.layer_folder("canny_latents", schema.fingerprint(recipe))
    with writer.ShardWriter(folder, 0) as shard:
        for key, input_digest in cache.wanted("image").items():
            stored = {
                name: torch.cat([tensor + r for r in range(3)]).contiguous()
                for name, tensor in layer.tensors(key).items()
            }
            shard.add(key, input_digest, {"safetensors": safetensors.torch.save(stored)})
    fields = [Field(name, "float32", "3 16 h w", "three drawings") for name in ("mean", "std")]
    entry = writer.publish_layer(
        folder, name="canny_latents", reads="image", recipe=recipe, fields=fields, made_with={}
    )
    own = ("format", "schema_version", "layers", "samples", "captions")
    writer.publish(
        path,
        samples=list(cache.samples.values()),
        captions=list(cache.captions.values()),
        layers={**cache.manifest["layers"], "canny_latents": entry},
        **{name: fact for name, fact in cache.manifest.items() if name not in own},
    )
    return samples_of(path)


# --- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_every_sample_comes_once_per_epoch_whatever_the_batch_size_and_number_of_processes(
    batch_size: int, num_ranks: int, samples: CachedSamples
) -> None:
    loaders = [loader_of(samples, batch_size=batch_size, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    per_epoch = loaders[0].batches_per_epoch
    num_steps = -(-3 * per_epoch // num_ranks)
    streams = [keys(steps(loader, num_steps)) for loader in loaders]
    stream = [batch for step in zip(*streams, strict=True) for batch in step]  # in the order of their positions
    for epoch in range(3):
        seen = Counter(itertools.chain(*stream[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert seen == Counter(sample.key for sample in samples.samples)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_a_batch_is_of_one_shape_and_no_larger_than_asked(batch_size: int, samples: CachedSamples) -> None:
    by_key = {sample.key: sample for sample in samples.samples}
    loader = loader_of(samples, batch_size=batch_size)
    sizes = set()
    for [batch] in steps(loader, loader.batches_per_epoch):
        assert 1 <= len(batch) <= batch_size
        assert {(by_key[key].bucket_height, by_key[key].bucket_width) for key in batch.keys} == {
            (batch.height, batch.width)
        }
        assert batch.tensors["latents.mean"].shape == (len(batch), 16, batch.height // 8, batch.width // 8)
        sizes.add((batch.height, batch.width))
    assert len(sizes) == 2


def test_a_seed_is_an_order_and_epochs_differ(samples: CachedSamples) -> None:
    one, again, other = (loader_of(samples, seed=seed) for seed in (1, 1, 2))
    assert same(steps(one, 25), steps(again, 25))
    assert one.order(0) != other.order(0)
    assert one.order(0) != one.order(1)
    assert one.order(0) == again.order(0)


@pytest.mark.parametrize(("accumulation", "num_ranks"), [(1, 1), (2, 1), (3, 2)])
def test_a_saved_position_is_gone_back_to_exactly_also_in_the_middle_of_an_epoch(
    accumulation: int, num_ranks: int, samples: CachedSamples
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "accumulation": accumulation, "num_ranks": num_ranks}
    for rank in range(num_ranks):
        through = steps(loader_of(samples, rank=rank, **options), 11)
        for position in (1, 4, 7):
            stopped = loader_of(samples, rank=rank, **options)
            steps(stopped, position)
            resumed = loader_of(samples, rank=rank, prefetch=1, **options)
            resumed.load_state(stopped.state())
            assert resumed.step == position
            assert same(steps(resumed, 11 - position), through[position:])


def test_the_position_is_of_what_was_handed_out_not_of_what_was_prefetched(samples: CachedSamples) -> None:
    loader = loader_of(samples, prefetch=8)
    with closing(iter(loader)) as iterator:
        next(iterator)
        time.sleep(0.2)
        next(iterator)
        assert loader.state()["step"] == 2


def test_accumulation_and_processes_share_one_stream(samples: CachedSamples) -> None:
    [alone] = [steps(loader_of(samples, batch_size=2, accumulation=2), 6)]
    two = [steps(loader_of(samples, batch_size=2, rank=rank, num_ranks=2), 6) for rank in (0, 1)]
    together = [[first, second] for [first], [second] in zip(*two, strict=True)]
    assert same(alone, together)


def test_step_samples_counts_the_whole_step_over_all_processes(samples: CachedSamples) -> None:
    options: dict[str, Any] = {"batch_size": 3, "accumulation": 1, "num_ranks": 3}
    ranks = [steps(loader_of(samples, rank=rank, **options), 8) for rank in range(3)]
    totals = set()
    for step in zip(*ranks, strict=True):
        batches = list(itertools.chain(*step))
        total = sum(len(batch) for batch in batches)
        assert {batch.step_samples for batch in batches} == {total}
        totals.add(total)
    assert len(totals) > 1  # the last batch of a bucket is short, so steps differ


# --- what a batch holds ---------------------------------------------------------------------------------------------


def test_tensors_are_the_cache_s_by_key(samples: CachedSamples, tiny_cache: Path) -> None:
    cache = Cache(tiny_cache)
    by_key = {sample.key: sample for sample in samples.samples}
    for [batch] in steps(loader_of(samples, batch_size=3), 8):
        for i, key in enumerate(batch.keys):
            for name in ("mean", "std"):
                assert torch.equal(batch.tensors[f"latents.{name}"][i], cache.layer("latents").tensors(key)[name])
                drawn = cache.layer("canny_latents").tensors(key)[name]
                assert torch.equal(batch.tensors[f"condition_latents.{name}"][i], drawn[0])
            candidates = [EMPTY_CAPTION, *by_key[key].captions]
            embeds = [cache.layer("t5").tensors(caption)["prompt_embeds"] for caption in candidates]
            [chosen] = [j for j, one in enumerate(embeds) if torch.equal(one, batch.tensors["t5.prompt_embeds"][i])]
            pooled = cache.layer("clip").tensors(candidates[chosen])["pooled_prompt_embeds"]
            assert torch.equal(batch.tensors["clip.pooled_prompt_embeds"][i], pooled)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_captions_are_dropped_as_often_as_asked_and_the_rest_drawn_evenly(share: float, samples: CachedSamples) -> None:
    loader = loader_of(samples, batch_size=5, caption_dropout=share)
    of_caption = {id: samples.layers["clip"][1].tensors(id)["pooled_prompt_embeds"] for id in samples.cache.captions}
    counts: Counter[str] = Counter()
    for position in range(120 * loader.batches_per_epoch):
        for pooled in loader.make(position).tensors["clip.pooled_prompt_embeds"]:
            counts[next(id for id, tensor in of_caption.items() if torch.equal(tensor, pooled))] += 1
    total = sum(counts.values())
    assert total == 120 * len(samples)
    assert counts[EMPTY_CAPTION] / total == pytest.approx(share, abs=0.04)
    if share < 1:  # every sample has a caption of its own and the common one
        assert counts[Caption.of("a box").id] / total == pytest.approx((1 - share) / 2, abs=0.04)


def test_every_drawing_is_drawn_and_the_right_one_is_stacked(several_drawings: CachedSamples) -> None:
    assert several_drawings.num_drawings == 3
    loader = loader_of(several_drawings, batch_size=2)
    layer = several_drawings.layers["condition_latents"][1]
    counts: Counter[int] = Counter()
    for position in range(60 * loader.batches_per_epoch):
        batch = loader.make(position)
        assert batch.tensors["condition_latents.mean"].shape == batch.tensors["latents.mean"].shape
        for i, key in enumerate(batch.keys):
            own = layer.tensors(key)
            [drawing] = [r for r in range(3) if torch.equal(own["mean"][r], batch.tensors["condition_latents.mean"][i])]
            assert torch.equal(own["std"][drawing], batch.tensors["condition_latents.std"][i])
            counts[drawing] += 1
    for drawing in range(3):
        assert counts[drawing] / counts.total() == pytest.approx(1 / 3, abs=0.06)


def test_captions_and_drawings_of_a_sample_do_not_depend_on_batches_or_processes(samples: CachedSamples) -> None:
    def chosen(**options: Any) -> dict[str, torch.Tensor]:
        loader = loader_of(samples, **options)
        batches = [loader.make(position) for position in range(loader.batches_per_epoch)]
        return {key: batch.tensors["t5.prompt_embeds"][i] for batch in batches for i, key in enumerate(batch.keys)}

    one, other = chosen(batch_size=1), chosen(batch_size=3, rank=1, num_ranks=2)
    assert all(torch.equal(embeds, other[key]) for key, embeds in one.items())


def test_a_batch_is_a_copy_the_maps_stay_behind(samples: CachedSamples) -> None:
    loader = loader_of(samples)
    before = loader.make(0).tensors["latents.mean"].clone()
    loader.make(0).tensors["latents.mean"].fill_(7)
    assert torch.equal(loader.make(0).tensors["latents.mean"], before)


# --- the thread -----------------------------------------------------------------------------------------------------


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_an_error_in_the_thread_reaches_the_caller(
    fails_at: int, accumulation: int, samples: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, make = loader_of(samples, accumulation=accumulation), Loader.make

    def breaks(self: Loader, position: int) -> Batch:
        if position == fails_at:
            raise CacheError("the disk is gone")
        return make(self, position)

    monkeypatch.setattr(Loader, "make", breaks)
    with pytest.raises(CacheError, match="the disk is gone"):
        steps(loader, 6)
    assert loader.step == fails_at // accumulation  # whole steps that came before it
    assert not threads()


def test_closing_ends_the_thread_also_when_it_has_an_error_to_tell_and_no_room_for_it(
    samples: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Loader.make

    def breaks(self: Loader, position: int) -> Batch:
        if position == 2:  # the first was taken, the second fills the queue
            raise CacheError("nobody will hear this")
        return make(self, position)

    monkeypatch.setattr(Loader, "make", breaks)
    iterator = iter(loader_of(samples, prefetch=1))
    next(iterator)
    time.sleep(0.1)
    iterator.close()  # used to hang here
    assert not threads()


def test_the_thread_ends_with_the_loop_that_reads_it(samples: CachedSamples) -> None:
    with closing(iter(loader_of(samples))) as iterator:
        next(iterator)
        assert len(threads()) == 1
    assert not threads()


def test_the_wait_for_data_is_measured_apart_from_the_work(
    samples: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Loader.make

    def slow(self: Loader, position: int) -> Batch:
        time.sleep(0.1)
        return make(self, position)

    monkeypatch.setattr(Loader, "make", slow)
    loader = loader_of(samples, accumulation=2)
    with closing(iter(loader)) as iterator:
        next(iterator)
        waited_for_two_batches = loader.waited_seconds
        time.sleep(1)  # the work, during which the next ones are made
        next(iterator)
        assert loader.waited_seconds < waited_for_two_batches


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 2}, "batch_size was 1, is 2"),
        ({"accumulation": 2}, r"processes x loader\.accumulation was 1, is 2"),
        ({"rank": 1, "num_ranks": 3}, r"processes x loader\.accumulation was 1, is 3"),
    ],
)
def test_a_position_in_another_stream_is_refused(
    changes: dict[str, Any], sentence: str, samples: CachedSamples
) -> None:
    state = loader_of(samples).state()
    with pytest.raises(UserError, match=f"cannot resume at the exact position: {sentence}; restore it"):
        loader_of(samples, **changes).load_state(state)


@pytest.mark.parametrize("what", ["sample", "image", "caption", "conditioning image"])
def test_a_position_among_other_samples_is_refused(what: str, tiny_cache: Path) -> None:
    state = loader_of(samples_of(tiny_cache)).state()
    changed = samples_of(tiny_cache)
    match what:
        case "sample":
            del changed.samples[3]
        case "image":
            changed.samples[3] = replace(changed.samples[3], sha256="another")
        case "caption":
            changed.samples[3] = replace(changed.samples[3], captions=changed.samples[3].captions[:1])
        case _:
            changed.samples[3] = replace(changed.samples[3], conditioning_sha256="another")
    with pytest.raises(UserError, match="the cache holds other samples than when this run began"):
        loader_of(changed).load_state(state)


def test_other_processes_with_the_same_global_batch_may_go_on(samples: CachedSamples) -> None:
    state = loader_of(samples, accumulation=4).state()
    loader_of(samples, accumulation=2, num_ranks=2).load_state(state)


def test_a_condition_that_is_not_there_is_refused_with_the_nearest_name(tiny_cache: Path) -> None:
    with pytest.raises(UserError, match=r"holds no condition 'cany': did you mean 'canny'\?.*CONDITION=cany"):
        CachedSamples(Cache(tiny_cache), flux(), "cany", "train")


def test_impossible_options_are_refused() -> None:
    for options in (LoaderOptions(batch_size=0), LoaderOptions(accumulation=0), LoaderOptions(prefetch=0)):
        with pytest.raises(UserError, match=r"loader\.\w+ must be 1 or more, not 0"):
            options.check()
    with pytest.raises(UserError, match="a share from 0 to 1"):
        LoaderOptions(caption_dropout=1.5).check()
