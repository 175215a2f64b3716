"""The public names of segment-anything, for programs that were written for it.

`from segment_anything import SamPredictor, sam_model_registry` becomes
`from sam_jax.segment_anything import SamPredictor, sam_model_registry`, and so for
`SamAutomaticMaskGenerator`, for `ResizeLongestSide` of `segment_anything.utils.transforms`, and for
the functions of `segment_anything.utils.amg` below.

Source: segment-anything `build_sam.py` and `utils/amg.py`.

Differences: arrays are numpy's, also where names or the source say PyTorch. A model has no `to`:
JAX computes on its default device. Functions that only handle tensors of the generator are left
out.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sam_jax.everything.crops import build_point_grid as build_point_grid
from sam_jax.everything.crops import build_point_grids as build_all_layer_point_grids
from sam_jax.everything.crops import plan_crops
from sam_jax.everything.generator import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask as batched_mask_to_box
from sam_jax.masks.boxes import xyxy_to_xywh as box_xyxy_to_xywh
from sam_jax.masks.regions import fill_small_holes, remove_small_islands
from sam_jax.masks.rle import area as area_from_rle
from sam_jax.masks.rle import compress as coco_encode_rle
from sam_jax.masks.rle import decode as rle_to_mask
from sam_jax.model.init import init_variables
from sam_jax.model.sam import Sam, sam_vit_b, sam_vit_h, sam_vit_l
from sam_jax.predict.official_names import ResizeLongestSide as ResizeLongestSide
from sam_jax.predict.predictor import SamPredictor as SamPredictor
from sam_jax.weights.formats import load

__all__ = [
    "ResizeLongestSide",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "area_from_rle",
    "batched_mask_to_box",
    "box_xyxy_to_xywh",
    "build_all_layer_point_grids",
    "build_point_grid",
    "build_sam",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "calculate_stability_score",
    "coco_encode_rle",
    "generate_crop_boxes",
    "mask_to_rle_pytorch",
    "remove_small_regions",
    "rle_to_mask",
    "sam_model_registry",
]


def _build(size: Callable[[], Sam], checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Builds a model that is bound to its variables.

    Args:
      size: Builds the model of an official size.
      checkpoint: A file or a name that `sam_jax.load` takes; None for initial values.

    Raises:
      ValueError: If the checkpoint is of another size.
    """
    expected = size()
    if checkpoint is None:
        return expected.bind(init_variables(expected, seed=0))
    model, variables = load(os.path.expanduser(checkpoint))
    found, wanted = ((x.image_encoder.embed_dim, x.image_encoder.depth) for x in (model, expected))
    if found != wanted:
        raise ValueError(
            f"checkpoint must be of a model with embed_dim and depth {wanted}; {checkpoint} has "
            f"{found}"
        )
    return model.bind(variables)


build_sam_vit_h = functools.partial(_build, sam_vit_h)
build_sam_vit_l = functools.partial(_build, sam_vit_l)
build_sam_vit_b = functools.partial(_build, sam_vit_b)
build_sam = build_sam_vit_h

sam_model_registry = {
    "default": build_sam,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
}


def mask_to_rle_pytorch(masks: Bool[np.ndarray, "b h w"]) -> list[dict[str, Any]]:
    """Encodes masks as lists of run lengths, see `sam_jax.masks.rle.uncompress`."""
    return [rle.uncompress(rle.encode(mask)) for mask in masks]


def calculate_stability_score(
    masks: Float[np.ndarray, "*b h w"], mask_threshold: float, threshold_offset: float
) -> Float[np.ndarray, "*b"] | np.float64:
    """Returns the IoU of the masks at two levels of their logits.

    Args:
      masks: The logits.
      mask_threshold: The middle of the two levels.
      threshold_offset: The distance of each level from it.

    Returns:
      NaN for masks that are empty at both levels.
    """
    inner = (masks > mask_threshold + threshold_offset).sum(axis=(-2, -1))
    outer = (masks > mask_threshold - threshold_offset).sum(axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        return inner / outer


def generate_crop_boxes(
    im_size: tuple[int, int], n_layers: int, overlap_ratio: float
) -> tuple[list[list[int]], list[int]]:
    """Returns the crops of an image and the layer of each, see `plan_crops`.

    Args:
      im_size: (height, width) of the image.
      n_layers: Layers of crops in addition to the image.
      overlap_ratio: The overlap of the first layer's crops.

    Returns:
      Boxes [x0, y0, x1, y1], and layers.
    """
    crops = plan_crops(im_size, n_layers, overlap_ratio)
    return [list(crop.box) for crop in crops], [crop.layer for crop in crops]


def remove_small_regions(
    mask: Bool[np.ndarray, "h w"], area_thresh: float, mode: str
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Fills small holes, or removes small islands but the largest.

    Args:
      mask: The mask.
      area_thresh: Regions of fewer pixels are small.
      mode: "holes" or "islands".

    Returns:
      The mask, and True if a region was small.

    Raises:
      ValueError: If `mode` is another one.
    """
    if mode not in ("holes", "islands"):
        raise ValueError(f'mode must be "holes" or "islands"; got {mode!r}')
    change = fill_small_holes if mode == "holes" else remove_small_islands
    return change(mask, area_thresh)
