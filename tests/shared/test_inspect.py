"""Seeing into a cache: what the page says is what the cache holds, and what the cache holds cannot harm the page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from shared import families
from shared.cache.reader import Cache
from shared.cache.schema import Caption, Sample
from shared.errors import EXIT_INCOMPLETE, UserError
from shared.families.base import Tensors
from shared.inspect import charts, words
from shared.inspect.__main__ import inspect
from shared.inspect.config import InspectConfig
from shared.inspect.gather import Facts, gather
from shared.inspect.page import page
from shared.inspect.statistics import OUTLIER_SCORE, measure, robust_z
from shared.model_folder import resolve
from tests.shared import small_cache

NOW = datetime(2030, 1, 2, 3, 4)
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>{{script}}<!--",
    "\"'&amp;&lt;\\u003cscript\u2028\u2029]]>",
    "日本語 \U0001f3a8 שלום \u202eback to front\u202c\nsecond line\x01",
    "long " * 20_000,
)
OUTLIER, UNENCODED, LEFT_OUT = "s07", "s11", "s98"


# --- a made-up cache: two drawings of each sample, hostile captions, one sample of every kind of trouble ---


def made_up_members(name: str, key: str, input_digest: str) -> dict[str, bytes]:
    """As `small_cache.members`, with real pictures, and one sample whose latents are far from all others."""
    if name == "edges":
        return {f"{r}.png": png(np.full((16, 16), 40 + 80 * r, np.uint8)) for r in range(2)}
    found = small_cache.tensors(name, key, input_digest)
    if key == OUTLIER and name == "latents":
        found["mean"] = found["mean"] * 100
    return {"safetensors": save(found)}


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def made_up_samples() -> list[Sample]:
    samples = []
    for i in range(20):
        captions = (f"number {i}", HOSTILE[i]) if i < len(HOSTILE) else (f"number {i}", "a box")
        sample = small_cache.sample(f"s{i:02d}", *captions, split="validation" if i % 5 == 4 else "train")
        if i % 2:
            sample = replace(sample, bucket_width=32, width=40)
        samples.append(replace(sample, caption_weights=(1.0, 0.25)))
    broken = replace(samples[11], source=small_cache.BROKEN)
    left_out = replace(
        small_cache.sample(LEFT_OUT, "never encoded", source="<b>left out</b>.png"),
        placement=None, bucket_width=None, bucket_height=None, status="error", error="0 bytes <script>",
    )  # fmt: skip
    return [*samples[:11], broken, *samples[12:], left_out]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = made_up_samples()
    ids = {caption for sample in samples[:-1] for caption in sample.captions}
    texts = ["", "a box", *HOSTILE, *(f"number {i}" for i in range(20))]
    captions = [caption for caption in map(Caption.of, texts) if caption.id in ids or not caption.text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_cache, "members", made_up_members)
        return small_cache.make(tmp_path_factory.mktemp("made-up") / "cache", samples, captions, shard_rows=4)


@pytest.fixture(scope="module")
def made_up_facts(made_up: Path) -> Facts:
    return gather(InspectConfig(cache=str(made_up)))


@pytest.fixture(scope="module")
def tiny_facts(tiny_cache: Path) -> Facts:
    return gather(InspectConfig(cache=str(tiny_cache)))


def of(facts: Facts, key: str) -> Any:
    return next(sample for sample in facts.gallery.samples if sample.row["key"] == key)


def pixels_of(source: str) -> NDArray[np.uint8]:
    """The picture in a data URI."""
    assert source.startswith("data:image/webp;base64,")
    data = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def embedded(html: str) -> dict[str, Any]:
    """The gallery's data, as a browser finds them."""
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


# --- what is said is what is there ---


def test_totals_are_those_of_the_files(tiny_cache: Path, tiny_facts: Facts) -> None:
    tars = {path.parent.name: 0 for path in tiny_cache.glob("*/*.tar")}
    for path in tiny_cache.glob("*/*.tar"):
        tars[path.parent.name] += path.stat().st_size
    assert {layer.summary.folder: layer.num_bytes for layer in tiny_facts.layers} == tars
    assert {layer.summary.name: layer.num_rows for layer in tiny_facts.layers} == {
        "latents": 12, "canny": 12, "canny_latents": 12, "clip": 14, "t5": 14,
    }  # fmt: skip
    assert all(layer.num_errors == layer.num_unused == 0 for layer in tiny_facts.layers)
    assert (tiny_facts.num_samples, tiny_facts.num_images, tiny_facts.num_captions) == (12, 12, 13)


