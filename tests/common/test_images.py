"""Laws of images: what a model is shown of each kind of file, and what is refused before a pixel is decoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from coldstill.common import images
from coldstill.common.images import ImageTooLarge, ImageUnreadable, ImageUnsupported, decoded, image_type
from tests.vision import image_bytes

EXIF_ORIENTATION = 0x0112


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def declared_png(width: int, height: int) -> bytes:
    """A PNG that declares a size, with almost no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("format", "type_"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("WEBP", "image/webp"),
        ("GIF", "image/gif"),
        ("BMP", "image/bmp"),
    ],
)
def test_the_type_is_read_from_the_bytes_and_the_image_is_rgb(format: str, type_: str) -> None:
    data = image_bytes(format=format)
    assert image_type(data, where="i") == type_
    shown = decoded(data, where="i")
    assert (shown.mode, shown.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_opaque_modes_are_converted(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    data = saved(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG", **({"quality": 100} if mode == "CMYK" else {}))
    stored = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(decoded(data, where="i")), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_places_are_white_whatever_color_they_hide(mode: str) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[1, 1] = (10, 20, 30, 0)
    image = Image.fromarray(pixels)
    data = saved(image.convert(mode)) if mode != "P" else saved(image.quantize(colors=8))
    shown = np.asarray(decoded(data, where="i"))
    assert shown[1, 1].tolist() == [255, 255, 255]
    assert shown[0, 0].tolist() == ([255, 0, 0] if mode != "LA" else [76, 76, 76])


def test_a_transparent_color_of_a_palette_or_of_gray_is_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    shown = np.asarray(decoded(saved(palette, transparency=0), where="i"))
    assert shown[0].tolist() == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_exif_is_applied_once(orientation: int) -> None:
    image = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = saved(image, exif=exif)
    shown = decoded(data, where="i")
    by_hand = {
        1: image,
        2: ImageOps.mirror(image),
        3: image.rotate(180),
        4: ImageOps.flip(image),
        5: ImageOps.mirror(image).rotate(90, expand=True),
        6: image.rotate(270, expand=True),
        7: ImageOps.mirror(image).rotate(270, expand=True),
        8: image.rotate(90, expand=True),
    }[orientation]
    assert np.array_equal(np.asarray(shown), np.asarray(by_hand))


def test_an_image_of_one_pixel_and_a_long_thin_one_are_shown() -> None:
    assert decoded(image_bytes(size=(1, 1)), where="i").size == (1, 1)
    assert decoded(image_bytes(size=(20_000, 1)), where="i").size == (20_000, 1)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    small = image_bytes()
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("a pixel was decoded"))
    for side in (8193, 20_000, 60_000):
        with pytest.raises(ImageTooLarge, match="pixels"):
            decoded(declared_png(side, side), where="i")
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ImageTooLarge, match="bytes"):
        image_type(small, where="i")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_several_frames_are_refused(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green")]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageUnsupported, match="2 frames"):
        decoded(data, where="i")
    assert decoded(saved(frames[0], format, save_all=True), where="i").size == (4, 4)


def test_the_picture_of_a_telephone_is_its_first_frame() -> None:
    large, small = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (2, 2), "blue")
    data = saved(large, "MPO", save_all=True, append_images=[small])
    assert image_type(data, where="i") == "image/jpeg"
    assert decoded(data, where="i").size == (8, 8)


def test_sixteen_bits_and_floats_are_refused() -> None:
    with pytest.raises(ImageUnsupported, match="I;16"):
        decoded(saved(Image.new("I;16", (4, 4))), where="i")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        image_bytes()[: len(image_bytes()) // 2],
        image_bytes(format="JPEG")[:-200],
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        declared_png(64, 64),
        saved(Image.new("RGB", (4, 4)), "TIFF"),
        saved(Image.new("RGB", (4, 4)), "PPM"),
    ],
)
def test_bytes_that_are_no_whole_image_are_a_named_error_without_a_place_in_memory(data: bytes) -> None:
    errors = []
    for _ in range(2):
        with pytest.raises(ImageUnreadable) as raised:
            decoded(data, where="i")
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert "0x" not in errors[0]


def test_a_cut_image_has_a_type_and_no_pixels() -> None:
    """The type is read without decoding, so a whole image is known only after `decoded`."""
    cut = image_bytes(size=(200, 200))[:2000]
    assert image_type(cut, where="i") == "image/png"
    with pytest.raises(ImageUnreadable):
        decoded(cut, where="i")
