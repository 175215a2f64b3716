"""Instances as PNGs: one of labels an image, or one a mask, as many microscopy sets have them.

Two layouts are known by what a folder holds:
- `index.json`: a list of {"id", "image", "label"}, the last two names of files: of an image, and of
  a PNG in which 0 is background and every other number an object.
- `ID/images/ID.png` and `ID/masks/*.png`, one object a file, everything that is not black: the 2018
  Data Science Bowl as published (BBBC038, Caicedo et al. 2019).
"""

import dataclasses
import os
from typing import Any

import numpy as np

from sam_jax.data import decode
from sam_jax.data.example import RLE, BadSample, Example, SourceError, check_index
from sam_jax.io import storage
from sam_jax.masks import rle


@dataclasses.dataclass(frozen=True)
class LabelMaps:
    """Images with a PNG of labels each, in the order of `index.json`; masks by ascending label.

    Attributes:
      folder: what the names are relative to; entries: the list in `index.json`.
      reduce_to: see `read_image`.
    """

    folder: str
    entries: tuple[Any, ...]
    reduce_to: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        image, label = self._named(index, "image"), self._named(index, "label")
        labels = decode.decode_labels(decode.read_file(label, decode.MASK))
        return _example(image, _masks_of(labels), labels.shape, self.reduce_to)

    def image(self, index: int) -> np.ndarray:
        return decode.decode_image(self.encoded(index), None, self.reduce_to)

    def encoded(self, index: int) -> bytes:
        check_index(index, len(self))
        return decode.read_file(self._named(index, "image"), decode.IMAGE)

    def name(self, index: int) -> str:
        try:
            return self._named(index, "image")
        except BadSample:
            return os.path.join(self.folder, f"index.json[{index}]")

    def _named(self, index: int, key: str) -> str:
        entry = self.entries[index]
        return decode.path_in(self.folder, entry.get(key) if isinstance(entry, dict) else None)


@dataclasses.dataclass(frozen=True)
class MaskFolders:
    """Folders with an image and its masks each, by name; masks by the names of their files.

    Attributes:
      folder: the folder of all; ids: the names of those in it.
      reduce_to: see `read_image`.
    """

    folder: str
    ids: tuple[str, ...]
    reduce_to: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        paths = _pngs(os.path.join(self.folder, self.ids[index], "masks"))
        if not paths:
            raise BadSample("no masks", f"there are no PNGs in masks of {self.ids[index]}")
        masks = [rle.encode(decode.decode_mask(decode.read_file(p, decode.MASK))) for p in paths]
        return _example(self.name(index), masks, tuple(masks[0]["size"]), self.reduce_to)

    def image(self, index: int) -> np.ndarray:
        return decode.decode_image(self.encoded(index), None, self.reduce_to)

    def encoded(self, index: int) -> bytes:
        check_index(index, len(self))
        return decode.read_file(self.name(index), decode.IMAGE)

    def name(self, index: int) -> str:
        name = self.ids[index]
        return os.path.join(self.folder, name, "images", f"{name}.png")


def open_labels(folder: str, reduce_to: tuple[int, int] | None = None) -> LabelMaps | MaskFolders:
    """Opens a folder of either layout.

    Args:
      folder: see above; reduce_to: see `read_image`.
    Raises:
      SourceError: if it is missing or of neither layout, or has no images.
    """
    if not storage.is_folder(folder):
        raise SourceError(f"labels: there is no folder {folder}")
    path = os.path.join(folder, "index.json")
    if storage.is_file(path):
        try:
            entries = decode.parse_json(decode.read_file(path, decode.JSON))
        except BadSample as error:
            raise SourceError(f"labels: {path} cannot be used: {error.detail}") from error
        if not isinstance(entries, list) or not entries:
            found = decode.short(entries)
            raise SourceError(f"labels: {path} must hold a list of images; got {found}")
        return LabelMaps(folder, tuple(entries), reduce_to)
    ids = sorted(
        n for n in storage.listdir(folder) if storage.is_folder(os.path.join(folder, n, "images"))
    )
    if not ids:
        raise SourceError(
            f"labels: {folder} must hold index.json, or folders ID/images and ID/masks; got neither"
        )
    return MaskFolders(folder, tuple(ids), reduce_to)


def _masks_of(labels: np.ndarray) -> list[RLE]:
    """The mask of each number but 0, ascending, however many there are at one pass over 'h w'."""
    flat = labels.ravel(order="F")
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    ends = np.append(starts[1:], flat.size)
    order = np.argsort(flat[starts], kind="stable")
    numbers, first = np.unique(flat[starts][order], return_index=True)
    masks = []
    for number, runs in zip(numbers, np.split(order, first[1:]), strict=True):
        if number:  # its runs do not touch, so no bound is there twice
            bounds = np.unique([starts[runs], ends[runs]])
            lengths = np.diff(bounds[bounds < flat.size], prepend=0, append=flat.size)
            masks.append({"size": list(labels.shape), "counts": lengths.tolist()})
    return masks


def _example(path, masks, size, reduce_to):
    image = decode.decode_image(decode.read_file(path, decode.IMAGE), size, reduce_to)
    return Example(image=image, masks=decode.check_masks(masks, size))


def _pngs(folder: str) -> list[str]:
    try:
        names = sorted(name for name in storage.listdir(folder) if name.lower().endswith(".png"))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names]
