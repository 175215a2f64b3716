"""Finds all masks of an image from a grid of points: numpy in, numpy out.

Source: segment-anything `automatic_mask_generator.py`, whose parameters, records and order are
kept; Kirillov et al. 2023, appendix B, for what the released code lacks.

Differences: only masks that remain after duplicates are dropped are computed at the size of the
image. The device first scores all masks tile by tile (`candidates.py`). The few that remain are
decoded again and transferred as bits, cropped to their boxes (`rasterize.py`). Of equally good
duplicates the first one is kept. Images have at most MAX_SIDE pixels per side. Masks that cover
more than a given share of the image, or consist only of small islands, can be dropped. Crops may be
tiles of fixed sizes. Options are checked when they are set, and `points_per_side` can be set too.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from numpy.typing import ArrayLike

from sam_jax.everything.candidates import (
    NUM_MULTIMASK_OUTPUTS,
    Candidates,
    Thresholds,
    find_candidates,
)
from sam_jax.everything.crops import Crop, plan_crops, plan_tile_crops
from sam_jax.everything.filtering import (
    drop_crop_duplicates,
    postprocess_small_regions,
    select_masks,
)
from sam_jax.everything.options import GeneratorOptions, sa1b_preset
from sam_jax.everything.rasterize import PendingMasks, finish_rasterizing, start_rasterizing
from sam_jax.everything.records import SelectedMask, make_record
from sam_jax.everything.tiling import MAX_SIDE, Tiling, plan_tiles
from sam_jax.everything.tuning import Tuning, current_tuning
from sam_jax.images.read import ImageError
from sam_jax.images.resize import apply_coords
from sam_jax.masks import rle
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import check_image, resize_and_encode, unbind
from sam_jax.predict.fork import warn_if_forked
from sam_jax.predict.predictor import SamPredictor
from sam_jax.predict.tiles_option import resolve_tiles

Value = TypeVar("Value")


class Option(Generic[Value]):
    """A descriptor that reads and sets one field of a generator's `options`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, generator: None, owner: type) -> "Option[Value]": ...

    @overload
    def __get__(self, generator: "SamAutomaticMaskGenerator", owner: type) -> Value: ...

    def __get__(
        self, generator: "SamAutomaticMaskGenerator | None", owner: type
    ) -> "Option[Value] | Value":
        return self if generator is None else getattr(generator.options, self._name)

    def __set__(self, generator: "SamAutomaticMaskGenerator", value: Value) -> None:
        generator.set_options(**{self._name: value})


class BestScores(NamedTuple):
    """The highest scores of all masks of an image, for the choice of thresholds.

    Attributes:
      predicted_iou: The highest predicted IoU.
      stability_score: The highest stability score.
    """

    predicted_iou: float
    stability_score: float


