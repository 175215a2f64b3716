"""COCO's instance annotations: `instances.json` and the images, as COCO, LVIS and many others have.

Source: the data format at cocodataset.org. Polygons are painted as pycocotools paints them, see
`sam_jax.masks.polygons`. Deliberate differences: crowd annotations are left out, they are many
objects at once; so are images without any other annotation; a polygon of two corners is an error.
"""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from sam_jax.data import decode
from sam_jax.data.example import RLE, BadSample, Example, SourceError, check_index
from sam_jax.io import storage
from sam_jax.masks import rle
from sam_jax.masks.polygons import PolygonError, paint

MAX_JSON_BYTES = 1 << 31  # COCO's has 0.45 GB, that of LVIS 1.1 GB


@dataclasses.dataclass(frozen=True)
class Coco:
    """Images with the masks of their objects, in the order of `images` in the file.

    Attributes:
      folder: what the names of the images are relative to, or its `images`.
      records: of each image, as JSON: a tenth of the memory, and soon sent to other processes. Its
        file name, height, width and the segmentations of its objects.
      reduce_to: see `read_image`.
    """

    folder: str
    records: tuple[bytes, ...]
    reduce_to: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        name, height, width, segmentations = json.loads(self.records[index])
        size = decode.check_size(height, width)
        masks = [_mask(i, s, size) for i, s in enumerate(segmentations)]
        data = decode.read_file(_image_path(self.folder, name), decode.IMAGE)
        image = decode.decode_image(data, size, self.reduce_to)
        return Example(image=image, masks=decode.check_masks(masks, size))

    def image(self, index: int) -> np.ndarray:
        return decode.decode_image(self.encoded(index), None, self.reduce_to)

    def encoded(self, index: int) -> bytes:
        check_index(index, len(self))
        return decode.read_file(self.name(index), decode.IMAGE)

    def name(self, index: int) -> str:
        try:
            return _image_path(self.folder, json.loads(self.records[index])[0])
        except BadSample:
            return os.path.join(self.folder, f"image {index} of instances.json")


def open_coco(folder: str, reduce_to: tuple[int, int] | None = None) -> Coco:
    """Reads `instances.json` in a folder.

    Args:
      folder: with `instances.json`; the images lie in its `images`, or where their `file_name` says
        from the folder, as in `train2017/000000000009.jpg`.
      reduce_to: see `read_image`.
    Raises:
      SourceError: if the file is missing or broken, or there is no image with an object.
    """
    path = os.path.join(folder, "instances.json")
    if not storage.is_file(path):
        raise SourceError(
            f"coco: there is no {path}; the folder must hold the images and instances.json, "
            "which may be a link to annotations/instances_train2017.json"
        )
    try:
        content = decode.parse_json(
            decode.read_file(path, decode.JSON._replace(max_bytes=MAX_JSON_BYTES))
        )
    except BadSample as error:
        raise SourceError(f"coco: {path} cannot be used: {error.detail}") from error
    objects: dict[Any, list[Any]] = {}
    for annotation in _dicts(content, "annotations", "image_id", path):
        if annotation.get("iscrowd") != 1:
            objects.setdefault(annotation["image_id"], []).append(annotation.get("segmentation"))
    records = []
    for image in _dicts(content, "images", "id", path):
        if image["id"] in objects:
            fields = [image.get(name) for name in ("file_name", "height", "width")]
            try:
                records.append(json.dumps([*fields, objects.pop(image["id"])]).encode())
            except RecursionError:
                raise SourceError(f"coco: {path} is nested too deeply") from None
    if not records:
        raise SourceError(f"coco: no image in {path} has an annotation that is not a crowd")
    return Coco(folder, tuple(records), reduce_to)


def _dicts(content: Any, name: str, key: str, path: str) -> list[dict[str, Any]]:
    """A list in the file, of dicts that have an id; nothing can be found without."""
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise SourceError(f"coco: {path} must hold a dict with a list {name!r}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get(key)) not in (int, str):
            raise SourceError(f"coco: {name}[{i}] in {path} must be a dict with an int {key!r}")
    return entries


def _image_path(folder: str, name: Any) -> str:
    inside = decode.path_in(os.path.join(folder, "images"), name)
    beside = decode.path_in(folder, name)
    return beside if storage.is_file(beside) and not storage.is_file(inside) else inside


def _mask(index: int, segmentation: Any, size: tuple[int, int]) -> RLE:
    """A segmentation as run lengths, which are yet to be checked where they come from the file."""
    if isinstance(segmentation, dict):
        return segmentation
    try:
        return rle.encode(paint(segmentation, size))
    except PolygonError as error:
        raise BadSample("broken mask", f"mask {index}: {error}") from error
