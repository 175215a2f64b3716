"""Checks the distributions of one mask's prompts over thousands of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    NOT_A_POINT,
    TOP_LEFT,
)
from train.objectives.prompt_sampling import (
    Clicks,
    sample_click_on_error,
    sample_first_prompt,
    tight_box,
)

KEYS = jax.random.split(jax.random.key(0), 10_000)
SIZE = (400, 600)  # of the image, without its padding
MIN_P = 1e-3  # significance level; the keys are fixed, so the tests are deterministic


def box_mask(x0, y0, x1, y1, shape=(416, 640)):
    """Returns a rectangular mask with the given outermost pixels, inclusive."""
    mask = np.zeros(shape, bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


@pytest.fixture(scope="module")
def sample_first(jit):
    """A function that samples the first prompts of 10,000 keys, as numpy arrays."""

    def sample_one(key, mask, size, box_noise):
        return sample_first_prompt(key, mask, size, num_slots=5, box_noise=box_noise)

    sample_all = jit(jax.vmap(sample_one, (0, None, None, None)), static_argnums=3)

    def sample(mask, size=SIZE, box_noise="gaussian"):
        return jax.tree.map(
            np.asarray, sample_all(KEYS, mask, jnp.array(size, jnp.int32), box_noise)
        )

    return sample


def select_boxes(clicks):
    """Returns the boxes 'key 4' (x0, y0, x1, y1) among first prompts."""
    is_box = clicks.labels[:, 0] == TOP_LEFT
    return clicks.points[is_box, :2].reshape(-1, 4)


# The first prompt.


def test_points_and_boxes_have_equal_probability(sample_first):
    clicks = sample_first(box_mask(200, 100, 300, 150))
    is_box = clicks.labels[:, 0] == TOP_LEFT
    assert scipy.stats.binomtest(int(is_box.sum()), len(KEYS), 0.5).pvalue > MIN_P
    point, box = clicks.labels[~is_box], clicks.labels[is_box]
    np.testing.assert_array_equal(point[:, :2], np.tile([FOREGROUND, NOT_A_POINT], (len(point), 1)))
    np.testing.assert_array_equal(box[:, :2], np.tile([TOP_LEFT, BOTTOM_RIGHT], (len(box), 1)))
    np.testing.assert_array_equal(clicks.points[~is_box, 1], 0)  # of the padding point
    # The slots of later clicks are empty.
    assert clicks.points.shape == (len(KEYS), 5, 2)
    np.testing.assert_array_equal(clicks.labels[:, 2:], ABSENT)
    np.testing.assert_array_equal(clicks.points[:, 2:], 0)
    np.testing.assert_array_equal(clicks.count, 0)
    assert (clicks.points.dtype, clicks.labels.dtype) == (np.float32, np.int32)


def test_points_are_uniform_over_the_mask(sample_first):
    rng = np.random.default_rng(0)
    mask = box_mask(0, 0, 0, 0)
    mask[rng.integers(0, 400, 60), rng.integers(0, 600, 60)] = True
    clicks = sample_first(mask)
    x, y = clicks.points[clicks.labels[:, 0] == FOREGROUND, 0].astype(int).T
    assert mask[y, x].all()
    hits = np.zeros(mask.shape, int)
    np.add.at(hits, (y, x), 1)
    assert scipy.stats.chisquare(hits[mask]).pvalue > MIN_P


def test_choice_of_point_or_box_does_not_depend_on_the_mask(sample_first):
    kinds = [sample_first(box_mask(*box)).labels[:, 0] for box in [(9, 9, 9, 9), (3, 4, 400, 300)]]
    np.testing.assert_array_equal(*kinds)


def test_standard_deviation_of_gaussian_noise_is_a_tenth_of_the_sides(sample_first):
    """The standard deviations of a box of 100 by 50 pixels are 10 and 5. Noise is clipped at 20."""
    noise = select_boxes(sample_first(box_mask(200, 100, 300, 150))) - [200, 100, 300, 150]
    for column, deviation in enumerate([10, 5, 10, 5]):
        normal = noise[:, column] / deviation
        bound = 20 / deviation
        clipped = np.isclose(np.abs(normal), bound, rtol=1e-5)
        probability = 2 * scipy.stats.norm.sf(bound)
        assert np.abs(normal).max() <= bound * (1 + 1e-5)
        assert scipy.stats.binomtest(int(clipped.sum()), len(clipped), probability).pvalue > MIN_P
        distribution = scipy.stats.truncnorm(-bound, bound)
        assert scipy.stats.kstest(normal[~clipped], distribution.cdf).pvalue > MIN_P


def test_noise_is_at_most_20_pixels(sample_first):
    """The standard deviations of a box of 400 by 300 pixels are 40 and 30."""
    noise = select_boxes(sample_first(box_mask(100, 50, 500, 350))) - [100, 50, 500, 350]
    assert np.abs(noise).max() == 20
    for column, deviation in enumerate([40, 30, 40, 30]):
        for bound in (-20, 20):
            clipped = int((noise[:, column] == bound).sum())
            probability = scipy.stats.norm.sf(20 / deviation)
            assert scipy.stats.binomtest(clipped, len(noise), probability).pvalue > MIN_P


def test_bound_of_uniform_noise_is_a_tenth_of_the_sides_or_20_pixels(sample_first):
    """The bounds of a box of 100 by 50 pixels are 10 and 5. Those of 400 by 300 pixels are 20."""
    for box, bounds in [((200, 100, 300, 150), (10, 5)), ((100, 50, 500, 350), (20, 20))]:
        noise = select_boxes(sample_first(box_mask(*box), box_noise="uniform")) - box
        for column, bound in enumerate(bounds * 2):
            distribution = scipy.stats.uniform(-bound, 2 * bound)
            assert scipy.stats.kstest(noise[:, column], distribution.cdf).pvalue > MIN_P


@pytest.mark.parametrize("box_noise", ["gaussian", "uniform"])
def test_noise_of_the_coordinates_is_independent(sample_first, box_noise):
    noise = select_boxes(sample_first(box_mask(200, 100, 300, 150), box_noise=box_noise))
    correlation = np.corrcoef(noise.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(noise))


@pytest.mark.parametrize("box_noise", ["gaussian", "uniform"])
@pytest.mark.parametrize("box", [(0, 0, 599, 399), (500, 380, 599, 399), (0, 50, 30, 399)])
def test_boxes_are_in_the_image_with_their_corners_in_order(sample_first, box_noise, box):
    x0, y0, x1, y1 = select_boxes(sample_first(box_mask(*box), box_noise=box_noise)).T
    assert (x0 <= x1).all()
    assert (y0 <= y1).all()
    assert min(x0.min(), y0.min()) >= 0
    assert x1.max() <= 599  # the last column and row of the image
    assert y1.max() <= 399
    for corner, side in zip((x0, y0, x1, y1), box, strict=True):
        if side in (0, 599, 399):  # half of the noise is clipped at the border
            num_at_side = int((corner == side).sum())
            assert scipy.stats.binomtest(num_at_side, len(corner), 0.5).pvalue > MIN_P


def test_box_of_one_pixel_has_no_noise(sample_first):
    np.testing.assert_array_equal(
        select_boxes(sample_first(box_mask(7, 9, 7, 9))) - [7, 9, 7, 9], 0
    )


def test_tight_box_has_the_outermost_pixels():
    mask = np.zeros((6, 9), bool)
    mask[2, 3] = mask[4, 7] = mask[3, 1] = True
    np.testing.assert_array_equal(tight_box(jnp.array(mask)), [[1, 2], [7, 4]])
    np.testing.assert_array_equal(tight_box(jnp.ones((6, 9), bool)), [[0, 0], [8, 5]])
    assert tight_box(jnp.array(mask)).dtype == jnp.float32


# Later clicks.

INSIDE = np.zeros((7, 9), bool)
INSIDE[:5, :7] = True
TARGET = np.zeros((7, 9), bool)
TARGET[1:4, 2:5] = True
STRIDE = 4


@pytest.fixture(scope="module")
def sample_click(jit):
    """A function that adds one click for each of 10,000 keys.

    It returns the clicked pixels 'key 2' (x, y) at the resolution of the loss, the labels and the
    points. It checks that nothing else changes.
    """
    add = jit(jax.vmap(sample_click_on_error, (0, *[None] * 5)), static_argnums=5)

    def sample(logits, target=TARGET, inside=INSIDE, count=0, stride=STRIDE):
        before = Clicks(
            points=jnp.arange(10.0).reshape(5, 2),
            labels=jnp.array([TOP_LEFT, BOTTOM_RIGHT, FOREGROUND, ABSENT, ABSENT]),
            count=jnp.int32(count),
        )
        logits = jnp.array(logits, jnp.float32)
        after = jax.tree.map(np.asarray, add(KEYS, before, logits, target, inside, stride))
        slot = 2 + count
        xy = (after.points[:, slot] + 0.5) / stride - 0.5
        pixels = np.round(xy).astype(int)
        np.testing.assert_array_equal(xy, pixels)  # x = (j + 0.5) * stride - 0.5, exactly
        # The other slots are unchanged.
        others = np.arange(5) != slot
        expected = np.broadcast_to(before.points, after.points.shape)
        np.testing.assert_array_equal(after.points[:, others], expected[:, others])
        expected = np.broadcast_to(before.labels, after.labels.shape)
        np.testing.assert_array_equal(after.labels[:, others], expected[:, others])
        np.testing.assert_array_equal(after.count, count + 1)
        return pixels, after.labels[:, slot], after.points[:, slot]

    return sample


def assert_uniform(pixels, region):
    x, y = pixels.T
    assert region[y, x].all()
    hits = np.zeros(region.shape, int)
    np.add.at(hits, (y, x), 1)
    assert (hits[region] > 0).all()
    if region.sum() > 1:
        assert scipy.stats.chisquare(hits[region]).pvalue > MIN_P


def make_logits(prediction):
    """Returns logits whose positive pixels are those of a bool mask."""
    return np.where(prediction, 0.1, -0.1)


def test_clicks_are_uniform_over_all_wrong_pixels(sample_click):
    """Two false negatives and five false positives: a pixel of either kind is equally likely."""
    prediction = TARGET.copy()
    prediction[1, 2] = prediction[3, 4] = False
    prediction[0, :4] = prediction[4, 6] = True
    prediction[5:] = prediction[:, 7:] = True  # errors in the padding are ignored
    pixels, labels, _ = sample_click(make_logits(prediction))
    assert_uniform(pixels, (prediction != TARGET) & INSIDE)
    x, y = pixels.T
    np.testing.assert_array_equal(labels, np.where(TARGET[y, x], FOREGROUND, BACKGROUND))
    false_negatives = int((labels == FOREGROUND).sum())
    assert scipy.stats.binomtest(false_negatives, len(KEYS), 2 / 7).pvalue > MIN_P


def test_clicks_on_false_negatives_are_foreground(sample_click):
    pixels, labels, _ = sample_click(np.full(TARGET.shape, -3.0))
    assert_uniform(pixels, TARGET)
    assert (labels == FOREGROUND).all()


def test_clicks_on_false_positives_are_background(sample_click):
    pixels, labels, _ = sample_click(np.full(TARGET.shape, 3.0))
    assert_uniform(pixels, ~TARGET & INSIDE)
    assert (labels == BACKGROUND).all()


def test_logits_of_zero_are_background(sample_click):
    pixels, labels, _ = sample_click(np.zeros(TARGET.shape))
    assert_uniform(pixels, TARGET)
    assert (labels == FOREGROUND).all()


def test_clicks_are_on_the_background_without_errors(sample_click):
    prediction = TARGET | ~INSIDE  # wrong only in the padding
    pixels, labels, _ = sample_click(make_logits(prediction))
    assert_uniform(pixels, ~TARGET & INSIDE)
    assert (labels == BACKGROUND).all()


def test_clicks_are_on_the_mask_without_errors_and_background(sample_click):
    pixels, labels, _ = sample_click(make_logits(INSIDE), target=INSIDE)
    assert_uniform(pixels, INSIDE)
    assert (labels == FOREGROUND).all()


def test_a_single_wrong_pixel_is_clicked_at_its_center(sample_click):
    prediction = TARGET.copy()
    prediction[4, 6] = True
    for stride, expected in [(1, [6, 4]), (2, [12.5, 8.5]), (4, [25.5, 17.5])]:
        _, _, points = sample_click(make_logits(prediction), stride=stride)
        np.testing.assert_array_equal(points, np.tile(expected, (len(KEYS), 1)))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_clicks_are_written_to_successive_slots(sample_click, count):
    sample_click(np.full(TARGET.shape, 3.0), count=count)


def test_clicks_of_different_keys_are_independent(sample_click):
    pixels, _, _ = sample_click(np.full(TARGET.shape, 3.0))
    index = pixels[:, 1] * 9 + pixels[:, 0]
    pairs = np.unique(np.stack([index[::2], index[1::2]]), axis=1, return_counts=True)[1]
    num_pixels = int((~TARGET & INSIDE).sum())
    absent = [0] * (num_pixels**2 - len(pairs))
    assert scipy.stats.chisquare([*pairs, *absent]).pvalue > MIN_P


def test_columns_and_rows_of_points_are_independent(sample_first):
    clicks = sample_first(box_mask(100, 50, 500, 350))
    x, y = clicks.points[clicks.labels[:, 0] == FOREGROUND, 0].T
    assert np.abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(len(x))
    assert scipy.stats.kstest(x, scipy.stats.uniform(99.5, 401).cdf).pvalue > MIN_P
    assert scipy.stats.kstest(y, scipy.stats.uniform(49.5, 301).cdf).pvalue > MIN_P
