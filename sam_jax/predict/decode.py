"""Decodes any number of prompted objects with few compiled programs.

The numbers of objects and of point slots are padded to a few fixed sizes, so that neither compiles
a new program.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Shaped

from sam_jax.model.mask_decoder import NUM_OUTPUT_TOKENS, Masks, choose_masks
from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import device_of
from sam_jax.predict.fork import warn_if_forked
from sam_jax.predict.prompts import ObjectPrompt, stack_prompts

CHUNK_SIZE = 4  # objects decoded together: their activations fit into the cache of a CPU
GROUP_SIZE = 32  # objects in one call of a program, where there are that many


@functools.partial(jax.jit, static_argnames="model")
def decode_prompts(
    model: Sam, variables: dict[str, Any], embedding: Float[Array, "b gh gw c"], prompts: Prompts
) -> Masks:
    """Decodes prompts in one program, CHUNK_SIZE objects at a time.

    Args:
      model: The model.
      variables: Its variables.
      embedding: The embeddings of b images.
      prompts: The prompts of n objects in each image. If n exceeds CHUNK_SIZE, CHUNK_SIZE must
        divide it.

    Returns:
      All four masks of every object.
    """

    def decode(chunk: Prompts) -> Masks:
        return cast(Masks, model.apply(variables, embedding, chunk, method="decode"))

    if prompts.points.shape[1] <= CHUNK_SIZE:
        return decode(prompts)

    def split(x: Shaped[Array, "b n ..."]) -> Shaped[Array, "s b r ..."]:
        return rearrange(x, "b (s r) ... -> s b r ...", r=CHUNK_SIZE)

    def join(x: Shaped[Array, "s b r ..."]) -> Shaped[Array, "b n ..."]:
        return rearrange(x, "s b r ... -> b (s r) ...")

    return jax.tree.map(join, jax.lax.map(decode, jax.tree.map(split, prompts)))


def decode_objects(
    model: Sam,
    variables: dict[str, Any],
    embedding: Float[Array, "b gh gw c"],
    objects: Sequence[Sequence[ObjectPrompt]],
    multimask_output: bool,
) -> list[tuple[Float32[np.ndarray, "n m lh lw"], Float32[np.ndarray, "n m"]]]:
    """Decodes the prompted objects of each image.

    Args:
      model: The model.
      variables: Its variables.
      embedding: The embeddings of b images.
      objects: For each of the first images, at least one and at most b, its objects. Each image
        may have another number n of them.
      multimask_output: Return three masks of each object instead of one.

    Returns:
      For each item of `objects`, the low-resolution logits and the predicted IoUs.
    """
    warn_if_forked()
    groups = []
    start = 0
    for size in group_sizes(max(map(len, objects))):
        group = [image_objects[start : start + size] for image_objects in objects]
        group += [[]] * (len(embedding) - len(group))
        most = max((len(x.labels) for image_objects in group for x in image_objects), default=0)
        prompts = stack_prompts(group, size, num_slots(most))
        with jax.default_device(device_of(variables)):
            decoded = decode_prompts(model, variables, embedding, prompts)
        groups.append(jax.device_get(decoded))
        start += size
    masks = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *groups)
    masks = choose_masks(masks, multimask_output)
    logits, iou = np.asarray(masks.logits), np.asarray(masks.iou)
    counts = [len(image_objects) for image_objects in objects]
    return [(logits[i, :n], iou[i, :n]) for i, n in enumerate(counts)]


def group_sizes(n: int) -> list[int]:
    """Splits n objects into groups of 1, CHUNK_SIZE or GROUP_SIZE, the last of them padded."""
    if n <= 1:
        return [1]
    return [GROUP_SIZE] * (n // GROUP_SIZE) + [CHUNK_SIZE] * -(-(n % GROUP_SIZE) // CHUNK_SIZE)


def num_slots(num_points: int) -> int:
    """Returns a number of point slots, at least `num_points`, out of few.

    Together with the decoder's output tokens there are 7 tokens (for a click or a box), 16, 32, 64
    and so on, which compiles few programs and wastes no lanes of the hardware.

    Args:
      num_points: The largest number of points of an object, box corners included.
    """
    if num_points <= 2:
        return 2
    tokens = 1 << (num_points + NUM_OUTPUT_TOKENS - 1).bit_length()
    return max(16, tokens) - NUM_OUTPUT_TOKENS
