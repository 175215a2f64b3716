"""Batch sizes of everything mode that depend on the platform. Results do not depend on them."""

import dataclasses

from sam_jax.model.ops.platform import platform
from sam_jax.predict.decode import CHUNK_SIZE


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Batch sizes for one platform.

    Attributes:
      max_points_per_batch: The most points that are decoded at a time, or None for no limit.
      images_per_batch: Crops that are encoded at a time.
      prompts_per_upscaling: Prompts whose masks are upscaled at a time.
      tiles_per_measurement: Tiles that are measured at a time.
      window: Rows and columns of logits that a tile may depend on, or None for all of them.
    """

    max_points_per_batch: int | None
    images_per_batch: int
    prompts_per_upscaling: int
    tiles_per_measurement: int
    window: int | None


# On CPUs small batches stay in the cache. TPUs slice arrays one item after the other, so one larger
# product with all logits is faster there.
TUNINGS = {
    "cpu": Tuning(
        max_points_per_batch=CHUNK_SIZE,
        images_per_batch=1,
        prompts_per_upscaling=1,
        tiles_per_measurement=8,
        window=32,
    ),
    "gpu": Tuning(
        max_points_per_batch=None,
        images_per_batch=8,
        prompts_per_upscaling=8,
        tiles_per_measurement=64,
        window=32,
    ),
    "tpu": Tuning(
        max_points_per_batch=None,
        images_per_batch=8,
        prompts_per_upscaling=8,
        tiles_per_measurement=64,
        window=None,
    ),
}


def current_tuning() -> Tuning:
    """Returns the tuning of the platform that programs are traced for."""
    return TUNINGS[platform()]
