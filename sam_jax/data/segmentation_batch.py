"""Batches of images in the model's input size with some of their masks, to train SAM."""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from sam_jax.data.example import RLE, BadSample, Example
from sam_jax.images.resize import resize_and_pad
from sam_jax.masks import rle

MAX_AREA = 0.9  # fraction of the image; larger masks are skipped. Kirillov et al. 2023, appendix A


@flax.struct.dataclass
class Batch:
    """Images on the model's canvas with n masks each.

    Attributes:
      image: RGB pixels, zero outside of the image; None where embeddings replace them.
      size: (height, width) of the image on the canvas.
      image_id: Index of the image in the source, which random keys are derived from.
      masks: Eight pixels a byte, the leftmost one in the highest bit.
      mask_id: Index of the mask in its image's annotations, which random keys are derived from.
      valid: False for padding after the masks of an image.
      embedding: Image embeddings, where they are already known.
    """

    image: UInt8[Array | np.ndarray, "b h w 3"] | None
    size: Int32[Array | np.ndarray, "b 2"]
    image_id: Int32[Array | np.ndarray, " b"]
    masks: UInt8[Array | np.ndarray, "b n h w_8"]
    mask_id: Int32[Array | np.ndarray, "b n"]
    valid: Bool[Array | np.ndarray, "b n"]
    embedding: Float[Array | np.ndarray, "b gh gw c"] | None = None


@dataclasses.dataclass(frozen=True)
class SegmentationTransform:
    """Resizes an example to the canvas, with up to `masks_per_image` of its masks.

    Attributes:
      canvas: (height, width) of the model's input.
      masks_per_image: Masks in a row. If there are more they are sampled, if fewer padded.
      flips: Mirrors images left to right at random.
      rot90: Rotates images by multiples of 90 degrees at random.
    """

    canvas: tuple[int, int]
    masks_per_image: int
    flips: bool = False
    rot90: bool = False
    batch_type: ClassVar[type] = Batch

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays of a row of a `Batch`, without image_id.

        Args:
          example: An image with its masks.
          rng: The source of randomness.

        Returns:
          Arrays by field, without the batch axis.

        Raises:
          BadSample: If a mask is broken, or none can be used.
        """
        quarter_turns = int(rng.integers(4)) if self.rot90 else 0
        flip = bool(rng.integers(2)) if self.flips else False
        moved = _flip_and_rotate(example.image, flip, quarter_turns)
        image, size = resize_and_pad(moved, self.canvas)
        size_before_turns = size[::-1] if quarter_turns % 2 else size

        height, width = self.canvas
        masks = np.zeros((self.masks_per_image, height, -(-width // 8)), np.uint8)
        mask_id = np.zeros(self.masks_per_image, np.int32)
        count = 0
        for i in rng.permutation(len(example.masks)):
            if count == self.masks_per_image:
                break
            mask = _decode(example.masks[i], size_before_turns)
            if mask is not None:
                _pack(_flip_and_rotate(mask, flip, quarter_turns), masks[count])
                mask_id[count] = i
                count += 1
        if not count:
            raise BadSample("no masks", f"none of {len(example.masks)} masks can be used")
        return {
            "image": image,
            "size": np.array(size, np.int32),
            "masks": masks,
            "mask_id": mask_id,
            "valid": np.arange(self.masks_per_image) < count,
        }


def _decode(mask: RLE, size: tuple[int, int]) -> Bool[np.ndarray, "h w"] | None:
    """Decodes a mask at a new size. Returns None if it is too large, or has no pixels there."""
    try:
        lengths = rle.runs(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", str(error)) from error
    height, width = mask["size"]
    if lengths[1::2].sum() > MAX_AREA * height * width:
        return None
    decoded = rle.decode_runs_resized(lengths, mask["size"], size)
    return decoded if decoded.any() else None


def _pack(mask: Bool[np.ndarray, "h w"], bits: UInt8[np.ndarray, "canvas_h canvas_w_8"]) -> None:
    """Writes a mask into bits that are zero, packing only its bounding box."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left = columns[0] // 8
    packed = np.packbits(mask[rows[0] : rows[-1] + 1, 8 * left : columns[-1] + 1], axis=-1)
    bits[rows[0] : rows[-1] + 1, left : left + packed.shape[1]] = packed


def _flip_and_rotate(x: Any, flip: bool, quarter_turns: int) -> Any:
    """Flips 'h w ...' left to right, then rotates it counterclockwise."""
    return np.rot90(x[:, ::-1] if flip else x, quarter_turns)
