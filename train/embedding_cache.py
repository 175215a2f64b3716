"""Embeddings of a frozen image encoder, each computed once and kept on disk."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.data.segmentation_batch import Batch
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import encode_images


class Embeddings:
    """Adds embeddings to batches.

    The file is a cache of this process: it grows as images are seen, and starts anew with a run.
    """

    def __init__(self, model: Sam, variables: dict, path: Path, count: int) -> None:
        shape = (count, *model.grid, model.embedding_dim)
        # The encoder's own copy: the step is given the variables themselves, and uses them up.
        params = {"image_encoder": variables["params"]["image_encoder"]}
        self.model, self.variables = model, {"params": jax.tree.map(jnp.copy, params)}
        self.known = np.zeros(count, bool)
        self.file = np.lib.format.open_memmap(path, "w+", np.float32, shape)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its images' embeddings instead of the images."""
        new = ~self.known[batch.image_id]
        if new.any():
            # Always as many as a batch has: one program.
            computed = encode_images(self.model, self.variables, batch.image, batch.size)
            self.file[batch.image_id] = np.asarray(computed, np.float32)
            self.known[batch.image_id] = True
        return batch.replace(image=None, embedding=self.file[batch.image_id])