class SamAutomaticMaskGenerator:
    """Finds masks of everything in an image.

    The options are attributes, too. A generator acts as if constructed with the values that they
    are set to. Threads may share a generator whose options they do not set.

    Example:
      >>> model, variables = sam_jax.load("sam_tiny")
      >>> generator = sam_jax.SamAutomaticMaskGenerator(
      ...     model, variables, points_per_side=8, pred_iou_thresh=0.3, stability_score_thresh=0.5
      ... )
      >>> masks = generator.generate(np.zeros((150, 200, 3), np.uint8))
      >>> masks[0]["segmentation"].shape
      (150, 200)

    Attributes:
      options: All options; `tiles` as `resolve_tiles` returns it.
    """

    points_per_side = Option[int | None]()
    points_per_batch = Option[int]()
    pred_iou_thresh = Option[float]()
    stability_score_thresh = Option[float]()
    stability_score_offset = Option[float]()
    box_nms_thresh = Option[float]()
    crop_n_layers = Option[int]()
    crop_nms_thresh = Option[float]()
    crop_overlap_ratio = Option[float]()
    crop_n_points_downscale_factor = Option[int]()
    min_mask_region_area = Option[int]()
    output_mode = Option[str]()
    max_image_share = Option[float | None]()
    remove_small_masks = Option[bool]()
    tiles = Option[int | str | None]()

    def __init__(
        self,
        model: Sam,
        variables: dict[str, Any] | None = None,
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
        point_grids: Sequence[ArrayLike] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        *,
        max_image_share: float | None = None,
        remove_small_masks: bool = False,
        tiles: int | str | None = None,
    ) -> None:
        """Sets the options of `generate`. The defaults suit the official ViT-H.

        Args:
          model: The model, as `sam_jax.load` returns it.
          variables: Its variables. Computation runs on the device that holds them. They are not
            needed if the model is bound to them, as by `model.bind(variables)`.
          points_per_side: Points in each row and column of the grid, or None if `point_grids` are
            given.
          points_per_batch: The most points that are decoded at a time. On CPUs a few are fastest,
            so no more are used there.
          pred_iou_thresh: Masks with a predicted IoU of at most this are dropped; 0 or less
            disables the threshold.
          stability_score_thresh: Masks with a lower stability score are dropped. It is the IoU of
            the masks at two levels of the logits; 0 or less disables the threshold.
          stability_score_offset: The distance of these levels from 0.
          box_nms_thresh: A mask is dropped if the IoU of its box with that of a better mask of the
            same crop exceeds this.
          crop_n_layers: Layers of 2 x 2, 4 x 4 and so on crops in addition to the full image.
          crop_nms_thresh: As box_nms_thresh, but across crops, where masks from smaller crops win.
          crop_overlap_ratio: The overlap of the first layer's crops as a fraction of the image's
            shorter side.
          crop_n_points_downscale_factor: The factor by which each layer has fewer points per side
            than the one before.
          point_grids: 'n 2' points (x, y) in [0, 1] for the image and for each layer of crops.
          min_mask_region_area: Holes and islands of fewer pixels are filled and removed; 0 disables
            this.
          output_mode: The form of "segmentation": "binary_mask", 'h w' bool; "uncompressed_rle"; or
            "coco_rle". See `sam_jax.masks.rle`.
          max_image_share: Masks that cover at least this share of the image are dropped; None
            disables this.
          remove_small_masks: Drop masks whose islands are all smaller than min_mask_region_area
            instead of keeping their largest island.
          tiles: The side in pixels of overlapping tiles that are segmented too, as further crops
            with the grid of points of the image; they overlap by crop_overlap_ratio of their side.
            "auto" for tiles of the size of the model's input and of 2, 4, ... times that. Tiles
            that would cover the image are left out. "none" for no tiles. By default "auto" for a
            model that was trained on windows around objects (`Sam.object_share`), and "none" for
            others.

        Raises:
          ValueError: If an argument is invalid. The message names it.
        """
        options = GeneratorOptions(
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            crop_n_layers=crop_n_layers,
            crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            point_grids=point_grids,
            min_mask_region_area=min_mask_region_area,
            output_mode=output_mode,
            max_image_share=max_image_share,
            remove_small_masks=remove_small_masks,
            tiles=resolve_tiles(model, tiles),
        )
        self._point_grids = options.make_point_grids()
        self.options = options
        warn_if_forked()
        model, variables = unbind(model, variables)
        self._predictor = SamPredictor(model, jax.tree.map(jnp.asarray, variables))

    @property
    def predictor(self) -> SamPredictor:
        """A predictor with the same model; `generate` does not use its image."""
        return self._predictor

    @property
    def model(self) -> Sam:
        """The model."""
        return self._predictor.model

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the model, on the device that runs it."""
        return self._predictor.variables

    @property
    def point_grids(self) -> tuple[Float[np.ndarray, "_ 2"], ...]:
        """Points (x, y) in [0, 1] for the image and for each layer of crops, read-only.

        Setting them replaces `points_per_side`.
        """
        return self._point_grids

    @point_grids.setter
    def point_grids(self, value: Sequence[ArrayLike]) -> None:
        self.set_options(point_grids=value)

    def set_options(self, **options: Any) -> None:
        """Replaces options, as if the generator were constructed with them.

        Setting one of `points_per_side` and `point_grids` unsets the other.

        Args:
          **options: Arguments of the constructor.

        Raises:
          ValueError: If a value is invalid. The message names it, and nothing is changed.
        """
        if options.keys() & {"points_per_side", "point_grids"}:
            options = {"points_per_side": None, "point_grids": None} | options
        if "tiles" in options:
            options["tiles"] = resolve_tiles(self.model, options["tiles"])
        replaced = dataclasses.replace(self.options, **options)
        self._point_grids = replaced.make_point_grids()
        self.options = replaced

    @classmethod
    def sa1b(
        cls, model: Sam, variables: dict[str, Any] | None = None, **overrides: Any
    ) -> "SamAutomaticMaskGenerator":
        """Makes a generator with the settings that made SA-1B, see `sa1b_preset`.

        Args:
          model: The model, as `sam_jax.load` returns it.
          variables: Its variables, as for the constructor.
          **overrides: Arguments to use instead of the preset's.

        Raises:
          ValueError: If an argument is invalid. The message names it.
        """
        return cls(model, variables, **(sa1b_preset() | overrides))

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Finds the masks of an image.

        Args:
          image: 'h w 3' uint8 RGB.

        Returns:
          A record for each mask. Masks from smaller crops come first, and those of a crop by
          falling predicted IoU. With min_mask_region_area, masks without small regions come before
          all others. A record holds:

          - segmentation: The mask in the form of `output_mode`.
          - area: Its area in pixels.
          - bbox: [x, y, w, h], where w is the last column minus the first one, so one less than the
            number of columns, and h likewise, as in the reference.
          - predicted_iou: The predicted IoU.
          - point_coords: [[x, y]], the point that prompted it.
          - stability_score: The stability score.
          - crop_box: [x, y, w, h] of the crop that it was found in.

        Raises:
          ValueError: If the image has another shape or type.
          ImageError: If it is too small for crops, or too large.
        """
        crops, size = self._plan(image)
        with jax.default_device(self.predictor.device):
            masks = self._generate(image, crops, size)
        records = []
        for mask in masks:
            crop = crops[mask.crop]
            point = self.point_grids[crop.layer][mask.candidate // NUM_MULTIMASK_OUTPUTS]
            records.append(make_record(mask, crop, point, self.options.output_mode))
        return records

    def best_scores(self, image: np.ndarray) -> BestScores:
        """Returns the highest scores of an image, whatever the thresholds are.

        Args:
          image: As for `generate`.

        Raises:
          ValueError: As for `generate`.
        """
        crops, size = self._plan(image)
        unlimited = dataclasses.replace(
            self.options, pred_iou_thresh=0.0, stability_score_thresh=0.0, max_image_share=None
        ).make_thresholds(size)
        best = []
        with jax.default_device(self.predictor.device):
            embeddings = self._encode([crop.extract(image) for crop in crops])
            for crop, embedding in zip(crops, embeddings, strict=True):
                found = jax.device_get(self._find_candidates(crop, embedding, unlimited, size))
                count = NUM_MULTIMASK_OUTPUTS * len(self.point_grids[crop.layer])
                stability = found.stability[:count]  # that of an empty mask is NaN
                best.append((found.iou[:count].max(), np.nan_to_num(stability).max()))
        return BestScores(*np.max(best, axis=0).tolist())

    def _plan(self, image: np.ndarray) -> tuple[list[Crop], tuple[int, int]]:
        """Returns the crops of an image, and its (height, width).

        Raises:
          ValueError: See `generate`.
        """
        size = check_image(image).shape[:2]
        if max(size) > MAX_SIDE or size[0] * size[1] > rle.MAX_PIXELS:
            raise ImageError(
                f"image must have sides of at most {MAX_SIDE} pixels, and at most "
                f"{rle.MAX_PIXELS} in all; got {size}"
            )
        overlap = self.options.crop_overlap_ratio
        crops = plan_crops(size, self.options.crop_n_layers, overlap)
        crops += plan_tile_crops(size, self.model.image_size, self.options.tiles, overlap)
        return crops, size

    def _generate(
        self, image: UInt8[np.ndarray, "h w 3"], crops: list[Crop], size: tuple[int, int]
    ) -> list[SelectedMask]:
        """Finds the masks of an image of `size` in its crops."""
        embeddings = self._encode([crop.extract(image) for crop in crops])
        thresholds = self.options.make_thresholds(size)
        candidates = [
            self._find_candidates(crop, embedding, thresholds, size)
            for crop, embedding in zip(crops, embeddings, strict=True)
        ]
        masks = select_masks(crops, jax.device_get(candidates))
        capacity = len(crops) * self._padded_points * NUM_MULTIMASK_OUTPUTS
        if self.options.tiles is not None:  # the number of crops varies with the image
            capacity = 1 << max(len(masks) - 1, 0).bit_length()
        if len(crops) > 1:
            masks = drop_crop_duplicates(masks, crops, self.options.crop_nms_thresh, capacity)
        masks = self._rasterize(masks, crops, embeddings, size)
        if self.options.min_mask_region_area:
            masks = postprocess_small_regions(
                masks,
                self.options.min_mask_region_area,
                keep_largest=not self.options.remove_small_masks,
                threshold=max(self.options.box_nms_thresh, self.options.crop_nms_thresh),
                capacity=capacity,
            )
        return masks

    def _encode(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    ) -> list[Float[Array, "1 gh gw c"]]:
        """Encodes the crops of an image, several in one program where that is faster."""
        batch_size = min(self._tuning.images_per_batch, len(images))
        embeddings = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            embedding, _ = resize_and_encode(self.model, self.variables, batch, batch_size)
            embeddings += [embedding[i : i + 1] for i in range(len(batch))]
        return embeddings

    def _find_candidates(
        self,
        crop: Crop,
        embedding: Float[Array, "1 gh gw c"],
        thresholds: Thresholds,
        size: tuple[int, int],
    ) -> Candidates:
        """Scores the masks of a crop, without waiting for the result."""
        return find_candidates(
            self.model,
            self.variables,
            embedding,
            self._points_on_canvas(crop),
            len(self.point_grids[crop.layer]),
            self._tiling(crop),
            thresholds,
            np.array(crop.box),
            np.array(size),
            points_per_batch=self._batch_size,
            tuning=self._tuning,
        )

    def _rasterize(
        self,
        masks: list[SelectedMask],
        crops: list[Crop],
        embeddings: list[Float[Array, "1 gh gw c"]],
        size: tuple[int, int],
    ) -> list[SelectedMask]:
        """Returns the masks with their run lengths in the image of `size`."""
        pending: list[tuple[int, PendingMasks]] = []
        for i, (crop, embedding) in enumerate(zip(crops, embeddings, strict=True)):
            crop_masks = [mask for mask in masks if mask.crop == i]
            if crop_masks:
                started = start_rasterizing(
                    self.model,
                    self.variables,
                    embedding,
                    self._points_on_canvas(crop),
                    np.array([mask.candidate for mask in crop_masks]),
                    np.array([mask.box for mask in crop_masks]) - np.tile(crop.corner, 2),
                    self._tiling(crop),
                    points_per_batch=self._batch_size,
                )
                pending += [(i, crop_pending) for crop_pending in started]

        def finish(item: tuple[int, PendingMasks]) -> dict:
            i, crop_pending = item
            return finish_rasterizing(crop_pending, crops[i].corner, size)

        rasterized = {}
        with ThreadPoolExecutor() as pool:
            for (i, _), finished in zip(pending, pool.map(finish, pending), strict=True):
                for candidate, (segmentation, box) in finished.items():
                    rasterized[i, candidate] = {"segmentation": segmentation, "box": box}
        return [
            dataclasses.replace(mask, **rasterized[mask.crop, mask.candidate]) for mask in masks
        ]

    @property
    def _tuning(self) -> Tuning:
        """The batch sizes of the platform that runs the model."""
        with jax.default_device(self.predictor.device):
            return current_tuning()

    @property
    def _batch_size(self) -> int:
        """The number of points that are decoded at a time."""
        limit = self._tuning.max_points_per_batch or self.options.points_per_batch
        most_points = max(map(len, self.point_grids))
        return min(most_points, self.options.points_per_batch, limit)

    @property
    def _padded_points(self) -> int:
        """The points of the largest grid, padded to a multiple of the batch."""
        most_points = max(map(len, self.point_grids))
        return -(-most_points // self._batch_size) * self._batch_size

    def _points_on_canvas(self, crop: Crop) -> Float32[np.ndarray, "p 2"]:
        """Returns a crop's points in pixels of the canvas, padded to a fixed number."""
        points = np.zeros((self._padded_points, 2), np.float32)
        grid = self.point_grids[crop.layer]
        points[: len(grid)] = apply_coords(grid * crop.size[::-1], crop.size, self.model.image_size)
        return points

    def _tiling(self, crop: Crop) -> Tiling:
        """Returns the tiles of a crop."""
        return plan_tiles(crop.size, self.model.low_res, self.model.image_size, self._tuning.window)
