"""Every sample once per epoch, the same order from the same seed, from any position, whoever reads."""

from __future__ import annotations

import gc
import itertools
import shutil
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from shared.cache import schema, writer
from shared.cache.reader import Cache, CacheError
from shared.cache.schema import Caption, Field
from shared.cache.storage import Listed
from shared.errors import UserError
from shared.families.base import Batch
from tests.shared.small_cache import flip
from tests.train import made_cache
from tests.train.conftest import flux, samples_of
from train.loader import Loader, LoaderOptions
from train.samples import CachedSamples

EMPTY_CAPTION = Caption.of("").id
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


def keys_of(samples: CachedSamples) -> list[str]:
    return [samples.key(index) for index in range(len(samples))]


def clip_of(samples: CachedSamples, caption: str) -> torch.Tensor:
    return samples.cache.layer("clip").tensors(caption)["pooled_prompt_embeds"]


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
        assert seen == Counter(keys_of(samples))


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_a_batch_is_of_one_shape_and_no_larger_than_asked(batch_size: int, samples: CachedSamples) -> None:
    by_key = samples.cache.samples
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
    assert not same(steps(one, 5), steps(other, 5))


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
    by_key = samples.cache.samples
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
    of_caption = {id: clip_of(samples, id) for id in samples.cache.captions}
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
    assert several_drawings.shapes["condition_latents.mean"][0] == 3
    loader = loader_of(several_drawings, batch_size=2)
    layer = several_drawings.cache.layer("canny_latents")
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


