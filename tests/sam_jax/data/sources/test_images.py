"""Tests of images without masks: files in folders, pixel formats, and broken files."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import BadSample, SourceError
from sam_jax.data.open import ImagesOnly, open_source

RAMP = np.arange(24 * 20, dtype=np.uint16).reshape(24, 20) * 130


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_files_are_found_recursively_and_sorted_by_name(tmp_path):
    pixels = np.zeros((8, 9, 3), np.uint8)
    for name in ("b.png", "a/2.JPG", "a/10.jpeg", "c.webp", ".hidden.png", ".cache/x.png"):
        write(tmp_path / name, pixels)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(f"images:{tmp_path}")
    names = [source.name(i) for i in range(len(source))]
    expected = ("a/10.jpeg", "a/2.JPG", "b.png", "c.webp")
    assert names == [str(tmp_path / name) for name in expected]
    assert source[1].image.shape == (8, 9, 3)
    assert source[1].masks == []
    assert pickle.loads(pickle.dumps(source)).name(2) == names[2]
    for index in (-1, 4):
        with pytest.raises(IndexError):
            source[index]


KINDS = {
    "gray": (RAMP // 256).astype(np.uint8),
    "sixteen bits": RAMP,
    "alpha": np.dstack([(RAMP // 256).astype(np.uint8)] * 3 + [np.full((24, 20), 7, np.uint8)]),
    "gray and alpha": np.dstack([(RAMP // 256).astype(np.uint8)] * 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_formats(tmp_path, kind):
    """Checks pixel formats. All files decode to the same gray pixels."""
    pixels = KINDS[kind].copy()
    if kind == "gray and alpha":
        pixels[..., 1] = 0
    write(tmp_path / "x.png", pixels)
    image = open_source(f"images:{tmp_path}").image(0)
    np.testing.assert_array_equal(image, np.dstack([(RAMP // 256).astype(np.uint8)] * 3))


def test_palettes_and_single_bits(tmp_path):
    black_and_white = Image.fromarray(np.eye(16, dtype=bool))
    black_and_white.save(tmp_path / "a.png")
    Image.fromarray(np.full((16, 16, 3), (9, 8, 7), np.uint8)).quantize(4).save(tmp_path / "b.png")
    source = open_source(f"images:{tmp_path}")
    np.testing.assert_array_equal(source.image(0)[..., 1], 255 * np.eye(16, dtype=np.uint8))
    assert source.image(1)[3, 3].tolist() == [9, 8, 7]


def test_broken_files_are_bad_samples(tmp_path):
    good = io.BytesIO()
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(good, "PNG")
    (tmp_path / "a.png").write_bytes(good.getvalue()[:40])
    (tmp_path / "b.jpg").write_bytes(b"text")
    (tmp_path / "c.png").write_bytes(b"")
    source = open_source(f"images:{tmp_path}")
    for index in range(3):
        with pytest.raises(BadSample) as error:
            source[index]
        assert error.value.reason == "broken image"


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="there is no folder"):
        open_source(f"images:{tmp_path / 'missing'}")
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(SourceError, match=r"end in \.jpg, \.jpeg, \.png, \.webp; there are none"):
        open_source(f"images:{tmp_path}")


def test_a_source_can_be_opened_without_its_masks():
    source = open_source("scenes:32x40")
    alone = open_source("scenes:32x40", masks=False)
    assert isinstance(alone, ImagesOnly)
    assert (len(alone), alone.name(3)) == (len(source), source.name(3))
    np.testing.assert_array_equal(alone[3].image, source[3].image)
    assert alone[3].masks == []
