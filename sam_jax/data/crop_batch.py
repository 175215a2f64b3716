"""Batches of random crops of images, to train a masked autoencoder.

Source: The augmentation in facebookresearch/mae: torchvision's `RandomResizedCrop` and a horizontal
flip.

Differences: Optional rotations by multiples of 90 degrees, for images without an upright direction.
"""

import dataclasses
import math
from typing import ClassVar

import flax.struct
import numpy as np
from jaxtyping import Array, Int32, UInt8
from PIL import Image

from sam_jax.data.example import BadSample, Example
from sam_jax.images.resize import resize_rgb

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width over height of a crop, before it is resized
MAX_ATTEMPTS = 10  # to sample a crop that fits into the image


@flax.struct.dataclass
class ImageBatch:
    """Crops of images.

    Attributes:
      image: RGB pixels.
      image_id: Index of the image in the source, which random keys are derived from.
    """

    image: UInt8[Array | np.ndarray, "b h w 3"]
    image_id: Int32[Array | np.ndarray, " b"]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Crops an example's image at random and resizes the crop. Masks are ignored.

    Attributes:
      size: (height, width) of the model's input.
      min_side: Smallest height and width of images that can be used.
      min_area: Smallest area of a crop, as a fraction of the image.
      flips: Mirrors images left to right at random.
      rot90: Rotates images by multiples of 90 degrees at random.
    """

    size: tuple[int, int]
    min_side: int
    min_area: float = 0.2
    flips: bool = True
    rot90: bool = False
    batch_type: ClassVar[type] = ImageBatch

    def __call__(
        self,
        example: Example,
        rng: np.random.Generator,
        view_rng: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a row of `ImageBatch`, without image_id.

        Args:
          example: An image.
          rng: The source of randomness.
          view_rng: Replaces `rng` if it is given.

        Returns:
          Arrays by field, without the batch axis.

        Raises:
          BadSample: If the image is too small.
        """
        rng = view_rng or rng
        quarter_turns = int(rng.integers(4)) if self.rot90 else 0
        image = np.rot90(example.image, quarter_turns)
        check_sides(image, self.min_side)
        box = sample_box((image.shape[0], image.shape[1]), self.min_area, rng)
        image = resize(crop(image, *box), self.size)
        flip = self.flips and bool(rng.integers(2))
        return {"image": image[:, ::-1] if flip else image}


def check_sides(image: UInt8[np.ndarray, "h w 3"], min_side: int) -> None:
    """Raises BadSample if the height or the width of an image is smaller than `min_side`."""
    height, width = image.shape[:2]
    if min(height, width) < min_side:
        raise BadSample(
            "small image", f"it must have {min_side} pixels on each side; got {height} x {width}"
        )


def sample_box(
    size: tuple[int, int], min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Samples a crop, uniformly in its area and in the logarithm of its aspect ratio.

    Args:
      size: (height, width) of the image.
      min_area: Smallest area, as a fraction of the image.
      rng: The source of randomness.

    Returns:
      (top, left, height, width). If no sample fits into the image, as in very long images, the
      largest crop in the middle.
    """
    height, width = size
    for _ in range(MAX_ATTEMPTS):
        area = height * width * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    narrowest, widest = ASPECT_RATIOS
    return middle_box(size, min(max(width / height, narrowest), widest))


def middle_box(size: tuple[int, int], aspect: float) -> tuple[int, int, int, int]:
    """Returns the largest crop of an aspect ratio in the middle of an image.

    Args:
      size: (height, width) of the image.
      aspect: Width over height of the crop.

    Returns:
      (top, left, height, width).
    """
    height, width = size
    h = max(1, min(height, round(width / aspect)))
    w = max(1, min(width, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def crop(
    image: UInt8[np.ndarray, "h w 3"], top: int, left: int, height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Returns a view of a part of an image."""
    return image[top : top + height, left : left + width]


def resize(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "{size[0]} {size[1]} 3"]:
    """Resizes an image with Pillow's antialiased bicubic filter."""
    return resize_rgb(image, size, Image.Resampling.BICUBIC)
