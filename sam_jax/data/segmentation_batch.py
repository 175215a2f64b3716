"""Batches of images in the model's input size with some of their masks, to train SAM."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.struct
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from sam_jax.data.example import RLE, BadSample, Example
from sam_jax.data.jitter import Unit, Window, cut_image, sample_window
from sam_jax.images.resize import resize_and_pad
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_runs

MAX_AREA = 0.9  # fraction of the image; larger masks are skipped. Kirillov et al. 2023, appendix A
MAX_ATTEMPTS = 6  # to sample a window in which there is a mask


@flax.struct.dataclass
class Batch:
    """Images on the model's canvas with n masks each.

    Attributes:
      image: RGB pixels, zero outside of the image; None where features replace them.
      size: (height, width) of the image on the canvas.
      image_id: Index of the image in the source, which random keys are derived from.
      masks: Eight pixels a byte, the leftmost one in the highest bit.
      mask_id: Index of the mask in its image's annotations, which random keys are derived from.
      valid: False for padding after the masks of an image.
      view: Number of the image's fixed view, where the loader has `views`.
      embedding: Image embeddings, where they are already known.
      trunk: The image encoder's tokens before its neck, where they are already known.
    """

    image: UInt8[Array | np.ndarray, "b h w 3"] | None
    size: Int32[Array | np.ndarray, "b 2"]
    image_id: Int32[Array | np.ndarray, " b"]
    masks: UInt8[Array | np.ndarray, "b n h w_8"]
    mask_id: Int32[Array | np.ndarray, "b n"]
    valid: Bool[Array | np.ndarray, "b n"]
    view: Int32[Array | np.ndarray, " b"] | None = None
    embedding: Float[Array | np.ndarray, "b gh gw c"] | None = None
    trunk: Float[Array | np.ndarray, "b gh gw e"] | None = None


@dataclasses.dataclass(frozen=True)
class SegmentationTransform:
    """Resizes an example to the canvas, with up to `masks_per_image` of its masks.

    Attributes:
      canvas: (height, width) of the model's input.
      masks_per_image: Masks in a row. If there are more they are sampled, if fewer padded.
      flips: Mirrors images left to right at random.
      rot90: Rotates images by multiples of 90 degrees at random.
      jitter: The smallest and the largest scale of a random window, see `sample_window`. () keeps
        the entire image.
      jitter_unit: The unit of these scales.
    """

    canvas: tuple[int, int]
    masks_per_image: int
    flips: bool = False
    rot90: bool = False
    jitter: tuple[float, ...] = ()
    jitter_unit: Unit = "canvas"
    batch_type: ClassVar[type] = Batch

    def __call__(
        self,
        example: Example,
        rng: np.random.Generator,
        view_rng: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a row of a `Batch`, without image_id and view.

        Args:
          example: An image with its masks.
          rng: The source of randomness.
          view_rng: The source of randomness of rotations, flips and windows; `rng` by default.

        Returns:
          Arrays by field, without the batch axis.

        Raises:
          BadSample: If a mask is broken, or none can be used.
        """
        view_rng = view_rng or rng
        quarter_turns = int(view_rng.integers(4)) if self.rot90 else 0
        flip = bool(view_rng.integers(2)) if self.flips else False
        if not self.jitter:
            moved = _flip_and_rotate(example.image, flip, quarter_turns)
            image, size = resize_and_pad(moved, self.canvas)
            resized = size[::-1] if quarter_turns % 2 else size
            masks, mask_id = self._decode(example, Window(resized, 0, 0, *resized), None, rng)
        else:
            window, masks, mask_id = self._sample_window(example, quarter_turns, rng, view_rng)
            part = _flip_and_rotate(cut_image(example.image, window), flip, quarter_turns)
            size = part.shape[:2]
            image = np.zeros((*self.canvas, 3), np.uint8)
            image[: size[0], : size[1]] = part
        if not masks:
            raise BadSample("no masks", f"none of {len(example.masks)} masks can be used")
        height, width = self.canvas
        bits = np.zeros((self.masks_per_image, height, -(-width // 8)), np.uint8)
        for row, mask in zip(bits, masks, strict=False):
            _pack(_flip_and_rotate(mask, flip, quarter_turns), row)
        return {
            "image": image,
            "size": np.array(size, np.int32),
            "masks": bits,
            "mask_id": np.array(mask_id + [0] * (self.masks_per_image - len(masks)), np.int32),
            "valid": np.arange(self.masks_per_image) < len(masks),
        }

    def _sample_window(
        self,
        example: Example,
        quarter_turns: int,
        rng: np.random.Generator,
        view_rng: np.random.Generator,
    ) -> tuple[Window, list[np.ndarray], list[int]]:
        """Samples windows until one shows a mask.

        Returns:
          The window, before flips and rotations, and the masks and their indices.
        """
        size = example.image.shape[:2]
        canvas = self.canvas[::-1] if quarter_turns % 2 else self.canvas
        boxes = _boxes(example.masks) if self.jitter_unit == "object" else []
        scales = self.jitter[0], self.jitter[1]
        for attempt in range(MAX_ATTEMPTS):
            if attempt == MAX_ATTEMPTS - 1:  # around a mask
                boxes = boxes or _boxes(example.masks)
            index, box = boxes[view_rng.integers(len(boxes))] if boxes else (None, None)
            window = sample_window(size, canvas, scales, self.jitter_unit, box, view_rng)
            masks, mask_id = self._decode(example, window, index, rng)
            if masks:
                break
        return window, masks, mask_id

    def _decode(
        self, example: Example, window: Window, first: int | None, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], list[int]]:
        """Decodes the parts of masks that a window shows, in random order.

        Args:
          example: The image with its masks.
          window: The window.
          first: The index of the mask to begin with, if it can be used.
          rng: The source of randomness.

        Returns:
          At most `masks_per_image` masks, none of them empty, and their indices.
        """
        order = rng.permutation(len(example.masks))
        if first is not None:
            order = np.concatenate([[first], order[order != first]])
        masks: list[np.ndarray] = []
        mask_id: list[int] = []
        for i in order:
            if len(masks) == self.masks_per_image:
                break
            mask = _decode_mask(example.masks[i], window)
            if mask is not None:
                masks.append(mask)
                mask_id.append(int(i))
        return masks, mask_id


def _boxes(masks: Sequence[RLE]) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Returns the index and the bounding box of each mask that is not empty."""
    boxes = []
    for index, mask in enumerate(masks):
        try:
            bounds = rle.bounds(mask)
        except rle.RLEError as error:
            raise BadSample("broken mask", str(error)) from error
        if len(bounds):
            boxes.append((index, box_of_runs(bounds, mask["size"][0])))
    if not boxes:
        raise BadSample("no masks", f"all of {len(masks)} masks are empty")
    return boxes


def _decode_mask(mask: RLE, window: Window) -> Bool[np.ndarray, "h w"] | None:
    """Decodes what a window shows of a mask. Returns None if that is too much, or nothing."""
    try:
        lengths = rle.runs(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", str(error)) from error
    height, width = mask["size"]
    is_entire = (window.height, window.width) == window.resized
    if is_entire and lengths[1::2].sum() > MAX_AREA * height * width:
        return None
    decoded = rle.decode_runs_resized(lengths, mask["size"], window.resized, window[1:])
    pixels = np.count_nonzero(decoded)
    return decoded if pixels and (is_entire or pixels <= MAX_AREA * decoded.size) else None


def _pack(mask: Bool[np.ndarray, "h w"], bits: UInt8[np.ndarray, "canvas_h canvas_w_8"]) -> None:
    """Writes a mask into bits that are zero, packing only its bounding box."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left = columns[0] // 8
    packed = np.packbits(mask[rows[0] : rows[-1] + 1, 8 * left : columns[-1] + 1], axis=-1)
    bits[rows[0] : rows[-1] + 1, left : left + packed.shape[1]] = packed


def _flip_and_rotate(x: Any, flip: bool, quarter_turns: int) -> Any:
    """Flips 'h w ...' left to right, then rotates it counterclockwise."""
    return np.rot90(x[:, ::-1] if flip else x, quarter_turns)
