"""Which of the masks that a grid of points gives are worth keeping, before any is painted.

A chunk of points at a time goes through the decoder's transformer. Only prompts of which some mask
is predicted to be good are upscaled, and only such masks are measured at the size of their image,
tile by tile. What leaves the device is a few numbers a mask.

Source: segment-anything `automatic_mask_generator.py` (_process_batch, _process_crop), in whose
order and with whose comparisons masks are dropped.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.everything.tiled_resize import make_matrices, measure
from sam_jax.masks.boxes import non_maximum_suppression
from sam_jax.model.ops.platform import platform
from sam_jax.model.prompt_encoder import FOREGROUND, NOT_A_POINT, Prompts

NUM_MASKS = 3  # of a point, which may mean several things
UPSCALED = {"cpu": 1, "gpu": 8, "tpu": 8}  # prompts at a time
NEAR = 20  # pixels from the side of a crop at which a mask may have been cut


@flax.struct.dataclass
class Thresholds:
    """What a mask must be like to be kept; an infinite limit is none.

    Attributes:
      iou: its predicted IoU must be above; stability: its stability must reach.
      offset: of the two levels between which a stable mask hardly changes.
      area: its pixels must be fewer.
      box_iou: a box that overlaps a better mask's by more is dropped.
    """

    iou: jax.Array | np.float32
    stability: jax.Array | np.float32
    offset: jax.Array | np.float32
    area: jax.Array | np.float32
    box_iou: jax.Array | np.float32


@flax.struct.dataclass
class Candidates:
    """The masks of n points in a crop, point by point.

    Attributes:
      iou: '(n m)' float32, predicted; stability: '(n m)' float32, of those that were measured.
      box: '(n m) 4' int32, inclusive, in pixels of the crop.
      kept: '(n m)' bool.
    """

    iou: jax.Array
    stability: jax.Array
    box: jax.Array
    kept: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def find_candidates(
    model, variables, embedding, points, count, tiling, limits, crop_box, size, *, chunk
):
    """Judges the masks of a crop's points.

    Args:
      embedding: '1 gh gw c' of the crop.
      points: 'n 2' (x, y) in pixels of the frame, n a multiple of chunk; the first `count` matter.
      tiling: of the crop; limits: `Thresholds`.
      crop_box: '4' (x0, y0, x1, y1) in the image, whose (height, width) is `size`.
      chunk: points at a time.
    Returns:
      `Candidates`, without duplicates.
    """
    tiles = tiling, make_matrices(tiling)
    judge = functools.partial(_judge, model, variables, embedding, tiles=tiles, limits=limits)

    def add_chunk(i, found):
        start = i * chunk
        there = start + jnp.arange(chunk) < count
        some = judge(jax.lax.dynamic_slice_in_dim(points, start, chunk), there)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(
            whole, part, start * NUM_MASKS, axis=0
        )
        return jax.tree.map(put, found, some)

    n = len(points) * NUM_MASKS
    found = Candidates(
        iou=jnp.zeros(n, jnp.float32),
        stability=jnp.zeros(n, jnp.float32),
        box=jnp.zeros((n, 4), jnp.int32),
        kept=jnp.zeros(n, bool),
    )
    found = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, add_chunk, found)
    kept = found.kept & ~_is_cut(found.box, crop_box, size)
    kept = non_maximum_suppression(found.box, found.iou, kept, limits.box_iou)
    return found.replace(kept=kept)


def _judge(model, variables, embedding, points, there, tiles, limits):
    """The `Candidates` of a chunk of points 'n 2', of which those that are `there` count."""
    attended = model.apply(variables, embedding, prompts_of(points), method="decode_tokens")
    iou = attended.iou[0, :, -NUM_MASKS:]
    is_good = there[:, None] & (iou > limits.iou)
    logits = _upscale(model, variables, embedding.shape[1], attended, is_good.any(axis=1))
    tiling, matrices = tiles
    measures = measure(logits, is_good.ravel(), tiling, matrices, limits.offset)
    stability = measures.above.astype(jnp.float32) / measures.below
    # Without a limit even 0 / 0 is kept.
    is_stable = (limits.stability == -jnp.inf) | (stability >= limits.stability)
    kept = is_good.ravel() & is_stable & (measures.area < limits.area)
    return Candidates(iou=iou.ravel(), stability=stability, box=measures.box, kept=kept)


def _upscale(model, variables, gh, attended, wanted):
    """The logits '(n m) lh lw' of those that are wanted, 'n' bool, and zeros."""
    n, step = len(wanted), min(len(wanted), UPSCALED[platform()])
    order = jnp.argsort(~wanted, stable=True)
    order = jnp.concatenate([order, jnp.full(-n % step, n)])  # out of bounds: nothing is written

    def upscale(some):
        image, hyper = attended.image[:, some], attended.hypernetwork_out[:, some]
        logits = model.apply(variables, image, hyper, gh, method="upscale_masks")
        return logits[0, :, -NUM_MASKS:]

    def upscale_next(state):
        i, logits = state
        some = jax.lax.dynamic_slice_in_dim(order, i * step, step)
        return i + 1, logits.at[some].set(upscale(some))

    shape = jax.eval_shape(upscale, order[:step]).shape[1:]
    start = jnp.int32(0), jnp.zeros((n, *shape), jnp.float32)
    more = lambda state: state[0] * step < jnp.sum(wanted)
    _, logits = jax.lax.while_loop(more, upscale_next, start)
    return rearrange(logits, "n m lh lw -> (n m) lh lw")


def prompts_of(points):
    """`Prompts` of an object for each of the points 'n 2'."""
    nowhere = jnp.zeros_like(points)
    labels = jnp.array([FOREGROUND, NOT_A_POINT])
    return Prompts(
        points=jnp.stack([points, nowhere], axis=1)[None],
        labels=jnp.broadcast_to(labels, (1, len(points), 2)),
    )


def _is_cut(box, crop_box, size):
    """Whether boxes 'n 4' reach a side of the crop that is not the image's."""
    x0, y0 = crop_box[:2]
    box = box + jnp.stack([x0, y0, x0, y0])
    image_box = jnp.stack([0, 0, size[1], size[0]])
    near = lambda sides: jnp.abs(box - sides) <= NEAR
    return jnp.any(near(crop_box) & ~near(image_box), axis=1)
