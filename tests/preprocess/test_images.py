"""Bytes become whole, upright, opaque RGB, or are refused with a reason."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile

from preprocess import images
from preprocess.images import MAX_BYTES, MAX_PIXELS, ImageError, decode, decoded, refuse_large_file


def gradient(width: int = 48, height: int = 32) -> NDArray[np.uint8]:
    """(H, W, 3): red grows to the right, green downwards, so that every turn and mirror shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, np.full((height, width), 60)], axis=2).astype(np.uint8)


def encoded(image: Image.Image | NDArray[Any], kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **settings)
    return buffer.getvalue()


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- formats ---


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
        ("JPEG2000", {}),
    ],
)
def test_lossless_formats_come_back_exactly(kind: str, settings: dict[str, Any]) -> None:
    pixels = decode(encoded(gradient(), kind, **settings))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (32, 48, 3)
    np.testing.assert_array_equal(pixels, gradient())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_lossy_formats_come_back_nearly(kind: str, settings: dict[str, Any]) -> None:
    difference = decode(encoded(gradient(), kind, **settings)).astype(int) - gradient()
    assert np.abs(difference).mean() < 5


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind, settings in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
        np.testing.assert_array_equal(decode(data), np.full((8, 8, 3), (255, 0, 0), np.uint8), err_msg=kind)


# --- modes ---


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    half = Image.new("RGB", (16, 16), "white")
    half.paste((0, 0, 0), (0, 0, 8, 16))
    pixels = decode(encoded(half.convert(mode), "TIFF"))
    assert pixels.shape == (16, 16, 3)
    assert pixels[:, :8].max() < 8
    assert pixels[:, 8:].min() > 247


def test_cmyk_jpeg_is_not_inverted() -> None:
    assert decode(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG")).min() > 250


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    grey = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pixels = decode(encoded(grey, kind))
    np.testing.assert_array_equal(pixels[..., 0], [[0, 0, 1, 1, 128, 255]])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    for kind in ("PNG", "TIFF", "PPM"):
        assert decode(encoded(np.full((4, 4), 200, np.uint16), kind)).max() <= 1, kind


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 255]], np.int32), [[0, 100, 255]]),
        (np.array([[0, 32768, 65535]], np.int32), [[0, 128, 255]]),
        (np.array([[0, 0.5, 1]], np.float32), [[0, 128, 255]]),
        (np.array([[0, 100.4, 255]], np.float32), [[0, 100, 255]]),
    ],
)
def test_wide_grey_takes_the_customary_white(values: NDArray[Any], expected: list[list[int]]) -> None:
    np.testing.assert_array_equal(decode(encoded(values, "TIFF"))[..., 1], expected)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 70000]], np.int32),
        np.array([[-1, 5]], np.int32),
        np.array([[0, 1e9]], np.float32),
        np.array([[0, np.nan]], np.float32),
    ],
)
def test_wide_grey_without_a_known_white_is_refused(values: NDArray[Any]) -> None:
    assert "none is known to be white" in reason(encoded(values, "TIFF"))


# --- transparency ---


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((4, 3, 4), np.uint8)
    rgba[..., :3] = (200, 0, 0)
    rgba[:, 0, 3], rgba[:, 1, 3], rgba[:, 2, 3] = 0, 128, 255
    row = decode(encoded(rgba))[0].astype(int)
    np.testing.assert_array_equal(row[0], (255, 255, 255))
    assert np.abs(row[1] - (227, 127, 127)).max() <= 1
    np.testing.assert_array_equal(row[2], (200, 0, 0))


@pytest.mark.parametrize(
    "data",
    [
        encoded(np.zeros((4, 4, 2), np.uint8)),  # LA
        encoded(Image.new("P", (4, 4), 0), transparency=0),
        encoded(Image.new("P", (4, 4), 0), "GIF", transparency=0),
        encoded(Image.new("PA", (4, 4), (0, 0)).convert("RGBA"), "WEBP", lossless=True),
        encoded(Image.new("L", (4, 4), 7), transparency=7),
        encoded(Image.new("1", (4, 4), 0), transparency=0),
        encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        encoded(Image.new("I;16", (4, 4), 7), transparency=7),
    ],
    ids=["LA", "P", "gif", "webp", "L+tRNS", "1+tRNS", "RGB+tRNS", "I;16+tRNS"],
)
def test_what_is_transparent_is_white_in_every_mode(data: bytes) -> None:
    np.testing.assert_array_equal(decode(data), np.full((4, 4, 3), 255, np.uint8))


