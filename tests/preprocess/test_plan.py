"""The plan: what becomes of every image before any model loads. Keys, variants, splits, reasons."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image

from preprocess import images, plan
from preprocess.config import PreprocessConfig
from preprocess.geometry import GeometryOptions
from preprocess.plan import Plan, choose_held_out, key_of
from preprocess.sources import SourceOptions, open_source
from shared.cache.schema import Caption, Sample
from shared.cache.writer import ShardWriter
from shared.errors import UserError


def picture(path: Path, width: int = 40, height: int = 40, value: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)
    path.with_suffix(".txt").write_text(f"a picture of {path.stem}")


def planned(data: Path, before: Iterable[Sample] = (), cache: Path | None = None, **options: object) -> Plan:
    fields: dict[str, object] = {"condition": ("canny",), "geometry": GeometryOptions(resolution=64), **options}
    config = PreprocessConfig(data=str(data), **fields)  # type: ignore[arg-type]
    return plan.make(open_source(data, SourceOptions()), config, 16, before, cache)


# --- keys ---


def test_keys_are_unique_for_names_that_look_alike() -> None:
    names = [
        "a.png",
        "a.jpg",
        "A.png",
        "sub/a.png",
        "sub_a.png",
        "a..png",
        "日本.png",
        "中国.png",
        "é.png",
        "e\u0301.png",
    ]
    names += [f"{chr(0x4E00 + i)}.png" for i in range(2000)]
    keys = {key_of(name, variant) for name in names for variant in range(4)}
    assert len(keys) == 4 * len(names)


def test_names_without_one_ascii_letter_keep_64_bits_of_hash() -> None:
    assert re.fullmatch(r"_-[0-9a-f]{16}-0", key_of("日本.png", 0))


def test_keys_fit_a_webdataset_tar(tmp_path: Path) -> None:
    names = ["a.tar.png", "sub/dir/.png", "x" * 200 + ".png", "with space, comma & dots...jpg", "日本.png", "-rf.png"]
    keys = [key_of(name, 12) for name in names]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys)
    with ShardWriter(tmp_path, 0) as shard:
        for key in keys:
            shard.add(key, "input", {"safetensors": b"tensors", "0.png": b"drawing"})
    found = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == keys
    assert all(sample["safetensors"] == b"tensors" and sample["0.png"] == b"drawing" for sample in found)


def test_a_key_depends_on_the_name_alone(tmp_path: Path) -> None:
    picture(tmp_path / "one/a.png")
    picture(tmp_path / "two/a.png", value=3)
    picture(tmp_path / "two/b.png")
    assert {s.key for s in planned(tmp_path / "one").samples} < {s.key for s in planned(tmp_path / "two").samples}


# --- variants ---


def test_flips_and_crops_are_samples_with_keys_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 100, 40)
    picture(tmp_path / "b.png", 40, 40)
    plain = planned(tmp_path).samples
    varied = planned(tmp_path, geometry=GeometryOptions(resolution=64, crop="random", crops=3, flip=True)).samples
    assert len(plain) == 2
    assert len(varied) == 2 * 3 * 2
    assert len({sample.key for sample in varied}) == 12
    assert {sample.key for sample in plain} < {sample.key for sample in varied}
    flips = [json.loads(sample.placement or "")["flip"] for sample in varied if sample.source == "a.png"]
    assert flips == [False, True] * 3


def test_all_variants_of_an_image_are_in_one_split(tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / f"{i}.png")
    geometry = GeometryOptions(resolution=64, crop="random", crops=2, flip=True)
    samples = planned(tmp_path, geometry=geometry, validation_fraction=0.4).samples
    splits = {source: {s.split for s in samples if s.source == source} for source in {s.source for s in samples}}
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "validation"} == set.union(*splits.values())


# --- splits ---


def held_out(names: Iterable[str], fraction: float = 0.05, most: int = 64) -> set[str]:
    config = PreprocessConfig(data="", validation_fraction=fraction, validation_max=most)
    return choose_held_out(names, config)


def test_the_source_s_word_decides_the_split(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    lines: list[dict[str, str]] = [{"file_name": f"{name}.png", "text": name} for name in ("a", "b", "c")]
    lines[1]["split"] = "validation"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    splits = {sample.source: sample.split for sample in planned(tmp_path, validation_fraction=0.9).samples}
    assert splits == {"a.png": "train", "b.png": "validation", "c.png": "train"}


def test_about_the_fraction_is_held_out() -> None:
    assert 150 < len(held_out((f"{i}.png" for i in range(4000)), 0.05, most=4000)) < 250


def test_added_images_move_no_image_between_the_splits() -> None:
    before, after = [f"{i}.png" for i in range(300)], [f"{i}.png" for i in range(900)]
    assert held_out(before) == held_out(after) & set(before)
    assert len(held_out(before)) < len(held_out(after)) < 64


def test_beyond_the_maximum_added_images_move_no_trained_image_into_the_held_out_ones() -> None:
    before, after = [f"{i}.png" for i in range(2000)], [f"{i}.png" for i in range(9000)]
    assert len(held_out(before)) == len(held_out(after)) == 64
    trained = set(before) - held_out(before)
    assert not trained & held_out(after)


def test_the_order_of_the_images_does_not_matter_for_the_split() -> None:
    names = [f"{i}.png" for i in range(500)]
    assert held_out(names) == held_out(reversed(names))


def test_a_small_set_holds_one_image_out_and_a_single_image_is_trained_on() -> None:
    assert len(held_out(["a.png", "b.png", "c.png"], 0.001)) == 1
    assert held_out(["a.png"]) == set()
    assert held_out(["a.png", "b.png"], 0.0) == set()
    assert held_out(["a.png", "b.png"], 0.5, most=0) == set()


# --- what is read, and what cannot be ---


def test_a_broken_image_is_a_sample_with_its_reason_and_loses_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())  # without a caption
    made = planned(tmp_path)
    errors = {sample.source: sample.error for sample in made.samples if sample.status == "error"}
    assert sorted(errors) == ["b.png", "c.png", "d.png"]
    assert "not an image" in str(errors["b.png"])
    assert "truncated" in str(errors["c.png"])
    assert "no caption" in str(errors["d.png"])
    assert [sample.source for sample in made.sound] == ["a.png"]
    assert [caption.text for caption in made.captions] == ["", "a picture of a"]


def test_no_sound_image_at_all_is_refused_with_the_reasons(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 1 images in .* can be used: not an image"):
        planned(tmp_path)


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(UserError, match="there is not one image in"):
        planned(tmp_path)


def test_an_image_whose_bytes_are_known_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.png", value=i)
    before = planned(tmp_path).samples
    decoded: list[bytes] = []
    decode = images.decode

    def counted(data: bytes) -> NDArray[np.uint8]:
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(images, "decode", counted)
    assert planned(tmp_path, before).samples == before
    assert decoded == []
    picture(tmp_path / "3.png", value=77)
    picture(tmp_path / "5.png", value=78)
    assert len(planned(tmp_path, before).samples) == 6
    assert len(decoded) == 2


def test_an_image_that_was_broken_is_looked_at_again(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    before = planned(tmp_path).samples
    picture(tmp_path / "b.png")
    assert all(sample.status == "ok" for sample in planned(tmp_path, before).samples)


def test_captions_are_distinct_and_the_empty_one_is_always_there(tmp_path: Path) -> None:
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    made = planned(tmp_path)
    assert [caption.text for caption in made.captions] == ["", "same", "other"]
    assert [sample.captions for sample in made.samples] == [(Caption.of(t).id,) for t in ("same", "same", "other")]


def test_a_plan_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    from preprocess.config import EncodeOptions

    for i in range(9):
        picture(tmp_path / f"{i}.png", 40 + i, 60 - i)
    plans = [planned(tmp_path, encode=EncodeOptions(workers=workers)) for workers in (1, 2, 7)]
    assert plans[0] == plans[1] == plans[2]
    assert [sample.key for sample in plans[0].samples] == sorted(sample.key for sample in plans[0].samples)


def test_a_moved_folder_gives_the_same_plan(tmp_path: Path) -> None:
    picture(tmp_path / "here/sub/a.png")
    picture(tmp_path / "here/b.png")
    first = planned(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert planned(tmp_path / "there") == first
    assert str(tmp_path) not in repr((first.samples, first.captions))


def test_a_missing_or_unreadable_conditioning_image_is_no_matter_of_the_plan(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    picture(tmp_path / "c.png")
    (tmp_path / "drawing").write_bytes(b"no image")
    lines = [
        {"file_name": "a.png", "text": "a", "conditioning_image": "drawing"},
        {"file_name": "b.png", "text": "b"},
        {"file_name": "c.png", "text": "c", "conditioning_image": "gone"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    a, b, c = planned(tmp_path, condition=("precomputed",)).samples
    assert (a.status, b.status, c.status) == ("ok", "ok", "ok")
    assert (c.conditioning_source, c.conditioning_sha256) == ("gone", None)
    assert a.conditioning_source == "drawing"
    assert a.conditioning_sha256 is not None
    assert (b.conditioning_source, b.conditioning_sha256) == (None, None)
    assert a.input("conditioning_image") != a.input("image")


def test_weights_of_captions_are_those_of_the_source(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    text = [{"text": "often", "weight": 3}, "once"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    (sample,) = planned(tmp_path).samples
    assert sample.captions == (Caption.of("often").id, Caption.of("once").id)
    assert sample.caption_weights == (3.0, 1.0)


def test_captions_come_in_the_order_in_which_units_of_samples_meet_them(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / f"{i:02d}.png", 40 if i % 2 else 80, 40)
    made = planned(tmp_path)
    met = [caption for sample in sorted(made.sound, key=plan.unit_order) for caption in sample.captions]
    assert [caption.id for caption in made.captions] == [Caption.of("").id, *met]
    assert len({sample.bucket_width for sample in made.sound}) == 2


def test_keys_sort_as_names_of_one_folder_do() -> None:
    names = [f"a very long folder with a very long name/{i // 10:05d}.tar/{i:06d}.jpg" for i in range(50)]
    assert sorted(names, key=lambda name: key_of(name, 0)) == names
