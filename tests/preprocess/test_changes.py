"""The table of changes in `cache_schema.md` is true: what was changed, what is made anew, why; and all else stays.

Each row is done to a copy of one small cache: the status says what will be made and why before any encoder is loaded,
then preprocessing makes just that, no file of before changes, and every row reads as in a cache made from nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from preprocess import pipeline
from preprocess.config import EncodeOptions, PreprocessConfig
from preprocess.geometry import GeometryOptions
from preprocess.status import LayerStatus
from shared import families
from tests.conftest import preprocess_options, write_data
from tests.preprocess.runs import contents, rows, shards

Rows = dict[tuple[str, str], dict[str, bytes]]
NUM_IMAGES = 6
PAGE = (Path(__file__).parent.parent.parent / "cache_schema.md").read_text(encoding="utf-8")


@dataclass
class Setting:
    """A data set, a model, a cache of both, and the options that made it."""

    data: Path
    model: Path
    options: PreprocessConfig

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.data / "metadata.jsonl").read_text().splitlines()]

    def write(self, lines: list[dict]) -> None:
        (self.data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def edit(self, i: int, **changes: object) -> None:
        lines = self.lines()
        lines[i] |= changes
        self.write(lines)

    def picture(self, name: str, width: int = 64, height: int = 64, seed: int = 1) -> None:
        noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(self.data / name)


def _setting(folder: Path, tiny_model: Path) -> Setting:
    data = write_data(folder / "data", NUM_IMAGES, ((64, 64), (90, 48)))  # the second fit no bucket as they are
    setting = Setting(data, tiny_model, preprocess_options(data, folder / "cache", tiny_model))
    lines = setting.lines()
    for i, line in enumerate(lines):
        width, height = Image.open(data / line["file_name"]).size
        setting.picture(f"drawing-{i}.jpg", width, height, seed=i)
        line["conditioning_image"] = f"drawing-{i}.jpg"
    setting.write(lines)
    setting.options = replace(setting.options, condition=("canny", "precomputed"))
    return setting


@pytest.fixture(scope="module")
def original(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = _setting(tmp_path_factory.mktemp("original"), tiny_model)
    assert pipeline.preprocess(setting.options) == 0
    return setting


@pytest.fixture
def setting(original: Setting, tmp_path: Path) -> Setting:
    shutil.copytree(original.data, tmp_path / "data")
    shutil.copytree(original.options.cache, tmp_path / "cache")
    options = replace(original.options, data=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    return Setting(tmp_path / "data", original.model, options)


def options(**changes: object) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.options = replace(setting.options, **changes)  # type: ignore[arg-type]

    return change


def another(component: str) -> Callable[[Setting], None]:
    """The same model but for one component, whose weights are others'."""

    def change(setting: Setting) -> None:
        model = Path(shutil.copytree(setting.model, setting.data.parent / "model"))
        other = families.get("flux").tiny(setting.data.parent / "other", seed=7)
        shutil.rmtree(model / component)
        shutil.copytree(other / component, model / component)
        setting.options = replace(setting.options, model=str(model))

    return change


def add_image(setting: Setting) -> None:
    setting.picture("new.png")
    setting.picture("drawing-new.jpg", seed=2)
    line = {"file_name": "new.png", "text": ["a new box", "a box"], "conditioning_image": "drawing-new.jpg"}
    setting.write([*setting.lines(), line])


def remove_image(setting: Setting) -> None:
    setting.write(setting.lines()[1:])


def rename_image(setting: Setting) -> None:
    (setting.data / "002.png").rename(setting.data / "renamed.png")
    setting.edit(2, file_name="renamed.png")


def break_image(setting: Setting) -> None:
    (setting.data / "002.png").write_bytes((setting.data / "002.png").read_bytes()[:60])


def share_caption_edited(setting: Setting) -> None:
    for i in range(NUM_IMAGES):
        setting.edit(i, text=[f"box number {i}", "one box"])


def weigh_captions(setting: Setting) -> None:
    lines = setting.lines()
    for line in lines:
        line["text"] = [{"text": text, "weight": weight} for text, weight in zip(line["text"], (3, 1), strict=True)]
    setting.write(lines)


def reorder_lines(setting: Setting) -> None:
    setting.write(setting.lines()[::-1])


def move_data(setting: Setting) -> None:
    moved = setting.data.rename(setting.data.parent / "moved")
    setting.data, setting.options = moved, replace(setting.options, data=str(moved))


def move_model(setting: Setting) -> None:
    moved = shutil.copytree(setting.model, setting.data.parent / "moved model")
    setting.options = replace(setting.options, model=str(moved))


def conditions(**changes: object) -> Callable[[Setting], None]:
    """Other settings of conditions: `canny={"low": 50}`."""

    def change(setting: Setting) -> None:
        group = setting.options.conditions
        for name, settings in changes.items():
            group = replace(group, **{name: replace(getattr(group, name), **settings)})  # type: ignore[arg-type]
        setting.options = replace(setting.options, conditions=group)

    return change


def geometry(**changes: object) -> Callable[[Setting], None]:
    return options(geometry=GeometryOptions(**({"resolution": 64} | changes)))  # type: ignore[arg-type]