def test_buckets_share_out_every_sample_and_every_byte(tiny_facts: Facts, made_up_facts: Facts) -> None:
    for facts in (tiny_facts, made_up_facts):
        num_sound = facts.num_samples - len(facts.failures.left_out)
        assert sum(bucket.num_train + bucket.num_validation for bucket in facts.buckets) == num_sound
        of_samples = [layer for layer in facts.layers if layer.summary.reads != "caption"]
        shared_out = sum(bucket.num_bytes for bucket in facts.buckets)
        assert 0 <= sum(layer.num_bytes for layer in of_samples) - shared_out <= 10  # halves of bytes
    assert [(bucket.width, bucket.height) for bucket in made_up_facts.buckets] == [(16, 16), (32, 16)]
    assert [bucket.num_incomplete for bucket in made_up_facts.buckets] == [0, 1]


def test_pictures_are_what_the_decoder_makes_of_the_latents(
    tiny_cache: Path, tiny_facts: Facts, tiny_model: Path
) -> None:
    assert tiny_facts.gallery.picture_layer == "latents"
    assert tiny_facts.notes == []
    family, cache = families.get("flux"), Cache(tiny_cache)
    decode = family.open_decoder(resolve(str(tiny_model), ()), "cpu", torch.float32)
    for sample in tiny_facts.gallery.samples[::5]:
        height, width = sample.row["bucket_height"], sample.row["bucket_width"]
        raw: Tensors = {k: v[None] for k, v in cache.layer("latents").tensors(sample.row["key"]).items()}
        latents = family.model_latents(raw, cache.summary("latents").recipe, None, torch.float32)
        assert sample.picture is not None
        assert (sample.picture.height, sample.picture.width) == (height, width)
        assert_alike(pixels_of(sample.picture.src), decode(latents, height, width)[0].numpy())
        stored = Image.open(io.BytesIO(cache.layer("canny").read(sample.row["key"], "0.png")))
        assert_alike(pixels_of(sample.drawings["canny"][0].src), np.asarray(stored.convert("RGB")))


