"""The prompts of one mask, as frequencies over thousands of keys."""

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
SIZE = (400, 600)  # of the image, in a frame that is larger
LEAST_P = 1e-3  # the keys are fixed: what holds once holds always


def box_mask(x0, y0, x1, y1, frame=(416, 640)):
    """A mask whose outermost pixels are these, inclusive."""
    mask = np.zeros(frame, bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


@pytest.fixture(scope="module")
def first(jit):
    """First prompts of 10,000 keys, as numpy arrays."""
    draw = jax.vmap(
        lambda key, mask, size, law: sample_first_prompt(
            key, mask, size, num_slots=5, box_noise=law
        ),
        (0, None, None, None),
    )
    draw = jit(draw, static_argnums=3)
    return lambda mask, size=SIZE, law="gaussian": jax.tree.map(
        np.asarray, draw(KEYS, mask, jnp.array(size, jnp.int32), law)
    )


def boxes_of(clicks):
    """The boxes 'key 4' (x0, y0, x1, y1) among first prompts."""
    is_box = clicks.labels[:, 0] == TOP_LEFT
    return clicks.points[is_box, :2].reshape(-1, 4)


# The first prompt.


def test_a_point_or_a_box_with_equal_probability(first):
    clicks = first(box_mask(200, 100, 300, 150))
    is_box = clicks.labels[:, 0] == TOP_LEFT
    assert scipy.stats.binomtest(int(is_box.sum()), len(KEYS), 0.5).pvalue > LEAST_P
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


def test_a_point_is_uniform_over_the_mask(first):
    rng = np.random.default_rng(0)
    mask = box_mask(0, 0, 0, 0)
    mask[rng.integers(0, 400, 60), rng.integers(0, 600, 60)] = True
    clicks = first(mask)
    x, y = clicks.points[clicks.labels[:, 0] == FOREGROUND, 0].astype(int).T
    assert mask[y, x].all()
    hits = np.zeros(mask.shape, int)
    np.add.at(hits, (y, x), 1)
    assert scipy.stats.chisquare(hits[mask]).pvalue > LEAST_P


def test_the_kind_of_prompt_does_not_depend_on_the_mask(first):
    kinds = [first(box_mask(*box)).labels[:, 0] for box in [(9, 9, 9, 9), (3, 4, 400, 300)]]
    np.testing.assert_array_equal(*kinds)


def test_gaussian_noise_is_a_tenth_of_the_sides(first):
    """100 wide and 50 high: deviations of 10 and 5, cut at 20, which is two and four of them."""
    noise = boxes_of(first(box_mask(200, 100, 300, 150))) - [200, 100, 300, 150]
    for column, deviation in enumerate([10, 5, 10, 5]):
        normal = noise[:, column] / deviation
        bound = 20 / deviation
        cut = np.isclose(np.abs(normal), bound, rtol=1e-5)
        chance = 2 * scipy.stats.norm.sf(bound)
        assert np.abs(normal).max() <= bound * (1 + 1e-5)
        assert scipy.stats.binomtest(int(cut.sum()), len(cut), chance).pvalue > LEAST_P
        law = scipy.stats.truncnorm(-bound, bound)
        assert scipy.stats.kstest(normal[~cut], law.cdf).pvalue > LEAST_P


def test_noise_is_at_most_20_pixels(first):
    """400 wide: a deviation of 40, so that 62 % are cut; 300 high: 30."""
    noise = boxes_of(first(box_mask(100, 50, 500, 350))) - [100, 50, 500, 350]
    assert np.abs(noise).max() == 20
    for column, deviation in enumerate([40, 30, 40, 30]):
        for bound in (-20, 20):
            cut = int((noise[:, column] == bound).sum())
            chance = scipy.stats.norm.sf(20 / deviation)
            assert scipy.stats.binomtest(cut, len(noise), chance).pvalue > LEAST_P


def test_uniform_noise(first):
    """100 wide and 50 high: within 10 and 5. 400 and 300: within 20."""
    for box, bounds in [((200, 100, 300, 150), (10, 5)), ((100, 50, 500, 350), (20, 20))]:
        noise = boxes_of(first(box_mask(*box), law="uniform")) - box
        for column, bound in enumerate(bounds * 2):
            law = scipy.stats.uniform(-bound, 2 * bound)
            assert scipy.stats.kstest(noise[:, column], law.cdf).pvalue > LEAST_P


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_coordinates_have_noise_of_their_own(first, law):
    noise = boxes_of(first(box_mask(200, 100, 300, 150), law=law))
    correlation = np.corrcoef(noise.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(noise))


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
@pytest.mark.parametrize("box", [(0, 0, 599, 399), (500, 380, 599, 399), (0, 50, 30, 399)])
def test_a_box_stays_in_the_image_with_its_corners_in_order(first, law, box):
    x0, y0, x1, y1 = boxes_of(first(box_mask(*box), law=law)).T
    assert (x0 <= x1).all()
    assert (y0 <= y1).all()
    assert min(x0.min(), y0.min()) >= 0
    assert x1.max() <= 599  # the last column and row of the image; the frame is larger
    assert y1.max() <= 399
    for corner, side in zip((x0, y0, x1, y1), box, strict=True):
        if side in (0, 599, 399):  # half of the noise is cut off there
            at_side = int((corner == side).sum())
            assert scipy.stats.binomtest(at_side, len(corner), 0.5).pvalue > LEAST_P


def test_a_pixel_has_a_box_without_noise(first):
    np.testing.assert_array_equal(boxes_of(first(box_mask(7, 9, 7, 9))) - [7, 9, 7, 9], 0)


def test_tight_boxes():
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
CELL = 4


@pytest.fixture(scope="module")
def clicked(jit):
    """One click more for each of 10,000 keys: its cell 'key 2' (x, y), its label and its point."""
    add = jit(jax.vmap(sample_click_on_error, (0, *[None] * 5)), static_argnums=5)

    def run(logits, target=TARGET, inside=INSIDE, count=0, cell=CELL):
        before = Clicks(
            points=jnp.arange(10.0).reshape(5, 2),
            labels=jnp.array([TOP_LEFT, BOTTOM_RIGHT, FOREGROUND, ABSENT, ABSENT]),
            count=jnp.int32(count),
        )
        logits = jnp.array(logits, jnp.float32)
        after = jax.tree.map(np.asarray, add(KEYS, before, logits, target, inside, cell))
        slot = 2 + count
        xy = (after.points[:, slot] + 0.5) / cell - 0.5
        cells = np.round(xy).astype(int)
        np.testing.assert_array_equal(xy, cells)  # x = (j + 0.5) * cell - 0.5, exactly
        # The other slots are as they were.
        others = np.arange(5) != slot
        expected = np.broadcast_to(before.points, after.points.shape)
        np.testing.assert_array_equal(after.points[:, others], expected[:, others])
        expected = np.broadcast_to(before.labels, after.labels.shape)
        np.testing.assert_array_equal(after.labels[:, others], expected[:, others])
        np.testing.assert_array_equal(after.count, count + 1)
        return cells, after.labels[:, slot], after.points[:, slot]

    return run


def assert_uniform(cells, region):
    x, y = cells.T
    assert region[y, x].all()
    hits = np.zeros(region.shape, int)
    np.add.at(hits, (y, x), 1)
    assert (hits[region] > 0).all()
    if region.sum() > 1:
        assert scipy.stats.chisquare(hits[region]).pvalue > LEAST_P


def logits_of(prediction):
    return np.where(prediction, 0.1, -0.1)


def test_clicks_are_uniform_over_misses_and_false_alarms_together(clicked):
    """Two misses and five false alarms: pixels are as likely, not the kinds of error."""
    prediction = TARGET.copy()
    prediction[1, 2] = prediction[3, 4] = False
    prediction[0, :4] = prediction[4, 6] = True
    prediction[5:] = prediction[:, 7:] = True  # the padding is wrong too, and does not matter
    cells, labels, _ = clicked(logits_of(prediction))
    assert_uniform(cells, (prediction != TARGET) & INSIDE)
    x, y = cells.T
    np.testing.assert_array_equal(labels, np.where(TARGET[y, x], FOREGROUND, BACKGROUND))
    misses = int((labels == FOREGROUND).sum())
    assert scipy.stats.binomtest(misses, len(KEYS), 2 / 7).pvalue > LEAST_P


def test_clicks_on_misses_are_foreground(clicked):
    cells, labels, _ = clicked(np.full(TARGET.shape, -3.0))
    assert_uniform(cells, TARGET)
    assert (labels == FOREGROUND).all()


def test_clicks_on_false_alarms_are_background(clicked):
    cells, labels, _ = clicked(np.full(TARGET.shape, 3.0))
    assert_uniform(cells, ~TARGET & INSIDE)
    assert (labels == BACKGROUND).all()


def test_a_logit_of_zero_is_outside(clicked):
    cells, labels, _ = clicked(np.zeros(TARGET.shape))
    assert_uniform(cells, TARGET)
    assert (labels == FOREGROUND).all()


def test_without_errors_a_click_lies_on_the_background(clicked):
    prediction = TARGET | ~INSIDE  # right inside, wrong in the padding
    cells, labels, _ = clicked(logits_of(prediction))
    assert_uniform(cells, ~TARGET & INSIDE)
    assert (labels == BACKGROUND).all()


def test_without_errors_and_background_a_click_lies_on_the_mask(clicked):
    cells, labels, _ = clicked(logits_of(INSIDE), target=INSIDE)
    assert_uniform(cells, INSIDE)
    assert (labels == FOREGROUND).all()


def test_one_wrong_pixel_is_clicked_whatever_its_size(clicked):
    prediction = TARGET.copy()
    prediction[4, 6] = True
    for cell, expected in [(1, [6, 4]), (2, [12.5, 8.5]), (4, [25.5, 17.5])]:
        _, _, points = clicked(logits_of(prediction), cell=cell)
        np.testing.assert_array_equal(points, np.tile(expected, (len(KEYS), 1)))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_slots_are_taken_in_turn(clicked, count):
    clicked(np.full(TARGET.shape, 3.0), count=count)


def test_another_key_another_click(clicked):
    """The rounds' keys differ, so that their clicks are independent."""
    cells, _, _ = clicked(np.full(TARGET.shape, 3.0))
    index = cells[:, 1] * 9 + cells[:, 0]
    pairs = np.unique(np.stack([index[::2], index[1::2]]), axis=1, return_counts=True)[1]
    places = int((~TARGET & INSIDE).sum())
    absent = [0] * (places**2 - len(pairs))
    assert scipy.stats.chisquare([*pairs, *absent]).pvalue > LEAST_P


def test_a_point_has_a_column_and_a_row_of_its_own(first):
    clicks = first(box_mask(100, 50, 500, 350))
    x, y = clicks.points[clicks.labels[:, 0] == FOREGROUND, 0].T
    assert np.abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(len(x))
    assert scipy.stats.kstest(x, scipy.stats.uniform(99.5, 401).cdf).pvalue > LEAST_P
    assert scipy.stats.kstest(y, scipy.stats.uniform(49.5, 301).cdf).pvalue > LEAST_P
