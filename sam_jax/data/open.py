"""One name for any source of examples, and a part of a source.

open_source("sa1b:/data/sa1b")
open_source("tfds:lvis/validation@/data/tfds")
open_source("coco:/data/coco")
open_source("labels:/data/dsb2018")
open_source("images:/data/photos")
open_source("scenes:96x128")
"""

import dataclasses
import difflib
import os
import re

import numpy as np

from sam_jax.data.example import Example, Source, SourceError, check_index
from sam_jax.io import storage

KINDS = {
    "sa1b": "sa1b:PATH",  # a folder of sa_*.jpg with sa_*.json or of tars of them, or one tar
    "tfds": "tfds:DATASET[:VERSION][/SPLIT][@FOLDER]",  # segment_anything, lvis or imagenet2012
    "coco": "coco:FOLDER",  # with instances.json and the images
    "labels": "labels:FOLDER",  # of images with PNGs of labels, or of masks
    "images": "images:FOLDER",  # of images without masks
    "scenes": "scenes[:HEIGHTxWIDTH]",  # drawn by the program
}
MIN_SCENE, MAX_SCENE = 16, 4096  # pixels of a side


def open_source(
    name: str, *, reduce_to: tuple[int, int] | None = None, masks: bool = True
) -> Source:
    """Opens a source of examples by its name.

    Args:
      name: `KIND:PLACE`, see KINDS.
      reduce_to: (height, width) of the frame that images are for. They may then be decoded smaller
        than they are, see `read_image`; masks keep the size of the original.
      masks: whether examples have their masks; images alone are read sooner.
    Raises:
      SourceError: if the kind is unknown, the place missing, or nothing in it.
    """
    source = _open(name, reduce_to)
    return source if masks else ImagesOnly(source)


def open_image_source(name: str) -> Source:
    """Opens images to be masked: an image file, a folder of them, or the images of a source.

    Args:
      name: a path, or `KIND:PLACE`, see KINDS; what is there as a path is one.
    Raises:
      SourceError: if it is none of these, or there is no image in it.
    """
    from sam_jax.data.sources.images import Images, open_images

    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Images(os.path.dirname(path), (os.path.basename(path),))
    if os.path.isdir(path):
        return open_images(path)
    if ":" not in name and name not in KINDS:
        raise SourceError(
            f"there is no file and no folder {name}; it must be one, or {', '.join(KINDS.values())}"
        )
    return open_source(name, masks=False)


@dataclasses.dataclass(frozen=True, eq=False)
class ImagesOnly:
    """The images of a source."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return Example(image=self.image(index), masks=[])

    def image(self, index: int) -> np.ndarray:
        return self.source.image(index)

    def encoded(self, index: int) -> bytes | None:
        return self.source.encoded(index)

    def name(self, index: int) -> str:
        return self.source.name(index)


def _open(name: str, reduce_to: tuple[int, int] | None) -> Source:
    kind, _, place = name.partition(":")
    if kind not in KINDS:
        raise SourceError(_unknown(name, kind))
    if kind == "scenes":
        from sam_jax.data.sources.synthetic import SyntheticScenes

        return SyntheticScenes(_scene_size(place)) if place else SyntheticScenes()
    if not place:
        raise SourceError(f"source {name!r} names no place; it must be {KINDS[kind]}")
    if kind == "tfds":
        from sam_jax.data.sources.tfds import open_tfds

        return open_tfds(place, reduce_to)
    try:
        return _open_files(kind, os.path.expanduser(place), reduce_to)
    except OSError as error:
        if not storage.is_url(place):
            raise
        raise SourceError(f"source {name!r} cannot be read: {error}") from error


def _open_files(kind, place, reduce_to):
    if kind == "sa1b":
        from sam_jax.data.sources.sa1b import open_sa1b

        return open_sa1b(place, reduce_to)
    if kind == "coco":
        from sam_jax.data.sources.coco import open_coco

        return open_coco(place, reduce_to)
    if kind == "images":
        from sam_jax.data.sources.images import open_images

        return open_images(place, reduce_to)
    from sam_jax.data.sources.label_images import open_labels

    return open_labels(place, reduce_to)


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some of a source's examples.

    Attributes:
      source: all of them.
      indices: 'i' int64, ascending, of the selected ones in `source`: the index by which an image
        is known to people and to randomness, whatever is selected.
    """

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        return self.source[int(self.indices[index])]

    def image(self, index: int) -> np.ndarray:
        check_index(index, len(self))
        return self.source.image(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | None:
        check_index(index, len(self))
        return self.source.encoded(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


def select(source: Source, text: str) -> Subset:
    """The examples of a slice, see `parse_slice`.

    Raises:
      SourceError: if the text is no slice, or selects none.
    """
    return _part(source, text, np.arange(len(source))[parse_slice(text)])


def exclude(source: Source, text: str) -> Subset:
    """All examples but those of a slice, see `parse_slice`.

    Raises:
      SourceError: if the text is no slice, or leaves none.
    """
    kept = np.ones(len(source), bool)
    kept[parse_slice(text)] = False
    return _part(source, text, np.flatnonzero(kept))


def parse_slice(text: str) -> slice:
    """Reads a slice as Python writes it: "3:10", "::5", "-100:"; "7" is one example.

    Raises:
      SourceError: if it is none, or does not go upwards.
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
        return slice(int(text), int(text) + 1 or None)  # "-1" is the last
    if len(numbers) == 3 and numbers[2] is not None and numbers[2] < 1:
        raise SourceError(f"the step of a slice must be 1 or more; got {text!r}")
    return slice(*numbers)


def _part(source: Source, text: str, chosen: np.ndarray) -> Subset:
    if not len(chosen):
        raise SourceError(f"the slice {text!r} of {len(source)} examples leaves none to be used")
    if isinstance(source, Subset):
        return Subset(source.source, source.indices[chosen])
    return Subset(source, chosen)


def _unknown(name: str, kind: str) -> str:
    near = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"source {name!r} is of no known kind{hint}; it must be {', '.join(KINDS.values())}"


def _scene_size(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(MIN_SCENE <= side <= MAX_SCENE for side in size):
        raise SourceError(
            f"scenes:{text} must be scenes:HEIGHTxWIDTH of {MIN_SCENE} to {MAX_SCENE} pixels, for "
            "example scenes:96x128"
        )
    return size