def assert_alike(shown: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    """Equal but for what WebP takes away: compared in blocks of 8 x 8 pixels."""
    assert shown.shape == expected.shape
    blocks = [
        picture.astype(float).reshape(picture.shape[0] // 8, 8, picture.shape[1] // 8, 8, 3).mean((1, 3))
        for picture in (shown, expected)
    ]
    assert np.abs(blocks[0] - blocks[1]).mean() < 3
    assert np.abs(blocks[0] - blocks[1]).max() < 30


def test_every_drawing_of_a_sample_is_shown_in_order(made_up_facts: Facts) -> None:
    for sample in made_up_facts.gallery.samples:
        if sample.row["key"] not in (UNENCODED, LEFT_OUT):
            assert [round(float(pixels_of(page.src).mean()) / 40) for page in sample.drawings["edges"]] == [1, 3]


def test_where_a_sample_lives_opens_it(made_up: Path, made_up_facts: Facts) -> None:
    sample = of(made_up_facts, "s03")
    assert [(place.layer, place.member) for place in sample.places] == [
        ("latents", "safetensors"), ("edges", "0.png"), ("edges", "1.png"),
    ]  # fmt: skip
    cache = Cache(made_up)
    caption = made_up_facts.gallery.captions[sample.captions[1][0]]
    assert caption.text == HOSTILE[3]
    for place, stored in (
        *((place, cache.layer(place.layer).read("s03", place.member)) for place in sample.places),
        *((place, cache.layer(place.layer).read(sample.captions[1][0], place.member)) for place in caption.places),
    ):
        data = (made_up / place.file).read_bytes()[place.offset : place.offset + place.length]
        assert data == bytes(stored)


def test_tokens_are_counted_by_the_family_s_own_tokenizer(
    tiny_cache: Path, tiny_facts: Facts, tiny_model: Path
) -> None:
    texts = [caption.text for caption in Cache(tiny_cache).captions.values() if caption.text]
    counted = families.get("flux").count_tokens(resolve(str(tiny_model), ()), texts)
    assert tiny_facts.caption_tokens is not None
    assert sorted(tiny_facts.caption_tokens) == sorted(counted)
    assert tiny_facts.text_length == 24


def test_captions_that_are_cut_off_are_marked(tiny_facts: Facts) -> None:
    assert "All fit into the 24 that are encoded." in page(tiny_facts, NOW)
    assert tiny_facts.caption_tokens is not None
    limit = int(np.sort(tiny_facts.caption_tokens)[5])
    over = int((tiny_facts.caption_tokens > limit).sum())
    html = page(replace(tiny_facts, text_length=limit), NOW)
    assert (
        f"{over} of 13 ({100 * over / 13:.1f} %) {'is' if over == 1 else 'are'} cut off after {limit} tokens." in html
    )
    assert f"{limit} encoded</text>" in html


def test_weights_of_captions_come_with_them(made_up_facts: Facts) -> None:
    assert [weight for _, weight in of(made_up_facts, "s00").captions] == [1.0, 0.25]


# --- statistics ---


def test_statistics_are_torch_s_own() -> None:
    latents = torch.randn(9, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    found = measure((f"k{i}", tensor) for i, tensor in enumerate(latents))
    assert found.keys == [f"k{i}" for i in range(9)]
    of_samples = torch.stack([t(latents.double().flatten(1)) for t in _TORCH], dim=1)
    of_channels = torch.stack([t(latents.double().movedim(2, 0).flatten(1)) for t in _TORCH], dim=1)
    np.testing.assert_allclose(found.samples, of_samples, rtol=1e-9)
    np.testing.assert_allclose(found.channels, of_channels, rtol=1e-9)


_TORCH: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: x.mean(1),
    lambda x: x.std(1, correction=0),
    lambda x: x.amin(1),
    lambda x: x.amax(1),
)


def test_the_score_is_the_formula_on_the_page() -> None:
    x = np.random.default_rng(0).normal(3, 2, (50, 4))
    median = np.median(x, axis=0)
    np.testing.assert_allclose(robust_z(x), 0.6745 * (x - median) / np.median(np.abs(x - median), axis=0))


def test_the_score_is_finite_where_most_samples_are_alike_and_nothing_stands_out_among_few() -> None:
    alike = np.ones((20, 4))
    assert not robust_z(alike).any()
    alike[3] = 2
    assert np.isfinite(robust_z(alike)).all()
    assert np.abs(robust_z(alike)).argmax(axis=0).tolist() == [3] * 4
    assert not robust_z(np.array([[0.0], [0.1], [100.0]])).any()


def test_latents_that_are_not_finite_stand_out_and_spoil_nothing() -> None:
    latents = [torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    sound = measure((str(i), tensor) for i, tensor in enumerate(latents))
    found = measure(
        [*((str(i), tensor) for i, tensor in enumerate(latents)), ("bad", torch.full((4, 2, 2), torch.nan))]
    )
    assert found.outliers[0] == 10
    np.testing.assert_array_equal(found.channels, sound.channels)
    np.testing.assert_array_equal(found.z[:10], sound.z)


def test_the_sample_that_stands_out_comes_first_and_is_named(made_up_facts: Facts) -> None:
    assert made_up_facts.outliers[0] == OUTLIER
    latents = made_up_facts.latents[0].statistics
    assert latents.scores.max() > 10 * OUTLIER_SCORE
    html = page(made_up_facts, NOW)
    table = html.split("Farthest out first")[1].split("</table>")[0]
    assert re.findall(r"#sample=(\w+)", table)[0] == OUTLIER
    assert "0.6745" in html


# --- failures and damage ---


def test_failures_are_told_with_their_reasons(made_up_facts: Facts) -> None:
    listed = {failure.key: failure for failure in made_up_facts.failures.listed}
    assert set(listed) == {UNENCODED, LEFT_OUT}
    assert (listed[UNENCODED].where, listed[UNENCODED].reason) == ("layers latents, edges", small_cache.BROKEN)
    assert (listed[LEFT_OUT].where, listed[LEFT_OUT].reason) == ("reading the image", "0 bytes <script>")
    assert of(made_up_facts, UNENCODED).status == "incomplete"
    assert of(made_up_facts, LEFT_OUT).status == "left out"
    html = page(made_up_facts, NOW)
    assert small_cache.BROKEN in html
    assert "0 bytes &lt;script&gt;" in html
    assert "&lt;b&gt;left out&lt;/b&gt;.png" in html


def test_a_caption_that_no_encoder_took_makes_its_samples_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption = Caption.of("a box")
    real = small_cache.writer.ShardWriter.add

    def add(self: Any, key: str, input_digest: str, members: Any) -> None:
        if key == caption.id:
            self.add_error(key, input_digest, "values that are not finite")
        else:
            real(self, key, input_digest, members)

    monkeypatch.setattr(small_cache.writer.ShardWriter, "add", add)
    facts = gather(InspectConfig(cache=str(small_cache.make(tmp_path / "cache"))))
    (failure,) = facts.failures.listed
    assert (failure.what, failure.where) == ("caption of 5 samples: a box", "layer text")
    assert {sample.status for sample in facts.gallery.samples} == {"incomplete"}
    assert all("layer text: values that are not finite" in sample.reasons for sample in facts.gallery.samples)


def test_a_flipped_bit_is_damage_with_the_sample_named_and_the_rest_is_shown(
    made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made_up, cache)
    sound = of(gather(InspectConfig(cache=str(cache))), "s00")
    for place in sound.places[:2]:
        small_cache.flip(cache / place.file, place.offset + place.length - 1)
    facts = gather(InspectConfig(cache=str(cache)))
    assert len(facts.problems) == 2
    assert all("'s00'" in problem for problem in facts.problems)
    assert {sample.row["key"] for sample in facts.gallery.samples if sample.status == "damaged"} == {"s00"}
    assert len(facts.gallery.samples) == 21
    assert inspect(InspectConfig(cache=str(cache))) == EXIT_INCOMPLETE
    assert "DAMAGED: sample 's00'" in capsys.readouterr().err
    assert "<h2>Damage</h2>" in (tmp_path / "cache.html").read_text()


def test_a_layer_that_cannot_be_opened_is_damage_and_the_others_are_shown(made_up: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made_up, cache)
    tar = min(cache.glob("edges-*/*.tar"))
    tar.unlink()
    facts = gather(InspectConfig(cache=str(cache)))
    assert [str(tar) in problem for problem in facts.problems] == [True]
    assert [layer.summary.name for layer in facts.layers] == ["latents", "text"]
    assert "<h2>Damage</h2>" in page(facts, NOW)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such cache"):
        gather(InspectConfig(cache=str(tmp_path / "none")))


# --- without a model, and bounded ---


def test_without_a_model_the_first_drawing_stands_in_and_the_page_says_so(made_up_facts: Facts) -> None:
    assert made_up_facts.gallery.picture_layer is None
    assert all(sample.picture is None for sample in made_up_facts.gallery.samples)
    html = page(made_up_facts, NOW)
    assert "<h2>Not shown</h2>" in html
    assert "Unknown model family &#x27;made up&#x27;" in html
    assert "a sample's first drawing stands in for its picture" in html
    assert "characters stand in for them" in html


def test_another_model_s_vae_decodes_nothing(tiny_cache: Path, tmp_path: Path) -> None:
    other = families.get("flux").tiny(tmp_path / "other", seed=1)
    facts = gather(InspectConfig(cache=str(tiny_cache), model=str(other)))
    assert facts.num_samples == len(facts.gallery.samples)
    assert facts.gallery.picture_layer is None
    assert any("The vae of model" in note and "--model" in note for note in facts.notes)
    assert facts.caption_tokens is not None  # the tokenizer is the same


def test_a_model_that_is_gone_is_a_note(tiny_cache: Path) -> None:
    facts = gather(InspectConfig(cache=str(tiny_cache), model="nobody/nothing"))
    assert facts.caption_tokens is None
    assert facts.notes == [
        "Model nobody/nothing is not on this machine. Pictures are not decoded and tokens not counted without it."
    ]


def test_a_large_cache_gives_a_bounded_page_that_says_what_was_drawn(made_up: Path) -> None:
    options = InspectConfig(cache=str(made_up), samples=3, statistics_samples=12)
    facts = gather(options)
    keys = [sample.row["key"] for sample in facts.gallery.samples]
    assert {UNENCODED, LEFT_OUT} <= set(keys)
    assert len(keys) <= 3 + 2 + 3
    html = page(facts, NOW)
    assert "3 of 20 samples, drawn with a fixed seed" in html
    assert "Measured over 12 of 20 samples, drawn with a fixed seed" in html
    assert page(gather(options), NOW) == html


def test_decode_says_how_many_were(tiny_cache: Path) -> None:
    facts = gather(InspectConfig(cache=str(tiny_cache), decode=2))
    assert sum(sample.picture is not None for sample in facts.gallery.samples) == 2
    assert any("The latents of 2 samples were decoded" in note for note in facts.notes)
    none = gather(InspectConfig(cache=str(tiny_cache), decode=0))
    assert none.gallery.picture_layer is None


def test_pictures_are_no_larger_than_asked_for(tiny_cache: Path) -> None:
    facts = gather(InspectConfig(cache=str(tiny_cache), picture_side=32))
    sizes = {pixels_of(sample.picture.src).shape[:2] for sample in facts.gallery.samples if sample.picture}
    assert {max(size) for size in sizes} == {32}


# --- the page ---


def test_the_page_asks_the_network_for_nothing(made_up_facts: Facts, tiny_facts: Facts) -> None:
    for facts in (made_up_facts, tiny_facts):
        html = page(facts, NOW)
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
        assert policy is not None
        assert policy[1].replace("&#x27;", "'").startswith("default-src 'none'; img-src data:; ")
        for what, tag in (("script", "script"), ("style", "style")):
            content = html.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{what}-src &#x27;sha256-{digest}&#x27;" in policy[1]
        places = re.findall(r"""(?:src|href)\s*=\s*["']?([^\s>"']*)""", html.split("<script type=")[0])
        assert {place[:1] for place in places} == {"#"}
        assert "@import" not in html
        assert "url(" not in html


def test_nothing_of_the_cache_becomes_markup(made_up_facts: Facts) -> None:
    html = page(made_up_facts, NOW)
    assert html.count("<script") == 2  # the data, and the page's own
    assert html.count("</script") == 2
    assert "<img" not in html
    assert "<!--" not in html
    assert "\u2028" not in html
    texts = [caption["text"] for caption in embedded(html)["captions"]]
    assert set(HOSTILE[:4]) <= set(texts)


def test_a_caption_of_100_000_characters_is_cut_and_its_length_stated(made_up_facts: Facts) -> None:
    (caption,) = [c for c in embedded(page(made_up_facts, NOW))["captions"] if (c["text"] or "").startswith("long ")]
    assert (len(caption["text"]), caption["shown"], caption["length"]) == (2000, 2000, 100_000)


def test_the_command_writes_one_file_beside_the_cache_and_changes_nothing_in_it(
    made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = small_cache.files(made_up)
    assert inspect(InspectConfig(cache=str(made_up), out=str(tmp_path / "new" / "page.html"))) == 0
    assert small_cache.files(made_up) == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    said = capsys.readouterr().out
    assert f"{tmp_path / 'new' / 'page.html'}: 21 of 21 samples, 2 failures" in said


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"statistics_samples": 0}, {"decode": -1}, {"picture_side": 2}])
def test_impossible_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        InspectConfig(**wrong).check()  # type: ignore[arg-type]


# --- words and charts ---


def test_a_recipe_is_told_in_words() -> None:
    fingerprint = "f" * 64
    told = words.recipe(
        {
            "layer": "x", "schema_version": 2, "encoder": {"vae": "e" * 64}, "decoder_sha256": "d" * 64,
            "shift": 0.1159, "drawings": fingerprint, "coarse": False, "detect_resolutions": [64, 128],
        },
        {"canny": fingerprint},
    )  # fmt: skip
    assert [(word.label, word.value) for word in told] == [
        ("vae", "eeeeeeee"), ("decoder", "dddddddd"), ("shift", "0.1159"), ("drawings", "canny"), ("coarse", "no"),
        ("detect resolutions", "64, 128"),
    ]  # fmt: skip


def test_a_placement_is_told_in_words() -> None:
    placement = {"resize_width": 96, "resize_height": 64, "crop_left": 4, "crop_top": 0, "bucket_width": 64,
                 "bucket_height": 64, "flip": True}  # fmt: skip
    told = words.placement(json.dumps(placement))
    assert told == "resized to 96 \u00d7 64, cut off 4 of 32 px left, mirrored"
    assert words.placement('{"of": "another kind"}') == '{"of": "another kind"}'


@pytest.mark.parametrize(
    "values",
    [
        [7],
        [5, 5, 5],
        [0, 0, 1],
        range(1000),
        [1, 30_000],
        [0.1, 0.25, 1e-3],
        [-3.5, 2.25],
        [0.0],
        [1e-9, 1e9],
        [512, 513],
    ],
)
def test_a_histogram_counts_every_value_once_in_its_bin(values: list[float]) -> None:
    numbers = np.array(list(values), np.float64)
    histogram = charts.count(numbers, numbers > numbers.mean())
    assert histogram.counts.sum() == len(numbers)
    assert histogram.marked.sum() == (numbers > numbers.mean()).sum()
    edges = histogram.edges
    for k, count in enumerate(histogram.counts):
        assert ((numbers >= edges[k]) & (numbers < edges[k + 1])).sum() == count
    ticks = charts.round_ticks(edges)
    assert ticks
    assert edges[0] - 1e-9 <= min(ticks) <= max(ticks) <= edges[-1] + 1e-9
    assert len(ticks) <= 25


def test_charts_are_svg_with_a_title_and_a_description_in_words() -> None:
    drawn = [
        charts.histogram_svg(
            charts.count([1, 2, 2, 9], [False, False, True, True]), name="one", title="<lengths> & more", x_label="<x>",
            y_label='"y"', description="in & words", marked_label="<cut>", line=(4, "<limit>"),
        ),
        charts.ranges_svg(
            np.array([[0, 1, -2, 2], [1, 0, 1, 1]], np.float64), name="two", title="<t>", x_label="<x>", y_label="<y>",
            description="<d>",
        ),
    ]  # fmt: skip
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        title, description = root[0], root[1]
        assert (title.tag, description.tag) == ("title", "desc")
        assert root.attrib["aria-labelledby"].split() == [title.attrib["id"], description.attrib["id"]]
    assert "<title>2 to below 3: 2, of them 1 &lt;cut&gt;</title>" in drawn[0]


# --- in a browser ---

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no browser here: apt-get install chromium chromium-driver"
)