# --- EXIF ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(kind: str, orientation: int) -> None:
    stored_from_upright = {  # what a camera does that later writes this orientation
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    upright = Image.fromarray(gradient())
    stored = upright if stored_from_upright is None else upright.transpose(stored_from_upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(stored, kind, exif=exif, **({} if kind == "TIFF" else {"quality": 95})))
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels.astype(int) - gradient()).mean() < 5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_picture() -> None:
    orientation_of_no_length = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\0\0\0\0\0\0\0\0\0"
    for exif in (b"garbage that is no TIFF", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0", orientation_of_no_length):
        exif = b"Exif\0\0" + exif
        assert decode(encoded(gradient(), "JPEG", exif=exif)).shape == (32, 48, 3)


# --- refusals ---


def test_nothing_is_refused_as_0_bytes() -> None:
    assert reason(b"") == "0 bytes"


@pytest.mark.parametrize(
    "data", [b"<!DOCTYPE html><html>", b"\0" * 1000, b"GIF", b"%!PS-Adobe-3.0 EPSF-3.0", b"P5ython"]
)
def test_what_is_no_image_is_named_by_its_first_bytes(data: bytes) -> None:
    message = reason(data)
    assert message.startswith("not an image")
    assert repr(data[:16]) in message


def test_a_truncated_jpeg_is_named_with_its_reason() -> None:
    data = encoded(gradient(), "JPEG")
    assert reason(data[: len(data) // 2]).startswith("truncated JPEG file")
    assert reason(data[:-2]).startswith("truncated JPEG file")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "jpeg"}),
        ("AVIF", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated File Read)")
def test_a_file_cut_anywhere_is_refused_or_whole_but_never_padded(kind: str, settings: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    data = encoded(noise, kind, **settings)
    whole = decode(data)
    for end in range(1, len(data), max(1, len(data) // 60)):
        try:
            pixels = decode(data[:end])
        except ImageError:
            continue
        np.testing.assert_array_equal(pixels, whole, err_msg=f"cut at {end} of {len(data)}")


def test_truncated_files_are_refused_though_a_library_has_told_pillow_to_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(gradient(), "JPEG")
    assert reason(data[:-40]).startswith("truncated JPEG file")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "others keep their setting"


def test_threads_that_decode_together_put_pillows_switch_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(gradient(200, 200), "JPEG")
    padded: list[int] = []

    def decode_many() -> None:
        for _ in range(20):
            decode(whole)
            try:
                decode(whole[:-60])
                padded.append(1)
            except ImageError:
                pass

    threads = [threading.Thread(target=decode_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not padded
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("pillows_limit", [None, 10, Image.MAX_IMAGE_PIXELS])
def test_a_decompression_bomb_is_refused_by_its_size_whatever_pillows_limit(
    pillows_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    assert reason(png_header(30000, 30000)).startswith(f"30000 x 30000 pixels is larger than the limit of {MAX_PIXELS}")
    assert pillows_limit == Image.MAX_IMAGE_PIXELS
    assert decode(encoded(gradient())).shape == (32, 48, 3)


def test_a_damaged_file_raises_nothing_but_image_error() -> None:
    random = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = encoded(gradient(), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for at in random.integers(0, min(len(data), 300), 3):
                damaged[at] = random.integers(256)
            try:
                pixels = decode(bytes(damaged))
            except ImageError:
                continue
            assert pixels.shape[2] == 3


# --- memory ---


@pytest.mark.parametrize(
    "data",
    [
        encoded(gradient()),
        encoded(Image.fromarray(gradient()).convert("P"), transparency=bytes(range(256))),
        encoded(Image.fromarray(gradient()).convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(gradient()).convert("LAB"), "TIFF"),
        encoded(Image.fromarray(gradient()).convert("1")),
        encoded(np.dstack([gradient(), gradient()[..., 0]])),
        encoded(gradient()[..., 0].astype(np.uint16) * 257, transparency=257 * 5),
        encoded(gradient()[..., 0].astype(np.int32) * 257, "TIFF"),
        encoded(gradient()[..., 0].astype(np.float32) / 255, "TIFF"),
        encoded(gradient()[..., 0].astype(np.uint16) * 257, "PPM"),
    ],
    ids=["RGB", "P+tRNS", "CMYK", "LAB", "1", "RGBA", "I;16+tRNS", "I", "F", "PPM"],
)
def test_a_picture_that_is_converted_in_strips_is_the_same(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode(data)
    for pixels in (1, 48 * 5, 48 * 31):
        monkeypatch.setattr(images, "_STRIP_PIXELS", pixels)
        np.testing.assert_array_equal(decode(data), whole)


def test_white_is_looked_for_in_all_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_STRIP_PIXELS", 1)
    assert decode(encoded(np.array([[10], [300]], np.int32), "TIFF")).max() == 1, "of 65535, though the first is 8 bits"
    for values in ([[0.5], [np.nan]], [[np.nan], [0.5]], [[0.5], [1e9]]):
        assert "none is known to be white" in reason(encoded(np.array(values, np.float32), "TIFF"))


def test_pictures_that_are_too_large_together_are_unpacked_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 2 * 48 * 32 - 1)
    data, inside, most = encoded(gradient()), 0, 0
    begun = threading.Event()

    def look() -> None:
        nonlocal inside, most
        with decoded(data) as pixels:
            inside += 1
            most = max(most, inside)
            begun.wait(0.05)  # nobody sets it: time for another to come in
            assert pixels.shape == (32, 48, 3)
            inside -= 1

    threads = [threading.Thread(target=look) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_pictures_that_are_small_together_are_unpacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 2 * 48 * 32)
    meeting = threading.Barrier(2, timeout=60)
    met: list[int] = []

    def look() -> None:
        with decoded(encoded(gradient())):
            met.append(meeting.wait())

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(met) == [0, 1]


def test_a_picture_that_fails_or_whose_user_fails_makes_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 32)
    for _ in range(3):
        with pytest.raises(ImageError), decoded(encoded(gradient(), "JPEG")[:-60]):
            pass
        with pytest.raises(ImageError, match="larger than the limit"), decoded(encoded(gradient(64))):
            pass
        with pytest.raises(ImageError, match="0 bytes"), decoded(b""):
            pass
        with pytest.raises(ZeroDivisionError), decoded(encoded(gradient())):
            _ = 1 / 0
        with decoded(encoded(gradient())) as pixels:
            assert pixels.shape == (32, 48, 3)


def test_a_file_that_is_too_large_to_be_an_image_is_refused_by_its_length() -> None:
    refuse_large_file(MAX_BYTES)
    with pytest.raises(ImageError, match=f"{10**12} bytes is larger than any image within the limit"):
        refuse_large_file(10**12)
