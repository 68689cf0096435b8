"""Pictures: their size without decoding, and their pixels, upright by EXIF and on white where they are transparent."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vft.common.errors import first_line
from vft.common.types import MediaInfo
from vft.data.media.errors import MediaError, check_file, check_size, too_large

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that PIL may try: none that runs other programs."""
EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by EXIF orientation; with any other value it is upright. PIL's exif_transpose also
rewrites the EXIF data, and fails if another entry in them is broken."""

_PIL_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error)


def scan_picture(path: Path) -> MediaInfo:
    """The size of a picture, upright.

    Raises:
        MediaError: the picture cannot be used.
    """
    with _open(path) as image:
        if image.mode[0] in "IF":  # the model's processor would clip these levels, which makes everything white
            text = f"has grey levels of more than 8 bits (PIL's mode {image.mode}); convert it to 8 bits"
            raise MediaError("not_a_picture", f"{path}: {text}")
        is_turned = image.format != "TIFF" and _orientation(path, image) >= 5  # PIL gives the turned size of a TIFF
        height, width = (image.width, image.height) if is_turned else (image.height, image.width)
        return MediaInfo("image", height, width)


def load_picture(path: Path, info: MediaInfo) -> Tensor:
    """The pixels, uint8 [3, H, W].

    Upright by EXIF orientation, as in transformers' `load_image` and in viewers; transparent parts are white, as in
    qwen-vl-utils 0.0.14 (`to_rgb`).

    Raises:
        MediaError: `changed` if the picture does not have the size of `info`; otherwise what is wrong with it.
    """
    with _open(path) as image:
        image.load()  # before reading its orientation: PIL turns a TIFF itself while loading
        rgb = _on_white(image)
        transposition = TRANSPOSITIONS.get(_orientation(path, image))
        rgb = rgb if transposition is None else rgb.transpose(transposition)
        if (rgb.height, rgb.width) != (info.height, info.width):
            sizes = f"is {rgb.height} x {rgb.width} (height x width), when indexed {info.height} x {info.width}"
            raise MediaError("changed", f"{path}: {sizes}; index it again")
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB on white, also if a palette or one colour of it is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _orientation(path: Path, image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    # PIL decodes a PNG to look for EXIF data behind the pixels: allow that only if there are some.
    may_decode = image.format != "PNG" or _has_late_text(path)
    with suppress(*_PIL_ERRORS):
        value = (image.getexif() if may_decode else Image.Image.getexif(image)).get(EXIF_ORIENTATION)
        return int(value) if value in TRANSPOSITIONS else 1
    return 1


def _has_late_text(path: Path) -> bool:
    """Whether a PNG file has chunks behind its pixels that may hold EXIF or XMP data."""
    with path.open("rb") as file:
        file.seek(8)
        after_pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if after_pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            after_pixels |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """An open picture whose size is known and whose pixels are not read yet. PIL's errors become MediaErrors."""
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size raises an error instead
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise too_large(path, "the picture") from error
    except _PIL_ERRORS as error:
        text = f"can't be read as a picture of {', '.join(FORMATS)}"
        raise MediaError("not_a_picture", f"{path}: {text}; download or convert it") from error
    with image:
        check_size(path, image.width, image.height)
        try:
            yield image
        except _PIL_ERRORS as error:
            raise MediaError("decode_error", f"{path}: {first_line(error)}; download it again") from error
