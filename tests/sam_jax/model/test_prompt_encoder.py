"""Compares the prompt encoder with recorded outputs of the official code."""

from pathlib import Path

import jax
import numpy as np
import pytest

from sam_jax.model.prompt_encoder import PromptEncoder, Prompts

REAL = Path(__file__).parents[4] / "shared" / "realdata" / "sam_prompt_encoder"
GRID, FRAME = (64, 64), (1024, 1024)


@pytest.fixture(scope="module")
def recorded():
    if not REAL.is_dir():
        pytest.skip(f"the released values are not here: there is no {REAL}")
    with np.load(REAL / "sam_prompt_encoder_real.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def encoder(recorded):
    """Returns the prompt encoder and variables, with released values where they are recorded."""
    with np.load(REAL / "sam_prompt_encoder_real_partial.npz") as arrays:
        real = dict(arrays)
    module = PromptEncoder(dim=256, mask_channels=16, position_scale=1.0, dtype="float32")
    prompts = Prompts(points=np.zeros((1, 1, 1, 2)), labels=np.zeros((1, 1, 1), int))
    variables = module.init(jax.random.key(0), prompts, FRAME)
    values = {
        "background": "point_embeddings.0.weight",
        "foreground": "point_embeddings.1.weight",
        "top_left": "point_embeddings.2.weight",
        "bottom_right": "point_embeddings.3.weight",
        "not_a_point": "not_a_point_embed.weight",
        "no_mask": "no_mask_embed.weight",
    }
    params = {name: real.pop(official)[0] for name, official in values.items()}
    gaussian = real.pop("pe_layer.positional_encoding_gaussian_matrix")
    assert not real
    assert params.keys() == variables["params"].keys()
    return module, {"params": params, "constants": {"gaussian": gaussian}}


def test_points(encoder, recorded):
    """Passes the padding point explicitly. The official encoder appends it."""
    points, labels = _padding_point(recorded["points"], recorded["labels"])
    _check_sparse(encoder, points, labels, recorded["sparse_points"])


def test_boxes(encoder, recorded):
    points, labels = _corners(recorded["boxes"])
    _check_sparse(encoder, points, labels, recorded["sparse_boxes"])


def test_points_and_boxes(encoder, recorded):
    corners, corner_labels = _corners(recorded["boxes"])
    points = np.concatenate([recorded["points"], corners], axis=1)
    labels = np.concatenate([recorded["labels"], corner_labels], axis=1)
    _check_sparse(encoder, points, labels, recorded["sparse_points_boxes"])


def test_absent_slots_change_nothing(encoder, recorded):
    points, labels = _padding_point(recorded["points"], recorded["labels"])
    points = np.pad(points, ((0, 0), (0, 5), (0, 0)), constant_values=77)
    labels = np.pad(labels, ((0, 0), (0, 5)), constant_values=-2)
    features = _encode(encoder, points, labels)
    np.testing.assert_allclose(
        features.sparse[0, :, :3], recorded["sparse_points"], rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(features.token_mask[0], [[True] * 3 + [False] * 5] * 2)


def test_grid(encoder, recorded):
    module, variables = encoder
    positions = module.apply(variables, *GRID, method="encode_grid").reshape(*GRID, 256)
    np.testing.assert_allclose(positions[0].T, recorded["dense_pe_row0"], rtol=0, atol=1e-5)
    diagonal = positions[np.arange(64), np.arange(64)]
    np.testing.assert_allclose(diagonal.T, recorded["dense_pe_diag"], rtol=0, atol=1e-5)


def test_no_mask(encoder, recorded):
    dense = _encode(encoder, *_corners(recorded["boxes"])).dense
    dense = np.broadcast_to(dense, (1, 2, 64 * 64, 256))
    expected = np.broadcast_to(recorded["dense_no_mask"], dense.shape)
    np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-5)


def _encode(encoder, points, labels):
    """Encodes n objects, 'n k 2' and 'n k', of one image."""
    module, variables = encoder
    prompts = Prompts(points=points[None], labels=labels[None].astype(np.int32))
    return module.apply(variables, prompts, FRAME)


def _check_sparse(encoder, points, labels, expected):
    features = _encode(encoder, points, labels)
    assert features.token_mask.all()
    np.testing.assert_allclose(features.sparse[0], expected, rtol=0, atol=1e-5)


def _padding_point(points, labels):
    points = np.concatenate([points, np.zeros((len(points), 1, 2), np.float32)], axis=1)
    return points, np.concatenate([labels, np.full((len(labels), 1), -1)], axis=1)


def _corners(boxes):
    return boxes.reshape(-1, 2, 2), np.tile([2, 3], (len(boxes), 1))
