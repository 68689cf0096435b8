"""Broken, odd and hostile pictures through the index, the worker pool and the decoder: each ends as declared.

Pixels are upright by EXIF, on white where they are transparent; of several pictures in a file they are the first's.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.helpers.patches import SPEC, plan_of
from tests.reliability.in_workers import measured
from vft.common.errors import UserError
from vft.common.types import MediaRef
from vft.config.data import DataConfig
from vft.data.budget import limits_of, plan_media
from vft.data.media.errors import MediaError
from vft.data.media.index import Index, build
from vft.data.media.patches import frames_of, load_patches
from vft.data.media.video import scan_file
from vft.data.workers import WorkerPool
from vft.models.qwen2_5_vl.processor import Qwen2_5Processor

COLOUR = (200, 100, 50)
DEADLINE_S = 60.0
SECONDS = 20.0
BOMB_MIB = 32
"""That a worker may take for a picture that is refused, over what it has when idle."""
PEAK_MIB = 1600
"""The same for one just below the limit: 89 million pixels, several times."""


@dataclass(frozen=True)
class Refused:
    """Left out for this reason, by the index or, where it is `late`, by the worker that decodes."""

    reason: str
    late: bool = False


@dataclass(frozen=True)
class Pixels:
    """Read, with this size and this colour in the middle."""

    width: int = 40
    height: int = 30
    colour: tuple[int, int, int] = COLOUR


RGB = Image.new("RGB", (40, 30), COLOUR)
BLUE = Image.new("RGB", (40, 30), (0, 0, 255))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
GREY = 124
"""Of COLOUR."""
WHITE = (255, 255, 255)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(99)))


def gif(canvas: int, frame: int) -> bytes:
    """A GIF file that claims sizes and holds one pixel."""
    screen = b"GIF89a" + struct.pack("<HHBBB", canvas, canvas, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"\x2c" + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x44\x01\0\x3b"


def sideways() -> Image.Exif:
    """Says that the picture is to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[274] = 6
    return exif


def png_with_text(key: str, text: str) -> bytes:
    """A PNG file with a text chunk before its pixels."""
    info = PngInfo()
    info.add_text(key, text)
    return saved(RGB, "PNG", pnginfo=info)