def lose_shard(setting: Setting) -> None:
    next(Path(setting.options.cache).glob("t5-*/00001.tar")).unlink()


CHANGES: dict[str, Callable[[Setting], None]] = {
    "nothing": lambda setting: None,
    "an image is added": add_image,
    "an image is edited": lambda setting: setting.picture("002.png", 64, 64, seed=5),
    "an image is removed": remove_image,
    "an image is renamed": rename_image,
    "an image's file is cut off": break_image,
    "a drawing of your own is edited": lambda setting: setting.picture("drawing-2.jpg", 64, 64, seed=5),
    "one image's caption is edited": lambda setting: setting.edit(0, text=["a box of wood", "a box"]),
    "one image gets one more caption": lambda setting: setting.edit(0, text=["box number 0", "a box", "a crate"]),
    "a caption that all share is edited": share_caption_edited,
    "captions are weighted": weigh_captions,
    "lines of metadata.jsonl change places": reorder_lines,
    "a condition is added": options(condition=("canny", "precomputed", "tile")),
    "canny's low threshold goes from 100 to 50": conditions(canny={"low": 50}),
    "the T5 length goes from 24 to 32": options(text_length=32),
    "the VAE is another one": another("vae"),
    "CLIP is another one": another("text_encoder"),
    "T5 is another one": another("text_encoder_2"),
    "the precision goes from fp32 to bf16": options(precision="bf16"),
    "the posterior is kept as its mean": options(posterior="mean"),
    "the resolution goes from 64 to 48": geometry(resolution=48),
    "mirrored copies are added": geometry(flip=True),
    "crops are drawn at random": geometry(crop="random"),
    "more samples are held out": options(validation_fraction=0.6),
    "the data's folder is moved": move_data,
    "the model's folder is copied elsewhere": move_model,
    "batches, threads and shards are of other sizes": options(
        encode=EncodeOptions(image_batch=2, text_batch=3, workers=1, shard_rows=5)
    ),
    "a shard is lost": lose_shard,
}


@dataclass(frozen=True)
class Expected:
    """A row of the page's table."""

    made: dict[str, int]
    why: set[str]


def table() -> dict[str, Expected]:
    section = re.search(r"^## What a change remakes\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    assert section
    lines = [line for line in section[1].splitlines() if line.startswith("|")][2:]
    found = {}
    for line in lines:
        change, made, why = (cell.strip() for cell in line[1:-1].split("|"))
        rows_of = {} if made == "nothing" else {name: int(n) for name, n in (part.split() for part in made.split(", "))}
        found[change] = Expected(rows_of, {part for part in why.split("; ") if part})
    return found


TABLE = table()


def test_the_table_has_every_change_and_no_other() -> None:
    assert list(TABLE) == list(CHANGES)
    assert len(TABLE) >= 18


def found_status(options: PreprocessConfig, monkeypatch: pytest.MonkeyPatch) -> list[LayerStatus]:
    said: list[LayerStatus] = []
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "report_status", lambda found, free_bytes: said.extend(found))
        assert pipeline.tell_status(options) == 0
    return said


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_remakes_what_the_table_says_and_all_else_keeps_its_bytes(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cache = Path(setting.options.cache)
    CHANGES[change](setting)
    before = contents(cache)
    status = found_status(setting.options, monkeypatch)
    unscanned = {name: data for name, data in contents(cache).items() if not name.startswith("scan/")}
    assert unscanned == {name: data for name, data in before.items() if not name.startswith("scan/")}
    expected = TABLE[change]
    assert {layer.name: sum(layer.missing.values()) for layer in status if layer.missing} == expected.made
    assert {reason for layer in status for reason in layer.missing} == expected.why

    assert pipeline.preprocess(setting.options) == (3 if change == "an image's file is cut off" else 0)
    old, new = shards_of(before), shards(cache)
    remade = {name for name in old if new.get(name) != old[name]}
    assert remade == set()
    layers = {name.rsplit("-", 1)[0] for name in new if name not in old}
    assert layers == set(expected.made)
    assert all(not layer.missing for layer in found_status(setting.options, monkeypatch))

    fresh = replace(setting.options, cache=str(tmp_path / "from nothing"))
    pipeline.preprocess(fresh)
    assert_same_rows(rows(cache), rows(Path(fresh.cache)))


def assert_same_rows(found: Rows, expected: Rows) -> None:
    """Drawings to the bit; tensors but for what a batch of other samples does to the last bits of a sum."""
    assert list(found) == list(expected)
    for key, members in found.items():
        assert list(members) == list(expected[key])
        for member, data in members.items():
            if member == "safetensors":
                tensors, others = load(data), load(expected[key][member])
                assert set(tensors) == set(others)
                for name, tensor in tensors.items():
                    exact = 1e-4 if tensor.dtype == torch.float32 else 2e-2
                    torch.testing.assert_close(tensor, others[name], atol=exact, rtol=exact)
            else:
                assert data == expected[key][member]


def shards_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if re.search(r"/\d{5}\.(tar|parquet)$", name)}