class Browser:
    """A headless browser, and the words that tests say to it."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument("--window-size=1280,900")
        options.add_argument("--force-prefers-reduced-motion")  # a click must not meet a page that still scrolls
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, path: Path, hash: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get_log("performance")
        self.driver.get(f"{path.as_uri()}{hash}")

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def until(self, look: Callable[[], object], expected: object) -> None:
        """Wait until what is seen is what is expected."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            WebDriverWait(self.driver, 20, 0.05).until(lambda _: look() == expected)
        except TimeoutException:
            assert look() == expected

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def cards(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('.card')].map(card => card.dataset.key)")

    def found(self) -> set[str]:
        return set(self.cards())

    def title(self) -> str:
        """The key of the sample in the view; empty where there is none."""
        return self.one("#detail-key").text

    def choose(self, control: str, value: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.one(f"#{control}")).select_by_value(value)

    def clear(self) -> None:
        self.one("button[type=reset]").click()
        self.until(lambda: len(self.cards()), 21)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -r requirements-dev.txt")
    opened = Browser()
    try:
        yield opened
    finally:
        opened.driver.quit()


@pytest.fixture(scope="module")
def written(made_up_facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(made_up_facts, NOW), encoding="utf-8")
    return path


@in_browser
def test_search_finds_captions_keys_and_sources(browser: Browser, written: Path) -> None:
    browser.open(written)
    assert len(browser.cards()) == 21
    for text, found in (
        ("number 13", ["s13"]),
        ("NUMBER 13", ["s13"]),
        ("s05", ["s05"]),
        ("s05.png", ["s05"]),
        ("日本語", ["s03"]),
        ("<script>window", ["s00"]),
        ("box 17", ["s17"]),
        ("no such thing", []),
    ):
        box = browser.one("#search")
        box.clear()
        box.send_keys(text)
        browser.until(browser.cards, found)
        assert browser.one("#count").text == f"{len(found)} of 21"
    assert browser.one("#none").is_displayed()
    browser.one("#clear").click()
    browser.until(lambda: len(browser.cards()), 21)


