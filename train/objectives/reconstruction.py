"""The masked autoencoder's objective: to reconstruct removed patches.

Source: He et al. 2022, facebookresearch/mae `models_mae.py`.

Differences: which patches are removed depends on the step and the image only.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sam_jax.data.crop_batch import ImageBatch
from sam_jax.model.mae import MaskedAutoencoder, reconstruction_loss
from sam_jax.model.sam import normalize_colors
from train.config import Reconstruction
from train.objectives.sums import Sums


@dataclasses.dataclass(frozen=True)
class ReconstructionObjective:
    """The objective of a model, a function of (params, constants, batch, key).

    Attributes:
      model: The model.
      config: The objective's configuration.
    """

    model: MaskedAutoencoder
    config: Reconstruction

    def __call__(
        self,
        params: dict[str, Any],
        constants: dict[str, Any],
        batch: ImageBatch,
        key: Key[Array, ""],
    ) -> Sums:
        """Computes the loss of a batch.

        Args:
          params: The model's parameters.
          constants: Not used, since the model has none.
          batch: The images.
          key: The random key of the step.

        Returns:
          The sum over the images; there are no values besides the loss.
        """
        del constants
        keys = jax.vmap(lambda image_id: jax.random.fold_in(key, image_id))(batch.image_id)
        image = normalize_colors(batch.image)
        output: Any = self.model.apply({"params": params}, image, keys)
        losses = reconstruction_loss(output, image, self.model.patch_size, self.config.normalized)
        return Sums(jnp.sum(losses), {}, len(losses))
