"""Instances as PNGs: one label map an image or one file a mask, as in many microscopy data sets.

The layout is recognized by the contents of the folder:
- `index.json`: A list of {"id", "image", "label"}. The last two are names of files: an image, and a
  PNG in which 0 is background and every other number is an object.
- `ID/images/ID.png` and `ID/masks/*.png`: One object a file, its pixels not black, as the 2018 Data
  Science Bowl was published (BBBC038, Caicedo et al. 2019).
"""

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sam_jax.data import decode
from sam_jax.data.decode_masks import Masks, check_masks, decode_labels, decode_mask
from sam_jax.data.example import RLE, BadSample, SourceError
from sam_jax.data.sources.base import FileSource
from sam_jax.io import storage
from sam_jax.masks import rle

MAX_RUNS = 1 << 23  # of equal pixels in the columns of a label map; each takes some 60 bytes


@dataclasses.dataclass(frozen=True)
class LabelMaps(FileSource):
    """Images with a label map each, in the order of `index.json`. Masks are ordered by label.

    Attributes:
      folder: The folder that the names are relative to.
      entries: The list in `index.json`.
    """

    folder: str
    entries: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def image_path(self, index: int) -> str:
        """Returns the path of an image.

        Raises:
          BadSample: If the entry is broken.
        """
        return self._path(index, "image")

    def name(self, index: int) -> str:
        """Returns the path of an image, or its position in the file if it has no usable path."""
        try:
            return self.image_path(index)
        except BadSample:
            return os.path.join(self.folder, f"index.json[{index}]")

    def read_masks(self, index: int) -> Masks:
        """Reads the label map of an image."""
        self.image_path(index)  # reports a broken entry before any file is read
        path = self._path(index, "label")
        labels = decode_labels(decode.read_file(path, decode.MASK_FILE), path)
        return check_masks(labels_to_rles(labels, path), (labels.shape[0], labels.shape[1]))

    def _path(self, index: int, key: str) -> str:
        entry = self.entries[index]
        return decode.safe_join(self.folder, entry.get(key) if isinstance(entry, dict) else None)


@dataclasses.dataclass(frozen=True)
class MaskFolders(FileSource):
    """Folders with an image and its masks each. Images and masks are ordered by their names.

    Attributes:
      folder: The folder that holds the others.
      ids: Names of the folders in it.
    """

    folder: str
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, index: int) -> str:
        """Returns the path of an image."""
        name = self.ids[index]
        return os.path.join(self.folder, name, "images", f"{name}.png")

    def read_masks(self, index: int) -> Masks:
        """Reads one file a mask."""
        paths = _list_pngs(os.path.join(self.folder, self.ids[index], "masks"))
        if not paths:
            raise BadSample("no masks", f"there are no PNGs in masks of {self.ids[index]}")
        return check_masks(paths, None, _read_mask)


def open_labels(folder: str, decode_size: tuple[int, int] | None = None) -> LabelMaps | MaskFolders:
    """Opens a folder of either layout.

    Args:
      folder: A path or a URL.
      decode_size: See `FileSource`.

    Returns:
      The images with their masks.

    Raises:
      SourceError: If the folder is missing, has neither layout, or has no images.
    """
    if not storage.is_folder(folder):
        raise SourceError(f"labels: there is no folder {folder}")
    path = os.path.join(folder, "index.json")
    if storage.is_file(path):
        return LabelMaps(folder, _read_index(path), decode_size=decode_size)
    ids = sorted(
        name
        for name in storage.listdir(folder)
        if storage.is_folder(os.path.join(folder, name, "images"))
    )
    if not ids:
        raise SourceError(
            f"labels: {folder} must hold index.json, or folders ID/images and ID/masks; got neither"
        )
    return MaskFolders(folder, tuple(ids), decode_size=decode_size)


def labels_to_rles(labels: Shaped[np.ndarray, "h w"], name: str) -> list[RLE]:
    """Encodes every label of a label map in one pass.

    Args:
      labels: One number a pixel; 0 is background.
      name: The name of the file, for error messages.

    Returns:
      The run lengths of each label, by ascending label.

    Raises:
      BadSample: If there are more than MAX_RUNS runs, which would take gigabytes of memory.
    """
    flat = labels.ravel(order="F")
    is_start = np.concatenate([[True], flat[1:] != flat[:-1]])
    if (count := np.count_nonzero(is_start)) > MAX_RUNS:
        raise BadSample("broken mask", f"{name}: at most {MAX_RUNS} runs of pixels; got {count}")
    starts = np.flatnonzero(is_start)
    ends = np.append(starts[1:], flat.size)
    order = np.argsort(flat[starts], kind="stable")
    numbers, first = np.unique(flat[starts][order], return_index=True)
    masks = []
    for number, runs in zip(numbers, np.split(order, first[1:]), strict=True):
        if number:  # runs of one label do not touch, so all bounds are different
            bounds = np.unique([starts[runs], ends[runs]])
            lengths = np.diff(bounds[bounds < flat.size], prepend=0, append=flat.size)
            masks.append({"size": list(labels.shape), "counts": lengths.tolist()})
    return masks


def _read_mask(path: str) -> RLE:
    return rle.encode(decode_mask(decode.read_file(path, decode.MASK_FILE), path))


def _read_index(path: str) -> tuple[Any, ...]:
    try:
        entries = decode.parse_json(decode.read_file(path, decode.JSON_FILE), path)
    except BadSample as error:
        raise SourceError(f"labels: {error.detail}") from error
    if not isinstance(entries, list) or not entries:
        found = decode.describe(entries)
        raise SourceError(f"labels: {path} must hold a list of images; got {found}")
    return tuple(entries)


def _list_pngs(folder: str) -> list[str]:
    try:
        names = sorted(name for name in storage.listdir(folder) if name.lower().endswith(".png"))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names]
