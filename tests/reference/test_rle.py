"""Compares run lengths with pycocotools, byte for byte."""

import json
from pathlib import Path

import numpy as np
import pytest

from sam_jax.masks import rle
from tests.fuzzed_rle import fuzzed

coco = pytest.importorskip("pycocotools.mask")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]

COCO_EVAL = Path(__file__).parents[3] / "shared" / "realdata" / "coco_eval"


@pytest.mark.parametrize("order", ["C", "F"])
def test_random_masks(order):
    rng = np.random.default_rng(0)
    for _ in range(1500):
        mask = _random_mask(rng, *rng.integers(0, 120, 2))
        _assert_same(np.asarray(mask, order=order))


def test_large_masks():
    rng = np.random.default_rng(1)
    for shape in [(1500, 2250), (3000, 1), (1, 3000)]:
        _assert_same(rng.random(shape) < 0.5)
        _assert_same(_ellipse(*shape))
        _assert_same(np.zeros(shape, bool))
        _assert_same(np.ones(shape, bool))


def test_runs_of_every_number_of_characters():
    for bits in range(1, 25):
        for length in (2**bits - 1, 2**bits, 2**bits + 1):
            flat = np.repeat([False, True, False, True, False], [3, length, 1, 2, length])
            _assert_same(flat[None])


def test_uncompressed_rles():
    rng = np.random.default_rng(2)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        encoded = rle.encode(_random_mask(rng, height, width))
        uncompressed = {"size": [height, width], "counts": rle.runs(encoded).tolist()}
        compressed = coco.frPyObjects(uncompressed, height, width)
        assert compressed["counts"].decode() == encoded["counts"]
        np.testing.assert_array_equal(rle.decode(uncompressed), coco.decode(compressed))


def test_fuzzed_strings():
    """Compares the valid ones of 100,000 strings.

    pycocotools would read past the end of the invalid strings, so that it does not get them.
    """
    valid = {}
    for string in fuzzed(100_000):
        try:
            valid.setdefault(tuple(string["size"]), []).append((string, rle.decode(string)))
        except rle.RLEError:
            continue
    assert sum(map(len, valid.values())) > 20_000
    for masks in valid.values():
        strings, actual = map(list, zip(*masks, strict=True))
        expected = coco.decode(strings)  # 'h w n'
        np.testing.assert_array_equal(np.stack(actual, axis=-1), expected)
        canonical = [again["counts"].decode() for again in coco.encode(np.asfortranarray(expected))]
        assert [rle.encode(mask)["counts"] for mask in actual] == canonical


def test_real_strings():
    files = sorted(COCO_EVAL.glob("*.json"))
    if not files:
        pytest.skip(f"no COCO results in {COCO_EVAL}")
    strings = [found for file in files for found in _strings(json.loads(file.read_text()))]
    assert strings
    for real in strings:
        expected = coco.decode(real)
        np.testing.assert_array_equal(rle.decode(real), expected)
        assert rle.encode(expected == 1) == real
        assert rle.area(real) == coco.area(real)


def _assert_same(mask: np.ndarray) -> None:
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    actual = rle.encode(mask)
    assert actual == {"size": expected["size"], "counts": expected["counts"].decode()}
    np.testing.assert_array_equal(rle.decode(actual), mask)
    assert rle.area(actual) == coco.area(expected)


def _random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns noise of random density in blocks, so that runs of many lengths occur."""
    block = int(rng.integers(1, 12))
    coarse = rng.random((height // block + 1, width // block + 1)) < rng.random()
    return np.repeat(np.repeat(coarse, block, axis=0), block, axis=1)[:height, :width]


def _ellipse(height: int, width: int) -> np.ndarray:
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return x**2 + y**2 < 0.7


def _strings(node) -> list[dict]:
    """Returns all compressed RLEs in a JSON tree."""
    if isinstance(node, dict) and isinstance(node.get("counts"), str):
        return [{"size": node["size"], "counts": node["counts"]}]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [found for child in children for found in _strings(child)]
