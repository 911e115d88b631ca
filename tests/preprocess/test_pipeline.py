"""The stage as a whole: what a run makes and what it leaves alone, what it says, what it refuses, what it holds."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from preprocess import conditions, images, pipeline
from preprocess.conditions.canny import Canny, CannyDrawer
from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.engine import open_workers
from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from shared import atomic, families
from shared.cache.reader import Cache, usable
from shared.cache.schema import Caption
from shared.cache.verify import verify
from shared.errors import UserError, run_command_line
from shared.families.base import Encode, LayerKind
from tests.conftest import preprocess_options, write_data
from tests.preprocess.runs import contents, ran, rows, shards

COUNT = 6
CAPTIONS = COUNT + 2  # one of each image, one that all share, the empty one
IMAGE_LAYERS = ("latents", "canny", "canny_latents")
FLUX = families.get("flux")


@dataclass
class Setting:
    """A data set, its finished cache, and the options of both: a copy that a test may change."""

    data: Path
    cache: Path
    options: PreprocessConfig

    def with_(self, **changes: Any) -> PreprocessConfig:
        return replace(self.options, **changes)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.data / "metadata.jsonl").read_text().splitlines()]

    def write_lines(self, lines: list[dict[str, Any]]) -> None:
        (self.data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def add_image(self, name: str = "new.png") -> None:
        picture(self.data / name, 200)
        picture(self.data / "drawings" / name, 255)
        line = {"file_name": name, "text": ["a new one", "a box"], "conditioning_image": f"drawings/{name}"}
        self.write_lines([*self.lines(), line])


def picture(path: Path, value: int, width: int = 64, height: int = 64) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 255 - value
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def original(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("original")
    data = write_data(folder / "data", COUNT)
    setting = Setting(data, folder / "cache", preprocess_options(data, folder / "cache", tiny_model))
    lines = setting.lines()
    for i, line in enumerate(lines):
        picture(data / "drawings" / line["file_name"], 255 - i)
        line["conditioning_image"] = f"drawings/{line['file_name']}"
    setting.write_lines(lines)
    assert preprocess(setting.options) == 0
    return setting


@pytest.fixture
def setting(original: Setting, tmp_path: Path) -> Setting:
    data, cache = shutil.copytree(original.data, tmp_path / "data"), shutil.copytree(original.cache, tmp_path / "cache")
    return Setting(data, cache, replace(original.options, data=str(data), cache=str(cache)))


def expected(**made: int) -> dict[str, int]:
    """Rows made now: 0 for every layer that is not named."""
    return {**dict.fromkeys((*IMAGE_LAYERS, "clip", "t5"), 0), **made}


def assert_unchanged(before: dict[str, bytes], cache: Path) -> None:
    """Every shard that was there is there, byte for byte."""
    now = shards(cache)
    assert before
    assert {name: now.get(name) for name in before} == before


# --- what a run redoes: exactly what depends on what changed ---


def test_the_first_run_makes_everything_once(original: Setting) -> None:
    cache = Cache(original.cache)
    assert len(cache.samples) == COUNT
    assert len(cache.captions) == CAPTIONS  # each distinct caption once, and the empty one
    assert set(cache.layer_names) == {*IMAGE_LAYERS, "clip", "t5"}
    assert cache.conditions == ["canny"]
    assert len(rows(original.cache)) == 3 * COUNT + 2 * CAPTIONS
    assert verify(original.cache).sound
    assert verify(original.cache).unlisted == []


def test_the_same_command_again_makes_nothing_and_changes_no_byte(
    setting: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(setting.cache)
    decoded: list[bytes] = []
    decode = images.decode

    def counted(data: bytes) -> NDArray[np.uint8]:
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(type(FLUX), "open_encoder", None)
    result = ran(setting.options, capsys)
    assert (result.code, result.made, result.err) == (0, expected(), "")
    assert contents(setting.cache) == before
    assert decoded == []


def test_an_added_image_is_the_only_one_encoded(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before, rows_before = shards(setting.cache), rows(setting.cache)
    setting.add_image()
    result = ran(setting.options, capsys)
    assert result.made == expected(latents=1, canny=1, canny_latents=1, clip=1, t5=1)
    assert_unchanged(before, setting.cache)
    assert rows_before.items() <= rows(setting.cache).items()
    assert len(Cache(setting.cache).samples) == COUNT + 1


def test_an_edited_image_is_the_only_one_encoded_again(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before, rows_before = shards(setting.cache), rows(setting.cache)
    picture(setting.data / "002.png", 31)
    result = ran(setting.options, capsys)
    assert result.made == expected(latents=1, canny=1, canny_latents=1)
    assert_unchanged(before, setting.cache)
    now = rows(setting.cache)
    assert set(now) == set(rows_before)
    changed = {key for key in now if now[key] != rows_before[key]}
    (key,) = (sample.key for sample in Cache(setting.cache).samples.values() if sample.source == "002.png")
    assert changed == {("latents", key), ("canny", key), ("canny_latents", key)}


def test_a_removed_image_is_named_and_no_longer_a_sample(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before = shards(setting.cache)
    (setting.data / "003.png").unlink()
    setting.write_lines([line for line in setting.lines() if line["file_name"] != "003.png"])
    result = ran(setting.options, capsys)
    assert result.made == expected()
    assert "1 image(s) of the cache, as 003.png, are no longer in" in result.err
    assert shards(setting.cache) == before
    cache = Cache(setting.cache)
    assert len(cache.samples) == COUNT - 1
    assert len(cache.captions) == CAPTIONS - 1
    assert "no longer" not in ran(setting.options, capsys).err


def test_an_edited_caption_is_the_only_one_encoded(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before = shards(setting.cache)
    lines = setting.lines()
    lines[1]["text"][0] = "another caption"
    setting.write_lines(lines)
    assert ran(setting.options, capsys).made == expected(clip=1, t5=1)
    assert_unchanged(before, setting.cache)
    assert {caption.text for caption in Cache(setting.cache).captions.values()} >= {"", "a box", "another caption"}


def test_an_added_condition_adds_its_own_layers_alone(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before = shards(setting.cache)
    options = setting.with_(condition=("precomputed",))
    result = ran(options, capsys)
    assert result.made == {"latents": 0, "precomputed": COUNT, "precomputed_latents": COUNT, "clip": 0, "t5": 0}
    assert_unchanged(before, setting.cache)
    cache = Cache(setting.cache)
    assert cache.conditions == ["canny", "precomputed"]
    assert set(cache.layer_names) == {*IMAGE_LAYERS, "precomputed", "precomputed_latents", "clip", "t5"}
    assert "conditions precomputed (and canny from before)" in result.out
    assert verify(setting.cache).sound
    finished = contents(setting.cache)
    assert ran(options, capsys).code == 0
    assert contents(setting.cache) == finished


def test_another_text_length_remakes_t5_alone(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before = shards(setting.cache)
    assert ran(setting.with_(text_length=32), capsys).made == expected(t5=CAPTIONS)
    assert_unchanged(before, setting.cache)
    assert ran(setting.options, capsys).made == expected()  # the old layer stayed
    assert Cache(setting.cache).summary("t5").recipe["text_length"] == 24


def test_another_vae_remakes_what_it_encodes_alone(
    setting: Setting, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = shards(setting.cache)
    model = with_another_vae(tiny_model, tmp_path)
    result = ran(setting.with_(model=str(model)), capsys)
    assert result.made == expected(latents=COUNT, canny_latents=COUNT)
    assert_unchanged(before, setting.cache)


def with_another_vae(model: Path, folder: Path) -> Path:
    copy = shutil.copytree(model, folder / "model")
    shutil.rmtree(copy / "vae")
    shutil.copytree(FLUX.tiny(folder / "other", seed=5) / "vae", copy / "vae")
    return copy


def test_another_resolution_remakes_what_has_pixels_alone(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(setting.cache)
    larger = setting.with_(geometry=GeometryOptions(resolution=96))
    assert ran(larger, capsys).made == expected(latents=COUNT, canny=COUNT, canny_latents=COUNT)
    assert_unchanged({name: data for name, data in before.items() if name.endswith("tar")}, setting.cache)
    assert all((s.bucket_width or 0) * (s.bucket_height or 0) > 64 * 64 for s in Cache(setting.cache).samples.values())
    assert ran(setting.options, capsys).made == expected()  # and back again


def test_flips_are_added_to_what_is_there(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    before, rows_before = shards(setting.cache), rows(setting.cache)
    result = ran(setting.with_(geometry=GeometryOptions(resolution=64, flip=True)), capsys)
    assert result.made == expected(latents=COUNT, canny=COUNT, canny_latents=COUNT)
    assert_unchanged(before, setting.cache)
    assert rows_before.items() <= rows(setting.cache).items()
    assert len(Cache(setting.cache).samples) == 2 * COUNT


def test_another_precision_remakes_the_encoders_layers_and_keeps_the_drawings(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ran(setting.with_(precision="bf16"), capsys)
    assert result.made == expected(latents=COUNT, canny_latents=COUNT, clip=CAPTIONS, t5=CAPTIONS)
    cache = Cache(setting.cache)
    key = next(iter(cache.samples))
    assert cache.layer("latents").tensors(key)["mean"].dtype == torch.bfloat16


def test_a_moved_data_folder_and_a_copied_model_remake_nothing(
    setting: Setting, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(setting.cache)
    setting.data.rename(tmp_path / "elsewhere")
    assert ran(setting.with_(data=str(tmp_path / "elsewhere")), capsys).made == expected()
    assert contents(setting.cache) == before
    model = shutil.copytree(tiny_model, tmp_path / "copied model")
    assert ran(setting.with_(data=str(tmp_path / "elsewhere"), model=str(model)), capsys).made == expected()
    del before["cache.json"]  # says where the model is
    assert {name: data for name, data in contents(setting.cache).items() if name != "cache.json"} == before


def test_batches_threads_and_shards_are_no_part_of_a_fingerprint(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(setting.cache)
    for encode in (EncodeOptions(image_batch=1, text_batch=1, workers=1), EncodeOptions(shard_rows=100, workers=5)):
        assert ran(setting.with_(encode=encode), capsys).made == expected()
    assert contents(setting.cache) == before


def test_the_same_options_give_the_same_bytes_anywhere(original: Setting, tmp_path: Path) -> None:
    encode = replace(original.options.encode, workers=5)
    assert preprocess(replace(original.options, cache=str(tmp_path / "again"), encode=encode)) == 0
    assert contents(tmp_path / "again") == contents(original.cache)


# --- conditions beside each other ---


def test_a_condition_that_does_not_cover_the_data_is_named_left_out_and_comes_back(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.add_image()
    before = shards(setting.cache)
    result = ran(setting.with_(condition=("precomputed",)), capsys)
    assert Cache(setting.cache).conditions == ["precomputed"]
    assert "canny" not in Cache(setting.cache).layer_names
    assert "condition canny is left out of the cache: canny lacks 1 of the samples as they are now" in result.err
    assert "CONDITION=canny" in result.err
    assert_unchanged(before, setting.cache)
    result = ran(setting.options, capsys)
    assert result.made == expected(canny=1, canny_latents=1)
    assert result.err == ""
    assert Cache(setting.cache).conditions == ["canny", "precomputed"]


def test_condition_latents_of_another_vae_do_not_stay_beside_the_new_latents(
    setting: Setting, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_another_vae(tiny_model, tmp_path)
    result = ran(setting.with_(condition=("precomputed",), model=str(model)), capsys)
    assert Cache(setting.cache).conditions == ["precomputed"]
    assert "condition canny is left out of the cache: canny_latents was made by another encoder" in result.err


def test_a_condition_whose_file_is_elsewhere_stays(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in a folder beyond the tree, and this run is not told which."""
    monkeypatch.setattr(conditions._REGISTRY, "names", lambda: ["precomputed"])
    assert preprocess(setting.with_(condition=("precomputed",))) == 0
    assert Cache(setting.cache).conditions == ["canny", "precomputed"]


