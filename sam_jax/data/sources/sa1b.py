"""SA-1B as published: `sa_ID.jpg` and `sa_ID.json` next to each other, in folders or in tars.

Images and JSON files may also be in separate folders or tars below the same folder.

Files in tars are read in place by their offsets; nothing is extracted. The headers of a tar are
read once. The offsets are then kept in a small file next to it, `NAME.tar.index.npz`, if the folder
is writable. In an object store every header is a request, so tars should be uploaded together with
the index that `sam-jax dataset check` leaves on a disk. Only the size of a tar is compared with the
index there: remove the index if you replace a tar.

Source: Kirillov et al. 2023, and the README of facebookresearch/segment-anything, "Dataset".
"""

import array
import contextlib
import dataclasses
import io
import os
import re
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from sam_jax.data import decode
from sam_jax.data.decode_masks import Masks, check_masks
from sam_jax.data.example import BadSample, SourceError, check_index
from sam_jax.data.sources.base import FileSource
from sam_jax.io import atomic, storage, tar_index

FILE_NAME = re.compile(r"(?:.*/)?sa_([0-9]{1,15})\.(jpg|json)", re.DOTALL)

# The two files of an image. These numbers index the last axis of `Sa1b.offset` and `Sa1b.size`.
JPG, JSON = 0, 1
EXTENSIONS = ("jpg", "json")
FILE_KINDS = (decode.IMAGE_FILE, decode.JSON_FILE)

# Special values of an offset.
MISSING = -1
NOT_IN_TAR = -2  # a separate file in a folder

INDEX_VERSION = 1
MAX_INDEX_BYTES = 1 << 28  # a tar of SA-1B has an index of 0.7 MB
MAX_MEMBER_BYTES = (1 << 31) - 1  # sizes are int32; larger files are not read


@dataclasses.dataclass(frozen=True, eq=False)
class Sa1b(FileSource):
    """Images with their masks, by ascending id.

    There are a few numbers an image, so that 11 million images fit in memory.

    Attributes:
      containers: Paths of the folders and tars that hold the files.
      container: The containers of the JPEG and the JSON file of each image, as indices.
      key: 16 times the id, plus its number of digits: `sa_7` is not `sa_007`.
      offset: First bytes of the JPEG and the JSON file in a tar; or MISSING; or NOT_IN_TAR.
      size: Bytes of the JPEG and the JSON file in a tar.
    """

    containers: tuple[str, ...]
    container: Int32[np.ndarray, "i 2"]
    key: Int64[np.ndarray, " i"]
    offset: Int64[np.ndarray, "i 2"]
    size: Int32[np.ndarray, "i 2"]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def ids(self) -> Int64[np.ndarray, " i"]:
        """The number in the names of each image's files."""
        return self.key // 16

    def image_path(self, index: int) -> str:
        """Returns the path of an image. A path below a tar names a file in it."""
        return self._path(index, JPG)

    def encoded(self, index: int) -> bytes:
        """Reads the JPEG file of an image."""
        check_index(index, len(self))
        return self._read(index, JPG)

    def read_masks(self, index: int) -> Masks:
        """Reads the JSON file of an image."""
        path = self._path(index, JSON)
        return parse_record(decode.parse_json(self._read(index, JSON), path))[1]

    def _path(self, index: int, kind: int) -> str:
        number, digits = divmod(int(self.key[index]), 16)
        name = f"sa_{number:0{digits}d}.{EXTENSIONS[kind]}"
        return os.path.join(self.containers[self.container[index, kind]], name)

    def _read(self, index: int, kind: int) -> bytes:
        offset, path = int(self.offset[index, kind]), self._path(index, kind)
        if offset == MISSING:
            raise BadSample("missing file", f"there is no {path}")
        if offset == NOT_IN_TAR:
            return decode.read_file(path, FILE_KINDS[kind])
        tar = self.containers[self.container[index, kind]]
        return decode.read_range(tar, offset, int(self.size[index, kind]), FILE_KINDS[kind])


def open_sa1b(path: str, decode_size: tuple[int, int] | None = None) -> Sa1b:
    """Finds the images of SA-1B below a folder, or in one tar.

    An id that occurs several times counts once. Where both files are next to each other, folders go
    before tars, and then the first path counts. Otherwise the first file of either kind counts.
    Within a tar the last file counts, as for `tar`. Links to folders are not followed.

    Args:
      path: A folder of `sa_*.jpg`, `sa_*.json`, `*.tar` and folders of these, or a tar.
      decode_size: See `FileSource`.

    Returns:
      The images with their masks.

    Raises:
      SourceError: If there are none, or a tar is damaged.
    """
    if storage.is_file(path):
        found = {path: index_tar(path)}
    elif storage.is_folder(path):
        found, tars = _walk(path)
        found |= {tar: index_tar(tar) for tar in tars}
    else:
        raise SourceError(f"sa1b: there is no folder and no tar {path}")
    if not sum(map(len, found.values())):
        raise SourceError(
            f"sa1b: there is no sa_*.jpg or sa_*.json in {path}, nor in a *.tar there; compressed "
            "tars have to be unpacked first, as by gunzip"
        )
    container, key, offset, size = _join(list(found.values()))
    return Sa1b(tuple(found), container, key, offset, size, decode_size=decode_size)


def parse_record(record: Any) -> tuple[tuple[int, int], Masks]:
    """Checks the content of a JSON file.

    Args:
      record: The parsed JSON, of any type.

    Returns:
      (height, width) of the image, and its checked masks.

    Raises:
      BadSample: If the record does not have the format of SA-1B, or no mask can be used.
    """
    image = record.get("image") if isinstance(record, dict) else None
    annotations = record.get("annotations") if isinstance(record, dict) else None
    if not isinstance(image, dict) or not isinstance(annotations, list):
        raise BadSample("broken json", "it must hold 'image', a dict, and 'annotations', a list")
    size = decode.check_size(image.get("height"), image.get("width"))
    return size, check_masks(annotations, size, _segmentation)


