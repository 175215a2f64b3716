"""The readers of images, masks and sources of examples, for `tests.fuzz`."""

import functools
import io
import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_jax.data.decode import decode_image
from sam_jax.data.decode_masks import decode_labels, decode_mask
from sam_jax.data.example import BadSample, SourceError
from sam_jax.data.sources.coco import open_coco
from sam_jax.data.sources.label_images import labels_to_rles, open_labels
from sam_jax.data.sources.sa1b import open_sa1b
from sam_jax.images.read import read_image
from sam_jax.masks import rle
from tests.fuzz.harness import Target
from tests.fuzz.mutators import mutate_bytes, mutate_json

SIZE = (24, 36)


def mutate_png(data: bytes, rng: random.Random) -> bytes:
    """Returns a PNG with changed bytes. Most of its chunks have correct checksums again."""
    mutant = bytearray(mutate_bytes(data, rng))
    start = 8
    while rng.random() < 0.97 and start + 12 <= len(mutant):
        end = start + 8 + int.from_bytes(mutant[start : start + 4], "big")
        checksum = zlib.crc32(mutant[start + 4 : end])
        if end + 4 <= len(mutant):
            mutant[end : end + 4] = checksum.to_bytes(4, "big")
        start = end + 4
    return bytes(mutant)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Returns the file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def images() -> list[bytes]:
    """Returns images of all formats and modes."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8))
    smooth = color.resize((200, 150))
    alpha = Image.fromarray(rng.integers(0, 256, (*SIZE, 4), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, SIZE, np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    modes = [color.convert(mode) for mode in ("L", "1", "P")]
    return [
        *(encode(image, "PNG") for image in (color, alpha, deep, smooth, *modes)),
        *(encode(alpha.quantize(9), "PNG"), encode(color, "PNG", exif=exif)),
        *(encode(image, "JPEG", exif=exif) for image in (smooth, color.convert("CMYK"))),
        *(encode(smooth, "JPEG", progressive=True), encode(modes[0], "JPEG")),
        *(encode(alpha, "WEBP", lossless=True), encode(smooth, "WEBP", exif=exif)),
    ]


@functools.cache
def masks() -> tuple[bytes, ...]:
    """Returns PNGs of masks. All but the last one are label maps, too."""
    labels = np.random.default_rng(0).integers(0, 5, SIZE).astype(np.uint8)
    colored = np.zeros((*SIZE, 4), np.uint8)
    colored[..., 3] = 60 * labels
    files = [Image.fromarray(x) for x in (labels, labels > 1, labels.astype(np.uint16) * 900)]
    files += [Image.fromarray(colored).quantize(4), Image.fromarray(colored)]
    return tuple(encode(image, "PNG") for image in files)


def boxes(count: int) -> list[dict[str, Any]]:
    """Returns run lengths of boxes."""
    found = []
    for i in range(count):
        mask = np.zeros(SIZE, bool)
        mask[2 * i : 9 + i, i : 3 * i + 5] = True
        found.append(rle.encode(mask))
    return found


def sa1b_json() -> bytes:
    """Returns a JSON file of SA-1B."""
    annotations = [{"segmentation": mask, "area": 5, "id": i} for i, mask in enumerate(boxes(4))]
    annotations[1]["segmentation"] = rle.uncompress(annotations[1]["segmentation"])
    image = {"height": SIZE[0], "width": SIZE[1], "file_name": "sa_1.jpg"}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def coco_json() -> bytes:
    """Returns COCO's instances.json."""
    polygons = [[2, 3, 12, 3, 12, 9, 2, 9.5]], [[1, 1, 9, 1, 5, 8], [20, 2, 30, 3, 25, 9]]
    segmentations = [*polygons, *boxes(2)]
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in range(2)
    ]
    annotations = [
        {"id": i, "image_id": i % 2, "segmentation": value, "iscrowd": 0, "bbox": [1, 2, 3, 4]}
        for i, value in enumerate(segmentations)
    ]
    return json.dumps({"images": images, "annotations": annotations}).encode()


JPEG = encode(Image.new("RGB", SIZE[::-1], (9, 80, 200)), "JPEG")


