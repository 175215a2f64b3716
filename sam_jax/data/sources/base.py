"""The base class of sources that read their examples from files."""

import abc
import dataclasses

import numpy as np
from jaxtyping import UInt8

from sam_jax.data import decode
from sam_jax.data.decode_masks import Masks
from sam_jax.data.example import Example, check_index


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FileSource(abc.ABC):
    """A source that reads its examples from files.

    A subclass defines `__len__`, `image_path`, and `read_masks` if its images have masks. It
    overrides `encoded` if images are not in files, `name` if a path may be broken.

    A source is a value: `dataclasses.replace(source, decode_size=None)` is the same source, which
    shares all that was read when it was opened.

    Attributes:
      decode_size: (height, width) that images are decoded for, see `read_image`. Masks keep the
        size of the original image. None decodes images in full.
    """

    decode_size: tuple[int, int] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of examples."""

    @abc.abstractmethod
    def image_path(self, index: int) -> str:
        """Returns the path of an image, or another name for it if `encoded` is overridden.

        Raises:
          BadSample: If the annotations do not hold a usable path.
        """

    def read_masks(self, index: int) -> Masks:
        """Reads the masks of an example. Sources of images alone have none.

        Args:
          index: An index in range.

        Returns:
          A result of `check_masks`.

        Raises:
          BadSample: If no mask can be used.
        """
        del index
        return Masks([], [])

    def __getitem__(self, index: int) -> Example:
        """Reads an example. See `Source`."""
        check_index(index, len(self))
        masks = self.read_masks(index)
        return self.make_example(self.encoded(index), masks)

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Reads the image of an example. See `Source`."""
        return decode.decode_image(self.encoded(index), None, self.decode_size)

    def encoded(self, index: int) -> bytes:
        """Reads the file of an image. See `Source`."""
        check_index(index, len(self))
        return decode.read_file(self.image_path(index), decode.IMAGE_FILE)

    def name(self, index: int) -> str:
        """Returns the name of an example. See `Source`."""
        return self.image_path(index)

    def make_example(self, encoded: bytes, masks: Masks) -> Example:
        """Decodes an image, whose original size must be that of its masks.

        Args:
          encoded: The file of the image.
          masks: Checked masks.

        Returns:
          The example.

        Raises:
          BadSample: If the image cannot be used.
        """
        size = None
        if masks.usable:
            height, width = masks.usable[0]["size"]
            size = height, width
        image = decode.decode_image(encoded, size, self.decode_size)
        return Example(image, masks.usable, masks.skipped)
