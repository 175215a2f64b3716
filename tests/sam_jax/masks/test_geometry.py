"""Tests centers and hulls of masks, also against the corners of all pixels."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given

from sam_jax.masks import rle
from sam_jax.masks.geometry import center, hull_area


def drawn(text):
    """Returns the RLE of a mask given as text."""
    return rle.encode(np.array([[c == "#" for c in row] for row in text.split()]))


HAND_COMPUTED = {
    "a pixel": ("... ..# ...", (2.5, 1.5), 1),
    "a line": (".... ####", (2, 1.5), 4),
    "a column": ("#. #. #.", (0.5, 1.5), 3),
    "a rectangle": (".... .##. .##. .##.", (2, 2.5), 6),
    "the full image": ("### ###", (1.5, 1), 6),
    "a corner is missing": ("##. #.. ...", (0.5 + 1 / 3, 0.5 + 1 / 3), 3.5),
    "a hole": ("### #.# ###", (1.5, 1.5), 9),
    "two corners": ("#.. ... ..#", (1.5, 1.5), 5),  # the square without two triangles of area 2
    "a run continues at the top of the next column": (".# .# #.", (1.5 - 1 / 3, 1.5), 4.5),
}


@pytest.mark.parametrize(("text", "xy", "area"), HAND_COMPUTED.values(), ids=HAND_COMPUTED)
def test_known_centers_and_hulls(text, xy, area):
    mask = drawn(text)
    assert center(mask) == pytest.approx(xy, abs=1e-15)
    assert hull_area(mask) == area
    assert type(hull_area(mask)) is float
    uncompressed = {"size": tuple(mask["size"]), "counts": rle.runs(mask).tolist()}
    assert center(uncompressed) == center(mask)
    assert hull_area(uncompressed) == area


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_results_equal_those_of_all_pixel_corners(mask):
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return
    encoded = rle.encode(mask)
    assert center(encoded) == pytest.approx((columns.mean() + 0.5, rows.mean() + 0.5))
    corners = {(x + i, y + j) for x, y in zip(columns, rows, strict=True) for i, j in SQUARE}
    assert hull_area(encoded) == area_of_hull(sorted(corners))


SQUARE = ((0, 0), (0, 1), (1, 0), (1, 1))


def area_of_hull(points):
    """Computes the area of the hull of sorted points with Andrew's monotone chain."""
    hull = chain(points)[:-1] + chain(points[::-1])[:-1]
    return abs(sum(turn((0, 0), a, b) for a, b in zip(hull, hull[1:] + hull[:1], strict=True))) / 2


def chain(points):
    kept = []
    for point in points:
        while len(kept) > 1 and turn(*kept[-2:], point) <= 0:
            kept.pop()
        kept.append(point)
    return kept


def turn(a, b, c):
    """Returns twice the area of a triangle, negative if it is clockwise."""
    return int((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


@pytest.mark.parametrize("size", [(1, 2**26), (2**26, 1), (2**13, 2**13), (3, 2**24)])
def test_the_largest_masks_are_exact(size):
    full = {"size": list(size), "counts": [0, size[0] * size[1]]}
    assert hull_area(full) == size[0] * size[1]
    assert center(full) == (size[1] / 2, size[0] / 2)


@pytest.mark.parametrize("measure", [center, hull_area])
def test_errors_name_the_problem(measure):
    with pytest.raises(ValueError, match=r"mask of size \[2, 3\] must have pixels; it is empty"):
        measure({"size": [2, 3], "counts": [6]})
    with pytest.raises(rle.RLEError, match=r"sum to 2 \* 3 = 6, got 5"):
        measure({"size": [2, 3], "counts": [5]})