def test_a_condition_whose_folder_was_removed_is_named(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = setting.cache.glob("canny_latents-*")
    shutil.rmtree(folder)
    result = ran(setting.with_(condition=("precomputed",)), capsys)
    assert Cache(setting.cache).conditions == ["precomputed"]
    assert "condition canny is left out of the cache" in result.err


def test_several_conditions_are_made_in_one_run(
    original: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(original.options, cache=str(tmp_path / "cache"), condition=("precomputed", "canny"))
    result = ran(options, capsys)
    assert set(result.made.values()) == {COUNT, CAPTIONS}
    cache = Cache(tmp_path / "cache")
    assert cache.conditions == ["canny", "precomputed"]
    assert cache.manifest["condition"] == "precomputed"  # the first one is training's default
    together = rows(tmp_path / "cache")
    assert {name: row for name, row in together.items() if "precomputed" not in name[0]} == rows(original.cache)


def test_a_sample_without_a_drawing_is_lost_to_that_condition_alone(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = setting.lines()
    del lines[2]["conditioning_image"]
    setting.write_lines(lines)
    (setting.data / "drawings/004.png").write_bytes(b"no image")
    result = ran(setting.with_(condition=("precomputed", "canny")), capsys)
    assert result.code == 3
    assert "2 sample(s) were left out" in result.err
    assert "002.png: layer precomputed: it has no conditioning_image" in result.err
    assert "004.png: layer precomputed: its conditioning image drawings/004.png: not an image" in result.err
    assert result.made["canny"] == 0
    cache = Cache(setting.cache)
    assert len(usable(cache.samples.values(), [cache.layer("canny_latents")], [])) == COUNT
    assert len(usable(cache.samples.values(), [cache.layer("precomputed_latents")], [])) == COUNT - 2
    assert ran(setting.options, capsys).code == 0  # canny never knew
    picture(setting.data / "drawings/004.png", 9)
    result = ran(setting.with_(condition=("precomputed",)), capsys)
    assert (result.made["precomputed"], result.made["precomputed_latents"]) == (1, 1)
    assert "1 sample(s) were left out" in result.err


# --- one encoder in memory at a time ---


def test_one_encoder_or_detector_is_in_memory_at_a_time(
    original: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    opened: list[str] = []
    closed: list[bool] = []
    open_encoder, open_canny = type(FLUX).open_encoder, Canny.open

    def watch(name: str, parts: list[Any]) -> None:
        assert [part() for part in alive if part() is not None] == [], f"still there when {name} is opened"
        alive[:] = [weakref.ref(part) for part in parts]
        opened.append(name)

    def encoder(self: Any, layer: LayerKind, *arguments: Any) -> Encode:
        watch(layer.name, [])
        encode = open_encoder(self, layer, *arguments)
        inner: Any = getattr(encode, "__wrapped__", encode)  # under torch.no_grad
        cells = [cell.cell_contents for cell in inner.__closure__]
        modules = [cell for cell in cells if isinstance(cell, torch.nn.Module)]
        assert len(modules) == 1
        alive[:] = [weakref.ref(modules[0]), weakref.ref(encode), weakref.ref(next(modules[0].parameters()))]
        return encode

    def drawer(self: Canny, device: str) -> Any:
        made = open_canny(self, device)
        watch("canny", [made])
        return made

    monkeypatch.setattr(type(FLUX), "open_encoder", encoder)
    monkeypatch.setattr(Canny, "open", drawer)
    monkeypatch.setattr(CannyDrawer, "close", lambda self: closed.append(True))
    gc.disable()  # what is freed is freed by the stage itself
    try:
        assert preprocess(replace(original.options, cache=str(tmp_path / "cache"))) == 0
        assert [part() for part in alive if part() is not None] == []
    finally:
        gc.enable()
    assert opened == ["latents", "canny", "condition_latents", "clip", "t5"]
    assert closed == [True]


# --- what an encoder cannot do, and what changes under it ---


def spoiled(layer_name: str, is_bad: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder of this layer gives NaN for inputs that are bad."""
    original_open = type(FLUX).open_encoder

    def open_encoder(self: Any, layer: LayerKind, *arguments: Any) -> Encode:
        encode = original_open(self, layer, *arguments)
        if layer.name != layer_name:
            return encode

        def spoil(batch: Any) -> dict[str, torch.Tensor]:
            tensors = encode(batch)
            for i, item in enumerate(batch):
                if is_bad(item):
                    next(iter(tensors.values()))[i].fill_(float("nan"))
            return tensors

        return spoil

    monkeypatch.setattr(type(FLUX), "open_encoder", open_encoder)


def test_a_sample_whose_latents_are_not_finite_is_reported_and_left_out_of_training(
    setting: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(setting.data / "002.png")
    spoiled("latents", lambda image: not image.any(), monkeypatch)
    result = ran(setting.options, capsys)
    assert result.code == 3
    assert "1 sample(s) were left out" in result.err
    assert "002.png: layer latents: the encoder gave values that are not finite (mean)" in result.err
    cache = Cache(setting.cache)
    latents = cache.layer("latents")
    assert list(latents.errors.values()) == ["the encoder gave values that are not finite (mean)"]
    assert len(usable(cache.samples.values(), [latents, cache.layer("canny_latents")], [])) == COUNT - 1
    again = ran(setting.options, capsys)
    assert (again.code, again.made) == (3, expected())  # it stays known, and costs nothing
    assert again.err == result.err


def test_a_caption_whose_embeddings_are_not_finite_leaves_its_images_out(
    setting: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = setting.lines()
    for i in (1, 4):
        lines[i]["text"] = ["bad words", "a box"]
    setting.write_lines(lines)
    spoiled("t5", lambda caption: caption == "bad words", monkeypatch)
    result = ran(setting.options, capsys)
    assert result.code == 3
    assert "2 sample(s) were left out" in result.err
    cache = Cache(setting.cache)
    left = usable(cache.samples.values(), [], [cache.layer("clip"), cache.layer("t5")])
    assert sorted(sample.source for sample in left) == ["000.png", "002.png", "003.png", "005.png"]


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_file_that_changes_between_plan_and_encoding_stops_the_run_and_the_next_run_completes_it(
    how: str, setting: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new, kept = setting.data / "new.png", setting.data.parent / "kept.png"
    setting.add_image()
    shutil.copy(new, kept)

    def change_then_open(*arguments: Any) -> Any:
        if how == "changed":
            picture(new, 99)
        else:
            new.unlink()
        return open_workers(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "open_workers", change_then_open)
        sentence = {"changed": "changed while it was being preprocessed", "gone": "can no longer be read"}[how]
        with pytest.raises(UserError, match=sentence):
            preprocess(setting.options)
    assert Cache(setting.cache).conditions == ["canny"]  # the cache before is whole
    assert len(Cache(setting.cache).samples) == COUNT
    shutil.copy(kept, new)
    assert ran(setting.options, capsys).made == expected(latents=1, canny=1, canny_latents=1, clip=1, t5=1)


def test_too_little_gpu_memory_is_a_sentence_that_names_the_option(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(self: Any, layer: LayerKind, *arguments: Any) -> Encode:
        def encode(batch: Any) -> dict[str, torch.Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

        return encode

    setting.add_image()
    monkeypatch.setattr(type(FLUX), "open_encoder", too_large)
    with pytest.raises(UserError, match=r"memory is too small to make latents with encode\.image_batch=3; lower it"):
        preprocess(setting.options)


# --- a full disk ---


class FullDisk:
    """`open` for `atomic`, on a disk that is full at the n-th write."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def open(self, path: Path, mode: str) -> Any:
        disk = self

        class Writer(io.FileIO):
            def write(self, data: Any) -> int:
                disk.count += 1
                if disk.count == disk.at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        return Writer(path, mode)


def test_a_full_disk_at_any_write_is_one_sentence_and_the_next_run_ends_at_the_same_bytes(
    original: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = contents(original.cache)
    with monkeypatch.context() as patch:
        disk = FullDisk(at=None)
        patch.setattr(atomic, "open", disk.open, raising=False)
        assert preprocess(replace(original.options, cache=str(tmp_path / "counted"))) == 0
        total = disk.count
    assert contents(tmp_path / "counted") == reference
    for at in sorted({1, 2, total // 4, total // 2, 3 * total // 4, total - 2, total - 1, total}):
        cache = tmp_path / f"full at {at}"
        options = replace(original.options, cache=str(cache))
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "open", FullDisk(at).open, raising=False)
            with pytest.raises(SystemExit) as stopped:
                run_command_line(partial(preprocess, options))
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip()
        assert "the disk is full: writing" in said
        assert "\n" not in said
        finished = shards(cache)
        assert finished.items() <= reference.items()
        assert not list(cache.rglob("*.part"))
        assert preprocess(options) == 0
        assert contents(cache) == reference


def test_a_disk_that_cannot_hold_the_cache_is_refused_before_the_start(
    original: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    options = replace(original.options, cache=str(cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9000, 9000))
    with pytest.raises(UserError, match=r"needs about .* GB more, but .* has 0\.00 GB free; .* Nothing was begun"):
        preprocess(options)
    assert [path.name for path in cache.iterdir()] == ["scan"]  # what planning remembers of the images


def test_the_room_that_is_asked_for_is_about_what_is_taken(
    original: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(original.options, cache=str(tmp_path / "cache"), geometry=GeometryOptions(resolution=256))
    result = ran(replace(options, encode=EncodeOptions(), text_length=128), capsys)
    foretold = float(result.out.split("about ")[1].split(" MB")[0].replace(",", ""))
    taken = sum(len(data) for name, data in contents(tmp_path / "cache").items() if name.endswith(".tar")) / 1e6
    assert 0.9 * taken < foretold < 1.6 * taken


def test_what_a_killed_run_was_writing_is_removed(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    (layer,) = setting.cache.glob("latents-*")
    (layer / "00099.tar.part").write_bytes(b"half")
    (setting.cache / "cache.json.part").write_bytes(b"half")
    before = {name: data for name, data in contents(setting.cache).items() if not name.endswith(".part")}
    assert ran(setting.options, capsys).made == expected()
    assert contents(setting.cache) == before


# --- what is refused before any image is read ---


def refused(options: PreprocessConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one sentence; asserts that no image was decoded and nothing written."""
    monkeypatch.setattr(images, "decode", None)
    with pytest.raises(UserError) as error:
        preprocess(options)
    assert "\n" not in str(error.value)
    assert not Path(options.cache).exists() or list(Path(options.cache).iterdir()) == []
    return str(error.value)


@pytest.fixture
def fresh(setting: Setting, tmp_path: Path) -> Setting:
    """The same with no cache yet."""
    return Setting(setting.data, tmp_path / "fresh", replace(setting.options, cache=str(tmp_path / "fresh")))


def test_no_such_data_is_refused(fresh: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder: nowhere" in refused(fresh.with_(data="nowhere"), monkeypatch)


def test_an_empty_folder_is_refused(fresh: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(fresh.with_(data=str(tmp_path / "empty")), monkeypatch)


def test_a_folder_without_any_caption_is_refused(fresh: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh.data / "metadata.jsonl").unlink()
    assert "has a caption" in refused(fresh.options, monkeypatch)


def test_a_malformed_line_is_refused_by_its_number(fresh: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fresh.data / "metadata.jsonl"
    path.write_text(path.read_text().replace('{"file_name": "003.png"', '{file_name: "003.png"'))
    assert "line 4 is not JSON" in refused(fresh.options, monkeypatch)


def test_images_without_captions_are_reported_and_the_others_are_encoded(
    fresh: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = fresh.lines()
    del lines[0]["text"]
    lines[1]["text"] = " "
    fresh.write_lines(lines)
    result = ran(fresh.options, capsys)
    assert result.code == 3
    assert "2 sample(s) were left out" in result.err
    assert "000.png: no caption" in result.err
    assert result.made["latents"] == COUNT - 2
    assert len(usable(Cache(fresh.cache).samples.values(), [], [])) == COUNT - 2


def test_a_model_that_is_not_whole_is_refused(fresh: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(fresh.options.model or "", tmp_path / "model")
    shutil.rmtree(model / "text_encoder_2")  # the last to be run
    assert "has no folder 'text_encoder_2'" in refused(fresh.with_(model=str(model)), monkeypatch)


def test_a_model_that_is_nowhere_is_refused(fresh: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'./nowhere' is neither a folder on this machine nor a hub id" in refused(
        fresh.with_(model="./nowhere"), monkeypatch
    )


def test_a_hub_id_without_a_network_is_refused(fresh: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    said = refused(fresh.with_(model="somebody/a-flux-that-nobody-has"), monkeypatch)
    assert "neither a folder here nor can it be fetched from the hub (is there a network?)" in said


def test_precomputed_without_conditioning_images_is_refused(fresh: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = fresh.lines()
    for line in lines:
        del line["conditioning_image"]
    fresh.write_lines(lines)
    said = refused(fresh.with_(condition=("canny", "precomputed")), monkeypatch)
    assert "condition 'precomputed' takes the drawings that come with the images, but" in said
    assert "'conditioning_image'" in said


def test_missing_detector_weights_are_refused(fresh: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "annotators").mkdir()
    lineart = replace(fresh.options.conditions.lineart, weights=str(tmp_path / "annotators"))
    conditions = replace(fresh.options.conditions, lineart=lineart)
    said = refused(fresh.with_(condition=("canny", "lineart"), conditions=conditions), monkeypatch)
    assert "does not hold sk_model.pth and sk_model2.pth" in said


def test_a_cache_that_another_process_is_writing_is_refused(setting: Setting) -> None:
    with atomic.alone(setting.cache, "preprocessing into"), pytest.raises(UserError, match="another process is"):
        preprocess(setting.options)


# --- what is said ---


def test_the_report_is_said_once_and_without_bars(
    original: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ran(replace(original.options, cache=str(tmp_path / "cache"), text_length=12), capsys)
    lines = result.out.splitlines()
    assert lines[0].split() == [
        "layer",
        "fresh",
        "to",
        "make",
        "stale",
        "units",
        "of",
        "work",
        "MB",
        "on",
        "disk",
        "MB",
        "to",
        "come",
    ]
    assert lines[7:12] == [
        f"  {name}, to make: not made yet ({rows})"
        for name, rows in (("latents", 6), ("canny", 6), ("canny_latents", 6), ("clip", 8), ("t5", 8))
    ]
    assert lines[12].startswith("10 units of work, about ")
    assert lines[13].split() == ["layer", "rows", "made", "now", "kept", "MB"]
    assert lines[20] == (f"cache {tmp_path / 'cache'}: 6 samples (1 held out), 7 distinct captions, conditions canny")
    assert lines[21] == "sizes: 3 of 64x64, 3 of 96x48"
    assert len(lines) == 22
    assert "warning: 6 of 7 captions are cut off after 12 tokens (text_length)" in result.err
    assert "%" not in result.err  # no progress bars where there is no terminal


def test_enlarged_images_are_counted(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    picture(setting.data / "002.png", 31, 32, 32)
    assert "1 sample(s) are smaller than their bucket and were enlarged" in ran(setting.options, capsys).err


def test_the_empty_caption_is_encoded_though_no_image_has_it(original: Setting) -> None:
    cache = Cache(original.cache)
    empty = Caption.of("").id
    assert not any(empty in sample.captions for sample in cache.samples.values())
    assert empty in cache.layer("t5")
    assert empty in cache.layer("clip")
