"""One mask's prompts through the rounds of an interactive training step.

Source: Kirillov et al. 2023, appendix A. What it leaves unsaid:
- The box's noise is Gaussian with a tenth of the side as its deviation, clipped at 20 pixels; the
  box then stays inside the image, its corners in order. `Interactive.box_noise` has another law.
- Later clicks are uniform over the pixels that the last prediction got wrong, misses and false
  alarms together, at the resolution of the loss. Where nothing is wrong, a background click is
  drawn; where there is no background, one on the mask.

Everything here is about one mask and is vmapped over masks by `train.objectives.interactive`.
"""

import flax.struct
import jax
import jax.numpy as jnp

from sam_jax.masks.clicks import uniform_click
from sam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    NOT_A_POINT,
    TOP_LEFT,
)

BOX_NOISE = 0.1  # of the box's side
MAX_BOX_NOISE = 20.0  # pixels of the frame
FIRST_SLOTS = 2  # a click and the padding point, or a box's two corners; sampled clicks follow


@flax.struct.dataclass
class Clicks:
    """The points of one mask's prompt.

    Attributes:
      points: 'k 2' float32 (x, y) in pixels of the frame; labels: 'k' int32, as in `Prompts`.
      count: '' int32, how many clicks were sampled after the first prompt.
    """

    points: jax.Array
    labels: jax.Array
    count: jax.Array


def first_prompt(key, mask, size, *, num_slots, box_noise):
    """Draws the first prompt: a click on the mask or a noisy box, with equal probability.

    Args:
      key: of this mask's first round.
      mask: 'h w' bool, in the frame.
      size: '2' int32, (height, width) of the image in the frame.
      num_slots: k of the result.
      box_noise: "gaussian" or "uniform", see `Interactive`.
    Returns:
      `Clicks`, its first FIRST_SLOTS slots taken.
    """
    kind, click_key, noise_key = jax.random.split(key, 3)
    click = uniform_click(click_key, mask).astype(jnp.float32)
    click = jnp.stack([click, jnp.zeros(2)])
    box = noisy_box(noise_key, tight_box(mask), size, box_noise)
    is_box = jax.random.bernoulli(kind)
    points = jnp.where(is_box, box, click)
    labels = jnp.where(
        is_box, jnp.array([TOP_LEFT, BOTTOM_RIGHT]), jnp.array([FOREGROUND, NOT_A_POINT])
    )
    empty = num_slots - FIRST_SLOTS
    return Clicks(
        points=jnp.pad(points, ((0, empty), (0, 0))),
        labels=jnp.pad(labels, (0, empty), constant_values=ABSENT),
        count=jnp.int32(0),
    )


def tight_box(mask):
    """The corners '2 2' float32 of a mask 'h w': its outermost pixels, (x, y), inclusive."""
    columns, rows = jnp.any(mask, axis=0), jnp.any(mask, axis=1)
    first = lambda line: jnp.argmax(line)
    last = lambda line: len(line) - 1 - jnp.argmax(line[::-1])
    corners = [[first(columns), first(rows)], [last(columns), last(rows)]]
    return jnp.array(corners, jnp.float32)


def noisy_box(key, box, size, law):
    """Moves the corners '2 2' of a box, each coordinate on its own, within the image."""
    side = box[1] - box[0]
    if law == "gaussian":
        noise = jax.random.normal(key, (2, 2)) * BOX_NOISE * side
        noise = jnp.clip(noise, -MAX_BOX_NOISE, MAX_BOX_NOISE)
    else:
        bound = jnp.minimum(BOX_NOISE * side, MAX_BOX_NOISE)
        noise = jax.random.uniform(key, (2, 2), minval=-1.0) * bound
    limit = size[::-1].astype(jnp.float32) - 1
    return jnp.sort(jnp.clip(box + noise, 0.0, limit), axis=0)


def click_on_error(key, clicks, logits, target, inside, cell):
    """Adds a click where the last prediction is wrong.

    Args:
      key: of this mask's round.
      clicks: `Clicks`.
      logits: 'h w' float32, the last prediction, at the resolution of the loss.
      target: 'h w' bool, the truth.
      inside: 'h w' bool, what is not padding.
      cell: pixels of the frame to one of these.
    Returns:
      `Clicks` with one more, labelled by what is true where it lies.
    """
    wrong = ((logits > 0) != target) & inside
    background = ~target & inside
    region = jnp.where(jnp.any(background), background, target)
    region = jnp.where(jnp.any(wrong), wrong, region)
    x, y = click = uniform_click(key, region)
    label = jnp.where(target[y, x], FOREGROUND, BACKGROUND)
    slot = FIRST_SLOTS + clicks.count
    return Clicks(
        points=clicks.points.at[slot].set((click + 0.5) * cell - 0.5),
        labels=clicks.labels.at[slot].set(label),
        count=clicks.count + 1,
    )
