"""Images and captions as they come from the wild, through the whole stage: what can be used is encoded as it looks,
what cannot is a row with its reason, and memory does not follow what a file claims."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from preprocess.conditions.canny import CannyDrawer
from preprocess.config import PreprocessConfig
from preprocess.images import MAX_BYTES, ImageError
from shared.cache.reader import Cache
from shared.cache.schema import Caption
from shared.cache.verify import verify
from tests.conftest import TEXT_LENGTH, preprocess_options, write_data
from tests.preprocess.runs import Ran, contents, ran

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(width: int = 96, height: int = 96, left: Any = RED, right: Any = BLUE, mode: str = "RGB") -> Image.Image:
    """Two colours side by side: that they come out where and as they should shows that the picture was understood."""
    image = Image.new(mode, (width, height), right)
    image.paste(left, (0, 0, width // 2, height))
    return image


def bytes_of(image: Image.Image | NDArray[Any], kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **settings)
    return buffer.getvalue()


def palette_with_transparency() -> bytes:
    """Red, and a blue that is wholly transparent."""
    image = Image.new("P", (96, 96), 1)
    image.putpalette([*RED, *BLUE])
    image.paste(0, (0, 0, 48, 96))
    return bytes_of(image, transparency=bytes([255, 0]))


def animation(kind: str, **settings: Any) -> bytes:
    frames = [halves(), halves(left=BLUE, right=RED), halves(left=WHITE)]
    return bytes_of(frames[0], kind, save_all=True, append_images=frames[1:], **settings)


def sixteen_bit_rgb() -> bytes:
    """A PNG of 16 bits for each of RGB, which Pillow cannot write."""
    pixels = np.asarray(halves()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return png(96, 96, zlib.compress(rows), depth=16)


def png(width: int, height: int, compressed: bytes, depth: int = 8) -> bytes:
    """A PNG in RGB that claims a size, whatever is in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))


def with_a_flipped_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


