"""Losses of predicted masks and of their predicted IoUs.

Source: Kirillov et al. 2023, appendix A: focal and dice loss at 20 to 1, the squared error of the
IoU. The paper does not give the following, for which we use common values: alpha 0.25 and gamma 2,
the focal loss averaged over pixels, and one added to both sides of the dice fraction.

`optax.losses` has both losses, and the tests compare with them. Ours reduce over the two axes of a
mask in either layout without reshaping it, and take boolean targets.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from train.config import Interactive

FOCAL_ALPHA = 0.25
DICE_SMOOTH = 1.0


def focal_loss(
    logits: Float[Array, "*batch s p"], target: Bool[Array, "*#batch s p"]
) -> Float[Array, "*batch"]:
    """Computes the focal loss with gamma 2, averaged over a mask's pixels."""
    wrong_logit = jnp.where(target, -logits, logits)  # positive where the prediction is wrong
    alpha = jnp.where(target, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    loss = alpha * jax.nn.sigmoid(wrong_logit) ** 2 * jax.nn.softplus(wrong_logit)
    return jnp.mean(loss, axis=(-2, -1))


def dice_loss(
    logits: Float[Array, "*batch s p"], target: Bool[Array, "*#batch s p"]
) -> Float[Array, "*batch"]:
    """Computes one minus the dice coefficient of a mask's probabilities."""
    p, t = jax.nn.sigmoid(logits), target.astype(logits.dtype)

    def total(x: Array) -> Array:
        return jnp.sum(x, axis=(-2, -1))

    return 1 - (2 * total(p * t) + DICE_SMOOTH) / (total(p) + total(t) + DICE_SMOOTH)


# Losses of a mask by the name of their weight in `Interactive`. A row here and a weight there add
# a loss: it then counts in the choice of the best mask, in the objective and in the logged values.
MASK_LOSSES: dict[str, Callable[..., Array]] = {"focal": focal_loss, "dice": dice_loss}


def mask_losses(
    logits: Float[Array, "*batch s p"], target: Bool[Array, "*#batch s p"]
) -> dict[str, Float[Array, "*batch"]]:
    """Computes every loss of `MASK_LOSSES`, unweighted.

    Args:
      logits: Logits of the masks in any layout of two axes.
      target: True masks in the same layout. Leading axes are broadcast.

    Returns:
      The losses of each mask by name.
    """
    return {name: loss(logits, target) for name, loss in MASK_LOSSES.items()}


def weighted_sum(
    losses: dict[str, Float[Array, "*batch"]], config: Interactive
) -> Float[Array, "*batch"]:
    """Sums the losses of `mask_losses`, weighted by the objective's configuration."""
    first, *others = (getattr(config, name) * loss for name, loss in losses.items())
    return sum(others, start=first)


def iou_losses(
    predicted: Float[Array, " m"], iou: Float[Array, " m"], config: Interactive
) -> Float[Array, " m"]:
    """Computes the loss of each predicted IoU: squared or absolute errors, by `iou_loss`."""
    error = predicted - iou
    return jnp.abs(error) if config.iou_loss == "l1" else error**2
