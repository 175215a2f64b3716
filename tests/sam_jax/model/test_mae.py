"""Tests properties of the masked autoencoder. `tests/reference/test_mae.py` compares values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.mae import (
    encode_positions,
    mae_tiny,
    mae_vit_b,
    mae_vit_h,
    mae_vit_l,
    normalize_patches,
    patchify,
)

MODEL = mae_tiny(image_size=(32, 48), depth=1)
GRID = (4, 6)


@pytest.fixture(scope="module")
def variables(jit):
    keys = jax.random.split(jax.random.key(0), 2)
    return jit(MODEL.init)(jax.random.key(1), jnp.zeros((2, 32, 48, 3)), keys)


@pytest.fixture(scope="module")
def reconstruct(jit, variables):
    return jit(lambda image, keys: MODEL.apply(variables, image, keys))


def sample_images(b=3):
    image = np.random.default_rng(0).standard_normal((b, 32, 48, 3)).astype(np.float32)
    return image, jax.random.split(jax.random.key(2), b)


def test_the_key_of_an_image_determines_its_masked_patches(reconstruct):
    image, keys = sample_images()
    mask = np.asarray(reconstruct(image, keys).mask)
    np.testing.assert_array_equal(mask.sum(axis=1), 24 - 6)
    assert len({row.tobytes() for row in mask}) == 3
    reversed_ = reconstruct(image[::-1], keys[::-1])
    np.testing.assert_array_equal(reversed_.mask, mask[::-1])
    np.testing.assert_allclose(reversed_.patches, reconstruct(image, keys).patches[::-1], atol=1e-5)


def test_patches_are_masked_uniformly(variables):
    order = jax.vmap(MODEL.sample_order)(jax.random.split(jax.random.key(3), 4000))
    assert (np.sort(order, axis=1) == np.arange(24)).all()
    visible = np.bincount(np.asarray(order)[:, :6].ravel(), minlength=24) / 4000
    np.testing.assert_allclose(visible, 0.25, atol=0.03)


def test_only_visible_patches_affect_the_reconstruction(reconstruct):
    image, keys = sample_images(1)
    before = reconstruct(image, keys)
    patches = image.reshape(1, 4, 8, 6, 8, 3)
    for index in range(24):
        changed = patches.copy()
        changed[:, index // 6, :, index % 6] += 1
        after = reconstruct(changed.reshape(image.shape), keys)
        same = np.array_equal(after.patches, before.patches)
        assert same == bool(before.mask[0, index])


def test_reconstruction_does_not_depend_on_the_order_of_patches(variables):
    """Checks that the order within the visible and within the removed patches has no effect."""
    image, keys = sample_images(1)
    order = np.asarray(MODEL.sample_order(keys[0]))[None]
    other = np.concatenate([order[:, 5::-1], order[:, :5:-1]], axis=1)

    def apply(order):
        return MODEL.apply(
            variables, image, order, method=lambda m, x, o: m.decode(m.encode(x, o[:, :6]), o)
        )

    np.testing.assert_allclose(apply(order), apply(other), atol=1e-5)
    swapped = order.copy()
    swapped[:, [0, -1]] = order[:, [-1, 0]]  # makes another patch visible
    assert np.abs(apply(order) - apply(swapped)).max() > 1e-3


def test_positions_are_sines_and_cosines():
    positions = encode_positions(3, 5, 8).reshape(3, 5, 8)

    def encode(n):
        return [np.sin(n), np.sin(n / 100), np.cos(n), np.cos(n / 100)]

    for y, x in ((0, 0), (2, 1), (1, 4)):
        np.testing.assert_allclose(positions[y, x], [*encode(x), *encode(y)], atol=1e-6)


def test_patches_are_cut_and_normalized():
    image = np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)
    patches = np.asarray(patchify(image, 8))
    np.testing.assert_array_equal(patches[1, 4].reshape(8, 8, 3), image[1, 8:, 8:16])
    scaled = np.asarray(normalize_patches(5 * patches + 3))
    np.testing.assert_allclose(scaled.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.var(axis=-1, ddof=1), 1, atol=1e-4)
    assert np.isfinite(normalize_patches(jnp.ones((1, 192)))).all()


def test_images_of_another_size_are_refused(variables):
    with pytest.raises(ValueError, match=r"image must have shape \('b', 32, 48, 3\); got"):
        MODEL.apply(variables, jnp.zeros((1, 48, 32, 3)), jax.random.split(jax.random.key(0), 1))


@pytest.mark.parametrize("ratio", [0.0, 0.99, 1.0, 1.5])
def test_mask_ratios_that_remove_all_or_no_patches_are_refused(variables, ratio):
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="mask_ratio must be such that some"):
        MODEL.clone(mask_ratio=ratio).apply(variables, jnp.zeros((1, 32, 48, 3)), keys)


@pytest.mark.parametrize(
    ("make", "millions"), [(mae_vit_b, 111.7), (mae_vit_l, 329.2), (mae_vit_h, 656.7)]
)
def test_parameter_counts_of_the_published_sizes(make, millions):
    model = make()
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0),
            jnp.zeros((1, 224, 224, 3)),
            jax.random.split(jax.random.key(0), 1),
        )
    )
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == pytest.approx(millions * 1e6, rel=1e-3)
