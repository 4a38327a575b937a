"""Images as a dataset stores them, and what a model is shown of one.

The stored bytes are the source's own. A model is shown the first frame in RGB, turned as EXIF says, with transparent
places white. Teacher and student get it from this one function, so they are shown the same pixels.

A stranger chose the bytes: the format is one of a few, and the number of pixels is known before any is decoded.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from .errors import ColdstillError

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_PIXELS = 1 << 26
"""200 MB as RGB."""
MAX_IMAGE_BYTES = 64 << 20

_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
"""MIME types of the formats that are read. Telephones store their pictures as MPO: a JPEG with smaller copies."""
ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "image/bmp": "bmp"}
"""The ending of a stored file of each type."""
FIRST_BYTES = 16
"""Enough for `type_of_first_bytes`."""
_FIRST_BYTES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/bmp": re.compile(rb"BM"),
}
_WANTED = "a whole PNG, JPEG, WebP, GIF or BMP image"
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")
_TRANSPARENT = {"RGBA", "LA", "PA", "La", "RGBa"}
_OPAQUE = {"1", "L", "P", "RGB", "CMYK", "YCbCr"}
"""Modes that become RGB without a loss but that of CMYK's gamut. 16-bit and float images would be clipped."""


class ImageUnreadable(ColdstillError):
    """The bytes are not a whole image of a format that is read.

    Fix: store the image again as PNG, JPEG or WebP, or remove the row from the source.
    """


class ImageUnsupported(ColdstillError):
    """The image has several frames, or a mode that RGB cannot show, such as 16 bits.

    Fix: store the frame that is meant, as 8-bit RGB.
    """


class ImageTooLarge(ColdstillError):
    """The image has more bytes or pixels than are read.

    Fix: store a smaller copy of the image.
    """


def type_of_first_bytes(data: bytes) -> str | None:
    """The MIME type that the first `FIRST_BYTES` of a file show, without PIL; None if it is none of those read."""
    return next((type_ for type_, pattern in _FIRST_BYTES.items() if pattern.match(data)), None)


def image_type(data: bytes, *, where: str) -> str:
    """The MIME type of an image, from its own bytes. Raises `ImageUnreadable`, `ImageUnsupported`, `ImageTooLarge`."""
    with _opened(data, where) as image:
        return _TYPES[str(image.format)]


def decoded(data: bytes, *, where: str) -> Image.Image:
    """The pixels that a model is shown, in mode RGB. `where`: the image's name in errors.

    Raises `ImageUnreadable`, `ImageUnsupported`, `ImageTooLarge`.
    """
    from PIL import Image, ImageOps

    with _opened(data, where) as opened:
        try:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode in _TRANSPARENT or "transparency" in image.info:
                image = image.convert("RGBA")
                shown = Image.new("RGB", image.size, "white")
                shown.paste(image, mask=image.getchannel("A"))
                return shown
            return image.convert("RGB")
        except Exception as error:  # a decoder may raise anything for bytes that somebody made up
            raise _unreadable(where, error) from None


def _opened(data: bytes, where: str) -> Image.Image:
    """The image with its header read, and no pixel decoded."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_IMAGE_BYTES:
        raise ImageTooLarge(where, found=f"{len(data):,} bytes", wanted=f"at most {MAX_IMAGE_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))
        frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise ImageTooLarge(where, found="more pixels than PIL reads", wanted=_pixels(MAX_IMAGE_PIXELS)) from None
    except UnidentifiedImageError:
        begin = f"bytes that begin with {data[:FIRST_BYTES]!r}" if data else "no bytes"
        raise ImageUnreadable(where, found=begin, wanted=_WANTED) from None
    except Exception as error:
        raise _unreadable(where, error) from None
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        found = f"{width:,} x {height:,} pixels"
        raise ImageTooLarge(where, found=found, wanted=_pixels(MAX_IMAGE_PIXELS), fix="store a smaller copy")
    if image.format != "MPO" and frames > 1:
        raise ImageUnsupported(where, found=f"{frames} frames", wanted="one", fix="store the frame that is meant")
    if image.mode not in _OPAQUE | _TRANSPARENT:
        modes = ", ".join(sorted(_OPAQUE | _TRANSPARENT))
        raise ImageUnsupported(
            where, found=f"mode {image.mode}", wanted=f"one of {modes}", fix="store it as 8-bit RGB, scaled as is meant"
        )
    return image


def _unreadable(where: str, error: Exception) -> ImageUnreadable:
    # Without the address of an object in memory: the text is part of a dataset.
    text = _ADDRESS.sub("the bytes", " ".join(str(error).split()))
    found = f"{type(error).__name__}: {text}"[:200]
    return ImageUnreadable(where, found=found, wanted=_WANTED)


def _pixels(number: int) -> str:
    return f"at most {number:,} pixels"
