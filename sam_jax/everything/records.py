"""Holds the masks that are kept and converts them to the official records.

Source: segment-anything `automatic_mask_generator.py` (generate).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sam_jax.everything.crops import Crop
from sam_jax.masks import rle
from sam_jax.masks.boxes import xyxy_to_xywh

# From run lengths to the form of a record's "segmentation".
OUTPUT_MODES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "binary_mask": rle.decode,
    "uncompressed_rle": rle.uncompress,
    "coco_rle": rle.compress,
}


@dataclasses.dataclass(frozen=True, eq=False)
class SelectedMask:
    """A mask that is kept.

    Attributes:
      crop: The index of the crop that it was found in.
      candidate: Its index in the `Candidates` of that crop.
      box: (left, top, right, bottom), inclusive, in pixels of the image.
      iou: The predicted IoU.
      stability: The stability score.
      segmentation: Its run lengths in the image, or None until it is rasterized.
    """

    crop: int
    candidate: int
    box: Int[np.ndarray, " 4"]
    iou: float
    stability: float
    segmentation: dict[str, Any] | None = None


def make_record(
    mask: SelectedMask, crop: Crop, point: Float[np.ndarray, " 2"], output_mode: str
) -> dict[str, Any]:
    """Returns a mask in the official form, see `SamAutomaticMaskGenerator.generate`.

    Args:
      mask: A rasterized mask.
      crop: The crop that it was found in.
      point: (x, y) of the point that prompted it, in [0, 1] of the crop.
      output_mode: A key of OUTPUT_MODES.
    """
    assert mask.segmentation is not None
    return {
        "segmentation": OUTPUT_MODES[output_mode](mask.segmentation),
        "area": rle.area(mask.segmentation),
        "bbox": xyxy_to_xywh(mask.box).tolist(),
        "predicted_iou": mask.iou,
        "point_coords": [(point * crop.size[::-1] + crop.corner).tolist()],
        "stability_score": mask.stability,
        "crop_box": xyxy_to_xywh(np.array(crop.box)).tolist(),
    }
