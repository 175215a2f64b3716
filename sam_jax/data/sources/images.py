"""Images without masks, of a folder and all those in it: enough for a masked autoencoder."""

import dataclasses
import os

import numpy as np

from sam_jax.data import decode
from sam_jax.data.example import Example, SourceError, check_index
from sam_jax.io import storage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images by their paths, without masks.

    Attributes:
      folder: what the names are relative to; names: of the files.
      reduce_to: see `read_image`.
    """

    folder: str
    names: tuple[str, ...]
    reduce_to: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        return Example(image=self.image(index), masks=[])

    def image(self, index: int) -> np.ndarray:
        return decode.decode_image(self.encoded(index), None, self.reduce_to)

    def encoded(self, index: int) -> bytes:
        check_index(index, len(self))
        return decode.read_file(self.name(index), decode.IMAGE)

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])


def open_images(folder: str, reduce_to: tuple[int, int] | None = None) -> Images:
    """Finds the JPEG, PNG and WebP files in a folder and the folders in it, by name.

    Args:
      folder: where they are; hidden files and folders, whose names begin with a dot, are left out.
      reduce_to: see `read_image`.
    Raises:
      SourceError: if it is missing, or has no such file.
    """
    if not storage.is_folder(folder):
        raise SourceError(f"images: there is no folder {folder}")
    found = [
        os.path.relpath(os.path.join(place, name), folder)
        for place, names in storage.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]
    names = tuple(
        sorted(name for name in found if not any(p.startswith(".") for p in name.split(os.sep)))
    )
    if not names:
        raise SourceError(
            f"images: {folder} and the folders in it must hold files that end in "
            f"{', '.join(SUFFIXES)}; there are none"
        )
    return Images(folder, names, reduce_to)
