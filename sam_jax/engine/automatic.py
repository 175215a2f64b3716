"""The fully automatic stage of the data engine: images in, masks in the format of SA-1B out.

Source: Kirillov et al. 2023, section 4. The result for an image is a function of the image and the
settings alone; `sam_jax.engine.folder` says how a run is interrupted and shared.

Differences: The id of an image is its index in the source, and the ids of masks count from 0 in
every image. Images are not downsampled, and faces are not blurred.
"""

import concurrent.futures
import io
import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam_jax.data import decode
from sam_jax.data.example import BadSample, Source
from sam_jax.data.validate import Finding
from sam_jax.engine.folder import OVERLAYS_NAME, write_file, write_json
from sam_jax.images.read import ImageError
from sam_jax.visualize.overlay import draw_masks

# `generate` of a `SamAutomaticMaskGenerator`.
Generate = Callable[[UInt8[np.ndarray, "h w 3"]], list[dict[str, Any]]]

# Images in flight on a device: the host works on one while the device works on the other.
IMAGES_PER_DEVICE = 2
EXIF_ORIENTATION = 0x0112  # 1 is upright, 2 to 8 are rotated or mirrored
MAX_JPEG_SIDE = 65_500  # pixels, the limit of libjpeg


def label_images(
    source: Source,
    indices: Iterable[int],
    generators: Sequence[Generate],
    folder: Path,
    *,
    process: int = 0,
    overlays: bool = False,
) -> Iterator[Finding]:
    """Segments images in threads and writes `sa_INDEX.jpg` and `sa_INDEX.json` for each of them.

    Args:
      source: The images.
      indices: The images to segment. They are consumed lazily, as there may be millions.
      generators: `SamAutomaticMaskGenerator.generate` with output mode "coco_rle", one a device.
      folder: An existing folder; see `acquire`.
      process: The number of this process; see `acquire`.
      overlays: Also writes each image beside a picture of its masks.

    Yields:
      The result for each image, in the order in which they finish. An image that cannot be read,
      or that the generator refuses, has a reason and no file.

    Raises:
      OSError: If a file cannot be written. Images in flight are finished first.
    """
    if overlays:
        (folder / OVERLAYS_NAME).mkdir(exist_ok=True)
    num_threads = len(generators) * IMAGES_PER_DEVICE
    idle: queue.SimpleQueue[Generate] = queue.SimpleQueue()
    for generate in [*generators] * IMAGES_PER_DEVICE:
        idle.put(generate)

    def label(index: int) -> Finding:
        generate = idle.get_nowait()  # never empty: there is one for each thread
        try:
            return _label_image(source, index, generate, folder, process, overlays)
        finally:
            idle.put(generate)

    remaining = iter(indices)
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)

    def submit(count: int) -> set[concurrent.futures.Future[Finding]]:
        return {pool.submit(label, index) for index in itertools.islice(remaining, count)}

    try:
        running = submit(2 * num_threads)  # a thread that finishes finds the next image queued
        while running:
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            running |= submit(len(done))
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _label_image(
    source: Source, index: int, generate: Generate, folder: Path, process: int, overlays: bool
) -> Finding:
    name = source.name(index)
    try:
        encoded = source.encoded(index)
        image = source.image(index) if encoded is None else decode.decode_image(encoded, None)
        jpeg = _to_jpeg(encoded, image)
        records = _generate_masks(generate, image)
    except BadSample as error:
        return Finding(index, name, reason=error.reason, detail=error.detail)
    write_file(folder / f"sa_{index}.jpg", [jpeg], process=process)
    if overlays:
        overlay = _draw_overlay(image, records)
        write_file(folder / OVERLAYS_NAME / f"sa_{index}.png", [overlay], process=process)
    # Last, since an image with a JSON file counts as finished.
    write_json(folder / f"sa_{index}.json", _sa1b_record(index, image, records), process=process)
    return Finding(index, name, masks=len(records))


def _generate_masks(generate: Generate, image: UInt8[np.ndarray, "h w 3"]) -> list[dict[str, Any]]:
    """Returns the records of the masks that have pixels; readers of SA-1B refuse empty ones."""
    try:
        records = generate(image)
    except ImageError as error:
        raise BadSample("rejected image", str(error)) from error
    return [record for record in records if record["area"]]  # no reader takes empty masks


def _sa1b_record(
    index: int, image: UInt8[np.ndarray, "h w 3"], records: list[dict[str, Any]]
) -> dict[str, Any]:
    height, width = image.shape[:2]
    return {
        "image": {
            "image_id": index,
            "width": width,
            "height": height,
            "file_name": f"sa_{index}.jpg",
        },
        "annotations": [{"id": i, **record} for i, record in enumerate(records)],
    }


def _draw_overlay(image: UInt8[np.ndarray, "h w 3"], records: list[dict[str, Any]]) -> bytes:
    """Returns a PNG file of the image and, to the right of it, its masks."""
    masks = draw_masks(image, [record["segmentation"] for record in records])
    png = io.BytesIO()
    Image.fromarray(np.hstack([image, masks])).save(png, "PNG")
    return png.getvalue()


def _to_jpeg(encoded: bytes | None, image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Returns the file of an image if it is an upright RGB JPEG, otherwise a new JPEG."""
    if encoded is not None:
        with Image.open(io.BytesIO(encoded)) as header:
            is_upright = header.getexif().get(EXIF_ORIENTATION) not in range(2, 9)
            if header.format == "JPEG" and header.mode == "RGB" and is_upright:
                return encoded
    height, width = image.shape[:2]
    if max(height, width) > MAX_JPEG_SIDE:
        raise BadSample(
            "rejected image",
            f"a JPEG has at most {MAX_JPEG_SIDE} pixels a side; got {height} x {width}",
        )
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()