@in_browser
def test_filters_show_what_they_say(browser: Browser, written: Path, made_up_facts: Facts) -> None:
    browser.open(written)
    every = {sample.row["key"] for sample in made_up_facts.gallery.samples}
    for control, value, expected in (
        ("split", "validation", {"s04", "s09", "s14", "s19"}),
        ("bucket", "32x16", {f"s{i:02d}" for i in range(1, 20, 2)}),
        ("condition", "edges", every - {UNENCODED, LEFT_OUT}),
        ("condition", "!edges", {UNENCODED, LEFT_OUT}),
        ("status", "incomplete", {UNENCODED}),
        ("status", "left out", {LEFT_OUT}),
    ):
        browser.choose(control, value)
        browser.until(browser.found, expected)
        browser.clear()
    browser.one("#outliers").click()
    browser.until(browser.found, set(made_up_facts.outliers))
    browser.choose("order", "score")
    browser.until(browser.cards, made_up_facts.outliers)


@in_browser
def test_a_click_on_a_sample_shows_all_of_it(browser: Browser, written: Path) -> None:
    browser.open(written)
    browser.one('[data-key="s01"]').click()
    assert browser.title() == "s01"
    assert [caption.text for caption in browser.all("#detail figcaption")] == ["edges, 1 of 2", "edges, 2 of 2"]
    assert all(browser.run("return arguments[0].naturalWidth", image) == 16 for image in browser.all("#detail img"))
    said = browser.one("#detail-body").text
    for part in ("number 1", HOSTILE[1], "weight 1", "weight 0.25", "32 \u00d7 16", "s01.png", "train", "00000.tar"):
        assert part in said
    assert len(browser.all("#detail tbody tr")) == 1 + 3 + 2  # latents; members of the sample; its captions
    browser.one("#close").click()
    browser.until(browser.title, "")