def _segmentation(annotation: Any) -> Any:
    if not isinstance(annotation, dict) or "segmentation" not in annotation:
        raise BadSample("broken json", "each of 'annotations' must be a dict with 'segmentation'")
    return annotation["segmentation"]


def index_tar(path: str) -> Int64[np.ndarray, "k 4"]:
    """Finds the files of SA-1B in a tar, or reads them from the index next to it.

    Args:
      path: A path or a URL.

    Returns:
      Rows (key, JPG or JSON, offset, size) in the order of the tar.

    Raises:
      SourceError: If the file is not a tar, or damaged.
    """
    stamp = np.array([INDEX_VERSION, *storage.stat(path)])
    index_path = f"{path}.index.npz"
    rows = _load_index(index_path, stamp)
    if rows is None:
        try:
            rows = _rows((m.name, m.offset, m.size) for m in tar_index.members(path))
        except tar_index.TarError as error:
            raise SourceError(str(error)) from error
        _save_index(index_path, stamp, rows)
    return rows


def _load_index(path: str, stamp: Int64[np.ndarray, "3"]) -> Int64[np.ndarray, "k 4"] | None:
    """Reads an index. Returns None if it is missing, broken, or of another tar."""
    try:
        data = storage.read_range(path, 0, MAX_INDEX_BYTES)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            is_compressed = any(entry.compress_type for entry in archive.infolist())
        if is_compressed:  # `_save_index` does not compress, and a few bytes may become gigabytes
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as saved:
            rows, saved_stamp = saved["rows"], saved["stamp"]
    except Exception:  # a broken file may raise anything; the index is then written again
        return None
    # A store has no modification times: an index that was written on a disk is valid there.
    compared = slice(None) if stamp[-1] else slice(None, -1)
    fits = saved_stamp.shape == stamp.shape
    fits = fits and np.array_equal(saved_stamp[compared], stamp[compared])
    usable = fits and rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] == 4
    if not usable or (rows < 0).any() or (rows[:, [1, 3]] > (1, MAX_MEMBER_BYTES)).any():
        return None
    return rows


def _save_index(path: str, stamp: Int64[np.ndarray, "3"], rows: Int64[np.ndarray, "k 4"]) -> None:
    """Writes an index if the folder is writable and the disk not full. It is only a cache."""
    data = io.BytesIO()
    np.savez(data, stamp=stamp, rows=rows)
    write = storage.upload_bytes if storage.is_url(path) else atomic.write_bytes
    with contextlib.suppress(OSError):
        write(path, data.getvalue())


def _walk(path: str) -> tuple[dict[str, Int64[np.ndarray, "k 4"]], list[str]]:
    """Returns the rows of each folder by its path, and the paths of the tars."""
    folders, tars = {}, []
    for folder, names in storage.walk(path):
        rows = _rows((name, NOT_IN_TAR, 0) for name in names)
        if len(rows):
            folders[folder] = rows
        tars += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".tar")]
    return folders, tars


def _rows(files: Iterable[tuple[str, int, int]]) -> Int64[np.ndarray, "k 4"]:
    """Returns rows (key, JPG or JSON, offset, size) of the files that belong to SA-1B.

    Args:
      files: Names, offsets and sizes.
    """
    numbers = array.array("q")
    for name, offset, size in files:
        if match := FILE_NAME.fullmatch(name):
            key = 16 * int(match[1]) + len(match[1])
            numbers.extend((key, EXTENSIONS.index(match[2]), offset, min(size, MAX_MEMBER_BYTES)))
    return np.array(numbers, np.int64).reshape(-1, 4)


def _join(
    rows: list[Int64[np.ndarray, "_ 4"]],
) -> tuple[
    Int32[np.ndarray, "i 2"],
    Int64[np.ndarray, " i"],
    Int64[np.ndarray, "i 2"],
    Int32[np.ndarray, "i 2"],
]:
    """Joins the rows of all containers to container, key, offset and size of every image."""
    keys, offsets, sizes = zip(*map(_pair, rows), strict=True)
    of_entry = np.repeat(np.arange(len(rows), dtype=np.int32), [len(key) for key in keys])
    entry_key, offset, size = np.concatenate(keys), np.concatenate(offsets), np.concatenate(sizes)
    exists = offset != MISSING
    # Entries with both files go first; among equal ones the order remains.
    order = np.argsort(~exists.all(axis=1), kind="stable")
    key, first = np.unique(entry_key[order], return_index=True)
    entry = np.stack([order[first]] * 2, axis=1)
    for kind in (JPG, JSON):
        candidates = order[exists[order, kind]]
        found, first = np.unique(entry_key[candidates], return_index=True)
        entry[np.searchsorted(key, found), kind] = candidates[first]
    kinds = np.arange(2)
    return of_entry[entry], key, offset[entry, kinds], size[entry, kinds]


def _pair(
    rows: Int64[np.ndarray, "k 4"],
) -> tuple[Int64[np.ndarray, " i"], Int64[np.ndarray, "i 2"], Int32[np.ndarray, "i 2"]]:
    """Pairs the files of one container to images. Of files of the same name the last counts."""
    key, image = np.unique(rows[:, 0], return_inverse=True)
    offset = np.full((len(key), 2), MISSING)
    size = np.zeros((len(key), 2), np.int32)
    offset[image, rows[:, 1]] = rows[:, 2]
    size[image, rows[:, 1]] = rows[:, 3]
    return key, offset, size
