"""Whole images in the model's frame, with some of their masks: what SAM learns from."""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.struct
import numpy as np

from sam_jax.data.example import BadSample, Example
from sam_jax.images.resize import resize_and_pad
from sam_jax.masks import rle

MAX_AREA = 0.9  # of the image; larger masks are left out. Kirillov et al. 2023, appendix A


@flax.struct.dataclass
class Batch:
    """Images in the model's frame, with n masks each.

    Attributes:
      image: 'b h w 3' uint8 RGB, zero outside the image.
      size: 'b 2' int32, (height, width) of the image in the frame.
      image_id: 'b' int32, its index in the source; keys randomness.
      masks: 'b n h (w/8)' uint8, eight pixels a byte, the leftmost in the highest bit.
      mask_id: 'b n' int32, index of the mask in its image's annotations; keys randomness.
      valid: 'b n' bool, the masks that are not fillers.
      embedding: 'b gh gw c' of the images, where it is known already.
    """

    image: Any
    size: Any
    image_id: Any
    masks: Any
    mask_id: Any
    valid: Any
    embedding: Any = None


@dataclasses.dataclass(frozen=True)
class SegmentationTransform:
    """Brings an example into the frame, with up to `masks_per_image` of its masks.

    Attributes:
      frame: (height, width) of the model.
      masks_per_image: n of a batch; more masks are drawn from at random, fewer filled up.
      flips, rot90: mirror images left to right, turn them by multiples of 90 degrees, at random.
    """

    frame: tuple[int, int]
    masks_per_image: int
    flips: bool = False
    rot90: bool = False
    batch: ClassVar[type] = Batch

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """The arrays of a row of a `Batch`, without image_id.

        Raises:
          BadSample: if a mask is broken, or none can be used.
        """
        quarter_turns = int(rng.integers(4)) if self.rot90 else 0
        flip = bool(rng.integers(2)) if self.flips else False
        move = functools.partial(_flip_and_turn, flip=flip, quarter_turns=quarter_turns)
        image, size = resize_and_pad(move(example.image), self.frame)
        size_before = size[::-1] if quarter_turns % 2 else size

        masks = np.zeros((self.masks_per_image, self.frame[0], -(-self.frame[1] // 8)), np.uint8)
        mask_id = np.zeros(self.masks_per_image, np.int32)
        count = 0
        for i in rng.permutation(len(example.masks)):
            if count == self.masks_per_image:
                break
            mask = _paint(example.masks[i], size_before)
            if mask is not None:
                _pack(move(mask), masks[count])
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


def _paint(mask, size):
    """A mask 'h w' bool in the frame, or None if it is too large, or too small to be seen there."""
    try:
        lengths = rle.runs(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", str(error)) from error
    height, width = mask["size"]
    if lengths[1::2].sum() > MAX_AREA * height * width:
        return None
    painted = rle.paint_resized(lengths, mask["size"], size)
    return painted if painted.any() else None


def _pack(mask, bits):
    """Sets the pixels of a mask 'h w' among bits that are zero, looking at its own box alone."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left = columns[0] // 8
    packed = np.packbits(mask[rows[0] : rows[-1] + 1, 8 * left : columns[-1] + 1], axis=-1)
    bits[rows[0] : rows[-1] + 1, left : left + packed.shape[1]] = packed


def _flip_and_turn(x, *, flip, quarter_turns):
    return np.rot90(x[:, ::-1] if flip else x, quarter_turns)