RED_AND_BLUE, RED_AND_WHITE, GREYS = (RED, BLUE), (RED, WHITE), ((0, 0, 0), (128, 128, 128))
USABLE: dict[str, tuple[Callable[[], bytes], tuple[Any, Any]]] = {
    "plain.png": (lambda: bytes_of(halves()), RED_AND_BLUE),
    "cmyk.jpg": (lambda: bytes_of(halves().convert("CMYK"), "JPEG", quality=95), RED_AND_BLUE),
    "cmyk.tif": (lambda: bytes_of(halves().convert("CMYK"), "TIFF"), RED_AND_BLUE),
    "16 bits of grey.png": (lambda: bytes_of(np.repeat([[0] * 48 + [32896] * 48], 96, 0).astype(np.uint16)), GREYS),
    "16 bits of grey.tif": (
        lambda: bytes_of(np.repeat([[0] * 48 + [32896] * 48], 96, 0).astype(np.uint16), "TIFF"), GREYS,
    ),
    "16 bits of each.png": (sixteen_bit_rgb, RED_AND_BLUE),
    "float.tif": (
        lambda: bytes_of(np.repeat([[0] * 48 + [0.502] * 48], 96, 0).astype(np.float32), "TIFF"), GREYS,
    ),
    "palette with transparency.png": (palette_with_transparency, RED_AND_WHITE),
    "alpha.webp": (
        lambda: bytes_of(halves(left=(*RED, 255), right=(*BLUE, 0), mode="RGBA"), "WEBP", lossless=True), RED_AND_WHITE,
    ),
    "animated.gif": (lambda: animation("GIF"), RED_AND_BLUE),
    "animated.webp": (lambda: animation("WEBP", lossless=True), RED_AND_BLUE),
    "animated.png": (lambda: animation("PNG"), RED_AND_BLUE),
    "pages.tif": (lambda: animation("TIFF"), RED_AND_BLUE),
    "a jpeg.png": (lambda: bytes_of(halves(), "JPEG", quality=95), RED_AND_BLUE),
    "a png.jpg": (lambda: bytes_of(halves()), RED_AND_BLUE),
    "a webp.gif": (lambda: bytes_of(halves(), "WEBP", lossless=True), RED_AND_BLUE),
    "30,000 wide.png": (lambda: bytes_of(halves(30_000, 40)), RED_AND_BLUE),
    "30,000 high.png": (lambda: bytes_of(halves(40, 30_000)), RED_AND_BLUE),
    "black and white.png": (lambda: bytes_of(halves(left=0, right=1, mode="1")), ((0, 0, 0), WHITE)),
    "one pixel.png": (lambda: bytes_of(Image.new("RGB", (1, 1), RED)), (RED, RED)),
    "packed a thousandfold.png": (lambda: bytes_of(halves(4000, 4000)), RED_AND_BLUE),
    "über 猫 \U0001f408.png": (lambda: bytes_of(halves()), RED_AND_BLUE),
}  # fmt: skip
"""Name -> its bytes, and the colours that a sample of it has on the left and on the right."""

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes.png": (lambda: b"", "0 bytes"),
    "truncated.jpg": (lambda: bytes_of(noise(), "JPEG")[:2000], "truncated JPEG file"),
    "truncated.png": (lambda: bytes_of(noise())[:9000], "truncated PNG file"),
    "truncated.webp": (lambda: bytes_of(noise(), "WEBP")[:900], "WebP file"),
    "truncated.gif": (lambda: bytes_of(noise().convert("P"), "GIF")[:3000], "GIF file"),
    "damaged.png": (lambda: with_a_flipped_bit(bytes_of(noise())), "PNG file"),
    "bomb.png": (
        lambda: png(100_000, 100_000, zlib.compress(b"\0" * 100_000)),
        "100000 x 100000 pixels is larger than",
    ),
    "less than it claims.png": (lambda: png(9000, 9000, zlib.compress(b"")), "PNG file"),
    "no width.png": (lambda: png(0, 96, zlib.compress(b"")), "PNG file"),
    "words.jpg": (lambda: b"<!DOCTYPE html><title>404</title>", "not an image that can be read"),
    "program.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%id) (r) file\n", "not an image that can be read"),
    "zeros.png": (lambda: b"\0" * 5000, "not an image that can be read"),
}
"""Name -> its bytes, and what the reason says."""

CAPTIONS: dict[str, str] = {
    "astral": "\U0001f408\u200d\u2b1b a cat \U0001d4d2\U00020000",
    "right to left": "\u0642\u0637\u0629 \u05d7\u05ea\u05d5\u05dc \u202etac a\u202c",
    "combining": "c\u0301\u0327\u0488" * 30 + "at",
    "control characters": "a\x01\x02\x07\x1b[31m cat\x7f\x85 \u2028 \u2029 \ufeff end",
    "noncharacters": "a \ufffe \uffff \U0010ffff cat",
    "newlines": "a cat\nsits\r\non\ra mat\n\nand\tsleeps",
    "100,000 characters": "a cat and " * 10_000 + "end",
    "100,000 without a space": "ab" * 50_000 + "end",
    "100,000 astral": "\U0001f408" * 100_000,
    "markup": "<|endoftext|> </s> <pad> \\ \" ' {} %s $(id) \\u0000",
}


def lines(**of: dict[str, Any]) -> str:
    return "".join(json.dumps({"file_name": name, **content}) + "\n" for name, content in of.items())


