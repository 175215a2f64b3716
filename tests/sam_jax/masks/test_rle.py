"""Tests of COCO run lengths: known strings, round trips, and malformed RLEs."""

import re
import tracemalloc
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_jax.masks import rle
from sam_jax.masks.rle import MAX_PIXELS, RLEError
from tests.fuzzed_rle import fuzzed

FUZZ_INPUTS = 100_000  # 6 seconds

# Sizes, run lengths and the known strings.
HAND_COMPUTED = [
    ([2, 3], [2, 3, 1], "231"),
    ([2, 2], [0, 4], "04"),
    ([2, 2], [4], "4"),
    ([2, 2], [1, 1, 1, 1], "1110"),  # the fourth run is stored as 1 - 1
    ([1, 9], [2, 2, 4, 1], "224O"),  # 1 - 2 = -1: five ones, 31 + 48
    ([1, 7], [1, 2, 1, 1, 2], "121O1"),  # the fifth run as 2 - 1
    ([1, 15], [15], "?"),  # the largest number that fits in one group
    ([1, 16], [16], "`0"),  # a single group would have the sign bit set
    ([1, 100], [100], "T3"),  # 4 + 3 * 32
    ([1, 511], [511], "o?"),
    ([1, 512], [512], "P`0"),
    ([1, 35], [0, 17, 1, 1, 16], "0a01@?"),  # 1 - 17 = -16: the smallest in one group
    ([1, 36], [0, 18, 1, 1, 16], "0b01_O?"),  # 1 - 18 = -17
    ([0, 5], [0], "0"),
    ([5, 0], [0], "0"),
]


@pytest.mark.parametrize(("size", "lengths", "counts"), HAND_COMPUTED)
def test_known_strings(size, lengths, counts):
    compressed = {"size": size, "counts": counts}
    mask = rle.decode({"size": size, "counts": lengths})
    assert mask.shape == tuple(size)
    assert mask.dtype == np.bool_
    assert rle.encode(mask) == compressed
    np.testing.assert_array_equal(rle.decode(compressed), mask)
    np.testing.assert_array_equal(rle.decode({"size": size, "counts": counts.encode()}), mask)
    np.testing.assert_array_equal(rle.runs(compressed), lengths)
    assert rle.runs(compressed).dtype == np.int64
    area = rle.area(compressed)
    assert area == sum(lengths[1::2])
    assert type(area) is int  # JSON cannot encode NumPy numbers


def test_bounds_of_the_runs_inside():
    padded = {"size": [2, 4], "counts": [1, 0, 1, 2, 0, 1, 3]}
    assert rle.bounds(padded).tolist() == [[2, 4], [4, 5]]
    assert rle.bounds({"size": [2, 4], "counts": [0, 8]}).tolist() == [[0, 8]]
    assert rle.bounds({"size": [2, 4], "counts": [8]}).shape == (0, 2)


def test_largest_mask():
    full = {"size": [2**13, 2**13], "counts": "0PPPPP2"}  # five groups of zeros, then 2 * 2**25
    assert rle.encode(np.ones((2**13, 2**13), bool)) == full
    assert rle.area(full) == MAX_PIXELS


def test_columns_first_and_zeros_first():
    mask = np.array([[False, True, True], [False, True, False]])
    assert rle.encode(mask) == {"size": [2, 3], "counts": "231"}
    np.testing.assert_array_equal(rle.decode({"size": [2, 3], "counts": [2, 3, 1]}), mask)
    assert rle.encode(~mask) == {"size": [2, 3], "counts": "023O"}


def test_empty_runs_in_the_middle_are_read():
    padded = {"size": [1, 5], "counts": [1, 0, 2, 2]}
    np.testing.assert_array_equal(rle.decode(padded)[0], [0, 0, 0, 1, 1])
    assert rle.area(padded) == 2


def test_no_runs_for_no_pixels():
    for counts in ("", b"", [], [0], "0"):
        assert rle.decode({"size": [0, 7], "counts": counts}).shape == (0, 7)


def test_numpy_integers_and_tuples_are_read():
    numbers = {"size": (np.int8(100), np.uint8(100)), "counts": (np.int32(9999), np.uint64(1))}
    assert rle.area(numbers) == 1
    assert rle.decode(numbers)[99, 99]


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)))
def test_round_trip(mask):
    encoded = rle.encode(mask)
    np.testing.assert_array_equal(rle.decode(encoded), mask)
    assert rle.area(encoded) == mask.sum()
    lengths = rle.runs(encoded)
    assert lengths.sum() == mask.size
    assert (lengths[1:] > 0).all()
    uncompressed = {"size": encoded["size"], "counts": lengths.tolist()}
    np.testing.assert_array_equal(rle.decode(uncompressed), mask)


