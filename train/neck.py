"""Initial values of the image encoder's neck for an encoder that was trained elsewhere.

A random neck in front of a trained encoder mixes its features at random. The fitted neck passes on
most of what the features contain instead: its 1x1 convolution is a projection onto their principal
components, and its 3x3 convolution is the identity.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

LAYER_NORM_EPS = 1e-6


def fit_neck(
    params: dict[str, Any],
    tokens: Float[np.ndarray, "n e"],
    scale: Float[np.ndarray, " e"] | None,
    seed: int,
) -> dict[str, Any]:
    """Returns the parameters of a neck that keeps most of the variance of an encoder's features.

    Encoders end with a LayerNorm that SAM lacks. It is folded into the projection: its centering
    and its scale are linear, and the neck's norm undoes the division by each token's deviation. Its
    bias is a constant, and so is the mean of the features that is to be subtracted. The neck has no
    bias for that. The projection is therefore orthogonal to the mean, which costs one dimension.

    Args:
      params: The initial parameters of the neck, whose norms are kept.
      tokens: Tokens before the neck, of images like those to train on.
      scale: The scale of the encoder's last LayerNorm; ones by default.
      seed: Seed of a rotation, after which all channels have about the same variance.

    Returns:
      The parameters of the neck.
    """
    c = params["conv1"]["kernel"].shape[-1]
    scale = np.ones(tokens.shape[1]) if scale is None else np.asarray(scale, np.float64)
    centered = tokens - tokens.mean(axis=1, keepdims=True, dtype=np.float64)
    deviation = np.sqrt((centered**2).mean(axis=1, keepdims=True) + LAYER_NORM_EPS)
    components = principal_components(scale * centered / deviation, c)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(c, c)))[0]
    kernel = scale[:, None] * (components @ rotation)
    kernel -= kernel.mean(axis=0)  # subtracts each token's mean
    identity = np.zeros((3, 3, c, c))
    identity[1, 1] = np.eye(c)
    return params | {
        "conv1": {"kernel": jnp.asarray(kernel[None, None], jnp.float32)},
        "conv2": {"kernel": jnp.asarray(identity, jnp.float32)},
    }


def principal_components(
    features: Float[np.ndarray, "n e"], count: int
) -> Float[np.ndarray, "e c"]:
    """Returns orthonormal directions of most variance that are orthogonal to the mean.

    Directions after the last one of any variance are zero.

    Args:
      features: The features.
      count: The number of directions.
    """
    mean = features.mean(axis=0)
    direction = mean / max(np.linalg.norm(mean), 1e-12)
    centered = features - mean
    centered = centered - np.outer(centered @ direction, direction)
    variance, vectors = np.linalg.eigh(centered.T @ centered / len(features))
    order = np.argsort(variance)[::-1]
    order = order[variance[order] > 1e-10 * variance.max()][:count]
    largest = vectors[:, order]
    return np.pad(largest, ((0, 0), (0, count - largest.shape[1])))
