"""Samples one mask's prompts in the rounds of an interactive training step.

Source: Kirillov et al. 2023, appendix A. The paper does not give the following:
- The box's noise is Gaussian. Its deviation is a tenth of the side, and it is clipped at 20 pixels.
  The box then stays inside the image with its corners in order. `Interactive.box_noise` offers
  uniform noise instead.
- Later clicks are uniform over the pixels that the last prediction got wrong, false negatives and
  false positives together, at the resolution of the loss. Where nothing is wrong, a background
  click is sampled; where there is no background, a click on the mask.

The functions take one mask. `train.objectives.interactive` maps them over masks.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from sam_jax.masks.clicks import uniform_click
from sam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    NOT_A_POINT,
    TOP_LEFT,
)

BOX_NOISE = 0.1  # as a fraction of the box's side
MAX_BOX_NOISE = 20.0  # pixels of the padded image
FIRST_SLOTS = 2  # for a click and the padding point, or for a box's corners; clicks follow


@flax.struct.dataclass
class Clicks:
    """The points of one mask's prompt.

    Attributes:
      points: (x, y) in pixels of the padded image.
      labels: As in `Prompts`.
      count: The number of clicks that were sampled after the first prompt.
    """

    points: Float32[Array, "k 2"]
    labels: Int32[Array, " k"]
    count: Int32[Array, ""]


def sample_first_prompt(
    key: Key[Array, ""],
    mask: Bool[Array, "h w"],
    size: Int[Array, " 2"],
    *,
    num_slots: int,
    box_noise: str,
) -> Clicks:
    """Samples the first prompt: a click on the mask or a noisy box, with equal probability.

    Args:
      key: The key of the mask's first round.
      mask: The mask in pixels of the padded image.
      size: (height, width) of the image without padding.
      num_slots: The number of slots of the result.
      box_noise: "gaussian" or "uniform", see `Interactive`.

    Returns:
      The prompt in the first FIRST_SLOTS slots; the others are absent.
    """
    kind_key, click_key, noise_key = jax.random.split(key, 3)
    click = uniform_click(click_key, mask).astype(jnp.float32)
    click = jnp.stack([click, jnp.zeros(2)])
    box = add_box_noise(noise_key, tight_box(mask), size, box_noise)
    is_box = jax.random.bernoulli(kind_key)
    points = jnp.where(is_box, box, click)
    labels = jnp.where(
        is_box, jnp.array([TOP_LEFT, BOTTOM_RIGHT]), jnp.array([FOREGROUND, NOT_A_POINT])
    )
    num_absent = num_slots - FIRST_SLOTS
    return Clicks(
        points=jnp.pad(points, ((0, num_absent), (0, 0))),
        labels=jnp.pad(labels, (0, num_absent), constant_values=ABSENT),
        count=jnp.int32(0),
    )


def tight_box(mask: Bool[Array, "h w"]) -> Float32[Array, "2 2"]:
    """Returns the corners (x, y) of a mask's tight box: its outermost pixels, inclusive."""
    columns, rows = jnp.any(mask, axis=0), jnp.any(mask, axis=1)

    def last(line: Array) -> Array:
        return len(line) - 1 - jnp.argmax(line[::-1])

    corners = [[jnp.argmax(columns), jnp.argmax(rows)], [last(columns), last(rows)]]
    return jnp.array(corners, jnp.float32)


def add_box_noise(
    key: Key[Array, ""], box: Float[Array, "2 2"], size: Int[Array, " 2"], distribution: str
) -> Float[Array, "2 2"]:
    """Moves each coordinate of a box's corners independently, within the image.

    Args:
      key: A random key.
      box: The corners (x, y).
      size: (height, width) of the image.
      distribution: "gaussian" or "uniform".

    Returns:
      The corners, in order.
    """
    side = box[1] - box[0]
    if distribution == "gaussian":
        noise = jax.random.normal(key, (2, 2)) * BOX_NOISE * side
        noise = jnp.clip(noise, -MAX_BOX_NOISE, MAX_BOX_NOISE)
    else:
        bound = jnp.minimum(BOX_NOISE * side, MAX_BOX_NOISE)
        noise = jax.random.uniform(key, (2, 2), minval=-1.0) * bound
    limit = size[::-1].astype(jnp.float32) - 1
    return jnp.sort(jnp.clip(box + noise, 0.0, limit), axis=0)


def sample_click_on_error(
    key: Key[Array, ""],
    clicks: Clicks,
    logits: Float[Array, "h w"],
    target: Bool[Array, "h w"],
    inside: Bool[Array, "h w"],
    stride: int,
) -> Clicks:
    """Adds a click where the last prediction is wrong.

    Args:
      key: The key of the mask's round.
      clicks: The clicks so far.
      logits: The last prediction, at the resolution of the loss.
      target: The true mask at this resolution.
      inside: True for pixels that are not padding.
      stride: The side of these pixels in pixels of the padded image.

    Returns:
      The clicks with one more, labeled by the true mask at its position.
    """
    is_wrong = ((logits > 0) != target) & inside
    background = ~target & inside
    region = jnp.where(jnp.any(background), background, target)
    region = jnp.where(jnp.any(is_wrong), is_wrong, region)
    x, y = click = uniform_click(key, region)
    label = jnp.where(target[y, x], FOREGROUND, BACKGROUND)
    slot = FIRST_SLOTS + clicks.count
    return Clicks(
        points=clicks.points.at[slot].set((click + 0.5) * stride - 0.5),
        labels=clicks.labels.at[slot].set(label),
        count=clicks.count + 1,
    )