@functools.cache
def tars() -> tuple[bytes, ...]:
    """Returns tars of SA-1B in all formats."""
    found = []
    for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
            for i in range(3):
                for suffix, data in (("jpg", JPEG), ("json", sa1b_json())):
                    folder = "" if format_ == tarfile.USTAR_FORMAT else "long/" * 30
                    member = tarfile.TarInfo(f"{folder}sa_{i}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        found.append(file.getvalue())
    return tuple(found)


SIZE_FIELDS = (
    *(b"77777777777\0", b"00000000001\0", b"-0000000001\0"),
    *(b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12),
)
MEMBER_TYPES = b"0123456789xgLKSMVDN\0"


def mutate_tar(data: bytes, rng: random.Random) -> bytes:
    """Returns a tar with changed headers, whose checksums fit, or with changed bytes."""
    if rng.randrange(3) == 0:
        return mutate_bytes(data, rng)
    mutant = bytearray(data)
    headers = [i for i in range(0, len(mutant), 512) if mutant[i + 257 : i + 262] == b"ustar"]
    for start in rng.choices(headers, k=rng.randint(1, 3)):
        header = mutant[start : start + 512]
        match rng.randrange(4):
            case 0:
                header[124:136] = rng.choice(SIZE_FIELDS)
            case 1:
                header[156] = rng.choice(MEMBER_TYPES)
            case 2:
                header[rng.randrange(500)] = rng.randrange(256)
            case _:
                header[:100] = b"../../sa_1.json".ljust(100, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        mutant[start : start + 512] = header
    return bytes(mutant)


def read_all(source: Any) -> None:
    """Reads the examples of a source, up to 50."""
    for index in range(min(50, len(source))):
        source.name(index)
        try:
            example = source[index]
        except BadSample:
            continue
        assert example.masks or example.skipped
        for mask in example.masks:
            rle.decode(mask)


def read_sa1b_json(data: bytes, folder: Path) -> None:
    """Reads the JSON file of an image."""
    (folder / "sa_1.json").write_bytes(data)
    (folder / "sa_1.jpg").write_bytes(JPEG)
    read_all(open_sa1b(str(folder)))


def read_coco_json(data: bytes, folder: Path) -> None:
    """Reads images with annotations."""
    (folder / "instances.json").write_bytes(data)
    for i in range(2):
        (folder / f"{i}.jpg").write_bytes(JPEG)
    read_all(open_coco(str(folder)))


def read_label_index(data: bytes, folder: Path) -> None:
    """Reads label maps."""
    (folder / "index.json").write_bytes(data)
    (folder / "i.png").write_bytes(JPEG)
    (folder / "l.png").write_bytes(masks()[0])
    read_all(open_labels(str(folder)))


def read_tar(data: bytes, folder: Path) -> None:
    """Reads a tar, whose index is made anew."""
    (folder / "a.tar.index.npz").unlink(missing_ok=True)
    (folder / "a.tar").write_bytes(data)
    read_all(open_sa1b(str(folder / "a.tar")))
    assert {path.name for path in folder.iterdir()} <= {"a.tar", "a.tar.index.npz"}


def tar_index(folder: Path) -> bytes:
    """Returns the index that is left next to a tar."""
    write_tar(folder)
    open_sa1b(str(folder / "a.tar"))
    return (folder / "a.tar.index.npz").read_bytes()


def write_tar(folder: Path) -> None:
    """Writes a tar, always with the same modification time, which is part of its index."""
    (folder / "a.tar").write_bytes(tars()[0])
    os.utime(folder / "a.tar", (1e9, 1e9))


def read_tar_index(data: bytes, folder: Path) -> None:
    """Reads a tar by an index."""
    write_tar(folder)
    (folder / "a.tar.index.npz").write_bytes(data)
    read_all(open_sa1b(str(folder / "a.tar")))


READERS: dict[str, Callable[[bytes, Path], object]] = {
    "image": lambda data, _: read_image(data),
    "small image": lambda data, _: decode_image(data, None, (9, 9)),
    "mask": lambda data, _: decode_mask(data, "m"),
    "labels": lambda data, _: labels_to_rles(decode_labels(data, "l"), "l"),
}


def targets(folder: Path) -> list[Target]:
    """Returns the readers with their files.

    Args:
      folder: A folder to write in.
    """

    def target(
        name: str,
        seed: bytes,
        read: Callable[[bytes, Path], object],
        mutate: Callable[[bytes, random.Random], bytes],
        errors: tuple[type[Exception], ...],
    ) -> Target:
        own = folder / name.replace(" ", "_")
        own.mkdir()
        return Target(name, seed, lambda data: read(data, own), errors, mutate)

    found = []
    files = {"image": images(), "small image": images(), "mask": masks(), "labels": masks()[:-1]}
    for kind, contents in files.items():
        errors = (OSError, ValueError) if kind == "image" else (BadSample,)
        for i, content in enumerate(contents):
            mutate = mutate_png if content[1:4] == b"PNG" else mutate_bytes
            found.append(target(f"{kind} {i}", content, READERS[kind], mutate, errors))
    index = json.dumps([{"id": "1", "image": "i.png", "label": "l.png"}]).encode()
    for name, content, read in (
        ("sa1b json", sa1b_json(), read_sa1b_json),
        ("coco json", coco_json(), read_coco_json),
        ("label index", index, read_label_index),
    ):
        found.append(target(name, content, read, mutate_json, (SourceError,)))
    for i, content in enumerate(tars()):
        found.append(target(f"tar {i}", content, read_tar, mutate_tar, (SourceError,)))
    content = tar_index(folder)
    found.append(target("tar index", content, read_tar_index, mutate_bytes, (SourceError,)))
    return found
