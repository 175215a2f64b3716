"""SA-1B as it is published: `sa_ID.jpg` and `sa_ID.json` beside each other, in folders or in tars.

Tars are read where they are, by the offset of each file; nothing is extracted. The headers of a tar
are read once, and where they lead to is kept in a small file beside it, `NAME.tar.index.npz`, if
the folder can be written to. In an object store each header is a request of its own: tars should
go there with the index beside them, as `sam-jax dataset check` leaves it on a disk. Only the size
of a tar is compared there: whoever replaces one should remove its index.

Source: Kirillov et al. 2023 and the README of facebookresearch/segment-anything, "Dataset".
"""

import array
import dataclasses
import io
import os
import re
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np

from sam_jax.data import decode
from sam_jax.data.example import RLE, BadSample, Example, SourceError, check_index
from sam_jax.io import storage, tar_index

FILE = re.compile(r"(?:.*/)?sa_([0-9]{1,15})\.(jpg|json)", re.DOTALL)
KINDS = (("jpg", decode.IMAGE), ("json", decode.JSON))
MISSING, WHOLE_FILE = -1, -2  # instead of an offset
INDEX_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Sa1b:
    """Images with their masks, by ascending id. A few numbers an image, so that 11 million fit.

    Attributes:
      places: folders and tars.
      place: 'i' int32, the one that an image is in.
      key: 'i' int64, 16 times the id, plus the number of its digits: `sa_7` is not `sa_007`.
      offset: 'i 2' int64, of the image and the json in a tar; or MISSING; or WHOLE_FILE.
      size: 'i 2' int32 of them, bytes.
      reduce_to: see `read_image`.
    """

    places: tuple[str, ...]
    place: np.ndarray
    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    reduce_to: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        size, masks = parse_record(decode.parse_json(self._read(index, 1)))
        image = decode.decode_image(self._read(index, 0), size, self.reduce_to)
        return Example(image=image, masks=masks)

    def image(self, index: int) -> np.ndarray:
        return decode.decode_image(self.encoded(index), None, self.reduce_to)

    def encoded(self, index: int) -> bytes:
        check_index(index, len(self))
        return self._read(index, 0)

    def name(self, index: int) -> str:
        return self._path(index, 0)

    @property
    def ids(self) -> np.ndarray:
        """'i' int64, the number in the name of each image's files."""
        return self.key // 16

    def _path(self, index: int, kind: int) -> str:
        number, digits = divmod(int(self.key[index]), 16)
        file = f"sa_{number:0{digits}d}.{KINDS[kind][0]}"
        return os.path.join(self.places[self.place[index]], file)

    def _read(self, index: int, kind: int) -> bytes:
        offset, path = int(self.offset[index, kind]), self._path(index, kind)
        if offset == MISSING:
            raise BadSample("missing file", f"there is no {path}")
        if offset == WHOLE_FILE:
            return decode.read_file(path, KINDS[kind][1])
        place = self.places[self.place[index]]
        return decode.read_range(place, offset, int(self.size[index, kind]), KINDS[kind][1])


def open_sa1b(path: str, reduce_to: tuple[int, int] | None = None) -> Sa1b:
    """Finds the images of SA-1B below a folder, or in one tar.

    An id that is there several times counts once: folders go before tars, then the first path does;
    within a tar the last file does, as for `tar`. Links to folders are not followed.

    Args:
      path: a folder of `sa_*.jpg`, `sa_*.json`, `*.tar` and folders of these; or a tar.
      reduce_to: see `read_image`.
    Raises:
      SourceError: if there is none, or a tar is damaged.
    """
    if storage.is_file(path):
        found = {path: index_tar(path)}
    elif storage.is_folder(path):
        found, tars = _walk(path)
        found |= {name: index_tar(name) for name in tars}
    else:
        raise SourceError(f"sa1b: there is no folder and no tar {path}")
    if not sum(map(len, found.values())):
        raise SourceError(
            f"sa1b: there is no sa_*.jpg or sa_*.json in {path}, nor in a *.tar there; compressed "
            "tars have to be unpacked first, as by gunzip"
        )
    place, key, offset, size = _join(list(found.values()))
    return Sa1b(tuple(found), place, key, offset, size, reduce_to)


