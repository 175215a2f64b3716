"""The settings of a run of `sam-jax everything`, on which its results depend, and image names."""

import argparse
import importlib.metadata
import inspect
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sam_jax
from sam_jax.data.open import Subset
from sam_jax.everything.generator import SamAutomaticMaskGenerator
from sam_jax.model.sam import Sam
from sam_jax.predict.tiles_option import resolve_tiles

# Packages whose version may change the results.
RESULT_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "pillow")


def run_settings(
    args: argparse.Namespace,
    images: Subset,
    model: Sam,
    variables: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Returns everything that the results of a run depend on.

    Args:
      args: The command line.
      images: The images.
      model: The model.
      variables: Its variables.
      options: The arguments of the generator.
    """
    return {
        **software_settings(),
        **image_settings(args, images),
        **model_settings(args, model, variables),
        "overlays": args.overlays,
        **generator_settings(model, options),
    }


def image_names(args: argparse.Namespace, images: Subset) -> dict[int, str]:
    """Returns the names of the selected images by their indices.

    They are relative to the folder of the images, so that they do not depend on how it is spelled.
    """
    folder = os.path.expanduser(args.images)
    if os.path.isfile(folder):
        folder = os.path.dirname(folder)
    elif not os.path.exists(folder):  # KIND:FOLDER
        folder = os.path.expanduser(args.images.partition(":")[2])
    prefix = os.path.join(folder, "")
    return {i: images.source.name(i).removeprefix(prefix) for i in images.indices.tolist()}


def software_settings() -> dict[str, Any]:
    """Returns the versions and the device, on which the results depend."""
    return {
        "sam_jax": sam_jax.__version__,
        **{package: importlib.metadata.version(package) for package in RESULT_PACKAGES},
        "device": jax.local_devices()[0].device_kind,
    }


def image_settings(args: argparse.Namespace, images: Subset) -> dict[str, Any]:
    """Returns which images are segmented.

    The names of all files matter: one more or less would change the indices of others.
    """
    checksum = 0
    for index in range(len(images.source)):
        name = os.path.basename(images.source.name(index))
        checksum = zlib.crc32(name.encode("utf-8", "surrogatepass"), checksum)
    return {
        "images": _resolve(args.images),
        "index": args.index,
        "number of images": len(images.source),
        "checksum of their names": checksum,
    }


def model_settings(
    args: argparse.Namespace, model: Sam, variables: dict[str, Any]
) -> dict[str, Any]:
    """Returns which model is used, by its values: the file at a path may change."""
    checksum = 0
    for leaf in jax.tree.leaves(variables):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return {
        "weights": args.weights,
        "checksum of the weights": checksum,
        "dtype": model.dtype,
    }


def generator_settings(model: Sam, options: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of the generator on which the results depend, with defaults."""
    bound = inspect.signature(SamAutomaticMaskGenerator).bind_partial(**options)
    bound.apply_defaults()
    settings = {k: value for k, value in bound.arguments.items() if k != "points_per_batch"}
    return settings | {"tiles": resolve_tiles(model, settings["tiles"])}


def _resolve(images: str) -> str:
    """Resolves the path in FOLDER or KIND:FOLDER, so that one folder has one name."""
    kind, colon, name = images.rpartition(":")
    path = Path(name).expanduser()
    return f"{kind}{colon}{path.resolve()}" if path.exists() else images
