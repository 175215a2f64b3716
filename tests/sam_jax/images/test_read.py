"""Tests that images are read like Pillow reads them, within bounds, and that errors are clear."""

import io
import os
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sam_jax.images import read
from sam_jax.images.read import ImageError, read_image

SIZE = (45, 70)


def pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width, height):
    """Returns a PNG that has this size only in its header."""
    data = bytearray(encode(Image.new("RGB", (1, 1))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(data[:29]) + checksum(data[12:29]) + bytes(data[33:])


def checksum(chunk):
    return zlib.crc32(chunk).to_bytes(4, "big")


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


COLOR = Image.fromarray(pixels(*SIZE, 3))
MODES = {
    "RGB": encode(COLOR),
    "RGBA": encode(Image.fromarray(pixels(*SIZE, 4))),
    "LA": encode(Image.fromarray(pixels(*SIZE, 2), "LA")),
    "L": encode(COLOR.convert("L")),
    "1": encode(COLOR.convert("1")),
    "P": encode(COLOR.quantize(30)),
    "P with alpha": encode(Image.fromarray(pixels(*SIZE, 4)).quantize(30)),
    "JPEG": encode(COLOR, "JPEG"),
    "CMYK": encode(COLOR.convert("CMYK"), "JPEG"),
    "gray JPEG": encode(COLOR.convert("L"), "JPEG"),
    "WEBP": encode(COLOR, "WEBP", lossless=True),
    "WEBP with alpha": encode(Image.fromarray(pixels(*SIZE, 4)), "WEBP", lossless=True),
}


@pytest.mark.parametrize("strip", [1, 300, 1 << 22])
@pytest.mark.parametrize("mode", MODES)
def test_images_are_converted_in_strips_as_by_pillow(monkeypatch, mode, strip):
    monkeypatch.setattr(read, "STRIP_PIXELS", strip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about transparent palettes
        expected = by_pillow(MODES[mode])
    np.testing.assert_array_equal(read_image(MODES[mode]), expected)


@pytest.mark.parametrize("strip", [300, 1 << 22])
def test_sixteen_bits_keep_the_upper_eight(monkeypatch, strip):
    monkeypatch.setattr(read, "STRIP_PIXELS", strip)
    values = pixels(*SIZE, dtype=np.uint16)
    found = read_image(encode(Image.fromarray(values)))
    np.testing.assert_array_equal(found, np.repeat(values[..., None] >> 8, 3, axis=-1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_images_are_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(COLOR, format, exif=exif)
    np.testing.assert_array_equal(read_image(data), by_pillow(data))
    decoded = read.decode_file(io.BytesIO(data), "the image")
    assert decoded.orientation == orientation
    assert decoded.size == decoded.pixels.shape[:2] == (SIZE[::-1] if orientation > 4 else SIZE)


@pytest.mark.parametrize("tag", [0, 9, 77])
def test_unknown_orientations_are_upright(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    decoded = read.decode_file(io.BytesIO(encode(COLOR, exif=exif)), "the image")
    assert decoded.orientation == 1
    np.testing.assert_array_equal(decoded.pixels, np.asarray(COLOR))


@pytest.mark.parametrize("size", [(1, 600), (600, 1), (2, 999), (3, 3), (1, 1)])
@pytest.mark.parametrize("decode_size", [(256, 256), (8, 8), (1, 1)])
def test_thin_jpegs_are_decoded_smaller(size, decode_size):
    decoded = read.decode_file(
        io.BytesIO(encode(Image.new("RGB", size[::-1]), "JPEG")), "the image", decode_size
    )
    assert decoded.size == size
    assert all(side <= full for side, full in zip(decoded.pixels.shape, size, strict=False))


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "a.jpg"
    for content, message in (
        (b"", "is not a JPEG, PNG or WebP file"),
        (b"text", "is not a JPEG, PNG or WebP file"),
        (MODES["JPEG"][:-40], "is damaged"),
        (MODES["RGB"][:200], "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"a.jpg {message}"):
            read_image(path)
        with pytest.raises(OSError, match=f"the image {message}") as error:
            read_image(content)
        assert "0x" not in str(error.value)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", tmp_path / "link.jpg")
    for name in ("pipe", "link.jpg", "."):
        with pytest.raises(OSError, match="is not a regular file"):
            read_image(tmp_path / name)
    with pytest.raises(OSError, match="is not a regular file"):
        read_image("/dev/zero")
    for missing in (tmp_path / "missing", "null\0byte", "\ud800"):
        with pytest.raises(FileNotFoundError):
            read_image(missing)


@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 10_000), (30_000, 30_000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_rejected_before_they_are_decoded(size):
    with pytest.raises(ImageError, match="the image must have at most 67108864 pixels"):
        read_image(png_header(*size))


BOMBS = """
import resource, sys, warnings
from sam_jax.images.read import read_image

warnings.simplefilter("ignore")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in sys.stdin.buffer.read().split(b"<next>"):
    try:
        read_image(data)
    except (OSError, ValueError):
        print("rejected")
    else:
        print("read")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def bombs():
    """Returns small files that claim to be large, or have large compressed parts."""
    jpeg = bytearray(MODES["JPEG"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xea\x60\xea\x60"  # 60,000 by 60,000
    webp = bytearray(MODES["WEBP"])
    webp[21:25] = (16_382 | 16_382 << 14).to_bytes(4, "little")  # 16,383 by 16,383
    png = MODES["RGB"]
    zeros = zlib.compress(bytes(1 << 25))
    found = [png_header(30_000, 30_000), bytes(jpeg), bytes(webp)]
    for kind, data in ((b"iCCP", b"a\0\0" + zeros), (b"zTXt", b"a\0\0" + zeros)):
        chunk = kind + data
        chunk = len(data).to_bytes(4, "big") + chunk + checksum(chunk)
        found.append(png[:33] + chunk + png[33:])
    return found


def test_bombs_take_little_memory():
    result = subprocess.run(
        [sys.executable, "-c", BOMBS],
        input=b"<next>".join(bombs()),
        capture_output=True,
        timeout=300,
        check=True,
    )
    *verdicts, megabytes = result.stdout.decode().split()
    assert verdicts[:3] == ["rejected"] * 3
    assert int(megabytes) < 200, result.stdout
