"""Pictures are seen upright and on white: turned as transformers' `load_image` does it, transparency as one computes it
by hand."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers.image_utils import load_image

from tests.helpers.patches import decode
from vft.common.types import MediaPlan, MediaRef
from vft.data.media.errors import MediaError
from vft.data.media.video import scan


def noise(mode: str = "RGB", height: int = 24, width: int = 40) -> Image.Image:
    """A picture that looks different however it is turned."""
    channels = {"RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4}[mode]
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels, mode)


def exif(orientation: int) -> Image.Exif:
    """EXIF data with this orientation."""
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def seen(*paths: Path) -> np.ndarray:
    """What vft decodes of a picture, or of several that are a video, uint8 [T, H, W, 3]."""
    ref = MediaRef("video", paths) if len(paths) > 1 else MediaRef("image", paths[0])
    info = scan(ref)
    clip = decode(MediaPlan(ref, info, tuple(range(info.num_frames)), info.height, info.width, (1, 1, 1), 1))
    assert clip.shape[-2:] == (info.height, info.width)
    return clip.permute(0, 2, 3, 1).numpy()


def save_plain(file: Path, orientation: int) -> None:
    noise().save(file, exif=exif(orientation))


def save_png_late(file: Path, orientation: int) -> None:
    """EXIF data behind the pixels, as the standard allows."""
    noise().save(file)
    data = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    content = file.read_bytes()
    file.write_bytes(content[:-12] + chunk + content[-12:])


def save_png_xmp(file: Path, orientation: int) -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>')
    noise().save(file, pnginfo=info)


def save_several(file: Path, orientation: int) -> None:
    """As phones do: further pictures behind the first one."""
    noise().save(file, "MPO", save_all=True, append_images=[noise()], exif=exif(orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("p.jpg", save_plain),
        ("p.png", save_plain),
        ("late.png", save_png_late),
        ("xmp.png", save_png_xmp),
        ("p.webp", save_plain),
        ("p.tif", save_plain),
        ("p.avif", save_plain),
        ("several.jpg", save_several),
    ],
)
def test_all_orientations(tmp_path: Path, name: str, save: Callable[[Path, int], None], orientation: int) -> None:
    file = tmp_path / name
    save(file, orientation)
    expected = np.asarray(load_image(str(file)))
    assert expected.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))  # or nothing would be compared
    assert np.array_equal(seen(file), expected[None])
    assert np.array_equal(seen(file, file), np.stack([expected] * 2))


def test_frames_that_are_turned_have_one_size_or_are_refused(tmp_path: Path) -> None:
    """Of a video kept as pictures: a size is what is seen, not what is stored."""
    noise().save(tmp_path / "0.jpg", exif=exif(6))
    noise(height=40, width=24).save(tmp_path / "1.jpg")
    assert seen(tmp_path / "0.jpg", tmp_path / "1.jpg").shape == (2, 40, 24, 3)
    noise().save(tmp_path / "2.jpg")
    with pytest.raises(MediaError, match=r"2\.jpg: is 40x24 but 0\.jpg is 24x40"):
        scan(MediaRef("video", (tmp_path / "0.jpg", tmp_path / "2.jpg")))


def test_a_picture_turned_since_it_was_indexed(tmp_path: Path) -> None:
    file = tmp_path / "p.jpg"
    noise().save(file)
    info = scan(MediaRef("image", file))
    noise().save(file, exif=exif(6))
    plan = MediaPlan(MediaRef("image", file), info, (0,), 24, 40, (1, 1, 1), 1)
    with pytest.raises(MediaError, match=r"is 40 x 24 .* when indexed 24 x 40"):
        decode(plan)


def on_white(rgba_HWC: np.ndarray) -> np.ndarray:
    """In floating point, by hand."""
    colour, alpha = rgba_HWC[..., :3].astype(float), rgba_HWC[..., 3:] / 255
    return colour * alpha + 255 * (1 - alpha)


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    for mode, name in (("RGBA", "p.png"), ("LA", "la.png"), ("RGBA", "p.webp"), ("RGBA", "p.tif")):
        image, file = noise(mode), tmp_path / name
        image.save(file, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
        np.testing.assert_allclose(seen(file)[0], on_white(np.asarray(image.convert("RGBA"))), atol=1)


def test_a_transparent_colour_is_white(tmp_path: Path) -> None:
    """A palette's entry, or one colour of all: none of both has an alpha channel."""
    image = Image.new("RGB", (40, 24), (10, 20, 30))
    image.paste((200, 100, 50), (0, 0, 20, 24))
    palette = image.quantize(2)
    hidden = palette.getpixel((0, 0))
    palette.save(tmp_path / "palette.png", transparency=hidden)
    palette.save(tmp_path / "palette.gif", transparency=hidden)
    palette.save(tmp_path / "some.png", transparency=bytes([0 if i == hidden else 128 for i in range(2)]))
    image.save(tmp_path / "rgb.png", transparency=(200, 100, 50))
    image.convert("L").save(tmp_path / "grey.png", transparency=image.convert("L").getpixel((0, 0)))
    for file in sorted(tmp_path.iterdir()):
        frame = seen(file)[0]
        assert (frame[:, :20] == 255).all(), file.name
        other = {"some.png": (132, 137, 142), "grey.png": (18,) * 3}.get(file.name, (10, 20, 30))
        assert np.abs(frame[:, 20:].astype(int) - other).max() <= 1, file.name


def test_the_first_of_several_pictures_is_laid_on_white(tmp_path: Path) -> None:
    first, second = Image.new("RGBA", (40, 24), (0, 0, 0, 0)), Image.new("RGBA", (40, 24), (9, 9, 9, 255))
    first.paste((200, 100, 50, 255), (0, 0, 20, 24))
    first.putpixel((39, 23), (1, 1, 1, 255))  # or a writer of WebP cuts off what is transparent
    for name in ("p.gif", "p.webp", "p.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        frame = seen(tmp_path / name)[0]
        assert (frame[:20, 22:] == 255).all(), name
        assert np.abs(frame[:, :18].astype(int) - (200, 100, 50)).max() <= 8, name


def test_colours_without_transparency_stay(tmp_path: Path) -> None:
    """CMYK as PIL turns it to RGB."""
    noise("CMYK").save(tmp_path / "p.jpg", quality=95)
    assert np.array_equal(seen(tmp_path / "p.jpg")[0], np.asarray(Image.open(tmp_path / "p.jpg").convert("RGB")))
