"""Opens sources of examples by name, and selects parts of them.

open_source("sa1b:/data/sa1b")
open_source("tfds:lvis/validation@/data/tfds")
open_source("coco:/data/coco")
open_source("labels:/data/dsb2018")
open_source("images:/data/photos")
open_source("scenes:96x128")
open_source("mix:coco:/data/coco*2+labels:/data/dsb2018")
"""

import dataclasses
import difflib
import importlib
import os
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from sam_jax.data.example import Example, Source, SourceError, check_index
from sam_jax.data.sources.base import FileSource
from sam_jax.data.sources.mixed import Mixture


class SourceKind(NamedTuple):
    """A kind of source.

    Attributes:
      usage: The name of a source of this kind. The part in brackets is optional.
      help: A phrase that says what the location holds.
      opener: "module:function", imported when a source is opened. The function takes the location
        and `decode_size`, see `open_source`, and returns a `Source`.
    """

    usage: str
    help: str
    opener: str

    @property
    def needs_location(self) -> bool:
        """True if the name of a source must have a location."""
        return not self.usage.partition(":")[0].endswith("[")


SOURCES = {
    "sa1b": SourceKind(
        usage="sa1b:PATH",
        help="SA-1B's files in a folder, in tars in a folder, or in one tar",
        opener="sam_jax.data.sources.sa1b:open_sa1b",
    ),
    "tfds": SourceKind(
        usage="tfds:DATASET[:VERSION][/SPLIT][@FOLDER]",
        help="segment_anything, lvis or imagenet2012 of TensorFlow Datasets",
        opener="sam_jax.data.sources.tfds:open_tfds",
    ),
    "coco": SourceKind(
        usage="coco:FOLDER",
        help="instances.json and its images",
        opener="sam_jax.data.sources.coco:open_coco",
    ),
    "labels": SourceKind(
        usage="labels:FOLDER",
        help="images with PNGs of labels or of masks",
        opener="sam_jax.data.sources.label_images:open_labels",
    ),
    "images": SourceKind(
        usage="images:FOLDER",
        help="images without masks",
        opener="sam_jax.data.sources.images:open_images",
    ),
    "scenes": SourceKind(
        usage="scenes[:HEIGHTxWIDTH]",
        help="generated images",
        opener="sam_jax.data.sources.synthetic:open_scenes",
    ),
    "mix": SourceKind(
        usage="mix:SOURCE[*REPEATS]+SOURCE...",
        help="several sources",
        opener="sam_jax.data.sources.mixed:open_mixture",
    ),
}


def source_usage() -> str:
    """Returns a text for the command line: the usage of every kind of source with its help."""
    kinds = [f"{kind.usage} ({kind.help})" for kind in SOURCES.values()]
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def open_source(
    name: str, *, decode_size: tuple[int, int] | None = None, masks: bool = True
) -> Source:
    """Opens a source of examples by its name.

    Args:
      name: `KIND:LOCATION`, see SOURCES.
      decode_size: (height, width) that images will be resized to fit into. They may be decoded
        smaller than they are, see `read_image`; masks keep the size of the original image. None
        decodes images in full.
      masks: False reads images alone, which is faster.

    Returns:
      The source.

    Raises:
      SourceError: If the kind is unknown, the location is missing, or there is nothing in it.
    """
    kind, _, location = name.partition(":")
    if kind not in SOURCES:
        raise SourceError(_unknown_kind(name, kind))
    if not location and SOURCES[kind].needs_location:
        raise SourceError(f"source {name!r} names no location; it must be {SOURCES[kind].usage}")
    module, function = SOURCES[kind].opener.split(":")
    open_kind = getattr(importlib.import_module(module), function)
    try:
        source = open_kind(os.path.expanduser(location), decode_size)
    except OSError as error:
        raise SourceError(f"source {name!r} cannot be read: {error}") from error
    return source if masks else ImagesOnly(source)


def open_image_source(name: str) -> Source:
    """Opens images without masks: an image file, a folder of them, or the images of a source.

    Args:
      name: A path, or `KIND:LOCATION`, see SOURCES. An existing path goes first.

    Returns:
      The images.

    Raises:
      SourceError: If there is no such path or source, or it has no image.
    """
    from sam_jax.data.sources.images import Images, open_images

    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Images(os.path.dirname(path), (os.path.basename(path),))
    if os.path.isdir(path):
        return open_images(path)
    if ":" not in name and name not in SOURCES:
        raise SourceError(f"there is no file and no folder {name}; it must be one, or {_usages()}")
    return open_source(name, masks=False)


