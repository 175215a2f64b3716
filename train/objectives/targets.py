"""The true masks of a batch, prepared for the rounds of the objective."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Bool, Float32, Int, Int32, Key

from sam_jax.data.segmentation_batch import Batch
from sam_jax.model.sam import UPSCALING
from train.config import Interactive
from train.objectives.token_layout import to_token_layout


@runtime_checkable
class PromptableModel(Protocol):
    """The part of `Sam` that the objective uses."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Returns (height, width) of the padded input in pixels."""
        ...

    @property
    def patch_size(self) -> int:
        """Returns the side of a token in pixels."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Returns (rows, columns) of the tokens."""
        ...

    @property
    def low_res(self) -> tuple[int, int]:
        """Returns (height, width) of the predicted masks' logits."""
        ...

    @property
    def apply(self) -> Callable[..., Any]:
        """Applies a method of the model, see `flax.linen.Module.apply`."""
        ...


@flax.struct.dataclass
class Targets:
    """The true masks of n objects in each of b images. They do not change between rounds.

    Attributes:
      mask: The masks in pixels of the padded image.
      target: The masks at the resolution of the loss, in the token layout.
      inside: The pixels at this resolution that are not padding, in the token layout.
      size: (height, width) of the image without padding.
      weight: The weight of the mask in the sum over masks and rounds: 0 for a filler.
      key: The random key of the mask.
    """

    mask: Bool[Array, "b n h w"]
    target: Bool[Array, "b n s p"]
    inside: Bool[Array, "b n s p"]
    size: Int32[Array, "b n 2"]
    weight: Float32[Array, "b n"]
    key: Key[Array, "b n"]


def num_rounds(config: Interactive) -> int:
    """Returns the number of rounds: first prompt, sampled clicks, rounds without a new point."""
    return 1 + config.num_clicks + config.num_extra_rounds


def loss_stride(model: PromptableModel, config: Interactive) -> int:
    """Returns the side, in pixels of the padded image, of a pixel at the loss's resolution."""
    return model.patch_size // (UPSCALING * config.loss_scale)


def split_masks(config: Interactive, batch: Batch) -> dict[str, Any]:
    """Splits the masks of a batch into chunks.

    Args:
      config: The objective's configuration.
      batch: The batch.

    Returns:
      {"bits", "mask_id", "weight"}, arrays 'chunk b n ...'. The last chunk is padded with masks of
      weight 0.
    """
    n = batch.valid.shape[1]
    size = min(config.masks_per_chunk, n)
    weight = jnp.asarray(batch.valid, jnp.float32) / num_rounds(config)
    masks = {"bits": batch.masks, "mask_id": batch.mask_id, "weight": weight}

    def split(x: Array) -> Array:
        padding = ((0, 0), (0, -n % size), *[(0, 0)] * (x.ndim - 2))
        return rearrange(jnp.pad(x, padding), "b (s n) ... -> s b n ...", n=size)

    return jax.tree.map(split, masks)


def prepare_targets(
    model: PromptableModel,
    config: Interactive,
    size: Int[Array | np.ndarray, "b 2"],
    keys: Key[Array, " b"],
    chunk: dict[str, Any],
) -> Targets:
    """Prepares the masks of a chunk for their rounds.

    Args:
      model: The model.
      config: The objective's configuration.
      size: (height, width) of the images without padding.
      keys: The random keys of the images.
      chunk: One of the chunks of `split_masks`.

    Returns:
      The targets.
    """
    mask = jnp.unpackbits(chunk["bits"], axis=-1, count=model.image_size[1]).astype(bool)
    stride = loss_stride(model, config)
    fraction = reduce(
        mask.astype(jnp.float32), "b n (h i) (w j) -> b n h w", "mean", i=stride, j=stride
    )
    target = fraction >= 0.5
    # A mask that covers less than half of every pixel would vanish; it keeps all that it touches.
    has_vanished = ~jnp.any(target, axis=(2, 3), keepdims=True)
    target = target | (has_vanished & (fraction > 0))
    inside = _inside(size, (target.shape[2], target.shape[3]), stride)[:, None]
    return Targets(
        mask=mask,
        target=to_token_layout(target, model.grid),
        inside=to_token_layout(inside | target, model.grid),
        size=jnp.broadcast_to(size[:, None], (*mask.shape[:2], 2)),
        weight=chunk["weight"],
        key=jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, chunk["mask_id"]),
    )


def _inside(
    size: Int[Array | np.ndarray, "b 2"], shape: tuple[int, int], stride: int
) -> Bool[Array, "b h w"]:
    """Returns True for pixels at the loss's resolution whose center is in the image."""
    covered = (2 * size + stride) // (2 * stride)
    rows = jnp.arange(shape[0]) < covered[:, :1]
    columns = jnp.arange(shape[1]) < covered[:, 1:]
    return rows[:, :, None] & columns[:, None, :]
