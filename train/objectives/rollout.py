"""The rounds of SAM's objective for one mask, one after the other, to be looked at.

Clicks, masks and scores are those of `train.objectives.interactive`, without dropping paths or
units.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.data.segmentation_batch import Batch
from sam_jax.model.mask_decoder import choose_masks
from sam_jax.model.prompt_encoder import BACKGROUND, Prompts
from sam_jax.model.sam import Sam, normalize
from train.config import Interactive
from train.objectives.interactive import (
    begin,
    by_place,
    by_token,
    is_multimask,
    make_truth,
    next_clicks,
    num_rounds,
    resize_logits,
    split_masks,
)
from train.objectives.losses import mask_iou


@dataclasses.dataclass(frozen=True)
class Round:
    """What was asked in a round, and what the model answered.

    Attributes:
      points: 'k 2' float32 (x, y) in pixels of the frame, labels: 'k' int32; all up to this round:
        1 a click on the object, 0 one off it, 2 and 3 the corners of a box.
      logits: 'm lh lw' float32 of three masks or one.
      predicted, iou: 'm' float32, the IoU that the model expects of each, and the true one.
      chosen: the mask that goes on to the next round.
    """

    points: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    predicted: np.ndarray
    iou: np.ndarray
    chosen: int


def replay(
    model: Sam, variables: dict, config: Interactive, batch: Batch, key: jax.Array
) -> list[Round]:
    """Plays the rounds of one mask.

    Args:
      model, variables: which answer.
      config: of the objective.
      batch: one image with one mask.
      key: of the step.
    Raises:
      ValueError: if the batch holds more.
    """
    if batch.valid.shape != (1, 1):
        raise ValueError(
            "batch must hold one image with one mask, as of a loader with batch_size=1 and "
            f"masks_per_image=1; got (images, masks) = {batch.valid.shape}"
        )
    embedding, truth, session = start(model, config, variables, batch, key)
    rounds = []
    for index in range(num_rounds(config)):
        clicks, masks = ask(model, config, variables, embedding, truth, session, index)
        session = session.replace(clicks=clicks)
        masks = choose_masks(masks, is_multimask(config, session, index).item())
        shown = by_token(resize_logits(masks.logits, config.loss_scale), model)
        iou = mask_iou(shown, truth.target[:, :, None])
        chosen = jnp.argmax(masks.iou)
        session = session.replace(logits=by_token(masks.logits[:, :, chosen], model))
        clicks, masks, iou = jax.tree.map(lambda x: np.asarray(x[0, 0]), (clicks, masks, iou))
        given = clicks.labels >= BACKGROUND  # neither absent nor the padding point
        rounds.append(
            Round(
                points=clicks.points[given],
                labels=clicks.labels[given],
                logits=masks.logits,
                predicted=masks.iou,
                iou=iou,
                chosen=int(chosen),
            )
        )
    return rounds


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(model, config, variables, batch, key):
    """The embedding '1 gh gw c' of the image, and the `Truth` and first `Session` of the mask."""
    embedding = model.apply(variables, normalize(batch.image, batch.size), method="encode")
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.image_id)
    chunk = jax.tree.map(lambda x: x[0], split_masks(config, batch))  # the only one
    truth = make_truth(model, config, batch.size, keys, chunk)
    return embedding.astype(jnp.float32), truth, begin(model, config, truth)


@functools.partial(jax.jit, static_argnums=(0, 1))
def ask(model, config, variables, embedding, truth, session, index):
    """The `Clicks` up to a round, and the `Masks` that the model answers; both '1 1 ...'."""
    clicks = next_clicks(model, config, truth, session, index)
    prompts = Prompts(
        points=clicks.points,
        labels=clicks.labels,
        mask=by_place(session.logits, model),
        has_mask=jnp.broadcast_to(index > 0, clicks.count.shape),
    )
    return clicks, model.apply(variables, embedding, prompts, method="decode")
