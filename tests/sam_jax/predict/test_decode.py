"""Tests that objects and points are padded to few sizes. `test_predictor.py` tests decoding."""

import pytest

from sam_jax.model.sam import sam_tiny, sam_vit_b
from sam_jax.predict.decode import group_sizes, num_slots


@pytest.mark.parametrize("n", [1, 2, 4, 5, 31, 32, 33, 64, 100])
def test_groups_contain_all_objects_with_little_padding(n):
    sizes = group_sizes(n)
    assert set(sizes) <= {1, 4, 32}
    assert n <= sum(sizes) < n + 4


def test_few_numbers_of_slots_fit_all_points():
    assert [num_slots(k) for k in (0, 1, 2, 3, 11, 12, 27, 28, 59, 60)] == [
        *(2, 2, 2, 11, 11, 27, 27, 59, 59, 123)
    ]
    assert all(num_slots(k) >= k for k in range(1000))
    assert len({num_slots(k) for k in range(1000)}) == 8


def test_low_resolution_masks_have_four_pixels_per_token_side():
    assert sam_vit_b().low_res == (256, 256)
    assert sam_tiny().low_res == (32, 32)