@given(st.lists(st.integers(0, 2**14), min_size=1, max_size=30))
def test_round_trip_of_long_runs(lengths):
    lengths = [lengths[0], *(length + 1 for length in lengths[1:])]
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    encoded = rle.encode(flat[None])
    np.testing.assert_array_equal(rle.runs(encoded), lengths)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided", "flipped"])
def test_memory_layout_does_not_matter(layout):
    mask = np.random.default_rng(0).random((37, 53)) < 0.3
    same = {
        "rows": np.ascontiguousarray(mask),
        "columns": np.asfortranarray(mask),
        "strided": np.repeat(np.repeat(mask, 2, axis=0), 3, axis=1)[::2, ::3],
        "flipped": np.ascontiguousarray(mask[::-1, ::-1])[::-1, ::-1],
    }[layout]
    assert rle.encode(same) == rle.encode(mask)
    np.testing.assert_array_equal(rle.decode(rle.encode(same)), mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 2), np.uint8), "'h w' bool, got uint8 of shape (2, 2)"),
        (np.zeros((1, 2, 2), bool), "'h w' bool, got bool of shape (1, 2, 2)"),
        (np.zeros(4, bool), "got bool of shape (4,)"),
        (np.broadcast_to(False, (2**13 + 1, 2**13)), "at most 67108864 pixels"),
    ],
)
def test_encode_rejects_other_shapes_and_dtypes(mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rle.encode(mask)


MALFORMED = {
    "not a dict": ([1, 2], "got a list of 2"),
    "no counts": ({"size": [2, 2]}, "'size' and 'counts', got a dict of 1"),
    "no size": ({"counts": "4"}, "'size' and 'counts'"),
    "size is a str": ({"size": "22", "counts": "4"}, "two ints [h, w], got a str"),
    "size of three": ({"size": [2, 2, 1], "counts": "4"}, "got a list of 3"),
    "size of one": ({"size": [4], "counts": "4"}, "got a list of 1"),
    "size is nothing": ({"size": None, "counts": "4"}, "got a NoneType"),
    "float side": ({"size": [2.0, 2], "counts": "4"}, "got 2.0"),
    "nan side": ({"size": [2, float("nan")], "counts": "4"}, "got nan"),
    "bool side": ({"size": [True, 4], "counts": "4"}, "got True"),
    "str side": ({"size": ["2", 2], "counts": "4"}, "got a str"),
    "negative side": ({"size": [-2, -2], "counts": "4"}, "from 0 to 67108864, got -2"),
    "huge side": ({"size": [10**5000, 0], "counts": "0"}, "got an int of 16610 bits"),
    "long side": ({"size": [2**26 + 1, 0], "counts": "0"}, "got 67108865"),
    "many pixels": ({"size": [2**13 + 1, 2**13], "counts": "0"}, "8193 * 8192: at most 67108864"),
    "product past int32": (
        {"size": [np.int32(2**16), np.int32(2**16)], "counts": "0"},
        "65536 * 65536: at most",
    ),
    "counts is nothing": ({"size": [2, 2], "counts": None}, "got a NoneType"),
    "counts is a number": ({"size": [2, 2], "counts": 4}, "got 4"),
    "counts is a dict": ({"size": [2, 2], "counts": {0: 4}}, "got a dict of 1"),
    "float count": ({"size": [2, 2], "counts": [4.0]}, "counts[0] must be an int from 0 to 4, got"),
    "nan count": ({"size": [2, 2], "counts": [4, float("nan")]}, "counts[1]"),
    "bool count": ({"size": [1, 1], "counts": [False, True]}, "counts[0]"),
    "numpy bool count": ({"size": [1, 1], "counts": [0, np.True_]}, "counts[1]"),
    "str count": ({"size": [2, 2], "counts": ["4"]}, "got a str"),
    "nested counts": ({"size": [2, 2], "counts": [[4]]}, "got a list of 1"),
    "negative count": ({"size": [2, 2], "counts": [5, -1]}, "counts[0] must be an int from 0 to 4"),
    "count -1": ({"size": [2, 2], "counts": [3, -1, 2]}, "counts[1] must be an int from 0 to 4"),
    "huge count": ({"size": [2, 2], "counts": [10**5000]}, "an int of 16610 bits"),
    "count past int64": ({"size": [2, 2], "counts": [2**64 + 4]}, "an int of 65 bits"),
    "sum too small": ({"size": [2, 2], "counts": [1, 2]}, "sum to 2 * 2 = 4, got 3"),
    "sum too large": ({"size": [2, 2], "counts": [4, 4]}, "sum to 2 * 2 = 4, got 8"),
    "no runs": ({"size": [2, 2], "counts": []}, "got 0"),
    "empty str": ({"size": [2, 2], "counts": ""}, "got 0"),
    "list of many runs": ({"size": [2, 2], "counts": [4, 0, 0, 0, 0, 0]}, "at most 5 runs, got 6"),
    "str of many runs": ({"size": [2, 2], "counts": "400000"}, "at most 5 runs, got 6"),
    "str sum": ({"size": [2, 2], "counts": "12"}, "sum to 2 * 2 = 4, got 3"),
    "str below 48": ({"size": [2, 2], "counts": "4/"}, "counts[1] must be a character from 48"),
    "str above 111": ({"size": [2, 2], "counts": "p"}, "counts[0] must be a character from 48"),
    "NUL": (
        {"size": [2, 2], "counts": b"4\0"},
        "counts[1] must be a character from 48 to 111, got 0",
    ),
    "byte 255": ({"size": [2, 2], "counts": b"4\xff"}, "got 255"),
    "not ASCII": ({"size": [2, 2], "counts": "4é"}, "counts[1] must be a character"),
    "lone surrogate": ({"size": [2, 2], "counts": "4\udc80"}, "counts[1] must be a character"),
    "fullwidth digit": ({"size": [2, 2], "counts": "\uff14"}, "counts[0] must be a character"),
    "cut short": ({"size": [2, 2], "counts": "4P"}, "cut short: 'P' at its end"),
    "all continued": ({"size": [2, 2], "counts": "oooo"}, "cut short"),
    "seven groups": ({"size": [2, 2], "counts": "TPPPPP0"}, "at most 6 characters, got 7"),
    "seventy groups": ({"size": [2, 2], "counts": "P" * 69 + "4"}, "at most 6 characters, got 70"),
    "negative run": ({"size": [2, 2], "counts": "5O"}, "run 0 must be 0 to 4 pixels long, got 5"),
    "run -1": ({"size": [2, 2], "counts": "3O2"}, "run 1 must be 0 to 4 pixels long, got -1"),
    "negative by difference": ({"size": [2, 2], "counts": "112N"}, "run 3 must be 0 to 4"),
    "longest number": ({"size": [2, 2], "counts": "ooooo?"}, "got 536870911"),
    "lowest number": ({"size": [2, 2], "counts": "PPPPP@"}, "got -536870912"),
}


@pytest.mark.parametrize("read", [rle.runs, rle.area, rle.decode, rle.compress, rle.uncompress])
@pytest.mark.parametrize(("malformed", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_rles_are_errors(read, malformed, message):
    with pytest.raises(RLEError) as error:
        read(malformed)
    assert message in str(error.value)
    assert len(str(error.value)) < 200


def test_six_groups_are_read():
    assert rle.area({"size": [2, 2], "counts": "0TPPPP0"}) == 4  # 4 with five empty groups after it


def test_nothing_is_decoded_before_the_checks():
    side = 2**13
    wrong = [
        {"size": [side, side], "counts": "0PPPPP1"},
        {"size": [side, side], "counts": [0, MAX_PIXELS - 1]},
        {"size": [side, side], "counts": "ooooo?" * 1000},
        {"size": [side, side + 1], "counts": "0PPPPP2"},
        {"size": [2, 2], "counts": "0" * 100_000},
        {"size": [2, 2], "counts": "PPPPPP" * 10_000 + "1"},
    ]
    for malformed in wrong:
        assert _peak_memory(malformed) < 4_000_000  # bytes; a decoded mask would take 67,108,864
    assert _peak_memory({"size": [side, side], "counts": "0PPPPP2"}, rle.area) < 100_000


def test_fuzzed_strings_are_masks_or_errors():
    """Checks that every string gives a mask or an RLEError."""
    masks = 0
    for string in fuzzed(FUZZ_INPUTS):
        try:
            lengths = rle.runs(string)
        except RLEError:
            continue
        masks += 1
        assert lengths.min() >= 0
        assert rle.decode(string).sum() == lengths[1::2].sum()
    assert FUZZ_INPUTS / 5 < masks < FUZZ_INPUTS / 2


def _peak_memory(malformed, read=rle.decode) -> int:
    tracemalloc.start()
    try:
        read(malformed)
    except RLEError:
        pass
    else:
        assert read is rle.area
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


# Another size.

SIDES = st.integers(1, 40)


def resized(mask, shape):
    """Resizes a mask by nearest neighbor in exact arithmetic."""
    rows, columns = (
        [int((Fraction(2 * i + 1, 2) * old) // new) for i in range(new)]
        for old, new in zip(mask.shape, shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


@given(
    hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)),
    st.tuples(SIDES, SIDES),
)
def test_another_size_has_the_nearest_pixels(mask, shape):
    actual = rle.decode_resized(rle.encode(mask), shape)
    assert actual.dtype == np.bool_
    assert actual.shape == shape
    np.testing.assert_array_equal(actual, resized(mask, shape))


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.lists(st.integers(0, 90), max_size=30))
def test_another_size_of_long_and_empty_runs(size, shape, lengths):
    pixels = size[0] * size[1]
    ends = np.minimum(np.cumsum([0, *lengths]), pixels)[: pixels + 1]
    uncompressed = {"size": size, "counts": np.diff(ends, append=pixels).tolist()}
    expected = resized(rle.decode(uncompressed), shape)
    np.testing.assert_array_equal(rle.decode_resized(uncompressed, shape), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 4), (7, 9), (14, 18), (100, 200)])
@pytest.mark.parametrize("size", [(7, 9), (1, 9), (7, 1), (1, 1)])
def test_another_size_of_empty_and_full_masks(size, shape):
    for value in (False, True):
        encoded = rle.encode(np.full(size, value))
        np.testing.assert_array_equal(
            rle.decode_resized(encoded, shape), np.full(shape, value, bool)
        )


def test_another_size_of_known_masks():
    mask = np.array([[1, 0, 0, 0], [0, 0, 1, 1]], bool)
    encoded = rle.encode(mask)
    np.testing.assert_array_equal(rle.decode_resized(encoded, (2, 4)), mask)
    np.testing.assert_array_equal(rle.decode_resized(encoded, (1, 2)), [[0, 1]])  # [1, 1], [1, 3]
    twice = np.repeat(np.repeat(mask, 2, axis=0), 2, axis=1)
    np.testing.assert_array_equal(rle.decode_resized(encoded, (4, 8)), twice)
    # The centers are 2/3, 2, 10/3 of 4 columns, and 1/3, 1, 5/3 of 2 rows.
    np.testing.assert_array_equal(
        rle.decode_resized(encoded, (3, 3)), [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    )


def test_a_large_mask_at_another_size():
    """Uses positions that need 26 bits. The mask must not be decoded at its original size."""
    side = 2**13
    mask = np.zeros((side, side), bool)
    mask[side // 2 :, side // 4 :] = True
    encoded = rle.encode(mask)
    expected = np.zeros((8, 8), bool)
    expected[4:, 2:] = True
    tracemalloc.start()
    np.testing.assert_array_equal(rle.decode_resized(encoded, (8, 8)), expected)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000  # bytes; the mask would take 67,108,864


@pytest.mark.parametrize(("malformed", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_rles_are_errors_at_another_size(malformed, message):
    with pytest.raises(RLEError) as error:
        rle.decode_resized(malformed, (3, 3))
    assert message in str(error.value)


def test_encoding_bits_equals_encoding_the_mask():
    """Uses parts at random positions, of which several extend beyond the mask."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        columns, rows = int(rng.integers(1, width - x + 3)), 8 * int(rng.integers(1, 7))
        mask = np.zeros((height, width), bool)
        inside = mask[y : y + rows, x : x + columns]
        inside[:] = rng.random(inside.shape) < rng.choice([0, 0.1, 0.5, 0.9, 1])
        part = np.zeros((columns, rows), bool)
        part[: inside.shape[1], : inside.shape[0]] = inside.T
        bits = np.packbits(part, axis=1, bitorder="little")
        found = rle.encode_bits(bits, (x, y), (height, width))
        assert rle.compress(found) == rle.encode(mask)
        assert found == rle.uncompress(rle.encode(mask))
