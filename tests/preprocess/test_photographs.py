"""Real photographs of many sizes and modes through the whole stage, two broken files among them."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from numpy.typing import NDArray
from PIL import ExifTags, Image

from preprocess import images
from preprocess.conditions.lineart import LineartOptions
from preprocess.config import ConditionOptions, EncodeOptions
from preprocess.geometry import GeometryOptions
from preprocess.pipeline import preprocess
from shared.cache.reader import Cache, usable
from shared.cache.schema import Sample
from shared.cache.verify import verify
from tests.conftest import preprocess_options
from tests.preprocess.runs import Ran, placed_image, ran

CAPTIONS = {
    "people/astronaut.png": "an astronaut in an orange suit before a flag",
    "animals/chelsea.jpg": "a tabby cat looks to the side, close-up",
    "animals/horse.png": "the black silhouette of a horse",
    "coffee.webp": "a cup of espresso on a wooden table",
    "rocket.jpg": "a rocket on its launch pad at night",
    "camera.png": "a man in a coat with a camera on a tripod",
    "page.png": "a page of printed text",
    "coins.tif": "rows of old coins, grey",
    "eye/retina.jpg": "a retina",
    "animals/truncated.jpg": "a rocket that broke off",
    "not an image.png": "a file of words",
}
BROKEN = {"animals/truncated.jpg", "not an image.png"}
DETECT_RESOLUTIONS = (64, 128)


def photograph(name: str) -> Image.Image:
    """One of those that come with scikit-image."""
    package = find_spec("skimage")
    assert package is not None
    assert package.origin is not None
    return Image.open(Path(package.origin).parent / "data" / name)


def write_photographs(folder: Path) -> None:
    """In colour, grey, transparent, with a palette, in 16 bits, turned by EXIF; JPEG, PNG, WebP, TIFF; two broken."""
    for name in CAPTIONS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    photograph("astronaut.png").resize((200, 200)).save(folder / "people/astronaut.png")
    photograph("chelsea.png").save(folder / "animals/chelsea.jpg", quality=80)
    photograph("horse.png").convert("RGBA").save(folder / "animals/horse.png")
    photograph("coffee.png").convert("RGB").save(folder / "coffee.webp", quality=80)
    # Stored lying, to be shown upright: a camera held sideways.
    photograph("rocket.jpg").transpose(Image.Transpose.ROTATE_90).save(folder / "rocket.jpg", exif=turned)
    photograph("camera.png").convert("L").save(folder / "camera.png")
    photograph("page.png").convert("P").save(folder / "page.png")
    sixteen = np.asarray(photograph("coins.png"), np.uint16) * 257
    Image.fromarray(sixteen).save(folder / "coins.tif")
    photograph("retina.jpg").resize((90, 90)).save(folder / "eye/retina.jpg")
    whole = io.BytesIO()
    photograph("rocket.jpg").save(whole, "JPEG")
    (folder / "animals/truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "not an image.png").write_text("words")
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector's weights in the hub repository's layout, at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from controlnet_aux.lineart import Generator

    folder = tmp_path_factory.mktemp("annotators")
    with torch.random.fork_rng(devices=[]):
        for seed, name in enumerate(("sk_model.pth", "sk_model2.pth")):
            torch.manual_seed(seed)
            model = Generator(3, 1, 3)
            with torch.no_grad():
                model.model4[1].bias.fill_(3.0)  # paper rather than lines, as trained weights draw
            torch.save(model.state_dict(), folder / name)
    return folder


@dataclass
class Made:
    data: Path
    folder: Path
    cache: Cache
    ran: Ran


@pytest.fixture(scope="module")
def made(tiny_model: Path, annotators: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    data, cache = tmp_path_factory.mktemp("photographs"), tmp_path_factory.mktemp("cache")
    write_photographs(data)
    lineart = LineartOptions(weights=str(annotators), detect_resolutions=DETECT_RESOLUTIONS)
    options = preprocess_options(
        data, cache, tiny_model, condition=("lineart", "canny"), precision="bf16",
        geometry=GeometryOptions(resolution=128), conditions=ConditionOptions(lineart=lineart),
        encode=EncodeOptions(image_batch=4, workers=2, shard_rows=4), text_length=64,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        code = preprocess(options)
    return Made(data, cache, Cache(cache), Ran(code, {}, {}, out.getvalue(), err.getvalue()))


def of(made: Made, source: str) -> Sample:
    return next(sample for sample in made.cache.samples.values() if sample.source == source)


def drawings(made: Made, condition: str, sample: Sample) -> list[NDArray[np.uint8]]:
    layer = made.cache.layer(condition)
    return [
        np.asarray(Image.open(io.BytesIO(layer.read(sample.key, member))))
        for member in sorted(layer.members(sample.key))
    ]


def test_the_two_broken_files_are_reported_with_reasons_and_nothing_else_is_lost(made: Made) -> None:
    assert made.ran.code == 3
    assert "2 sample(s) were left out" in made.ran.err
    assert "animals/truncated.jpg: truncated JPEG file" in made.ran.err
    assert "not an image.png: not an image that can be read" in made.ran.err
    broken = {sample.source for sample in made.cache.samples.values() if sample.status == "error"}
    assert broken == BROKEN
    layers = [made.cache.layer(name) for name in ("latents", "lineart", "lineart_latents", "canny", "canny_latents")]
    texts = [made.cache.layer(name) for name in ("clip", "t5")]
    assert not any(layer.errors for layer in (*layers, *texts))
    assert {s.source for s in usable(made.cache.samples.values(), layers, texts)} == set(CAPTIONS) - BROKEN
    assert made.cache.manifest["samples"]["errors"] == 2
    assert verify(made.folder).sound


def test_sizes_are_those_of_the_upright_images_and_buckets_keep_their_shape(made: Made) -> None:
    sizes = {s.source: (s.width, s.height) for s in made.cache.samples.values() if s.status == "ok"}
    assert sizes["people/astronaut.png"] == (200, 200)
    assert sizes["animals/chelsea.jpg"] == (451, 300)
    assert sizes["rocket.jpg"] == (640, 427)  # stored 427 x 640
    assert sizes["page.png"] == (384, 191)
    for source, (width, height) in sizes.items():
        sample = of(made, source)
        assert sample.bucket_width is not None
        assert sample.bucket_height is not None
        assert sample.bucket_width % 16 == sample.bucket_height % 16 == 0
        assert abs(sample.bucket_width * sample.bucket_height / 128**2 - 1) <= 0.15
        assert width is not None
        assert height is not None
        assert abs(sample.bucket_width / sample.bucket_height / (width / height) - 1) < 0.25
    assert (of(made, "animals/chelsea.jpg").bucket_width or 0) > (of(made, "animals/chelsea.jpg").bucket_height or 0)


def test_the_turned_photograph_is_encoded_upright(made: Made) -> None:
    upright = np.asarray(photograph("rocket.jpg"), np.float32).mean()
    pixels = placed_image(made.data, of(made, "rocket.jpg"))
    whole = np.asarray(photograph("rocket.jpg").resize(pixels.shape[1::-1]), np.float32)
    assert np.abs(pixels.astype(np.float32) - whole).mean() < 12
    assert upright > 0
    turned = np.asarray(photograph("rocket.jpg").transpose(Image.Transpose.ROTATE_180).resize(pixels.shape[1::-1]))
    assert np.abs(pixels.astype(np.float32) - turned).mean() > 25


def test_grey_and_transparent_images_are_encoded_as_rgb_on_white(made: Made) -> None:
    camera = placed_image(made.data, of(made, "camera.png"))
    assert (camera == camera[..., :1]).all()
    horse = placed_image(made.data, of(made, "animals/horse.png"))
    assert horse[0, 0].tolist() == [255, 255, 255]
    coins = images.decode((made.data / "coins.tif").read_bytes())
    assert np.array_equal(coins[..., 0], np.asarray(photograph("coins.png")))


def test_latents_have_the_shape_of_their_bucket(made: Made) -> None:
    latents, lineart = made.cache.layer("latents"), made.cache.layer("lineart_latents")
    canny = made.cache.layer("canny_latents")
    for source in set(CAPTIONS) - BROKEN:
        sample = of(made, source)
        shape = (16, (sample.bucket_height or 0) // 8, (sample.bucket_width or 0) // 8)
        assert latents.tensors(sample.key)["mean"].shape == shape
        assert lineart.tensors(sample.key)["std"].shape == (len(DETECT_RESOLUTIONS), *shape)
        assert canny.tensors(sample.key)["mean"].shape == (1, *shape)
        assert latents.tensors(sample.key)["mean"].dtype == torch.bfloat16


@pytest.mark.parametrize(("condition", "count"), [("lineart", 2), ("canny", 1)])
def test_drawings_are_white_on_black_one_for_each_detect_resolution(made: Made, condition: str, count: int) -> None:
    for source in set(CAPTIONS) - BROKEN:
        sample = of(made, source)
        drawn = drawings(made, condition, sample)
        assert len(drawn) == count
        for drawing in drawn:
            assert drawing.shape == (sample.bucket_height, sample.bucket_width)
            assert drawing.mean() < 128, (source, "mostly black")
            assert drawing.max() > 0 or condition == "lineart"
        if condition == "lineart":
            assert not np.array_equal(drawn[0], drawn[1])


def test_every_shard_reads_as_webdataset_with_the_keys_of_the_samples(made: Made) -> None:
    for layer in ("latents", "lineart", "canny_latents"):
        (folder,) = made.folder.glob(f"{layer}-????????")
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        assert len(shards) >= 3
        keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
        assert sorted(keys) == sorted(of(made, source).key for source in set(CAPTIONS) - BROKEN)


def test_a_second_run_makes_nothing_and_says_the_same_of_the_broken_files(
    made: Made, annotators: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lineart = LineartOptions(weights=str(annotators), detect_resolutions=DETECT_RESOLUTIONS)
    options = preprocess_options(
        made.data, made.folder, tiny_model, condition=("lineart", "canny"), precision="bf16",
        geometry=GeometryOptions(resolution=128), conditions=ConditionOptions(lineart=lineart), text_length=64,
    )  # fmt: skip
    again = ran(options, capsys)
    assert again.code == 3
    assert set(again.made.values()) == {0}
    assert again.err == made.ran.err
