"""Several sources as one, some of them repeated.

    mix:coco:photos*2+labels:nuclei

The examples of the first source come first, and so on. A source with *N occurs N times in a row,
so that training sees its images N times as often. The copies of an image have indices of their
own, so they are augmented independently.
"""

import dataclasses
import re

import numpy as np
from jaxtyping import UInt8

from sam_jax.data.example import Example, Source, SourceError, check_index


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """A concatenation of sources.

    Attributes:
      sources: The sources. The same one may occur several times.
    """

    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        """Reads an example. See `Source`."""
        source, index = self._find(index)
        return source[index]

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Reads the image of an example. See `Source`."""
        source, index = self._find(index)
        return source.image(index)

    def encoded(self, index: int) -> bytes | None:
        """Reads the file of an image. See `Source`."""
        source, index = self._find(index)
        return source.encoded(index)

    def name(self, index: int) -> str:
        """Returns the name of an example. See `Source`."""
        source, index = self._find(index)
        return source.name(index)

    def _find(self, index: int) -> tuple[Source, int]:
        """Returns the source of an example and its index in that source."""
        check_index(index, len(self))
        for source in self.sources:
            if index < len(source):
                return source, index
            index -= len(source)
        raise AssertionError(index)


def open_mixture(text: str, decode_size: tuple[int, int] | None = None) -> Mixture:
    """Opens the sources of a mixture.

    Args:
      text: Names of sources, each of which may end in *N, separated by +. A + inside of a path does
        not separate unless the name of a kind of source follows it.
      decode_size: See `open_source`.

    Returns:
      The mixture.

    Raises:
      SourceError: If a source cannot be opened, or is a mixture itself.
    """
    from sam_jax.data.open import SOURCES, open_source  # which imports this module by name

    kinds = "|".join(SOURCES)
    sources: list[Source] = []
    for part in re.split(rf"\+(?=(?:{kinds})(?::|\+|\*|$))", text):
        name, repeats = part, "1"
        if match := re.fullmatch(r"(.*)\*([1-9][0-9]{0,4})", part):
            name, repeats = match[1], match[2]
        if name.partition(":")[0] == "mix":
            raise SourceError(f"a mixture cannot contain a mixture; got {part!r}")
        sources += [open_source(name, decode_size=decode_size)] * int(repeats)
    return Mixture(tuple(sources))
