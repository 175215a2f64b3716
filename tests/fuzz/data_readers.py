"""Mutated images, masks, JSON, tars and indices for the readers of `sam_jax.data`.

    python -m tests.fuzz.data_readers --count 2000 --seed 0

The process has a limit of memory. A reader must return, or raise one of its own errors, in time.
"""

import argparse
import functools
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

MAX_BYTES = 3 << 30  # of address space, most of which libraries reserve and do not use
MAX_SECONDS = 20  # of the processor for one file; a read takes milliseconds
SIZE = (24, 36)


class Reader(NamedTuple):
    """A reader of files that anybody may have written.

    Attributes:
      samples: Intact files.
      mutate: Changes a file at random.
      read: Reads a file; the folder is empty or holds what the last call left there.
      errors: The errors that it may raise.
    """

    samples: Sequence[bytes]
    mutate: Callable[[np.random.Generator, bytes], bytes]
    read: Callable[[bytes, Path], Any]
    errors: tuple[type[Exception], ...]


def mutate_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes, removes, repeats or inserts bytes at up to four places."""
    mutated = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        start = int(rng.integers(len(mutated) + 1))
        length = int(rng.choice([1, 1, 2, 4, 16, 200]))
        kind = rng.integers(7)
        if kind == 0:
            mutated[start : start + 1] = bytes([rng.integers(256)])
        elif kind == 1 and start < len(mutated):
            mutated[start] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del mutated[start : start + length]
        elif kind == 3:
            mutated[start:start] = mutated[start : start + length]
        elif kind == 4:
            mutated[start : start + length] = bytes([rng.choice([0, 127, 128, 255])]) * length
        elif kind == 5:
            mutated[start:start] = rng.bytes(length)
        else:
            del mutated[start:]
    return bytes(mutated)


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 24.0, 10**30, 2**31, 2**63, 1e300, float("nan"), float("inf")),
    *("", "x", "\ud800", "a\0", "../x", "/etc/passwd", "c:\\x", "0" * 300),
    *([], [[]], [0] * 50, {}, {"a": 1}, [[1, 2, 3, 4]], {"size": [1, 1], "counts": "1"}),
)


def mutate_json(rng: np.random.Generator, data: bytes) -> bytes:
    """Replaces values of a JSON file, or changes its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    rate = rng.choice([0.01, 0.05, 0.2])

    def change(value: Any) -> Any:
        if rng.random() < rate:
            return JUNK[rng.integers(len(JUNK))]
        if isinstance(value, dict):
            return {key: change(inner) for key, inner in value.items() if rng.random() > 0.01}
        return [change(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(change(json.loads(data))).encode()


def mutate_image(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes the bytes of an image. The chunks of most PNGs get correct checksums again."""
    mutated = bytearray(mutate_bytes(rng, data))
    start = 8
    while mutated[1:4] == b"PNG" and rng.random() < 0.97 and start + 12 <= len(mutated):
        end = start + 8 + int.from_bytes(mutated[start : start + 4], "big")
        checksum = zlib.crc32(mutated[start + 4 : end])
        if end + 4 <= len(mutated):
            mutated[end : end + 4] = checksum.to_bytes(4, "big")
        start = end + 4
    return bytes(mutated)


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


def mutate_tar(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes fields of headers, whose checksums are corrected, or any bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    mutated = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        blocks = [i for i in range(0, len(mutated) - 511, 512) if mutated[i + 257 : i + 262]]
        start = int(rng.choice(blocks)) if blocks else 0
        kind = rng.integers(4)
        field = mutated[start : start + 512]
        if kind == 0:
            field[124:136] = SIZE_FIELDS[rng.integers(len(SIZE_FIELDS))]
        elif kind == 1:
            field[156] = MEMBER_TYPES[rng.integers(len(MEMBER_TYPES))]
        elif kind == 2:
            field[int(rng.integers(500))] = int(rng.integers(256))
        else:
            field[:100] = b"../../sa_1.json".ljust(100, b"\0")
        field[148:156] = b" " * 8
        field[148:156] = b"%06o\0 " % sum(field)
        mutated[start : start + 512] = field
    return bytes(mutated)


def read_all(source: Any) -> None:
    """Reads all examples of a source."""
    for index in range(len(source)):
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


def tar_index() -> bytes:
    """Returns the index that is left next to a tar."""
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder))
        open_sa1b(f"{folder}/a.tar")
        return (Path(folder) / "a.tar.index.npz").read_bytes()


def write_tar(folder: Path) -> None:
    """Writes a tar, always with the same modification time, which is part of its index."""
    (folder / "a.tar").write_bytes(tars()[0])
    os.utime(folder / "a.tar", (1e9, 1e9))


def read_tar_index(data: bytes, folder: Path) -> None:
    """Reads a tar by an index."""
    write_tar(folder)
    (folder / "a.tar.index.npz").write_bytes(data)
    read_all(open_sa1b(str(folder / "a.tar")))


def readers() -> dict[str, Reader]:
    """Returns all readers by name."""
    bad = (BadSample,)
    opening = (SourceError,)
    index = json.dumps([{"id": "1", "image": "i.png", "label": "l.png"}]).encode()
    strings = [json.dumps(mask).encode() for mask in boxes(5)]
    return {
        "image": Reader(
            images(), mutate_image, lambda data, _: read_image(data), (OSError, ValueError)
        ),
        "image for training": Reader(
            images(), mutate_image, lambda data, _: decode_image(data, None, (9, 9)), bad
        ),
        "mask": Reader(masks(), mutate_image, lambda data, _: decode_mask(data, "m"), bad),
        "labels": Reader(
            masks()[:-1],
            mutate_image,
            lambda data, _: labels_to_rles(decode_labels(data, "l"), "l"),
            bad,
        ),
        "run lengths": Reader(
            strings, mutate_json, lambda data, _: rle.decode(json.loads(data)), (ValueError,)
        ),
        "SA-1B json": Reader([sa1b_json()], mutate_json, read_sa1b_json, opening),
        "COCO json": Reader([coco_json()], mutate_json, read_coco_json, opening),
        "label index": Reader([index], mutate_json, read_label_index, opening),
        "tar": Reader(tars(), mutate_tar, read_tar, opening),
        "index of a tar": Reader([tar_index()], mutate_bytes, read_tar_index, opening),
    }


def fuzz(reader: Reader, count: int, seed: int, folder: Path) -> Iterator[str]:
    """Reads mutated files.

    Args:
      reader: The reader.
      count: The number of files.
      seed: The seed of the mutations.
      folder: An empty folder.

    Yields:
      A description of each failure.
    """
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        data = reader.mutate(rng, reader.samples[i % len(reader.samples)])
        start = time.process_time()
        try:
            reader.read(data, folder)
        except reader.errors:
            pass
        except Exception as error:
            yield f"seed {seed}, file {i}: {type(error).__name__}: {error}"
        if time.process_time() - start > MAX_SECONDS:
            yield f"seed {seed}, file {i}: took {time.process_time() - start:.0f} s"


def main() -> int:
    """Reads mutated files with all readers and returns the exit code."""
    parser = argparse.ArgumentParser(description="Reads mutated files with every reader.")
    parser.add_argument("--count", type=int, default=1000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    warnings.simplefilter("ignore")  # those of Pillow about damaged metadata
    num_failures = 0
    for name, reader in readers().items():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for failure in fuzz(reader, args.count, args.seed, Path(folder)):
                num_failures += 1
                print(f"{name}: {failure}")
        print(f"{name}: {args.count} files, {time.monotonic() - start:.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{num_failures} failures, peak memory {peak} MB")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
