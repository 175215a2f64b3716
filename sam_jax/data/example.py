"""What a source of examples is: images with masks, read by index, and why a reading may fail."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

RLE = dict[str, Any]  # {"size": [h, w], "counts": ...}, see `sam_jax.masks.rle`

# Why a sample may be unusable.
REASONS = (
    "missing file",  # or one that cannot be opened
    "broken image",  # truncated, of another format, or too large
    "small image",  # smaller than what learns from it can use
    "refused image",  # by what should mask it
    "broken json",
    "broken record",  # of an archive of records
    "broken mask",  # run lengths or polygons that are no mask
    "size mismatch",  # masks of another size than the image
    "empty mask",
    "no masks",
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its masks.

    Attributes:
      image: 'h w 3' uint8 RGB.
      masks: run lengths of the image's size, in the order of the annotations; painted only when
        they are needed. Sources of images alone have none.
    """

    image: np.ndarray
    masks: Sequence[RLE]


class Source(Protocol):
    """Examples by index, without state: any worker may read any of them at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Reads an example.

        Raises:
          BadSample: if it is unusable.
        """
        ...

    def image(self, index: int) -> np.ndarray:
        """Reads the image of an example, 'h w 3', and none of its masks.

        Raises:
          BadSample: if it is unusable.
        """
        ...

    def encoded(self, index: int) -> bytes | None:
        """Reads the file of an image as it is; None where images are drawn rather than read.

        Raises:
          BadSample: if it cannot be read; nothing is decoded.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for: a file, or a file and the member in it."""
        ...


class SourceError(ValueError):
    """A source that cannot be opened, or has no examples."""


class BadSample(ValueError):
    """A sample that cannot be used.

    Attributes:
      reason: one of REASONS, to count by.
      detail: what is wrong, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # its arguments, with which it is unpickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def check_index(index: int, count: int) -> None:
    """Raises IndexError, with which iteration ends, unless an index is one of `count`."""
    if not 0 <= index < count:
        raise IndexError(f"index must be 0 to {count - 1}; got {index}")
