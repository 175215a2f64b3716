"""The rounds of SAM's objective for one mask, one by one, for inspection.

Clicks, masks and scores are those of `InteractiveObjective`, without drop path and dropout.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Key

from sam_jax.data.segmentation_batch import Batch
from sam_jax.masks.overlap import mask_iou
from sam_jax.model.mask_decoder import Masks, choose_masks
from sam_jax.model.prompt_encoder import BACKGROUND
from sam_jax.model.sam import Sam, normalize
from train.config import Interactive
from train.objectives.interactive import DecoderInputs, InteractiveObjective, PromptState
from train.objectives.prompt_sampling import Clicks
from train.objectives.targets import Targets, num_rounds, prepare_targets, split_masks
from train.objectives.token_layout import to_image_layout, to_token_layout, upsample


@dataclasses.dataclass(frozen=True)
class Round:
    """The prompt of a round and the model's answer.

    Attributes:
      points: (x, y) in pixels of the padded image, of all points up to this round.
      labels: 1 for a click on the object, 0 for one on the background, 2 and 3 for the corners of
        a box.
      logits: Logits of three masks or of one.
      predicted: The predicted IoU of each mask.
      iou: The IoU of each mask with the true mask.
      chosen: The index of the mask that becomes the next mask prompt.
    """

    points: Float32[np.ndarray, "k 2"]
    labels: Int32[np.ndarray, " k"]
    logits: Float32[np.ndarray, "m lh lw"]
    predicted: Float32[np.ndarray, " m"]
    iou: Float32[np.ndarray, " m"]
    chosen: int


def rollout(
    model: Sam, variables: dict[str, Any], config: Interactive, batch: Batch, key: Key[Array, ""]
) -> list[Round]:
    """Runs the rounds of one mask.

    Args:
      model: The model.
      variables: Its variables.
      config: The objective's configuration.
      batch: One image with one mask.
      key: The random key of the step.

    Returns:
      The rounds.

    Raises:
      ValueError: If the batch holds more than one image or mask.
    """
    if batch.image is None or batch.valid.shape != (1, 1):
        raise ValueError(
            "batch must hold one image with one mask, as from a loader with batch_size=1 and "
            f"masks_per_image=1; got (images, masks) = {batch.valid.shape}"
        )
    objective = InteractiveObjective(model, config, train=False)
    inputs, targets, state = _prepare(objective, variables, batch, key)
    rounds = []
    for index in range(num_rounds(config)):
        clicks, masks = _predict(objective, inputs, targets, state, jnp.int32(index))
        multimask = objective.is_multimask(clicks.count, jnp.int32(index)).item()
        masks = choose_masks(masks, multimask)
        chosen = int(jnp.argmax(masks.iou))
        logits = to_token_layout(masks.logits[:, :, chosen], model.grid)
        state = PromptState(clicks, logits)
        rounds.append(_to_round(clicks, masks, targets, chosen, objective))
    return rounds


@functools.partial(jax.jit, static_argnums=0)
def _prepare(
    objective: InteractiveObjective, variables: dict[str, Any], batch: Batch, key: Key[Array, ""]
) -> tuple[DecoderInputs, Targets, PromptState]:
    """Encodes the image and samples the first prompt."""
    model, config = objective.model, objective.config
    assert batch.image is not None  # checked by `rollout`
    image = normalize(batch.image, batch.size)
    embedding: Any = model.apply(variables, image, method="encode")
    keys = jax.vmap(lambda image_id: jax.random.fold_in(key, image_id))(batch.image_id)
    chunk = jax.tree.map(lambda x: x[0], split_masks(config, batch))  # the only one
    targets = prepare_targets(model, config, batch.size, keys, chunk)
    inputs = DecoderInputs(
        variables["params"], variables["constants"], embedding.astype(jnp.float32)
    )
    return inputs, targets, objective.init_prompt_state(targets)


@functools.partial(jax.jit, static_argnums=0)
def _predict(
    objective: InteractiveObjective,
    inputs: DecoderInputs,
    targets: Targets,
    state: PromptState,
    index: Int[Array, ""],
) -> tuple[Clicks, Masks]:
    return objective.predict_round(inputs, targets, state, index)


def _to_round(
    clicks: Clicks, masks: Masks, targets: Targets, chosen: int, objective: InteractiveObjective
) -> Round:
    """Converts the arrays of the only mask of a round to numpy."""
    grid = objective.model.grid
    logits = upsample(masks.logits, objective.config.loss_scale)
    iou = mask_iou(logits > 0, to_image_layout(targets.target, grid)[:, :, None])
    labels = np.asarray(clicks.labels[0, 0])
    is_given = labels >= BACKGROUND  # neither absent nor the padding point
    return Round(
        points=np.asarray(clicks.points[0, 0])[is_given],
        labels=labels[is_given],
        logits=np.asarray(masks.logits[0, 0]),
        predicted=np.asarray(masks.iou[0, 0]),
        iou=np.asarray(iou[0, 0]),
        chosen=chosen,
    )
