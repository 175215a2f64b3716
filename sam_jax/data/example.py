"""Defines examples, which are images with masks, and sources that read them by index."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

RLE = dict[str, Any]  # {"size": [h, w], "counts": ...}, see `sam_jax.masks.rle`

# Reasons why a sample cannot be used.
REASONS = (
    "missing file",  # or a file that cannot be opened
    "broken image",  # truncated, in another format, or too large
    "small image",  # smaller than the model can use
    "rejected image",  # the mask generator refused it
    "broken json",
    "broken record",  # in an archive of records
    "broken mask",  # run lengths or polygons that do not describe a mask
    "size mismatch",  # masks and image differ in size
    "turned image",  # by EXIF, so that its masks may be of the turned image or of the file's pixels
    "empty mask",
    "no masks",
)

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")  # in the representation of an object


class BadSample(ValueError):
    """A sample that cannot be used, or a mask of a sample.

    Attributes:
      reason: One of REASONS, which samples are counted by.
      detail: An explanation for people. It has no memory addresses, so that it is always the same.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Creates the error.

        Args:
          reason: One of REASONS.
          detail: An explanation for people.
        """
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # unpickling calls the class with these arguments
        self.reason = reason
        self.detail = ADDRESS.sub("", detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its masks.

    Attributes:
      image: RGB pixels.
      masks: Run lengths in the size of the original image, in the order of the annotations. They
        are decoded only where they are needed. Sources of images alone have none.
      skipped: Why masks of the annotations that cannot be used are not among `masks`.
    """

    image: UInt8[np.ndarray, "h w 3"]
    masks: Sequence[RLE]
    skipped: Sequence[BadSample] = ()


@runtime_checkable
class Source(Protocol):
    """A stateless sequence of examples. Any worker may read any example at any time."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Reads an example.

        Raises:
          IndexError: If the index is out of range.
          BadSample: If the example cannot be used.
        """
        ...

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Reads the image of an example without its masks.

        Raises:
          BadSample: If the image cannot be used.
        """
        ...

    def encoded(self, index: int) -> bytes | None:
        """Reads the file of an image without decoding it. Generated images have none.

        Raises:
          BadSample: If the file cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Returns a name that lets people find the example, such as the path of its image."""
        ...


class SourceError(ValueError):
    """A source that cannot be opened or has no examples."""


def count_reasons(problems: Iterable[BadSample]) -> dict[str, int]:
    """Counts problems by their reasons, in the order of REASONS."""
    counts = collections.Counter(problem.reason for problem in problems)
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


def check_index(index: int, count: int) -> None:
    """Raises IndexError, which also ends an iteration, unless 0 <= index < count."""
    if not 0 <= index < count:
        raise IndexError(f"index must be 0 to {count - 1}; got {index}")
