"""The masked autoencoder's objective: to paint what is hidden, each patch by its own scale.

Source: He et al. 2022, facebookresearch/mae `models_mae.py`.

Differences: which patches are hidden depends on the step and the image alone.
"""

import jax
import jax.numpy as jnp

from sam_jax.model.mae import reconstruction_loss
from sam_jax.model.sam import normalize_colors


def make_reconstruction_objective(model, config):
    """Builds the objective of a model.

    Args:
      model: `MaskedAutoencoder`; config: `Reconstruction`.
    Returns:
      f(params, constants, batch, key) -> (loss, {}), where batch is `ImageBatch` and key that of
      the step.
    """

    def objective(params, constants, batch, key):
        del constants  # it has none
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.image_id)
        image = normalize_colors(batch.image)
        painted = model.apply({"params": params}, image, keys)
        losses = reconstruction_loss(painted, image, model.patch_size, config.normalized)
        return jnp.mean(losses), {}

    return objective
