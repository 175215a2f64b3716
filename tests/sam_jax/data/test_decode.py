"""Tests of reading files and decoding images: EXIF orientations, and messages."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from sam_jax.data import decode
from sam_jax.data.example import BadSample, count_reasons


def jpeg(size, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", size[::-1]).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("decode_size", [None, (16, 16)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_must_be_known_to_fit_the_upright_image(orientation, decode_size):
    long, square = jpeg((40, 60), orientation), jpeg((50, 50), orientation)
    assert decode.decode_image(long, None, decode_size).ndim == 3
    if orientation == 1:
        decode.decode_image(square, (50, 50), decode_size)
        return
    turned = f"it is turned by its EXIF orientation {orientation}"
    with pytest.raises(BadSample, match=f"turned image: {turned}.*remove the orientation"):
        decode.decode_image(square, (50, 50), decode_size)
    if orientation in (5, 6, 7, 8):
        decode.decode_image(long, (60, 40), decode_size)  # masks of the upright image
        with pytest.raises(BadSample, match=f"size mismatch: .*; {turned}, and its masks are not"):
            decode.decode_image(long, (40, 60), decode_size)
    else:
        with pytest.raises(BadSample, match="turned image"):
            decode.decode_image(long, (40, 60), decode_size)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, "/dev/zero"):
        for read in (decode.read_file, lambda path, kind: decode.read_range(path, 0, 9, kind)):
            with pytest.raises(BadSample, match=r"missing file: .* is not a regular file"):
                read(str(path), decode.IMAGE_FILE)


def test_no_more_is_allocated_than_a_file_has(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(BadSample, match="cut short: it ends 268435449 bytes early"):
        decode.read_range(str(tmp_path / "a"), 2, 268435452, decode.IMAGE_FILE)


def test_messages_have_no_addresses():
    for error in (BadSample("broken image", f"no {object()}"),):
        assert str(error) == "broken image: no <object object>"
        assert pickle.loads(pickle.dumps(error)).detail == error.detail
    assert BadSample("broken image", "at 0x7f.jpg").detail == "at 0x7f.jpg"


def test_reasons_are_counted_in_a_fixed_order():
    problems = [BadSample(reason, "") for reason in ("no masks", "empty mask", "no masks")]
    assert list(count_reasons(problems).items()) == [("empty mask", 1), ("no masks", 2)]


@pytest.mark.parametrize("value", [0, -1, 2**27, 1.5, True, "2", None, float("nan"), [3]])
def test_sizes_are_whole_numbers(value):
    for size in ((value, 2), (2, value)):
        with pytest.raises(BadSample, match="height and width must be whole numbers; got"):
            decode.check_size(*size)
    assert decode.check_size(20.0, 30) == (20, 30)
    with pytest.raises(BadSample, match="at most 67108864 pixels"):
        decode.check_size(1e5, 1e5)


def test_json_is_parsed_with_nan_and_within_a_depth():
    assert np.isnan(decode.parse_json(b"[NaN]", "a.json")[0])
    with pytest.raises(BadSample, match=r"a\.json is nested too deeply"):
        decode.parse_json(b"[" * 100_000, "a.json")
    for data in (b"", b"{", b"\xff", b'{"a": 1' + b"0" * 5000 + b"}"):
        with pytest.raises(BadSample, match=r"broken json: a\.json: "):
            decode.parse_json(data, "a.json")