HUNDRED_MB = zlib.compress(bytes(100_000_000))
LARGE = Image.new("L", (9400, 9500), 7)
SEVERAL = {"save_all": True, "append_images": [BLUE] * 3}
CORPUS: Mapping[str, tuple[bytes, Pixels | Refused]] = {
    "jpeg.jpg": (saved(RGB, "JPEG"), Pixels()),
    "jpeg_called.png": (saved(RGB, "JPEG"), Pixels()),
    "cmyk.jpg": (saved(RGB.convert("CMYK"), "JPEG"), Pixels()),
    "grey.jpg": (saved(RGB.convert("L"), "JPEG"), Pixels(colour=(GREY,) * 3)),
    "turned_by_exif.jpg": (saved(RGB, "JPEG", exif=sideways()), Pixels(30, 40)),
    "turned_by_exif.tif": (saved(RGB, "TIFF", exif=sideways()), Pixels(30, 40)),
    "broken_exif.jpg": (saved(RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), Pixels()),
    "broken_exif.png": (png_with_text("Raw profile type exif", "exif\n8\nno hex"), Pixels()),
    "broken_xmp.png": (png_with_text("XML:com.adobe.xmp", 'tiff:Orientation="9"'), Pixels()),
    "16_bits_rgb.png": (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress((b"\0" + b"\xc8\0\x64\0\x32\0" * 40) * 30))
        + chunk(b"IEND", b""),
        Pixels(),
    ),
    "16_bits_grey.png": (saved(Image.fromarray(np.full((30, 40), 40_000, np.uint16)), "PNG"), Refused("not_a_picture")),
    "16_bits_grey.tif": (
        saved(Image.fromarray(np.full((30, 40), 40_000, np.uint16)), "TIFF"),
        Refused("not_a_picture"),
    ),
    "floats.tif": (saved(Image.fromarray(np.full((30, 40), 0.5, np.float32)), "TIFF"), Refused("not_a_picture")),
    "palette_with_alpha.png": (saved(RGB.quantize(8), "PNG", transparency=0), Pixels(colour=WHITE)),
    "rgba.png": (saved(RGB.convert("RGBA"), "PNG"), Pixels()),
    "transparent.png": (saved(Image.new("RGBA", (40, 30), (*COLOUR, 0)), "PNG"), Pixels(colour=WHITE)),
    "grey_with_alpha.png": (saved(RGB.convert("LA"), "PNG"), Pixels(colour=(GREY,) * 3)),
    "one_bit.png": (saved(Image.new("1", (40, 30), 1), "PNG"), Pixels(colour=WHITE)),
    "lossless.webp": (saved(RGB, "WEBP", lossless=True), Pixels()),
    "animated.gif": (saved(RGB, "GIF", **SEVERAL), Pixels()),
    "animated.webp": (saved(RGB, "WEBP", lossless=True, **SEVERAL), Pixels()),
    "animated.png": (saved(RGB, "PNG", **SEVERAL), Pixels()),
    "picture.bmp": (saved(RGB, "BMP"), Pixels()),
    "one_pixel.png": (saved(Image.new("RGB", (1, 1), COLOUR), "PNG"), Pixels(1, 1)),
    "a_line.png": (saved(Image.new("RGB", (10_000, 1), COLOUR), "PNG"), Pixels(10_000, 1)),
    "below_the_limit.png": (saved(LARGE, "PNG"), Pixels(9400, 9500, (7, 7, 7))),
    "bomb.png": (png(60_000, 60_000), Refused("too_large")),
    "bomb_just_above.png": (png(9460, 9460), Refused("too_large")),
    "bomb_2_to_31.png": (png(2**31 - 1, 2**31 - 1), Refused("too_large")),
    "bomb_canvas.gif": (gif(65_535, 1), Refused("too_large")),
    "bomb_frame.gif": (gif(40, 65_535), Refused("too_large")),
    "bomb.ppm": (b"P6 60000 60000 255\n" + bytes(100), Refused("too_large")),
    "bomb.bmp": (
        saved(RGB, "BMP")[:18] + struct.pack("<iiHH", 60_000, 60_000, 1, 24) + bytes(99),
        Refused("too_large"),
    ),
    "bomb_text.png": (png(40, 30, chunk(b"zTXt", b"a\0\0" + HUNDRED_MB)), Refused("not_a_picture")),
    "bomb_profile.png": (png(40, 30, chunk(b"iCCP", b"a\0\0" + HUNDRED_MB)), Refused("not_a_picture")),
    "no_width.png": (png(0, 10), Refused("not_a_picture")),
    "cut.jpg": (saved(NOISE, "JPEG")[:5000], Refused("decode_error", late=True)),
    "cut.png": (saved(NOISE, "PNG")[:5000], Refused("decode_error", late=True)),
    "cut.gif": (saved(NOISE, "GIF")[:5000], Refused("decode_error", late=True)),
    "cut.webp": (saved(NOISE, "WEBP")[:5000], Refused("not_a_picture")),
    "cut_header.jpg": (saved(RGB, "JPEG")[:30], Refused("not_a_picture")),
    "empty.jpg": (b"", Refused("empty")),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', Refused("not_a_picture")),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", Refused("not_a_picture")),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), Refused("not_a_picture")),
    "web_page.jpg": (b"<!DOCTYPE html><html>404</html>", Refused("not_a_picture")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, (data, _) in CORPUS.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def indexed(folder: Path) -> Index:
    refs = [MediaRef("image", folder / name) for name in CORPUS]
    return build(refs, folder / "cache", 1, DEADLINE_S, show_progress=False)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(1, DEADLINE_S) as pool:
        yield pool


@pytest.mark.parametrize("name", CORPUS)
def test_picture(folder: Path, indexed: Index, pool: WorkerPool, name: str) -> None:
    declared, ref = CORPUS[name][1], MediaRef("image", folder / name)
    refusal, seconds, peak_mib = pool.submit(measured, scan_file, "image", ref.path).result()
    assert seconds < SECONDS and peak_mib < BOMB_MIB
    try:
        info = indexed.info(ref)
    except MediaError as error:
        assert isinstance(declared, Refused) and not declared.late, str(error)
        assert error.reason == refusal.reason == declared.reason
        assert str(ref.path) in str(error) and len(str(error).splitlines()) == 1
        return
    plan = plan_of(ref, info, (0,), 28, 28)
    patches, seconds, peak_mib = pool.submit(measured, load_patches, plan, SPEC).result()
    assert seconds < SECONDS and peak_mib < PEAK_MIB, (seconds, peak_mib)
    if isinstance(declared, Refused):
        assert isinstance(patches, MediaError) and declared.late
        assert patches.reason == declared.reason and str(ref.path) in str(patches)
        return
    assert (info.width, info.height) == (declared.width, declared.height)
    (frame_CHW,) = frames_of(patches.pixels_PD, plan, SPEC)
    assert frame_CHW[:, 14, 14].tolist() == pytest.approx(declared.colour, abs=3)


def test_a_picture_too_narrow_for_the_model_is_named(folder: Path, indexed: Index) -> None:
    processor = Qwen2_5Processor(image_token=1, video_token=2, tokens_per_second=2.0)
    ref = MediaRef("image", folder / "a_line.png")
    with pytest.raises(UserError) as caught:
        plan_media([(ref, indexed.info(ref), limits_of(ref, DataConfig()))], processor, "records.jsonl:3")
    message = str(caught.value)
    assert message.startswith(f"records.jsonl:3: {ref.path}: ") and "10000 x 1" in message
