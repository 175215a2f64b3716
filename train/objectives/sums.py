"""The result of an objective: sums and their count."""

from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Sums:
    """Sums over the valid masks, or the images, of a batch.

    An objective returns sums instead of means, because the devices hold different numbers of valid
    masks: the sums and counts of all devices are added up before the division.

    Attributes:
      loss: The sum of the losses.
      values: Sums of other values by name, of any shapes.
      count: The number of masks or images.
    """

    loss: Float[Array, ""]
    values: dict[str, Any]
    count: int | Int[Array, ""]

    def mean(self) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Returns the means (loss, values), which are 0 if there is nothing to count."""
        count = jax.numpy.maximum(1, self.count)
        return self.loss / count, jax.tree.map(lambda x: x / count, self.values)
