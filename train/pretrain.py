"""The masked autoencoder's objective: to paint what is hidden, each patch by its own scale.

Source: He et al. 2022. Every random number is keyed by the image, so that the layout of a batch
does not change it.
"""

import jax
import jax.numpy as jnp

from sam_jax.model.mae import normalize_patches, patches_of
from sam_jax.model.sam import normalize


def make_pretrain(model):
    """Builds the objective of a `MaskedAutoencoder`.

    Returns:
      f(params, constants, batch, key) -> (loss, values), where batch is a `Batch` of images alone,
      key that of the step, and values a dict of '' float32 means: "loss".
    """

    def objective(params, constants, batch, key):
        del constants  # there are none
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.image_id)
        image = normalize(batch.image, batch.size)
        painted = model.apply({"params": params}, image, keys)
        loss = painting_loss(painted, image, model.patch_size)
        return loss, {"loss": loss}

    return objective


def painting_loss(painted, image, patch_size):
    """The mean squared error of hidden patches.

    Args:
      painted: `Painted`; image: 'b h w 3' float32, normalised.
    """
    target = normalize_patches(patches_of(image, patch_size))
    error = jnp.mean((painted.patches - target) ** 2, axis=-1)
    return jnp.sum(error * painted.is_hidden) / jnp.sum(painted.is_hidden)
