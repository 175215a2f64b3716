"""COCO instance annotations: `instances.json` and its images, as for COCO, LVIS and many others.

Source: The data format at cocodataset.org. Polygons are rasterized as by pycocotools, see
`sam_jax.masks.polygons`.

Differences: Crowd annotations are left out, because they cover many objects at once, and so are
images without any other annotation. An annotation without a usable mask is skipped and counted: one
without polygons, with a polygon of two corners, without a pixel in the image, or of another size.
"""

import dataclasses
import functools
import json
import os
from typing import Any

from sam_jax.data import decode
from sam_jax.data.decode_masks import Masks, check_masks
from sam_jax.data.example import BadSample, SourceError
from sam_jax.data.sources.base import FileSource
from sam_jax.io import storage
from sam_jax.masks.polygons import PolygonError, rasterize

MAX_INSTANCES_BYTES = 1 << 31  # COCO's file has 0.45 GB, that of LVIS 1.1 GB


@dataclasses.dataclass(frozen=True)
class Coco(FileSource):
    """Images with the masks of their objects, in the order of `images` in the file.

    Attributes:
      folder: The folder of `instances.json`.
      file_names: For each image its `file_name` in the file, which may be of any type.
      records: For each image its height, its width and the segmentations of its objects, as JSON.
        JSON takes a tenth of the memory of the values, and is quickly sent to workers.
    """

    folder: str
    file_names: tuple[Any, ...]
    records: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.file_names)

    def image_path(self, index: int) -> str:
        """Returns the path of an image, in the folder or in its subfolder `images`.

        A backslash in the file name is read as a slash, as programs for Windows mean it.

        Raises:
          BadSample: If the file name is not a string or leads out of the folder.
        """
        name = self.file_names[index]
        name = name.replace("\\", "/") if isinstance(name, str) else name
        in_images = decode.safe_join(os.path.join(self.folder, "images"), name)
        in_folder = decode.safe_join(self.folder, name)
        if storage.is_file(in_folder) and not storage.is_file(in_images):
            return in_folder
        return in_images

    def name(self, index: int) -> str:
        """Returns the path of an image, or its position in the file if it has no usable path."""
        try:
            return self.image_path(index)
        except BadSample:
            return os.path.join(self.folder, f"image {index} of instances.json")

    def read_masks(self, index: int) -> Masks:
        """Reads run lengths and rasterizes polygons."""
        height, width, segmentations = json.loads(self.records[index])
        size = decode.check_size(height, width)
        return check_masks(segmentations, size, functools.partial(_to_rle, size))


def open_coco(folder: str, decode_size: tuple[int, int] | None = None) -> Coco:
    """Reads `instances.json` in a folder.

    Args:
      folder: A path or a URL. Images are in its subfolder `images`, or at their `file_name` in the
        folder itself, as in `train2017/000000000009.jpg`.
      decode_size: See `FileSource`.

    Returns:
      The images that have objects.

    Raises:
      SourceError: If the file is missing or broken, or no image has an object.
    """
    path = os.path.join(folder, "instances.json")
    content = _read_instances(path)
    segmentations: dict[Any, list[Any]] = {}
    for annotation in _dicts(content, "annotations", "image_id", path):
        if annotation.get("iscrowd") != 1:
            of_image = segmentations.setdefault(annotation["image_id"], [])
            of_image.append(annotation.get("segmentation"))
    file_names, records = [], []
    for image in _dicts(content, "images", "id", path):
        if image["id"] in segmentations:
            record = [image.get("height"), image.get("width"), segmentations.pop(image["id"])]
            try:
                records.append(json.dumps(record).encode())
            except RecursionError:
                raise SourceError(f"coco: {path} is nested too deeply") from None
            file_names.append(image.get("file_name"))
    if not records:
        raise SourceError(f"coco: no image in {path} has an annotation that is not a crowd")
    return Coco(folder, tuple(file_names), tuple(records), decode_size=decode_size)


def _read_instances(path: str) -> Any:
    if not storage.is_file(path):
        raise SourceError(
            f"coco: there is no {path}; the folder must hold the images and instances.json, "
            "which may be a link to annotations/instances_train2017.json"
        )
    kind = decode.JSON_FILE._replace(max_bytes=MAX_INSTANCES_BYTES)
    try:
        return decode.parse_json(decode.read_file(path, kind), path)
    except BadSample as error:
        raise SourceError(f"coco: {error.detail}") from error


def _dicts(content: Any, name: str, key: str, path: str) -> list[dict[str, Any]]:
    """Returns a list in the file, whose entries must be dicts with an id."""
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise SourceError(f"coco: {path} must hold a dict with a list {name!r}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get(key)) not in (int, str):
            raise SourceError(f"coco: {name}[{i}] in {path} must be a dict with an int {key!r}")
    return entries


def _to_rle(size: tuple[int, int], segmentation: Any) -> Any:
    """Rasterizes polygons. Run lengths of the file are returned unchecked."""
    if isinstance(segmentation, dict):
        return segmentation
    if not segmentation and (segmentation is None or isinstance(segmentation, list)):
        raise BadSample("empty mask", "it has no segmentation")
    try:
        return rasterize(segmentation, size)
    except PolygonError as error:
        raise BadSample("broken mask", str(error)) from error
