"""A fake generator whose masks are connected bright regions, and a run that kills itself.

`python -m tests.sam_jax.engine.bright PHOTOS OUT STEP` kills itself before its STEP-th call of
os.fsync or os.replace, unless STEP is 0.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from sam_jax.data.open import open_source
from sam_jax.engine.automatic import label_images
from sam_jax.engine.folder import acquire, finished_ids, write_json
from sam_jax.engine.instances import write_instances
from sam_jax.images.read import ImageError
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask, xyxy_to_xywh


def generate(image):
    """Returns records of bright regions in the format of `SamAutomaticMaskGenerator.generate`."""
    height, width = image.shape[:2]
    if min(height, width) < 8:
        raise ImageError(f"image must have sides of at least 8 pixels; got {height} x {width}")
    labels, count = ndimage.label(image[..., 0] > image[..., 0].mean())
    masks = [labels == i + 1 for i in range(count)]
    return [
        {
            "segmentation": rle.encode(mask),
            "area": int(mask.sum()),
            "bbox": xyxy_to_xywh(box_of_mask(mask)).tolist(),
            "predicted_iou": 0.9,
            "point_coords": [[x + 0.5, y + 0.5] for y, x in np.argwhere(mask)[:1].tolist()],
            "stability_score": 0.97,
            "crop_box": [0, 0, width, height],
        }
        for mask in masks
    ]


def main(photos, out, step):
    steps = itertools.count(1)

    def killed_at_step(function):
        def call(*args):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    def slowly(image):
        time.sleep(0.06)
        return generate(image)

    os.fsync, os.replace = killed_at_step(os.fsync), killed_at_step(os.replace)
    source = open_source(f"images:{photos}")
    acquire(out, {})
    print("started", flush=True)
    remaining = sorted(set(range(len(source))) - finished_ids(out))
    found = label_images(source, remaining, [slowly, slowly], out, overlays=True)
    bad = [finding.index for finding in found if finding.reason is not None]
    write_json(out / "skipped_0.json", [{"index": index} for index in bad], process=0)
    write_instances(out, sorted(finished_ids(out)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
