"""Embeddings of a frozen image encoder, each of which is computed once and kept on disk."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.data.segmentation_batch import Batch
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import encode_images


class EmbeddingCache:
    """Replaces the images of a batch by their embeddings.

    The file is a cache of this process: it is filled while images are seen, and a new run or a
    resumed one starts with an empty file.
    """

    def __init__(self, model: Sam, variables: dict[str, Any], path: Path, count: int) -> None:
        """Creates the file.

        Args:
          model: The model.
          variables: Its variables.
          path: The file to write.
          count: The number of images.
        """
        # A copy, because the step is given the variables and donates them.
        params = {"image_encoder": variables["params"]["image_encoder"]}
        self.model, self.variables = model, {"params": jax.tree.map(jnp.copy, params)}
        self.is_known = np.zeros(count, bool)
        shape = (count, *model.grid, model.embedding_dim)
        self.file = np.lib.format.open_memmap(path, "w+", np.float32, shape)

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with embeddings instead of images."""
        if not self.is_known[batch.image_id].all():
            # All images of the batch are encoded, so that there is only one program.
            embeddings = encode_images(self.model, self.variables, batch.image, batch.size)
            self.file[batch.image_id] = np.asarray(embeddings, np.float32)
            self.is_known[batch.image_id] = True
        embedding = self.file[batch.image_id]
        return dataclasses.replace(batch, image=None, embedding=embedding)