def parse_record(record: Any) -> tuple[tuple[int, int], list[RLE]]:
    """The content of a json -> (height, width) and the masks, checked.

    Raises:
      BadSample: if it is not as SA-1B's are, or a mask is unusable.
    """
    image = record.get("image") if isinstance(record, dict) else None
    annotations = record.get("annotations") if isinstance(record, dict) else None
    if not isinstance(image, dict) or not isinstance(annotations, list):
        raise BadSample("broken json", "it must hold 'image', a dict, and 'annotations', a list")
    size = decode.check_size(image.get("height"), image.get("width"))
    for annotation in annotations:
        if not isinstance(annotation, dict) or "segmentation" not in annotation:
            raise BadSample(
                "broken json", "each of 'annotations' must be a dict with 'segmentation'"
            )
    return size, decode.check_masks([a["segmentation"] for a in annotations], size)


def index_tar(path: str) -> np.ndarray:
    """Where the files in a tar lie.

    Returns:
      'k 4' int64, in the order of the tar: key, 0 for an image or 1 for a json, offset, size.
    Raises:
      SourceError: if it is no tar, or damaged.
    """
    stamp = np.array([INDEX_VERSION, *storage.stat(path)])
    cache = f"{path}.index.npz"
    rows = _load_index(cache, stamp)
    if rows is None:
        rows = _rows((m.name, m.offset, m.size) for m in tar_index.members(path))
        _save_index(cache, stamp, rows)
    return rows


def _load_index(cache: str, stamp: np.ndarray) -> np.ndarray | None:
    try:
        data = io.BytesIO(storage.read_range(cache))
        with np.load(data, allow_pickle=False) as saved:
            rows, before = saved["rows"], saved["stamp"]
    except Exception:  # whatever is wrong with it, it is made anew
        return None
    known = slice(
        None, None if stamp[-1] else -1
    )  # an index that is sent to a store is valid there
    fits = before.shape == stamp.shape and np.array_equal(before[known], stamp[known])
    usable = fits and rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] == 4
    if not usable or (rows < 0).any() or (rows[:, 1] > 1).any():
        return None
    return rows


def _save_index(cache: str, stamp: np.ndarray, rows: np.ndarray) -> None:
    data = io.BytesIO()
    np.savez(data, stamp=stamp, rows=rows)
    part = f"{cache}.{secrets.token_hex(8)}.part"  # others may be writing the same index
    try:
        if storage.is_url(cache):
            storage.write_bytes(cache, data.getvalue())
            return
        with open(part, "xb") as file:
            file.write(data.getvalue())
        os.replace(part, cache)
    except OSError:  # a folder that cannot be written to, or a full disk: it works without
        if os.path.exists(part):
            os.remove(part)


def _walk(path: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The rows of each folder, and the tars, both by path."""
    folders, tars = {}, []
    for folder, names in storage.walk(path):
        rows = _rows((name, WHOLE_FILE, 0) for name in names)
        if len(rows):
            folders[folder] = rows
        tars += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".tar")]
    return folders, tars


def _rows(found: Iterable[tuple[str, int, int]]) -> np.ndarray:
    """(name, offset, size) of files, as rows of those that are SA-1B's."""
    numbers = array.array("q")
    for name, offset, size in found:
        if match := FILE.fullmatch(name):
            key = 16 * int(match[1]) + len(match[1])
            numbers.extend((key, match[2] == "json", offset, min(size, 2**31 - 1)))
    return np.array(numbers, np.int64).reshape(-1, 4)


def _join(rows: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Rows of each place -> place, key, offset and size of every image."""
    keys, offsets, sizes = zip(*map(_pair, rows), strict=True)
    place = np.repeat(np.arange(len(rows), dtype=np.int32), [len(key) for key in keys])
    key, first = np.unique(np.concatenate(keys), return_index=True)
    return place[first], key, np.concatenate(offsets)[first], np.concatenate(sizes)[first]


def _pair(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images of one place; of files of the same name the last counts."""
    key, image = np.unique(rows[:, 0], return_inverse=True)
    offset = np.full((len(key), 2), MISSING)
    size = np.zeros((len(key), 2), np.int32)
    offset[image, rows[:, 1]] = rows[:, 2]
    size[image, rows[:, 1]] = rows[:, 3]
    return key, offset, size