# --- the threads ----------------------------------------------------------------------------------------------------


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_an_error_in_a_thread_reaches_the_caller_in_its_turn(
    fails_at: int, accumulation: int, workers: int, samples: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, make = loader_of(samples, accumulation=accumulation, workers=workers), Loader.make

    def breaks(self: Loader, position: int, making: Any = None) -> Batch:
        if position == fails_at:
            raise CacheError("the disk is gone")
        return make(self, position, making)

    monkeypatch.setattr(Loader, "make", breaks)
    with pytest.raises(CacheError, match="the disk is gone"):
        steps(loader, 6)
    assert loader.step == fails_at // accumulation  # whole steps that came before it
    assert not threads()


@pytest.mark.parametrize("workers", [1, 4])
def test_closing_ends_the_threads_also_when_they_have_an_error_to_tell(
    workers: int, samples: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, failed = Loader.make, threading.Event()

    def breaks(self: Loader, position: int, making: Any = None) -> Batch:
        if position == 2:
            failed.set()
            raise CacheError("nobody will hear this")
        return make(self, position, making)

    monkeypatch.setattr(Loader, "make", breaks)
    iterator = iter(loader_of(samples, prefetch=3, workers=workers))
    next(iterator)
    assert failed.wait(60)
    iterator.close()
    assert not threads()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_threads_end_with_the_loop_that_reads_them(workers: int, samples: CachedSamples) -> None:
    with closing(iter(loader_of(samples, workers=workers, prefetch=8))) as iterator:
        for _ in range(4):
            next(iterator)
        assert 1 <= len(threads()) <= workers
    assert not threads()


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_no_more_batches_are_made_ahead_than_asked(
    prefetch: int, samples: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made, enough = Loader.make, [], threading.Event()

    def counted(self: Loader, position: int, making: Any = None) -> Batch:
        batch = make(self, position, making)
        made.append(position)
        if len(made) == 3 + prefetch:
            enough.set()
        return batch

    monkeypatch.setattr(Loader, "make", counted)
    with closing(iter(loader_of(samples, workers=3, prefetch=prefetch))) as iterator:
        for _ in range(3):
            next(iterator)
        assert enough.wait(60)  # without being asked for another
        time.sleep(0.1)
        assert sorted(made) == list(range(3 + prefetch))


@pytest.mark.parametrize(("workers", "prefetch"), [(2, 1), (3, 4), (7, 5), (5, 9)])
def test_any_number_of_workers_makes_the_same_batches(workers: int, prefetch: int, samples: CachedSamples) -> None:
    options: dict[str, Any] = {"batch_size": 2, "accumulation": 2, "seed": 3}
    alone = steps(loader_of(samples, workers=1, **options), 20)
    assert same(steps(loader_of(samples, workers=workers, prefetch=prefetch, **options), 20), alone)


def test_the_memory_of_a_batch_serves_again_when_it_is_let_go_and_not_before(samples: CachedSamples) -> None:
    loader = loader_of(samples, batch_size=3, workers=3, prefetch=2)
    count = 12 * loader.batches_per_epoch
    expected = [loader.make(position) for position in range(count)]
    addresses, held = set(), []
    gc.disable()  # what is let go is to serve again at once
    try:
        with closing(iter(loader)) as iterator:
            for position in range(count):
                [batch] = next(iterator)
                addresses |= {t.untyped_storage().data_ptr() for t in batch.tensors.values()}
                held.append((position, batch))
                if position % 3 == 0:  # some are held longer than others
                    held.append((position, batch))
                for kept, other in held:
                    assert all(torch.equal(t, expected[kept].tensors[name]) for name, t in other.tensors.items())
                del held[: len(held) - 4]
    finally:
        gc.enable()
    assert len(addresses) < 6 * 12  # six fields, and no more than a dozen batches that are held or made


def test_an_altered_member_is_refused_in_its_turn_by_whichever_thread_reads_it(tmp_path: Path) -> None:
    cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(20))
    opened = samples_of(cache)
    layer = opened.cache.layer("latents")
    place = layer.places.place(7)
    flip(layer.tar_path(1), place.offset + place.length - 5)
    for workers in (1, 4):
        for seed in range(3):
            loader = loader_of(samples_of(cache), seed=seed, batch_size=2, workers=workers)
            altered = next(i for i in range(10) if 7 in loader.order.places(i))
            with pytest.raises(CacheError, match="sample 's007' of layer 'latents' was altered on disk"):
                steps(loader, 10)
            assert loader.step == altered


def test_the_wait_for_data_is_measured_apart_from_the_work(
    samples: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Loader.make

    def slow(self: Loader, position: int, making: Any = None) -> Batch:
        time.sleep(0.1)
        return make(self, position, making)

    monkeypatch.setattr(Loader, "make", slow)
    loader = loader_of(samples, accumulation=2)
    with closing(iter(loader)) as iterator:
        next(iterator)
        waited_for_two_batches = loader.waited_seconds
        time.sleep(1)  # the work, during which the next ones are made
        next(iterator)
        assert loader.waited_seconds < waited_for_two_batches


# --- orders ---------------------------------------------------------------------------------------------------------


def remote(samples: CachedSamples, monkeypatch: pytest.MonkeyPatch) -> list[list[Listed]]:
    """The samples as if their cache came over a network; what is announced is listed."""
    announced: list[list[Listed]] = []
    monkeypatch.setattr(samples.cache.storage, "remote", True)
    monkeypatch.setattr(samples.cache.storage, "fetch_ahead", lambda files: announced.append(list(files)))
    return announced


@pytest.fixture(scope="module")
def cache_of_many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [made_cache.sample(f"s{i:03d}", size=((16, 16), (32, 16))[i % 3 == 0]) for i in range(90)]
    return made_cache.write(tmp_path_factory.mktemp("many") / "cache", samples)


@pytest.fixture
def many(cache_of_many: Path) -> CachedSamples:
    return samples_of(cache_of_many)


def test_a_cache_that_comes_over_a_network_is_read_window_by_window(
    many: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loader_of(many).order.state() == {"kind": "global"}
    remote(many, monkeypatch)
    loader = loader_of(many, batch_size=2, window=16)
    assert loader.order.state() == {"kind": "window", "window": 16, "chunks": 8}
    assert loader_of(many, order="global").order.state() == {"kind": "global"}
    epoch = steps(loader, loader.batches_per_epoch)
    assert Counter(itertools.chain(*keys(epoch))) == Counter(keys_of(many))


def test_a_run_that_goes_on_keeps_its_order_wherever_the_cache_now_is(
    many: CachedSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        remote(many, patch)
        begun = loader_of(many, batch_size=2, window=16)
        steps(begun, 7)
        state = begun.state()
        following = steps(begun, 60)
    local = loader_of(many, batch_size=2, window=999)
    local.load_state(state)
    assert same(steps(local, 60), following)
    assert local.order.state() == state["order"]
    begun = loader_of(many, batch_size=2)
    steps(begun, 7)
    remote(many, monkeypatch)
    back = loader_of(many, batch_size=2)
    back.load_state(begun.state())
    assert back.order.state() == {"kind": "global"}
    assert same(steps(back, 5), steps(begun, 5))


def test_an_order_that_was_asked_for_is_not_given_up_for_the_saved_one(many: CachedSamples) -> None:
    state = loader_of(many, order="window", window=16).state()
    for options in ({"order": "global"}, {"order": "window", "window": 32}):
        with pytest.raises(UserError, match=r"the exact position: loader\.order was window of 16 samples, is"):
            loader_of(many, **options).load_state(state)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_shards_of_coming_batches_are_announced_in_the_order_of_their_use(
    num_ranks: int, many: CachedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = remote(many, monkeypatch)
    lookahead = 5
    loader = loader_of(many, batch_size=2, window=16, lookahead=lookahead, num_ranks=num_ranks)

    def shards(position: int) -> list[str]:
        numbers = [many.cache.index.sample_numbers[key] for key in loader.make(position).keys]
        return [
            f"{layer.summary.folder}/{layer.places.place(number).shard}.tar"
            for layer in (many.cache.layer("latents"), many.cache.layer("canny_latents"))
            for number in numbers
        ]

    with closing(iter(loader)) as iterator:
        for step in range(1, 31):
            next(iterator)
            positions = [(step + ahead) * num_ranks for ahead in range(lookahead)]
            latest = [file.name for file in announced[-1] if "latents" in file.name]
            assert sorted(latest) == sorted({name for position in positions for name in shards(position)})
            first = {*shards(positions[0])}
            assert {*latest[: len(first)]} == first
            listed = announced[-1][0]
            assert (many.cache.path / listed.name).stat().st_size == listed.num_bytes
    assert len(announced) < 40  # where nothing changes, nothing is said
    assert announced[-1] == []


def test_what_a_cache_s_own_folder_holds_is_not_announced(many: CachedSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[Any] = []
    monkeypatch.setattr(many.cache.storage, "fetch_ahead", announced.append)
    steps(loader_of(many), 5)
    assert announced == []


# --- choices --------------------------------------------------------------------------------------------------------


def chosen_captions(loader: Loader, epochs: int) -> Counter[tuple[str, str]]:
    """(sample, caption's id) -> how often they came together."""
    samples = loader.samples
    ids = {tuple(clip_of(samples, id).tolist()): id for id in samples.cache.captions}
    counts: Counter[tuple[str, str]] = Counter()
    for position in range(epochs * loader.batches_per_epoch):
        batch = loader.make(position)
        embeds = batch.tensors["clip.pooled_prompt_embeds"].tolist()
        counts.update((key, ids[tuple(row)]) for key, row in zip(batch.keys, embeds, strict=True))
    return counts


def test_captions_come_as_often_as_they_weigh(tmp_path: Path) -> None:
    samples = [
        made_cache.sample("a", "one", "two", "three", weights=(1.0, 3.0, 0.0)),
        made_cache.sample("b", "two", "four"),
        made_cache.sample("c", "five", weights=(0.25,)),
        made_cache.sample("d", "one", "four", weights=(0.1, 0.3)),
    ]
    cached = samples_of(made_cache.write(tmp_path / "cache", samples))
    counts = chosen_captions(loader_of(cached, batch_size=4, caption_dropout=0.2), 2000)
    expected = {("a", "one"): 0.2, ("a", "two"): 0.6, ("b", "two"): 0.4, ("b", "four"): 0.4, ("c", "five"): 0.8,
                ("d", "one"): 0.2, ("d", "four"): 0.6, **{(key, ""): 0.2 for key in "abcd"}}  # fmt: skip
    shares = {(key, text): counts[key, Caption.of(text).id] / 2000 for key, text in expected}
    assert shares == {pair: pytest.approx(share, abs=0.05) for pair, share in expected.items()}
    assert counts.total() == 8000
    assert sum(counts[key, Caption.of(text).id] for key, text in expected) == 8000


def test_of_several_conditions_one_is_drawn_for_each_sample_and_the_right_drawing_of_it_is_stacked(
    tmp_path: Path,
) -> None:
    drawings = {"canny": 1, "lineart": 3}
    cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(8), drawings=drawings)
    cached = CachedSamples(Cache(cache), flux(), ("lineart", "canny"), "train")
    loader, counts = loader_of(cached, batch_size=4), Counter[tuple[str, int]]()
    for position in range(400):
        batch = loader.make(position)
        for i, key in enumerate(batch.keys):
            [(condition, drawing)] = [
                (condition, r)
                for condition, count in drawings.items()
                for r in range(count)
                if torch.equal(
                    made_cache.tensors(f"{condition}_latents", key, (16, 16), count)["mean"][r],
                    batch.tensors["condition_latents.mean"][i],
                )
            ]
            counts[condition, drawing] += 1
    assert {pair: count / 1600 for pair, count in counts.items()} == {
        ("canny", 0): pytest.approx(1 / 2, abs=0.05),
        **{("lineart", r): pytest.approx(1 / 6, abs=0.04) for r in range(3)},
    }
    assert cached.fingerprints.keys() == {"latents", "lineart_latents", "canny_latents", "clip", "t5"}
    looked_at = cached.batch([0, 1, 2])
    for i, (condition, drawing) in enumerate([("lineart", 2), ("canny", 0), ("lineart", 2)]):
        finest = made_cache.tensors(f"{condition}_latents", f"s{i:03d}", (16, 16), drawings[condition])
        assert torch.equal(looked_at.tensors["condition_latents.std"][i], finest["std"][drawing])


@pytest.mark.parametrize(
    ("differing", "sentence"),
    [
        ({"precision": "float32"}, r"'canny_latents' and 'lineart_latents' were made with different options \(preci"),
        ({"channels": 3}, r"of 'canny_latents' and 'lineart_latents' one is grey .* train on each by itself"),
    ],
)
def test_conditions_that_were_made_differently_are_refused_together(
    differing: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    recipes = {"lineart_latents": {**differing, "drawings": "8"}, "canny_latents": {"drawings": "9"}}
    cache = made_cache.write(
        tmp_path / "cache", made_cache.samples_named(3), drawings={"canny": 1, "lineart": 1}, recipes=recipes
    )
    with pytest.raises(UserError, match=sentence):
        CachedSamples(Cache(cache), flux(), ("canny", "lineart"), "train")


@pytest.mark.parametrize("shuffled", [False, True])
def test_of_an_image_s_variants_one_is_drawn_each_epoch(shuffled: bool, tmp_path: Path) -> None:
    counts = {"a": 4, "b": 1, "c": 2, "d": 3, "e": 1}
    # In the order of their keys, variants of one image are neighbours; shuffled, they are not.
    samples = [
        made_cache.sample(
            f"{i}-{image}" if shuffled else f"{image}-{i}", source=image, size=((16, 16), (32, 16))[image > "c"]
        )
        for image, count in counts.items()
        for i in range(count)
    ]
    loader = loader_of(samples_of(made_cache.write(tmp_path / "cache", samples)), batch_size=2, variants="one")
    assert loader.batches_per_epoch == 3
    image_of = {sample.key: sample.source for sample in samples}
    drawn: Counter[str] = Counter()
    for epoch in range(600):
        epoch_keys = [key for i in range(3) for key in loader.make(3 * epoch + i).keys]
        assert sorted(image_of[key] for key in epoch_keys) == sorted(counts)
        drawn.update(epoch_keys)
    assert drawn.keys() == image_of.keys()
    for key, count in drawn.items():
        assert count / 600 == pytest.approx(1 / counts[image_of[key]], abs=0.09)
    every = loader_of(loader.samples, batch_size=2)
    assert Counter(itertools.chain(*keys(steps(every, every.batches_per_epoch)))) == Counter([*image_of])


def test_samples_that_a_layer_lacks_are_left_out_and_counted(tmp_path: Path) -> None:
    failing = [f"s{i:03d}" for i in (0, 5, 6)]
    lost_caption = Caption.of("caption of s009").id
    samples = made_cache.samples_named(10, size=(32, 16))
    samples += [made_cache.sample("only", size=(16, 48)), made_cache.sample("held", split="validation")]
    samples += [replace(made_cache.sample("torn"), status="error", error="cannot be decoded")]
    cache = made_cache.write(
        tmp_path / "cache",
        samples,
        broken={"latents": [*failing[:2], "only"], "canny_latents": failing[1:], "t5": [lost_caption]},
    )
    cached = samples_of(cache)
    assert keys_of(cached) == ["s001", "s002", "s003", "s004", "s007", "s008"]
    assert cached.num_left_out == 6
    assert cached.sizes == [(32, 16)]
    assert [cached.number(index) for index in range(6)] == cached.numbers(np.arange(6)).tolist()
    loader = loader_of(cached, batch_size=4)
    assert Counter(itertools.chain(*keys(steps(loader, 2)))) == Counter(keys_of(cached))
    for [batch] in steps(loader, 4):
        for i, key in enumerate(batch.keys):
            assert torch.equal(batch.tensors["latents.std"][i], made_cache.tensors("latents", key, (32, 16))["std"])
    held_out = samples_of(cache, "validation")
    assert (keys_of(held_out), held_out.num_left_out) == (["held"], 0)


def test_a_split_without_samples_is_empty_and_no_loader_takes_it(tmp_path: Path) -> None:
    cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(3))
    held_out = samples_of(cache, "validation")
    assert (len(held_out), held_out.sizes, held_out.num_left_out) == (0, [], 0)
    with pytest.raises(UserError, match="has no sound sample in the split 'validation'"):
        loader_of(held_out)


def test_a_layer_without_the_empty_caption_is_refused(tmp_path: Path) -> None:
    cache = made_cache.write(tmp_path / "cache", made_cache.samples_named(3), broken={"clip": [EMPTY_CAPTION]})
    with pytest.raises(UserError, match=f"layer 'clip' of .* lacks the empty caption.*{made_cache.BROKEN}"):
        samples_of(cache)


def test_opening_and_reading_make_no_object_for_each_sample(many: CachedSamples) -> None:
    assert same(steps(loader_of(many), 5), steps(loader_of(many), 5))
    assert many.num_left_out == 0
    for table in ("samples", "captions"):
        assert table not in vars(many.cache)
    for lookup in ("sample_numbers", "caption_numbers"):
        assert lookup not in vars(many.cache.index)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"variants": "one"}, "loader.variants was all, is one"),
        ({"order": "window"}, r"loader\.order was global, is window of 2048 samples"),
        ({"batch_size": 2}, "loader.batch_size was 1, is 2"),
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


CHANGES: dict[str, Any] = {
    "a sample less": lambda samples: samples[:-1],
    "a sample more": lambda samples: [*samples, made_cache.sample("s999")],
    "an image": lambda samples: [made_cache.sample("s000", content="painted over"), *samples[1:]],
    "a caption": lambda samples: [made_cache.sample("s000", "another"), *samples[1:]],
    "a weight": lambda samples: [replace(samples[0], caption_weights=(2.0,)), *samples[1:]],
    "a conditioning image": lambda samples: [replace(samples[0], conditioning_sha256="another"), *samples[1:]],
    "a placement": lambda samples: [replace(samples[0], placement='{"left": 3}'), *samples[1:]],
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_position_among_other_samples_is_refused(what: str, tmp_path: Path) -> None:
    before = made_cache.samples_named(6)
    state = loader_of(samples_of(made_cache.write(tmp_path / "before", before))).state()
    changed = samples_of(made_cache.write(tmp_path / "after", CHANGES[what](before)))
    with pytest.raises(UserError, match="the cache holds other samples than when this run began"):
        loader_of(changed).load_state(state)


def test_a_position_is_refused_where_a_layer_now_lacks_a_sample(tmp_path: Path) -> None:
    samples = made_cache.samples_named(6)
    state = loader_of(samples_of(made_cache.write(tmp_path / "before", samples))).state()
    lacking = samples_of(made_cache.write(tmp_path / "after", samples, broken={"latents": ["s003"]}))
    with pytest.raises(UserError, match="the cache holds other samples than when this run began"):
        loader_of(lacking).load_state(state)


def test_a_position_does_not_depend_on_which_shards_hold_the_samples(tmp_path: Path) -> None:
    samples = made_cache.samples_named(6)
    one, other = (
        loader_of(samples_of(made_cache.write(tmp_path / f"{rows}", samples, shard_rows=rows))) for rows in (2, 5)
    )
    steps(one, 4)
    other.load_state(one.state())
    assert same(steps(other, 9), steps(one, 9))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_stream_goes_on_exactly_with_another_number_of_processes(num_ranks: int, samples: CachedSamples) -> None:
    options: dict[str, Any] = {"batch_size": 2, "seed": 6}
    whole = [batch for step in steps(loader_of(samples, accumulation=4, **options), 9) for batch in step]
    begun = loader_of(samples, accumulation=2, num_ranks=2, **options)
    steps(begun, 5)
    ranks = []
    for rank in range(num_ranks):
        loader = loader_of(samples, accumulation=4 // num_ranks, rank=rank, num_ranks=num_ranks, **options)
        loader.load_state(begun.state())
        ranks.append([batch for step in steps(loader, 4) for batch in step])
    together = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert same([together], [whole[20:]])


def test_a_condition_that_is_not_there_is_refused_with_the_nearest_name(tiny_cache: Path) -> None:
    with pytest.raises(UserError, match=r"holds no condition 'cany': did you mean 'canny'\?.*CONDITION=cany"):
        CachedSamples(Cache(tiny_cache), flux(), "cany", "train")


def test_options_of_another_order_are_known_to_have_no_effect() -> None:
    odd = LoaderOptions(window=9, lookahead=9)
    assert odd.unused(remote=False) == ["window", "lookahead"]
    assert odd.unused(remote=True) == []
    assert replace(odd, order="window").unused(remote=False) == ["lookahead"]
    assert replace(odd, order="global").unused(remote=True) == ["window"]
    assert LoaderOptions().unused(remote=False) == []


def test_impossible_options_are_refused() -> None:
    for name in ("batch_size", "accumulation", "prefetch", "workers", "window", "lookahead"):
        with pytest.raises(UserError, match=rf"loader\.{name} must be 1 or more, not 0"):
            LoaderOptions(**{name: 0}).check()  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a share from 0 to 1"):
        LoaderOptions(caption_dropout=1.5).check()
