"""The masked autoencoder's loss: to paint what is hidden, each patch by its own scale.

Source: He et al. 2022.
"""

import jax.numpy as jnp

from sam_jax.model.mae import normalize_patches, patches_of


def painting_loss(painted, image, patch_size):
    """The mean squared error of hidden patches.

    Args:
      painted: `Painted`; image: 'b h w 3' float32, normalised, of images that fill the frame.
    """
    target = normalize_patches(patches_of(image, patch_size))
    error = jnp.mean((painted.patches - target) ** 2, axis=-1)
    return jnp.sum(error * painted.is_hidden) / jnp.sum(painted.is_hidden)