def with_full_size(source: Source) -> Source:
    """Returns the same opened source, decoding its images in full.

    Nothing is read again: indices and annotations are shared with the given source. Sources that
    always decode in full are returned unchanged.

    Args:
      source: A source, an `ImagesOnly` or a `Subset` of one, or a `Mixture`.

    Returns:
      A source of the same examples, of the same type.
    """
    if isinstance(source, ImagesOnly | Subset):
        return dataclasses.replace(source, source=with_full_size(source.source))
    if isinstance(source, Mixture):
        return Mixture(tuple(map(with_full_size, source.sources)))
    if isinstance(source, FileSource):
        return dataclasses.replace(source, decode_size=None)
    return source


@dataclasses.dataclass(frozen=True, eq=False)
class ImagesOnly:
    """The images of a source, without their masks.

    Attributes:
      source: The source, whose masks are not read.
    """

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """Reads an example. See `Source`."""
        return Example(image=self.image(index), masks=[])

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Reads the image of an example. See `Source`."""
        return self.source.image(index)

    def encoded(self, index: int) -> bytes | None:
        """Reads the file of an image. See `Source`."""
        return self.source.encoded(index)

    def name(self, index: int) -> str:
        """Returns the name of an example. See `Source`."""
        return self.source.name(index)


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Selected examples of a source.

    Attributes:
      source: The source.
      indices: Ascending indices of the selected examples in `source`. People and random keys refer
        to an image by this index, whatever is selected.
    """

    source: Source
    indices: Int[np.ndarray, " i"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        """Reads an example. See `Source`."""
        check_index(index, len(self))
        return self.source[int(self.indices[index])]

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Reads the image of an example. See `Source`."""
        check_index(index, len(self))
        return self.source.image(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | None:
        """Reads the file of an image. See `Source`."""
        check_index(index, len(self))
        return self.source.encoded(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Returns the name of an example. See `Source`."""
        return self.source.name(int(self.indices[index]))


def select(source: Source, text: str) -> Subset:
    """Selects the examples of a slice.

    Args:
      source: A source, or a subset of one.
      text: A slice, see `parse_slice`.

    Returns:
      The selected examples.

    Raises:
      SourceError: If the text is not a slice, or selects nothing.
    """
    return _subset(source, text, np.arange(len(source))[parse_slice(text)])


def exclude(source: Source, text: str) -> Subset:
    """Selects all examples except those of a slice.

    Args:
      source: A source, or a subset of one.
      text: A slice, see `parse_slice`.

    Returns:
      The remaining examples.

    Raises:
      SourceError: If the text is not a slice, or nothing remains.
    """
    kept = np.ones(len(source), bool)
    kept[parse_slice(text)] = False
    return _subset(source, text, np.flatnonzero(kept))


def parse_slice(text: str) -> slice:
    """Parses a slice in Python's notation, such as "3:10", "::5" or "-100:".

    Args:
      text: The slice, or an index such as "7", which selects one example.

    Returns:
      The slice.

    Raises:
      SourceError: If the text is not a slice, or its step is not positive.
    """
    parts = text.split(":")
    if (
        len(parts) > 3
        or not all(re.fullmatch("-?[0-9]{1,15}|", part) for part in parts)
        or not text
    ):
        raise SourceError(
            f"a slice is START:STOP:STEP, for example 0::5, or an index; got {text!r}"
        )
    numbers = [int(part) if part else None for part in parts]
    if len(parts) == 1:
        return slice(int(text), int(text) + 1 or None)  # "-1" is the last example
    if len(numbers) == 3 and numbers[2] is not None and numbers[2] < 1:
        raise SourceError(f"the step of a slice must be 1 or more; got {text!r}")
    return slice(*numbers)


def _subset(source: Source, text: str, indices: Int[np.ndarray, " i"]) -> Subset:
    if not len(indices):
        raise SourceError(f"the slice {text!r} of {len(source)} examples leaves none to be used")
    if isinstance(source, Subset):
        return Subset(source.source, source.indices[indices])
    return Subset(source, indices)


def _usages() -> str:
    return ", ".join(kind.usage for kind in SOURCES.values())


def _unknown_kind(name: str, kind: str) -> str:
    near = difflib.get_close_matches(kind, SOURCES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"source {name!r} is of no known kind{hint}; it must be {_usages()}"
