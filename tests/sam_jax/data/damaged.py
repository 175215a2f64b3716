"""A corpus of images with masks, of which 1 % are damaged in each of many ways."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_jax.masks import rle

SIZE = (48, 64)
BOX = [[8, 8, 40, 8, 40, 30, 8, 30]]


def _overwrite(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _replace(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: (path.unlink(), make(path))


def _turn(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)


def _pretend_to_be_large(data: bytes) -> bytes:
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + b"\xea\x60\xea\x60" + data[frame + 9 :]


# What is done to the file of an image, and the reason that it gets.
FILES = {
    "missing": (Path.unlink, "missing file"),
    "folder": (_replace(Path.mkdir), "missing file"),
    "pipe": (_replace(os.mkfifo), "missing file"),
    "link to a pipe": (
        _replace(lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe"))),
        "missing file",
    ),
    "empty": (_overwrite(lambda data: b""), "broken image"),
    "text": (_overwrite(lambda data: b"<html>" * 50), "broken image"),
    "truncated": (_overwrite(lambda data: data[: len(data) // 2]), "broken image"),
    "bomb": (_overwrite(_pretend_to_be_large), "broken image"),
    "turned": (_turn, "turned image"),
    "smaller": (lambda path: Image.new("RGB", (30, 30)).save(path), "size mismatch"),
}

# Fields of the image in instances.json, and the reason that it gets.
IMAGES = {
    "no height": ({"height": None}, "broken json"),
    "name": ({"file_name": "../x.jpg"}, "broken json"),
    "huge": ({"height": 10**5, "width": 10**5}, "broken image"),
}

# A segmentation that is added to the good one, and the reason that the mask gets.
MASKS = {
    "none": (None, "empty mask"),
    "empty list": ([], "empty mask"),
    "outside": ([[90, 90, 99, 90, 99, 99]], "empty mask"),
    "two corners": ([[1, 2, 3, 4]], "broken mask"),
    "no mask": ({"size": [*SIZE], "counts": "~"}, "broken mask"),
    "another size": (rle.encode(np.ones((9, 9), bool)), "size mismatch"),
}


def write_corpus(folder: Path, count: int = 300) -> tuple[dict[int, str], dict[int, str]]:
    """Writes a source for `open_coco`.

    Args:
      folder: An existing folder.
      count: Number of images, of which each kind of damage has a hundredth.

    Returns:
      The reasons of unusable images and those of images with an unusable mask, by index.
    """
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    order = iter(rng.permutation(count).tolist())
    images = [
        {"id": i, "file_name": f"снимок {i}.jpg", "height": SIZE[0], "width": SIZE[1]}
        for i in range(count)
    ]
    annotations = [{"image_id": i, "segmentation": BOX, "iscrowd": 0} for i in range(count)]
    for image in images:
        pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(SIZE[::-1])
        pixels.save(folder / "images" / image["file_name"])
    bad, partial = {}, {}
    for _ in range(count // 100):
        for damage, reason in FILES.values():
            bad[index := next(order)] = reason
            damage(folder / "images" / images[index]["file_name"])
        for fields, reason in IMAGES.values():
            bad[index := next(order)] = reason
            images[index] |= fields
        for segmentation, reason in MASKS.values():
            partial[index := next(order)] = reason
            annotations.append({"image_id": index, "segmentation": segmentation})
    content = {"images": images, "annotations": annotations, "info": {"score": float("nan")}}
    (folder / "instances.json").write_text(json.dumps(content))
    return bad, partial
