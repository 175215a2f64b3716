"""The data engine's fully automatic stage: masks of everything in many images, as SA-1B has them.

Source: Kirillov et al. 2023, section 4. What an image gets is a function of the image and the
settings alone; see `folder` for what that means for a run that is killed or shared.

Deliberate differences from SA-1B: an image's id is its index in the source; the ids of masks count
from 0 in every image; images are not made smaller, and faces not blurred.
"""

import concurrent.futures
import io
import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_jax.data import decode
from sam_jax.data.example import BadSample, Source
from sam_jax.data.validate import Finding
from sam_jax.engine.folder import OVERLAYS, write_file, write_json
from sam_jax.images.read import ImageError
from sam_jax.visualize.overlay import draw_masks

Generate = Callable[[np.ndarray], list[dict[str, Any]]]  # of a SamAutomaticMaskGenerator

WORKERS = 2  # images at a time on a device: the host's work on one overlaps the device's on another
ORIENTATION = 0x0112  # in EXIF; 2 to 8 are not upright
MAX_JPEG_SIDE = 65_500  # pixels, libjpeg's limit


def label_images(
    source: Source,
    indices: Iterable[int],
    generators: Sequence[Generate],
    folder: Path,
    *,
    process: int = 0,
    overlays: bool = False,
) -> Iterator[Finding]:
    """Masks images and writes `sa_INDEX.jpg` and `sa_INDEX.json` of each, in threads.

    Args:
      source: of the images.
      indices: of those to be masked; read one by one, as there may be millions.
      generators: `generate` of one `SamAutomaticMaskGenerator` a device, with coco_rle masks.
      folder: that exists, see `claim`.
      process: the number of this process, see `claim`.
      overlays: whether to draw the masks too.
    Yields:
      What became of each image, in no order. One that cannot be read, or that a generator refuses,
      has a reason, and no file.
    Raises:
      OSError: if a file cannot be written; images that are being worked on are finished.
    """
    if overlays:
        (folder / OVERLAYS).mkdir(exist_ok=True)
    idle: queue.SimpleQueue[Generate] = queue.SimpleQueue()
    for generate in [*generators] * WORKERS:
        idle.put(generate)

    def label(index: int) -> Finding:
        generate = idle.get_nowait()  # there is one for each thread
        try:
            return _label_image(source, index, generate, folder, process, overlays)
        finally:
            idle.put(generate)

    waiting = iter(indices)
    threads = len(generators) * WORKERS
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    start = lambda count: {pool.submit(label, i) for i in itertools.islice(waiting, count)}
    try:
        running = start(2 * threads)  # a thread that is done finds the next image waiting
        while running:
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            running |= start(len(done))
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _label_image(
    source: Source, index: int, generate: Generate, folder: Path, process: int, overlays: bool
) -> Finding:
    """Masks one image; its json comes last, with which it is finished."""
    name = source.name(index)
    try:
        data = source.encoded(index)
        image = source.image(index) if data is None else decode.decode_image(data, None)
        jpeg = _jpeg(data, image)
        records = _masks(generate, image)
    except BadSample as error:
        return Finding(index, name, reason=error.reason, detail=error.detail)
    stem = f"sa_{index}"
    write_file(folder / f"{stem}.jpg", [jpeg], process=process)
    if overlays:
        drawn = io.BytesIO()
        Image.fromarray(draw_masks(image, [r["segmentation"] for r in records])).save(drawn, "PNG")
        write_file(folder / OVERLAYS / f"{stem}.png", [drawn.getvalue()], process=process)
    height, width = image.shape[:2]
    content = {
        "image": {"image_id": index, "width": width, "height": height, "file_name": f"{stem}.jpg"},
        "annotations": [{"id": i, **record} for i, record in enumerate(records)],
    }
    write_json(folder / f"{stem}.json", content, process=process)
    return Finding(index, name, masks=len(records))


def _masks(generate: Generate, image: np.ndarray) -> list[dict[str, Any]]:
    try:
        records = generate(image)
    except ImageError as error:
        raise BadSample("rejected image", str(error)) from error
    return [record for record in records if record["area"]]  # no reader takes empty masks


def _jpeg(data: bytes | None, image: np.ndarray) -> bytes:
    """An image's own file if that is a JPEG, upright and in color; else a new one of its pixels."""
    if data is not None:
        with Image.open(io.BytesIO(data)) as header:
            turned = header.getexif().get(ORIENTATION) in range(2, 9)
            if (header.format, header.mode, turned) == ("JPEG", "RGB", False):
                return data
    height, width = image.shape[:2]
    if max(height, width) > MAX_JPEG_SIDE:
        detail = f"a JPEG has at most {MAX_JPEG_SIDE} pixels a side; got {height} x {width}"
        raise BadSample("rejected image", detail)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()
