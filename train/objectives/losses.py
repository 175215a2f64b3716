"""Losses of predicted masks and of their predicted IoUs.

Source: Kirillov et al. 2023, appendix A: focal and dice loss at 20 to 1, the squared error of the
IoU. The paper leaves unsaid, and we take: alpha 0.25 and gamma 2, the focal loss averaged over
pixels, and one added on both sides of the dice fraction.
"""

import jax
import jax.numpy as jnp

FOCAL_ALPHA = 0.25
DICE_SMOOTH = 1.0


def focal_loss(logits, target):
    """The focal loss with gamma 2, averaged over pixels.

    Args:
      logits: '... h w' float32.
      target: '... h w' bool.
    Returns:
      '...' float32.
    """
    wrong = jnp.where(target, -logits, logits)  # the logit of the wrong answer
    alpha = jnp.where(target, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    loss = alpha * jax.nn.sigmoid(wrong) ** 2 * jax.nn.softplus(wrong)
    return jnp.mean(loss, axis=(-2, -1))


def dice_loss(logits, target):
    """One minus the dice coefficient of probabilities: '... h w' each -> '...'."""
    p, t = jax.nn.sigmoid(logits), target.astype(logits.dtype)
    total = lambda x: jnp.sum(x, axis=(-2, -1))
    return 1 - (2 * total(p * t) + DICE_SMOOTH) / (total(p) + total(t) + DICE_SMOOTH)


def mask_iou(logits, target):
    """IoU of the thresholded logits with the target: '... h w' each -> '...'; 0 for two empty."""
    predicted = logits > 0
    intersection = jnp.sum(predicted & target, axis=(-2, -1))
    union = jnp.sum(predicted | target, axis=(-2, -1))
    return intersection / jnp.maximum(union, 1)
