"""All masks of an image, from a grid of points: numpy in, numpy out.

Source: segment-anything `automatic_mask_generator.py`, whose parameters, records and order are
kept; Kirillov et al. 2023, appendix B, for what the released code lacks.

Differences: only the masks that are left when duplicates are gone are painted. First all are judged
on the device (`candidates.py`) by measures that are taken tile by tile; then the few that are left
are decoded once more and leave the device as bits, within their boxes. Ties between duplicates go
to the first. Images have at most MAX_SIDE pixels a side. Masks of more than 95 % of the image, and
masks of small parts alone, can be dropped.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.everything.candidates import NUM_MASKS, Thresholds, find_candidates
from sam_jax.everything.crops import checked_grids, make_grids, plan_crops
from sam_jax.everything.filtering import clean, drop_duplicates_of_crops, float32_below, in_order
from sam_jax.everything.rasterize import finish_drawing, start_drawing
from sam_jax.everything.tiled_resize import MAX_SIDE, tile_image
from sam_jax.images.read import ImageError
from sam_jax.images.resize import apply_coords, resize_and_pad
from sam_jax.masks import rle
from sam_jax.masks.boxes import xyxy_to_xywh
from sam_jax.model.ops.platform import platform
from sam_jax.model.sam import Sam
from sam_jax.predict.predictor import CHUNK, check_image, encode_images

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
ENCODED = 8  # images at a time, on accelerators


class SamAutomaticMaskGenerator:
    """Masks all that is in an image."""

    def __init__(
        self,
        model: Sam,
        variables: dict[str, Any],
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        *,
        max_image_share: float | None = None,
        remove_small_masks: bool = False,
    ) -> None:
        """Sets what `generate` does; the defaults suit the official ViT-H.

        Args:
          model, variables: as from `sam_jax.load`; the device that holds the variables computes.
          points_per_side: of the grid of points; or None, if point_grids are given.
          points_per_batch: points at a time, at most; on CPUs a few are the fastest.
          pred_iou_thresh: the predicted IoU of a mask must be above; 0 and less are no limit.
          stability_score_thresh: its stability, the IoU of the masks of two levels of its logits,
            must reach this; 0 and less are no limit.
          stability_score_offset: what the levels differ by from 0.
          box_nms_thresh: in a crop, a mask is dropped whose box overlaps a better one's by more.
          crop_n_layers: layers of crops, of 2 x 2, 4 x 4, ..., that are looked at too.
          crop_nms_thresh: as box_nms_thresh, among crops; masks of smaller crops are better.
          crop_overlap_ratio: of the image's shorter side, by which the first layer's crops overlap.
          crop_n_points_downscale_factor: by which each layer has fewer points a side.
          point_grids: 'n 2' points (x, y) in [0, 1] for the image and each layer of crops.
          min_mask_region_area: holes and parts of fewer pixels are filled and removed; 0: none.
          output_mode: of `segmentation`: "binary_mask" 'h w' bool, "uncompressed_rle" or
            "coco_rle"; see `sam_jax.masks.rle`.
          max_image_share: masks that cover this share of the image, or more, are dropped.
          remove_small_masks: drop masks of which all parts are smaller than min_mask_region_area,
            instead of keeping their largest part.
        Raises:
          ValueError: naming the argument that is wrong.
        """
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {OUTPUT_MODES}; got {output_mode!r}")
        _check_at_least(0, crop_n_layers=crop_n_layers, min_mask_region_area=min_mask_region_area)
        _check_at_least(0, stability_score_offset=stability_score_offset)
        _check_at_least(1, points_per_batch=points_per_batch)
        if not 0 <= crop_overlap_ratio <= 1:
            raise ValueError(f"crop_overlap_ratio must be 0 to 1; got {crop_overlap_ratio}")
        if max_image_share is not None and not 0 < max_image_share <= 1:
            raise ValueError(f"max_image_share must be above 0, up to 1; got {max_image_share}")
        if point_grids is None:
            _check_at_least(1, crop_n_points_downscale_factor=crop_n_points_downscale_factor)
            point_grids = make_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor)
        self.point_grids = checked_grids(point_grids, crop_n_layers)
        self.model = model
        self.variables = jax.tree.map(jnp.asarray, variables)
        self._device = next(iter(jax.tree.leaves(self.variables)[0].devices()))
        self._limits = Thresholds(
            iou=np.float32(pred_iou_thresh if pred_iou_thresh > 0 else -np.inf),
            stability=np.float32(stability_score_thresh if stability_score_thresh > 0 else -np.inf),
            offset=np.float32(stability_score_offset),
            area=np.float32(np.inf),
            box_iou=float32_below(box_nms_thresh),
        )
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.max_image_share = max_image_share
        self.remove_small_masks = remove_small_masks
        most = max(map(len, self.point_grids))
        with jax.default_device(self._device):
            at_once = CHUNK if platform() == "cpu" else points_per_batch
        self._chunk = min(most, points_per_batch, at_once)
        self._num_points = -(-most // self._chunk) * self._chunk

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Masks an image.

        Args:
          image: 'h w 3' uint8 RGB.
        Returns:
          A record for each mask: those of smaller crops first, and of a crop the best first. With
            min_mask_region_area, those that had nothing to be removed come before all others.
          segmentation: see output_mode;
          area: int, in pixels;
          bbox: [x, y, w, h], where w is the last column less the first one, so one less than their
            number, as in the reference;
          predicted_iou, stability_score: float;
          point_coords: [[x, y]], the point that gave it;
          crop_box: [x, y, w, h] of the crop that it was found in.
        Raises:
          ValueError: if the image has another shape or type.
          ImageError: if it is too small for crops, or too large.
        """
        size = check_image(image).shape[:2]
        if max(size) > MAX_SIDE or size[0] * size[1] > rle.MAX_PIXELS:
            raise ImageError(
                f"image must have sides of at most {MAX_SIDE} pixels, and at most "
                f"{rle.MAX_PIXELS} in all; got {size}"
            )
        crops = plan_crops(size, self.crop_n_layers, self.crop_overlap_ratio)
        with jax.default_device(self._device):
            return self._generate(image, crops, size)

    def _generate(self, image, crops, size):
        embeddings = self._encode([crop.cut(image) for crop in crops])
        found = [self._find(*pair, size) for pair in zip(crops, embeddings, strict=True)]
        masks = in_order(crops, jax.device_get(found))
        capacity = len(crops) * self._num_points * NUM_MASKS
        if len(crops) > 1:
            masks = drop_duplicates_of_crops(masks, crops, self.crop_nms_thresh, capacity)
        masks = self._draw(masks, crops, embeddings, size)
        if self.min_mask_region_area:
            masks = clean(
                masks,
                self.min_mask_region_area,
                not self.remove_small_masks,
                max(self.box_nms_thresh, self.crop_nms_thresh),
                capacity,
            )
        return [self._record(mask, crops[mask.crop]) for mask in masks]

    def _encode(self, images):
        """The embeddings '1 gh gw c' of images 'h w 3', on accelerators some at a time."""
        batch = 1 if platform() == "cpu" else min(ENCODED, len(images))
        embeddings = []
        for start in range(0, len(images), batch):
            some = [resize_and_pad(x, self.model.image_size) for x in images[start : start + batch]]
            padded, sizes = zip(*some, *some[-1:] * (batch - len(some)), strict=True)
            arrays = np.stack(padded), np.array(sizes, np.int32)
            embedded = encode_images(self.model, self.variables, *arrays)
            embeddings += [embedded[i : i + 1] for i in range(len(some))]
        return embeddings

    def _find(self, crop, embedding, size):
        """The `Candidates` of a crop of an image of (height, width), which may be under way."""
        limits = self._limits
        if self.max_image_share is not None:
            limits = dataclasses.replace(
                limits, area=np.float32(self.max_image_share * size[0] * size[1])
            )
        return find_candidates(
            self.model,
            self.variables,
            embedding,
            self._points_in_frame(crop),
            len(self.point_grids[crop.layer]),
            self._tiling(crop),
            limits,
            np.array(crop.box),
            np.array(size),
            chunk=self._chunk,
        )

    def _draw(self, masks, crops, embeddings, size):
        """The `Mask`s with their run lengths in the image of (height, width)."""
        drawings = []
        for i, (crop, embedding) in enumerate(zip(crops, embeddings, strict=True)):
            here = [mask for mask in masks if mask.crop == i]
            if here:
                started = start_drawing(
                    self.model,
                    self.variables,
                    embedding,
                    self._points_in_frame(crop),
                    np.array([mask.number for mask in here]),
                    np.array([mask.box for mask in here]) - np.tile(crop.corner, 2),
                    self._tiling(crop),
                    chunk=self._chunk,
                )
                drawings += [(i, drawing) for drawing in started]
        with ThreadPoolExecutor() as pool:
            finish = lambda i, drawing: finish_drawing(drawing, crops[i].corner, size)
            finished = pool.map(finish, *zip(*drawings, strict=True)) if drawings else ()
            drawn = {
                (i, number): mask
                for (i, _), masks_of_one in zip(drawings, finished, strict=True)
                for number, mask in masks_of_one.items()
            }
        return [mask.drawn(*drawn[mask.crop, mask.number]) for mask in masks]

    def _points_in_frame(self, crop):
        """The points of a crop 'n 2' float32 in pixels of the frame, padded to a fixed number."""
        points = np.zeros((self._num_points, 2), np.float32)
        grid = self.point_grids[crop.layer]
        points[: len(grid)] = apply_coords(grid * crop.size[::-1], crop.size, self.model.image_size)
        return points

    def _tiling(self, crop):
        """The `Tiling` of a crop."""
        frame, patch = self.model.image_size, self.model.patch_size
        return tile_image(crop.size, (4 * frame[0] // patch, 4 * frame[1] // patch), frame)

    def _record(self, mask, crop):
        point = self.point_grids[crop.layer][mask.number // NUM_MASKS] * crop.size[::-1]
        write: dict[str, Callable[[dict], Any]] = {
            "binary_mask": rle.decode,
            "uncompressed_rle": rle.uncompress,
            "coco_rle": rle.compress,
        }
        return {
            "segmentation": write[self.output_mode](mask.segmentation),
            "area": rle.area(mask.segmentation),
            "bbox": xyxy_to_xywh(mask.box).tolist(),
            "predicted_iou": mask.iou,
            "point_coords": [(point + crop.corner).tolist()],
            "stability_score": mask.stability,
            "crop_box": xyxy_to_xywh(np.array(crop.box)).tolist(),
        }


def sa1b_preset() -> dict[str, Any]:
    """The arguments with which SA-1B was made: appendix B of the paper.

    As the released code, a predicted IoU of 0.88 exactly is not enough, and parts are of pixels
    that touch by 8 neighbours; the paper says neither.
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


def _check_at_least(least, **arguments):
    for name, value in arguments.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
