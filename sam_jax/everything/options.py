"""The options of everything mode, validated in one place.

Source: segment-anything `automatic_mask_generator.py` for names and defaults; Kirillov et al. 2023,
appendix B, for `max_image_share`, `remove_small_masks` and the settings of SA-1B.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from sam_jax.everything.candidates import Thresholds
from sam_jax.everything.crops import build_point_grids, check_point_grids
from sam_jax.everything.filtering import round_down_to_float32
from sam_jax.everything.records import OUTPUT_MODES
from sam_jax.predict.tiles_option import check_tiles

INTEGERS = (
    "points_per_side",
    "points_per_batch",
    "crop_n_layers",
    "crop_n_points_downscale_factor",
    "min_mask_region_area",
)
REALS = (
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
    "box_nms_thresh",
    "crop_nms_thresh",
    "crop_overlap_ratio",
    "max_image_share",
)


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratorOptions:
    """The options of `SamAutomaticMaskGenerator`, which documents them.

    Raises:
      ValueError: If an option is invalid. The message names it.
    """

    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: Sequence[ArrayLike] | None = None
    min_mask_region_area: int = 0
    output_mode: str = "binary_mask"
    max_image_share: float | None = None
    remove_small_masks: bool = False
    tiles: int | str | None = None

    def __post_init__(self) -> None:
        """Validates the options."""
        if (self.points_per_side is None) == (self.point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(
                f"output_mode must be one of {tuple(OUTPUT_MODES)}; got {self.output_mode!r}"
            )
        check_tiles(self.tiles)
        self._check_numbers()
        self._check_at_least("crop_n_layers", 0)
        self._check_at_least("min_mask_region_area", 0)
        self._check_at_least("stability_score_offset", 0)
        self._check_at_least("points_per_batch", 1)
        if self.point_grids is None:
            self._check_at_least("crop_n_points_downscale_factor", 1)
        if not 0 <= self.crop_overlap_ratio <= 1:
            raise ValueError(f"crop_overlap_ratio must be 0 to 1; got {self.crop_overlap_ratio}")
        if self.max_image_share is not None and not 0 < self.max_image_share <= 1:
            raise ValueError(
                f"max_image_share must be above 0, up to 1; got {self.max_image_share}"
            )

    def make_point_grids(self) -> tuple[Float[np.ndarray, "_ 2"], ...]:
        """Returns a grid of points in [0, 1] for the image and one for each layer of crops.

        The grids cannot be written to.

        Raises:
          ValueError: If `point_grids` are invalid, or if a layer has no points.
        """
        if self.point_grids is not None:
            grids = check_point_grids(self.point_grids, self.crop_n_layers)
        else:
            assert self.points_per_side is not None
            grids = build_point_grids(
                self.points_per_side, self.crop_n_layers, self.crop_n_points_downscale_factor
            )
        for grid in grids:
            grid.flags.writeable = False
        return tuple(grids)

    def make_thresholds(self, image_size: tuple[int, int]) -> Thresholds:
        """Returns the thresholds for the masks of an image.

        Args:
          image_size: (height, width) of the image.
        """
        iou, stability = self.pred_iou_thresh, self.stability_score_thresh
        area = np.inf
        if self.max_image_share is not None:
            area = self.max_image_share * image_size[0] * image_size[1]
        return Thresholds(
            iou=np.float32(iou if iou > 0 else -np.inf),
            stability=np.float32(stability if stability > 0 else -np.inf),
            offset=np.float32(self.stability_score_offset),
            area=np.float32(area),
            box_iou=round_down_to_float32(self.box_nms_thresh),
        )

    def _check_numbers(self) -> None:
        for name in INTEGERS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} must be an integer; got {value!r}")
        for name in REALS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, numbers.Real) or math.isnan(value)):
                raise ValueError(f"{name} must be a number; got {value!r}")

    def _check_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def sa1b_preset() -> dict[str, Any]:
    """Returns the options that made SA-1B: appendix B of the paper.

    As in the released code, a predicted IoU of exactly 0.88 is not enough, and regions are
    8-connected; the paper specifies neither.
    """
    return dict(
        points_per_side=32,
        pred_iou_thresh=0.88,
        stability_score_thresh=0.95,
        box_nms_thresh=0.7,
        crop_n_layers=2,
        crop_nms_thresh=0.7,
        crop_n_points_downscale_factor=2,
        min_mask_region_area=100,
        max_image_share=0.95,
        remove_small_masks=True,
    )
