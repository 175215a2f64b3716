"""Random crops of images, resized to the frame: what a masked autoencoder learns from.

Source: facebookresearch/mae's augmentation, torchvision's `RandomResizedCrop` and a mirror image.

Differences: quarter turns, if they are asked for, as for images that have no upside.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import numpy as np
from PIL import Image

from sam_jax.data.example import BadSample, Example

ASPECT = (3 / 4, 4 / 3)  # width over height of a crop, before it is resized to the frame
ATTEMPTS = 10  # to find a crop that lies in the image


@flax.struct.dataclass
class ImageBatch:
    """Parts of images, which fill the frame.

    Attributes:
      image: 'b h w 3' uint8 RGB.
      image_id: 'b' int32, its index in the source; keys randomness.
    """

    image: Any
    image_id: Any

    @property
    def valid(self) -> np.ndarray:
        """'b' bool: all of them are to be learnt from."""
        return np.ones(len(self.image), bool)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Crops an example's image at random; its masks are not looked at.

    Attributes:
      frame: (height, width) of the model.
      min_side: pixels of the smallest images that are used.
      min_area: of the image; crops have at least this share of it.
      flips, rot90: mirror images left to right, turn them by multiples of 90 degrees, at random.
    """

    frame: tuple[int, int]
    min_side: int
    min_area: float = 0.2
    flips: bool = True
    rot90: bool = False
    batch: ClassVar[type] = ImageBatch

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """The arrays of a row of `ImageBatch`, without image_id.

        Raises:
          BadSample: if the image is too small.
        """
        quarter_turns = int(rng.integers(4)) if self.rot90 else 0
        image = np.rot90(example.image, quarter_turns)
        check_sides(image, self.min_side)
        image = resize(crop(image, *draw_box(image.shape[:2], self.min_area, rng)), self.frame)
        flip = self.flips and bool(rng.integers(2))
        return {"image": image[:, ::-1] if flip else image}


def check_sides(image: np.ndarray, min_side: int) -> None:
    """Raises BadSample for an image 'h w 3' of fewer pixels on a side."""
    height, width = image.shape[:2]
    if min(height, width) < min_side:
        raise BadSample(
            "small image", f"it must have {min_side} pixels on each side; got {height} x {width}"
        )


def draw_box(
    size: tuple[int, int], min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a crop: its area evenly, its aspect evenly by its log.

    An image so long that no crop of such an area was found in it has its middle taken.
    """
    height, width = size
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    narrowest, widest = ASPECT
    return middle_box(size, min(max(width / height, narrowest), widest))


def middle_box(size: tuple[int, int], aspect: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest crop of an aspect, width over height, in the
    middle."""
    height, width = size
    h = max(1, min(height, round(width / aspect)))
    w = max(1, min(width, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def crop(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A part of 'h w 3'."""
    return image[top : top + height, left : left + width]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes 'h w 3' uint8 by Pillow's antialiased bicubic filter."""
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized)
