"""Images without masks, in a folder and all folders below it, as for masked autoencoders."""

import dataclasses
import os

from sam_jax.data.example import SourceError
from sam_jax.data.sources.base import FileSource
from sam_jax.io import storage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class Images(FileSource):
    """Images without masks.

    Attributes:
      folder: The folder that the names are relative to.
      names: Names of the files.
    """

    folder: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def image_path(self, index: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.folder, self.names[index])


def open_images(folder: str, decode_size: tuple[int, int] | None = None) -> Images:
    """Finds the JPEG, PNG and WebP files in a folder and all folders below it.

    Args:
      folder: A path or a URL. Hidden files and folders, whose names begin with a dot, are skipped.
      decode_size: See `FileSource`.

    Returns:
      The images in the order of their names.

    Raises:
      SourceError: If the folder is missing or has no such file.
    """
    if not storage.is_folder(folder):
        raise SourceError(f"images: there is no folder {folder}")
    names = [
        os.path.relpath(os.path.join(subfolder, name), folder)
        for subfolder, files in storage.walk(folder)
        for name in files
        if name.lower().endswith(SUFFIXES)
    ]
    names = sorted(name for name in names if not _is_hidden(name))
    if not names:
        raise SourceError(
            f"images: {folder} and the folders in it must hold files that end in "
            f"{', '.join(SUFFIXES)}; there are none"
        )
    return Images(folder, tuple(names), decode_size=decode_size)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split(os.sep))
