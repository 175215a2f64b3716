"""The masks of the automatic stage in one file, as COCO's readers expect it.

Source: the data format at cocodataset.org. `file_name` is relative to the folder of the file, so
that `coco:FOLDER` finds the images. Boxes are COCO's, a pixel wider and higher than SA-1B's, which
end at the last pixel rather than after it; scores, points and crops are kept beside them.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from sam_jax.engine.folder import write_file

CATEGORY = {"id": 1, "name": "object"}


def write_instances(folder: Path, indices: Iterable[int], *, process: int = 0) -> None:
    """Writes `instances.json` from `sa_INDEX.json` of each index, reading one at a time.

    Raises:
      OSError: if a file cannot be read or written.
    """
    write_file(folder / "instances.json", _chunks(folder, indices), process=process)


def _chunks(folder: Path, indices: Iterable[int]) -> Iterator[bytes]:
    images, count = [], 0
    yield json.dumps({"categories": [CATEGORY]}).encode()[:-1] + b', "annotations": ['
    for index in indices:
        content = json.loads((folder / f"sa_{index}.json").read_bytes())
        images.append({"id": index} | content["image"])
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            fields = {"id": count + 1, "image_id": index, "category_id": CATEGORY["id"]}
            box = {"bbox": [x, y, width + 1, height + 1], "iscrowd": 0}
            yield (b",\n" if count else b"\n") + json.dumps(annotation | fields | box).encode()
            count += 1
    yield b'\n], "images": ' + json.dumps(images).encode() + b"}\n"
