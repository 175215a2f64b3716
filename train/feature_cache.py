"""Features of frozen image encoders, each of which is computed once and kept on disk.

Runs share a cache if the frozen weights, the images, and what is done to the images are the same.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.data.segmentation_batch import Batch
from sam_jax.model.fields import module_to_dict
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import encode_images

Part = Literal["embedding", "trunk"]
METHODS: dict[Part, Literal["encode", "encode_trunk"]] = {
    "embedding": "encode",
    "trunk": "encode_trunk",
}
# Tokens before the neck have more channels than embeddings. The neck normalises them, so that half
# precision is enough; it halves the files.
DTYPES: dict[Part, type] = {"embedding": np.float32, "trunk": np.float16}


class FeatureCache:
    """Replaces the images of a batch by their features.

    A row is marked as known only after its features were written, so that a cache stays valid if a
    run is killed.

    Attributes:
      path: The folder of the features' files.
    """

    def __init__(
        self,
        model: Sam,
        variables: dict[str, Any],
        part: Part,
        folder: Path,
        key: Mapping[str, Any],
        count: int,
        views: int,
        name: str,
    ) -> None:
        """Opens the cache of a run, or creates it.

        Args:
          model: The model.
          variables: Its variables.
          part: The features to keep: embeddings, or the tokens before the neck.
          folder: The folder of all caches.
          key: Everything, besides the encoder, that the features depend on.
          count: The number of images of the source.
          views: The number of views per image; 0 is the same as 1.
          name: A name for the files of this host.
        """
        # A copy, because the step is given the variables and donates them.
        encoder = variables["params"]["image_encoder"]
        if part == "trunk":
            encoder = {name: value for name, value in encoder.items() if name != "neck"}
        self.model, self.part, self.views = model, part, max(1, views)
        self.variables = {"params": {"image_encoder": jax.tree.map(jnp.copy, encoder)}}
        settings = dict(key) | {"part": part, "model": module_to_dict(model.image_encoder)}
        self.path = folder / digest(settings, encoder)
        self.path.mkdir(parents=True, exist_ok=True)
        rows = count * self.views
        shape = feature_shape(model, part, rows)
        self.features = open_rows(self.path / f"{part}_{name}.npy", shape, DTYPES[part])
        self.is_known = open_rows(self.path / f"known_{name}.npy", (rows,), bool)

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with features instead of images."""
        row = batch.image_id * self.views + (0 if batch.view is None else batch.view)
        if not self.is_known[row].all():
            # All images of the batch are encoded, so that there is only one program.
            features = encode_images(
                self.model, self.variables, batch.image, batch.size, METHODS[self.part]
            )
            self.features[row] = np.asarray(features, self.features.dtype)
            self.features.flush()
            self.is_known[row] = True
        features = np.asarray(self.features[row], np.float32)
        return dataclasses.replace(batch, image=None, view=None, **{self.part: features})


def feature_shape(model: Sam, part: Part, rows: int) -> tuple[int, ...]:
    """Returns the shape of the features of some rows."""
    encoder = model.image_encoder
    return rows, *model.grid, encoder.out_dim if part == "embedding" else encoder.embed_dim


def digest(settings: Mapping[str, Any], params: Any) -> str:
    """Returns a name that depends on settings and on the values of parameters."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()[:24]


def open_rows(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    """Opens a file of rows. A new file, or one that replaces a damaged file, holds zeros."""
    try:
        rows = np.lib.format.open_memmap(path, "r+")
    except (FileNotFoundError, ValueError):
        return np.lib.format.open_memmap(path, "w+", dtype, shape)
    if rows.shape != shape or rows.dtype != dtype:
        return np.lib.format.open_memmap(path, "w+", dtype, shape)
    return rows
