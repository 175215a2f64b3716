"""Features of frozen image encoders, each of which is computed once and kept on disk.

Runs share a cache if the frozen weights, the images, and what is done to the images are the same.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.data.example import BadSample, Source
from sam_jax.data.segmentation_batch import Batch
from sam_jax.io.atomic import atomic_path
from sam_jax.masks import rle
from sam_jax.model.fields import module_to_dict
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import encode_images
from train.config import ConfigError

Part = Literal["embedding", "trunk"]
METHODS: dict[Part, Literal["encode", "encode_trunk"]] = {
    "embedding": "encode",
    "trunk": "encode_trunk",
}
# Tokens before the neck have more channels than embeddings. The neck normalizes them, so that half
# precision is enough; it halves the files.
DTYPES: dict[Part, type] = {"embedding": np.float32, "trunk": np.float16}


CHUNKS = 8  # of a batch, of which only those with new images are encoded
VERSION = 1  # increase it when other features would be computed from the same settings
FINGERPRINTED = 64  # examples


class FeatureCache:
    """Replaces the images of a batch by their features.

    A row is marked as known only after its features were written, so that a cache stays valid if a
    run is killed.

    Attributes:
      path: The folder of the features' files.
      num_bytes: The size of this host's file once all features are known.
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

        Raises:
          ConfigError: If the disk has too little space.
        """
        # A copy, because the step is given the variables and donates them.
        encoder = variables["params"]["image_encoder"]
        if part == "trunk":
            encoder = {name: value for name, value in encoder.items() if name != "neck"}
        self.model, self.part, self.views = model, part, max(1, views)
        self.variables = {"params": {"image_encoder": jax.tree.map(jnp.copy, encoder)}}
        settings = dict(key) | {"version": VERSION, "part": part}
        settings["model"] = module_to_dict(model.image_encoder)
        self.path = folder / digest(settings, encoder)
        self.path.mkdir(parents=True, exist_ok=True)
        rows = count * self.views
        shape = feature_shape(model, part, rows)
        self.num_bytes = rows + math.prod(shape) * np.dtype(DTYPES[part]).itemsize
        file = self.path / f"{part}_{name}.bin"
        check_space(file, self.num_bytes)
        if file_size(file) != self.num_bytes:
            create_file(file, self.num_bytes)
        # One file, so that a row that is known has its features even if two runs create the file.
        self.is_known = np.memmap(file, bool, "r+", shape=(rows,))
        self.features = np.memmap(file, DTYPES[part], "r+", offset=rows, shape=shape)

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with features instead of images."""
        assert batch.image is not None
        row = batch.image_id * self.views + (0 if batch.view is None else batch.view)
        new = np.flatnonzero(~self.is_known[row])
        chunk = -(-len(row) // CHUNKS)
        for start in range(0, len(new), chunk):
            # The last chunk is filled up with an image again, so that there is only one program.
            indices = np.resize(new[start : start + chunk], chunk)
            features = encode_images(
                self.model,
                self.variables,
                batch.image[indices],
                batch.size[indices],
                METHODS[self.part],
            )
            self.features[row[indices]] = np.asarray(features, self.features.dtype)
            self.features.flush()
            self.is_known[row[indices]] = True
        features = np.asarray(self.features[row], np.float32)
        return dataclasses.replace(batch, image=None, view=None, **{self.part: features})


def check_space(file: Path, num_bytes: int) -> None:
    """Raises ConfigError if the disk has too little space for a file of `num_bytes`."""
    used = file.stat().st_blocks * 512 if file.is_file() else 0  # the file may have holes
    if (free := shutil.disk_usage(file.parent).free) < num_bytes - used:
        raise ConfigError(
            f"feature_cache={str(file.parent)!r} needs {num_bytes / 2**20:.0f} MiB of disk space; "
            f"{free / 2**20:.0f} MiB are free. Choose a folder on another disk, or fewer data.views"
        )


def file_size(path: Path) -> int:
    """Returns the size of a file in bytes; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


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


def create_file(path: Path, num_bytes: int) -> None:
    """Creates a file of zeros, which take no space before they are replaced."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.truncate(num_bytes)


def fingerprint(source: Source) -> str:
    """Returns a name that changes with the images and masks of a source.

    Up to FINGERPRINTED examples are read, spread over the source.
    """
    total = hashlib.sha256(str(len(source)).encode())
    for index in np.linspace(0, len(source) - 1, min(len(source), FINGERPRINTED)).astype(int):
        total.update(source.name(int(index)).encode("utf-8", "surrogatepass"))
        try:
            example = source[int(index)]
        except BadSample:
            continue
        total.update(example.image.tobytes())
        total.update(json.dumps([rle.compress(mask) for mask in example.masks]).encode())
    return total.hexdigest()
