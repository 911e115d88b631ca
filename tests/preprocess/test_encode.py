"""Producers: what becomes of a batch's rows. Order, reasons, and the files they are read from."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load

from preprocess import encode, images, lookahead
from preprocess.encode import Producer, Row
from preprocess.geometry import Placement
from preprocess.images import ImageError
from preprocess.sources import File
from shared.cache.schema import Sample
from shared.cache.storage import LocalStorage, Storage
from shared.errors import UserError
from shared.families.base import Tensors

KEYS = [f"key{i}" for i in range(11)]


def pixels_of(key: str) -> NDArray[np.uint8]:
    """(8, 8, 3), another for each key."""
    return np.random.default_rng(int(key.removeprefix("key"))).integers(0, 256, (8, 8, 3), np.uint8)


def mean_of(batch: NDArray[np.uint8]) -> Tensors:
    return {"mean": torch.from_numpy(batch).float().mean(dim=(1, 2, 3))[:, None]}


def values(rows: Sequence[Row]) -> dict[str, float | str]:
    """Key to its mean, or to the reason why there is none."""
    found: dict[str, float | str] = {row.key: row.error for row in rows if row.error is not None}
    return found | {row.key: load(row.members["safetensors"])["mean"].item() for row in rows if row.members is not None}


@dataclass(frozen=True)
class Given:
    """An item that loads what `read` gives for its key."""

    key: str
    read: Callable[[str], Any]

    @property
    def input(self) -> str:
        return f"input of {self.key}"

    def load(self, storage: Storage) -> Any:
        return self.read(self.key)


def produced(producer: Producer, read: Callable[[str], Any], batch_size: int, keys: Sequence[str] = KEYS) -> list[Row]:
    """The rows of `keys`, batch by batch."""
    made = []
    for batch in encode.batched([Given(key, read) for key in keys], batch_size):
        loaded = [encode.load(LocalStorage(Path()), item) for item in batch]
        made += [finish() for finish in producer.batch(batch, loaded, batch_size)]
    return made


# --- rows ---


@pytest.mark.parametrize("batch_size", [1, 3, 11, 100])
def test_each_key_gets_its_own_values_in_order(batch_size: int) -> None:
    rows = produced(encode.images_producer(mean_of), pixels_of, batch_size)
    assert [row.key for row in rows] == KEYS
    assert values(rows) == {key: pytest.approx(float(pixels_of(key).mean())) for key in KEYS}


@pytest.mark.parametrize("keys", [KEYS[:1], KEYS[3:5], KEYS])
def test_a_row_does_not_depend_on_how_many_others_are_made_with_it(keys: Sequence[str]) -> None:
    def rounded_by_shape(batch: NDArray[np.uint8]) -> Tensors:
        return {name: tensor * (1 + len(batch) / 1024) for name, tensor in mean_of(batch).items()}

    producer = encode.images_producer(rounded_by_shape)
    whole = {row.key: row for row in produced(producer, pixels_of, 3)}
    assert produced(producer, pixels_of, 3, keys) == [whole[key] for key in keys]


def test_a_value_that_is_not_finite_makes_its_row_an_error_and_no_other() -> None:
    def encoder(batch: NDArray[np.uint8]) -> Tensors:
        tensors = mean_of(batch)
        for i, image in enumerate(batch):
            if np.array_equal(image, pixels_of("key4")):
                tensors["mean"][i] = float("nan")
        return tensors

    rows = {row.key: row for row in produced(encode.images_producer(encoder), pixels_of, 3)}
    assert rows["key4"] == Row("key4", None, "the encoder gave values that are not finite (mean)")
    assert [key for key in KEYS if rows[key].error is None] == [key for key in KEYS if key != "key4"]


def test_a_caption_s_infinite_embedding_is_an_error() -> None:
    captions = {"a": "fine", "b": "bad", "c": "fine too"}

    def encoder(texts: list[str]) -> Tensors:
        return {"mean": torch.tensor([[float("inf") if text == "bad" else len(text)] for text in texts])}

    found = values(produced(encode.captions_producer(encoder), captions.__getitem__, 2, list(captions)))
    assert found == {"a": 4.0, "b": "the encoder gave values that are not finite (mean)", "c": 8.0}


def test_an_image_that_cannot_be_had_is_an_error_and_its_batch_goes_on() -> None:
    shapes = []

    def read(key: str) -> NDArray[np.uint8]:
        if key in ("key0", "key4", "key6", "key7", "key8"):
            raise ImageError(f"no {key}")
        return pixels_of(key)

    def encoder(batch: NDArray[np.uint8]) -> Tensors:
        shapes.append(len(batch))
        return mean_of(batch)

    rows = produced(encode.images_producer(encoder), read, 3)
    assert shapes == [3, 3, 3]  # filled up, and the third batch has nobody
    assert {row.key for row in rows} == set(KEYS)
    assert {row.key: row.error for row in rows if row.error} == {
        key: f"no {key}" for key in ("key0", "key4", "key6", "key7", "key8")
    }


def test_drawings_are_png_of_the_very_pixels_grey_where_they_are_grey() -> None:
    def draw(batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        grey = np.repeat(batch[..., :1], 3, axis=-1)
        return np.stack([batch, grey], axis=1)  # (B, 2, H, W, 3)

    rows = produced(encode.drawings_producer(draw), pixels_of, 4)
    assert [row.key for row in rows] == KEYS
    for row in rows:
        assert row.members is not None
        assert list(row.members) == ["0.png", "1.png"]
        colour, grey = (Image.open(io.BytesIO(row.members[name])) for name in ("0.png", "1.png"))
        assert (colour.mode, grey.mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(colour), pixels_of(row.key))
        assert np.array_equal(np.asarray(grey), pixels_of(row.key)[..., 0])


def test_png_bytes_do_not_depend_on_batches() -> None:
    def drawn(batch_size: int) -> list[Row]:
        return produced(encode.drawings_producer(lambda batch: batch[:, None]), pixels_of, batch_size)

    assert drawn(1) == drawn(4) == drawn(100)


# --- reading ahead ---


@pytest.mark.parametrize(("ahead", "total"), [(0, 50), (1, 50), (7, 50), (7, 3), (7, 0)])
def test_so_many_are_begun_at_once_and_no_more_than_that_are_ahead_of_the_taker(ahead: int, total: int) -> None:
    begun, taken, most = 0, 0, 0

    def items() -> Iterator[int]:
        nonlocal begun, most
        for item in range(total):
            begun += 1
            most = max(most, begun - taken)
            yield item

    with ThreadPoolExecutor(2) as pool:
        results = lookahead.Ahead(str, items(), pool, ahead)
        assert begun == min(ahead, total)
        for expected in range(total):
            assert next(results) == str(expected)
            taken += 1
        assert list(results) == []
    assert begun == total
    assert most <= ahead + 1


def test_what_has_not_begun_never_does_when_the_caller_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    closed, close = threading.Event(), lookahead.Ahead.close

    def waiting(item: int) -> int:
        started.append(item)
        assert item < 3 or closed.wait(60)
        return item

    def then_let_go(self: lookahead.Ahead[int, int]) -> None:
        close(self)
        closed.set()

    monkeypatch.setattr(lookahead.Ahead, "close", then_let_go)
    results = lookahead.mapped(waiting, range(1000), workers=2, ahead=20)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 3 + 2
    assert threading.active_count() < 20


def test_an_error_of_one_item_is_raised_in_its_turn() -> None:
    def fails_at_5(item: int) -> int:
        if item == 5:
            raise UserError("five")
        return item

    results = lookahead.mapped(fails_at_5, range(100), workers=4, ahead=10)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="five"):
        next(results)


# --- the files, between plan and encoding ---


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    return Sample(
        key="a", source="a.png", sha256=hashlib.sha256(data).hexdigest(), conditioning_source=None,
        conditioning_sha256=None, width=16, height=16, variant=0,
        placement=json.dumps(asdict(Placement(16, 16, 16, 16, 0, 0, False))), bucket_width=16, bucket_height=16,
        split="train", captions=(), status="ok", error=None,
    )  # fmt: skip


def test_a_placed_image_is_its_pixels(tmp_path: Path, sample: Sample) -> None:
    assert (encode.load_placed(File(str(tmp_path), "a.png"), sample, "image") == 200).all()


def test_a_file_that_changed_since_the_plan_is_refused(tmp_path: Path, sample: Sample) -> None:
    Image.fromarray(np.full((16, 16, 3), 100, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png changed while it was being preprocessed; run the same command again"):
        encode.load_placed(File(str(tmp_path), "a.png"), sample, "image")


def test_a_file_that_is_gone_since_the_plan_is_refused(tmp_path: Path, sample: Sample) -> None:
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png can no longer be read \(No such file or directory\); run the same"):
        encode.load_placed(File(str(tmp_path), "a.png"), sample, "image")


def test_a_conditioning_image_that_is_missing_or_broken_is_a_reason_and_no_refusal(
    tmp_path: Path, sample: Sample
) -> None:
    with pytest.raises(ImageError, match="it has no conditioning_image"):
        encode.load_placed(None, sample, "conditioning_image")
    unread = replace(sample, conditioning_source="b.png")
    with pytest.raises(ImageError, match=r"its conditioning image b\.png cannot be read"):
        encode.load_placed(None, unread, "conditioning_image")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    broken = replace(unread, conditioning_sha256=hashlib.sha256((tmp_path / "b.png").read_bytes()).hexdigest())
    with pytest.raises(ImageError, match=r"its conditioning image b\.png: truncated PNG file"):
        encode.load_placed(File(str(tmp_path), "b.png"), broken, "conditioning_image")
    assert images.decode((tmp_path / "a.png").read_bytes()).shape == (16, 16, 3)
