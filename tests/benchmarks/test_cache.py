"""The benchmarks run, at a size that says nothing, and end with lines that parse. No time is looked at."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cache, disk, index, layouts, loader, overhead, page_cache, stages, waiting
from benchmarks.flux_cache import FAMILY, FluxSamples
from benchmarks.overhead import Encoders
from preprocess.pipeline import preprocess
from shared.errors import UserError
from shared.families.base import Encode, LayerKind, Tensors
from tests import forked

TOY = FluxSamples(resolution=64, count=20, text_length=4)
TINY = Encoders(vae_channels=(8, 8, 8, 8), t5_width=32, t5_layers=1, text_length=16, resolution=64, count=9)


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Benchmarks choose torch's threads; the tests after them shall have theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """The closing lines, and all else that was printed, of the parts that have one. Where packages of
    requirements-bench.txt are not installed, without what they read."""
    kinds = tuple(kind for kind in loader.OTHERS if kind.package is None or importlib.util.find_spec(kind.package))
    names = {kind.name for kind in kinds} | {loader.PLAIN}
    ratios = {name: tuple(other for other in others if other in names) for name, others in loader.RATIOS.items()}
    plan = cache.Plan(loader=(TOY,), rounds=2, cold_rounds=1, disk=(TOY,), encoders=TINY, preprocess_rounds=1)
    folder, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(loader, "OTHERS", kinds)
        patch.setattr(loader, "RATIOS", {name: others for name, others in ratios.items() if others})
        closing = cache.measure(plan, folder, ["preprocess", "bytes", "loader"])
    assert not any(folder.iterdir())
    return closing, printed.getvalue()


def numbers(line: str) -> dict[str, float]:
    """The figures of a closing line, by name."""
    found = dict(re.findall(r" (\w+)=(\d+\.\d+)", line))
    assert re.fullmatch(r"\w+( \w+=\d+\.\d+)+", line), line
    return {name: float(value) for name, value in found.items()}


def test_the_closing_lines_come_in_their_order_and_parse(ran: tuple[list[str], str]) -> None:
    first, second, third = ran[0]
    assert first.startswith("loader raw_ratio=")
    assert set(numbers(first)) >= {"raw_ratio", "webdataset_ratio", "arrow_ratio", "files_ratio"}
    assert all(value > 0 for value in numbers(first).values())
    assert second.startswith("bytes ratio=")
    assert numbers(second)["ratio"] > 1
    assert third.startswith("preprocess overhead=")
    assert numbers(third)["overhead"] > 0


def test_every_way_of_reading_is_in_the_tables_warm_and_cold(ran: tuple[list[str], str]) -> None:
    # Before anything is timed, each has given the samples that were written, bit by bit.
    kinds = [kind for kind in loader.OTHERS if kind.package is None or importlib.util.find_spec(kind.package)]
    for name in (
        loader.PLAIN,
        loader.PLAIN_BATCH,
        loader.ONE_WORKER,
        loader.DEFAULT_WORKERS,
        *(kind.name for kind in kinds),
    ):
        assert ran[1].count(f"\n{name}  ") == 2, name
    assert f"\n{loader.ONE_WORKER}, first epoch  " in ran[1]
    assert "== loader, 64 px ==" in ran[1]


def test_a_layout_that_gives_other_samples_is_found(tmp_path: Path) -> None:
    written = layouts.SafetensorsFiles(tmp_path / "files", TOY)
    with written.writing() as add:
        for i in range(TOY.count):
            add(i, TOY.tensors(i + (i == 7)))
    with pytest.raises(AssertionError, match="gives other samples"):
        loader.compare(TOY, {"files": written.reading})


def test_a_missing_package_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layouts.MosaicStreaming, "package", "no_such_package")
    with pytest.raises(UserError, match=r"not installed: .*no_such_package.* make bench-cache"):
        cache.measure(cache.Plan(), tmp_path, ["loader"])
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GB free, the benchmarks need .* GB: choose another --folder, or --quick"):
        cache.measure(cache.Plan(index_rows=(10**13,)), tmp_path, ["index"])
    assert not any(tmp_path.iterdir())


def test_the_page_cache_is_counted_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert page_cache.resident([path]) == 1.0
    page_cache.drop([path])
    assert 0.0 <= page_cache.resident([path]) <= 1.0  # a file system in memory keeps it
    assert page_cache.resident([]) == 0.0


def test_bytes_on_disk_are_compared_with_the_numbers_and_shared_captions_cost_a_tenth(tmp_path: Path) -> None:
    unique = FluxSamples(resolution=256, count=20)
    shared = FluxSamples(resolution=256, count=20, images_per_caption=10)
    mean = FluxSamples(resolution=256, count=4, posterior="mean")
    sizes = disk.measure(tmp_path, [unique, shared, mean])
    ratio = numbers(disk.closing_line(sizes))["ratio"]
    assert ratio == pytest.approx(max(sizes[0].ratio, sizes[2].ratio), abs=1e-3)
    assert 1.0 < ratio < 1.01
    assert sizes[1].text / sizes[0].text == pytest.approx(0.1, abs=0.001)
    assert sizes[0].samples.minimum_bytes == 20 * 4 * 16 * 32 * 32 * 2 + 21 * (512 * 4096 + 768) * 2
    assert len(disk.report(sizes).splitlines()) == 6
    assert not any(tmp_path.iterdir())


def test_the_encoders_alone_get_the_batches_that_preprocessing_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, given = FAMILY.open_encoder, dict[str, list[Any]]()

    def open_encoder(kind: LayerKind, *rest: Any) -> Encode:
        encode = opened(kind, *rest)

        def noted(batch: Any) -> Tensors:
            given.setdefault(kind.name, []).append(batch)
            return encode(batch)

        return noted

    monkeypatch.setattr(FAMILY, "open_encoder", open_encoder)
    model, data = overhead.write_model(tmp_path / "model", TINY), overhead.write_pictures(tmp_path / "pictures", TINY)
    stages.run(preprocess, overhead.preprocess_options(model, data, tmp_path / "cache", TINY))
    alone = {kind.name: list(overhead.batches_of(kind, data, TINY)) for kind in FAMILY.layers}
    assert {name: [len(batch) for batch in batches] for name, batches in alone.items()} == {
        "latents": [8, 8], "condition_latents": [8, 8], "clip": [8, 8], "t5": [8, 8],
    }  # fmt: skip
    for name, batches in alone.items():
        assert [np.shape(batch) for batch in batches] == [np.shape(batch) for batch in given[name]], name
    assert {caption for batch in alone["t5"] for caption in batch} == {c for batch in given["t5"] for c in batch}


def test_the_overhead_is_that_of_the_round_s_own_neighbours() -> None:
    figures = overhead.Figures(TINY, own=[{"t5": 1.0}, {"t5": 3.0}, {"t5": 3.0}], wall=[2.0, 6.0], drawings_bytes=0.0)
    assert figures.closing_line() == "preprocess overhead=1.500"


def test_ratios_are_of_the_same_round() -> None:
    ours, plain = [1.0, 10.0, 1.0], [0.5, 5.0, 0.9]
    seconds = {loader.ONE_WORKER: ours, loader.PLAIN: plain, "a": [4.0, 60.0, 5.0], "b": [9.0, 20.0, 6.0]}
    figures = loader.Figures(TOY, warm=seconds, cold={})
    assert figures.ratio(loader.ONE_WORKER, [loader.PLAIN]) == 0.5
    assert figures.ratio(loader.ONE_WORKER, ["a", "b"]) == 4.0


def test_an_index_is_opened_in_a_process_of_its_own_and_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "subprocess", forked)
    ((cold, warm),) = index.measure(tmp_path, [300], steps=5)
    assert (warm.rows, warm.shards) == (300, 10)  # latents 2, their condition's 2, CLIP 1, T5 5
    assert warm.index_bytes == cold.index_bytes > 300 * 100
    assert warm.peak_bytes >= warm.before_bytes
    assert warm.seconds > 0
    assert len(index.report([(cold, warm)]).splitlines()) == 3
    assert not any(tmp_path.iterdir())


def test_the_wait_for_data_is_what_the_run_itself_recorded(tmp_path: Path) -> None:
    figures = waiting.measure(tmp_path, pictures=16, steps=3)
    assert figures.steps == 2  # nothing could be read ahead of the first
    assert 0 <= numbers(figures.line())["wait"] <= 1
    assert "2 steps of batch 16" in waiting.report(figures)
