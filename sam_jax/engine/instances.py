"""The masks of the automatic stage in one file, as readers of COCO expect it.

Source: The data format at cocodataset.org. `file_name` is relative to the folder of the file, so
that `coco:FOLDER` finds the images. Boxes follow COCO: they end after the last pixel, so they are a
pixel wider and higher than those of SA-1B, which end at it.

Differences: Scores, points and crops are kept as additional keys.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from sam_jax.engine.folder import read_json, write_file

CATEGORY = {"id": 1, "name": "object"}


def write_instances(folder: Path, indices: Iterable[int], *, process: int = 0) -> None:
    """Writes `instances.json` from the files `sa_INDEX.json`, reading one at a time.

    Args:
      folder: The folder of the automatic stage.
      indices: The ids of the images, all of them finished.
      process: The number of this process.

    Raises:
      OSError: If a file cannot be read or written.
      ValueError: If a file is damaged. The message names it.
    """
    write_file(folder / "instances.json", _json_chunks(folder, indices), process=process)


def _json_chunks(folder: Path, indices: Iterable[int]) -> Iterator[bytes]:
    """Yields the file piece by piece, so that memory does not grow with the number of masks."""
    images, count = [], 0
    yield json.dumps({"categories": [CATEGORY]}).encode()[:-1] + b', "annotations": ['
    for index in indices:
        content = read_json(folder / f"sa_{index}.json")
        images.append({"id": index} | content["image"])
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            record = annotation | {
                "id": count + 1,
                "image_id": index,
                "category_id": CATEGORY["id"],
                "bbox": [x, y, width + 1, height + 1],
                "iscrowd": 0,
            }
            yield (b",\n" if count else b"\n") + json.dumps(record).encode()
            count += 1
    yield b'\n], "images": ' + json.dumps(images).encode() + b"}\n"