@in_browser
def test_the_gallery_is_worked_by_the_keyboard_alone(browser: Browser, written: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(written)
    browser.keys("/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.keys("s1")
    browser.until(lambda: len(browser.cards()), 10)
    first, second = browser.cards()[:2]
    browser.run("document.querySelector('.card').focus()")
    browser.keys(Keys.ENTER)
    browser.until(browser.title, first)
    browser.keys(Keys.ARROW_RIGHT)
    browser.until(browser.title, second)
    browser.keys(Keys.ESCAPE)
    browser.until(browser.title, "")
    assert browser.run("return document.activeElement.dataset.key") == second


@in_browser
def test_a_failure_and_an_outlier_lead_to_their_sample(browser: Browser, written: Path) -> None:
    for key, section in ((UNENCODED, "failures"), (OUTLIER, "latents")):
        browser.open(written)
        browser.run("arguments[0].click()", browser.one(f'#{section} a[href="#sample={key}"]'))
        browser.until(browser.title, key)
    browser.open(written, f"#sample={LEFT_OUT}")
    assert browser.title() == LEFT_OUT
    assert "0 bytes <script>" in browser.one("#detail-body").text


@in_browser
def test_hostile_captions_are_shown_and_do_nothing_and_nothing_is_asked_of_the_network(
    browser: Browser, written: Path
) -> None:
    browser.open(written)
    for i in range(len(HOSTILE)):
        browser.run("location.hash = arguments[0]", f"sample=s{i:02d}")
        browser.until(browser.title, f"s{i:02d}")
        shown = browser.run("return document.querySelectorAll('#detail blockquote')[1].textContent")
        assert shown == (HOSTILE[i] if i < 4 else f"{HOSTILE[i][:2000]} \u2026")
        assert browser.all("#detail script, #detail img:not([src^='data:'])") == []
    assert "2,000 of 100,000 characters shown" in browser.one("#detail-body").text
    assert browser.run("return window.hacked") is None
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert written.as_uri() in asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_all_without_scrolling_sideways(browser: Browser, written: Path, dark: bool) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        browser.open(written)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        browser.run("location.hash = 'sample=s00'")
        browser.until(browser.title, "s00")
        assert browser.run("return document.getElementById('detail-body').scrollWidth") <= 390
        light = browser.run("return getComputedStyle(document.body).backgroundColor").count("25") > 0
        assert light != dark
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