@dataclass
class Made:
    data: Path
    options: PreprocessConfig
    ran: Ran

    @property
    def cache(self) -> Cache:
        return Cache(Path(self.options.cache))


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All of them in one data set, encoded with the picture itself as a condition, to look at."""
    data = tmp_path_factory.mktemp("hostile")
    for name, (content, _) in [*USABLE.items(), *REFUSED.items()]:
        (data / name).write_bytes(content())
    with open(data / "too large a file.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # a file with a hole: it takes no space
    names = [*USABLE, *REFUSED, "too large a file.png", "not there.png"]
    (data / "a folder.png").mkdir()
    of: dict[str, dict[str, Any]] = {name: {"text": f"picture {i}"} for i, name in enumerate([*names, "a folder.png"])}
    for i, text in enumerate(CAPTIONS.values()):
        (data / f"caption {i}.png").write_bytes(bytes_of(halves()))
        of[f"caption {i}.png"] = {"text": [text, "shared"]}
    (data / "metadata.jsonl").write_text(lines(**of), encoding="utf-8")
    defaults = PreprocessConfig(data="").conditions
    options = preprocess_options(
        data, tmp_path_factory.mktemp("cache") / "cache", tiny_model, condition=("tile",),
        conditions=replace(defaults, tile=replace(defaults.tile, factors=(1,))),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        from preprocess.pipeline import preprocess

        code = preprocess(options)
    return Made(data, options, Ran(code, {}, {}, out.getvalue(), err.getvalue()))


# --- images ---


def test_the_run_comes_to_its_end_and_says_that_samples_are_missing(made: Made) -> None:
    assert made.ran.code == 3
    assert f"{len(REFUSED) + 3} sample(s) were left out:" in made.ran.err
    assert verify(Path(made.options.cache)).problems == []


@pytest.mark.parametrize("name", USABLE)
def test_what_can_be_used_is_encoded_as_it_looks(name: str, made: Made) -> None:
    [sample] = [sample for sample in made.cache.samples.values() if sample.source == name]
    assert (sample.status, sample.error) == ("ok", None)
    left, right = USABLE[name][1]
    picture = Image.open(io.BytesIO(made.cache.layer("tile").read(sample.key, "0.png"))).convert("RGB")
    assert picture.size == (sample.bucket_width, sample.bucket_height)
    pixels = np.asarray(picture).astype(int)
    width = pixels.shape[1]
    for part, colour in ((pixels[:, : width // 2 - 3], left), (pixels[:, width // 2 + 3 :], right)):
        assert np.abs(part - colour).max() <= 12, "lossy ones are a little off"
    latents = made.cache.layer("latents").tensors(sample.key)
    assert latents["mean"].shape == (16, picture.height // 8, picture.width // 8)
    assert all(torch.isfinite(tensor).all() for tensor in latents.values())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_a_row_with_its_reason(name: str, made: Made) -> None:
    [sample] = [sample for sample in made.cache.samples.values() if sample.source == name]
    assert sample.status == "error"
    assert sample.error is not None
    assert REFUSED[name][1] in sample.error
    assert f"  {name}: {sample.error}" in made.ran.err, "and in the report"
    for layer in ("latents", "tile", "tile_latents"):
        assert sample.key not in made.cache.layer(layer)


def test_files_that_are_none_and_files_too_large_to_be_read_are_rows_with_reasons(made: Made) -> None:
    errors = {sample.source: sample.error for sample in made.cache.samples.values() if sample.status == "error"}
    assert f"{MAX_BYTES + 1} bytes is larger than any image" in str(errors["too large a file.png"])
    assert "no such file" in str(errors["not there.png"])
    assert "no such file" in str(errors["a folder.png"])
    assert len(errors) == len(REFUSED) + 3


def test_running_again_makes_nothing_and_says_the_same(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(Path(made.options.cache))
    again = ran(made.options, capsys)
    assert again.code == 3
    assert set(again.made.values()) == {0}
    assert again.err.count("sample(s) were left out") == 1
    shards = {name for name in before if name.endswith(".tar")}
    after = contents(Path(made.options.cache))
    assert {name for name in after if name.endswith(".tar")} == shards
    assert all(after[name] == before[name] for name in shards)


def test_a_drawing_that_fails_is_that_sample_s_row_and_no_other_s(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No picture is known that real weights give no finite drawing of: a drawer that does stands for it."""
    data = write_data(tmp_path / "data", 6, ((64, 64),))
    (data / "003.png").write_bytes(bytes_of(Image.new("RGB", (64, 64), (1, 2, 3))))
    draw = CannyDrawer._draw

    def failing(self: CannyDrawer, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if (images == (1, 2, 3)).all(axis=(1, 2, 3)).any():
            raise ImageError("the detector gave values that are not finite")
        return draw(self, images)

    monkeypatch.setattr(CannyDrawer, "_draw", failing)
    run = ran(preprocess_options(data, tmp_path / "cache", tiny_model), capsys)
    assert run.code == 3
    assert "  003.png: layer canny: the detector gave values that are not finite" in run.err
    cache = Cache(tmp_path / "cache")
    for layer in ("canny", "canny_latents"):
        missing = [sample.source for key, sample in cache.samples.items() if key not in cache.layer(layer)]
        assert missing == ["003.png"]


# --- captions ---


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_of_any_characters_is_kept_and_encoded(name: str, made: Made) -> None:
    text = CAPTIONS[name]
    key = Caption.of(text).id
    assert made.cache.captions[key].text == text
    [sample] = [sample for sample in made.cache.samples.values() if key in sample.captions]
    assert sample.captions == (key, Caption.of("shared").id)
    t5, clip = made.cache.layer("t5").tensors(key), made.cache.layer("clip").tensors(key)
    assert t5["prompt_embeds"].shape[0] == TEXT_LENGTH
    assert torch.isfinite(t5["prompt_embeds"]).all()
    assert torch.isfinite(clip["pooled_prompt_embeds"]).all()


def test_captions_that_are_cut_off_are_counted(made: Made) -> None:
    assert "captions are cut off after 24 tokens" in made.ran.err


def test_text_files_may_hold_any_characters_too(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, text in enumerate(CAPTIONS.values()):
        (tmp_path / f"{i}.png").write_bytes(bytes_of(halves(64, 64)))
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    cache = tmp_path / "cache"
    assert ran(preprocess_options(tmp_path, cache, tiny_model), capsys).code == 0
    assert {caption.text for caption in Cache(cache).captions.values()} == {"", *CAPTIONS.values()}


# --- memory ---

_MEASURED = """
import sys
from pathlib import Path
from preprocess import images
from preprocess.config import EncodeOptions
from preprocess.pipeline import preprocess
from tests.conftest import preprocess_options

images.MAX_PIXELS = 6_000_000
small, hostile, cache, model = map(Path, sys.argv[1:])
encode = EncodeOptions(image_batch=2, workers=4)

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))  # KiB

assert preprocess(preprocess_options(small, cache / "small", model, encode=encode)) == 0
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = peak()
assert preprocess(preprocess_options(hostile, cache / "hostile", model, encode=encode)) == 0
print(peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts the peak, and may forbid it")
def test_memory_is_bounded_by_one_largest_image_however_many_threads_read_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    """With the limit lowered to 6 million pixels, four threads read pictures of 5.1 million with 16 bits: of each, its
    pixels as stored and as bytes of RGB come to 26 MB, and converting all at once took 130 MB."""
    small, hostile = write_data(tmp_path / "small", 4), tmp_path / "hostile"
    hostile.mkdir()
    grey = np.random.default_rng(0).integers(0, 2**16, (17, 3000), np.uint16).repeat(10, 0).repeat(10, 1)
    data = bytes_of(grey, compress_level=1)
    for i in range(4):
        (hostile / f"{i}.png").write_bytes(data)
        (hostile / f"{i}.txt").write_text(f"wide {i}")
    finished = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(small), str(hostile), str(tmp_path), str(tiny_model)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},  # what is freed is given back and counted no more
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout.splitlines()[-1]) < 120 * 1024
