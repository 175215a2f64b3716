"""Prediction from an image file into a folder: an overlay, the masks, and a JSON of them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sam_jax.images.read import read_image
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask, xyxy_to_xywh
from sam_jax.visualize.overlay import draw_overlay


def predict_file(predictor, image_path, folder, *, points=(), labels=(), box=None, num_masks=None):
    """Masks one object of an image file.

    Args:
      predictor: `SamPredictor`.
      image_path: of a JPEG, PNG or WebP file.
      folder: where overlay.png (of the best mask), mask_0.png, ... and masks.json are written;
        the JSON, with COCO run lengths, boxes XYWH and scores, comes last.
      points: 'k 2' (x, y) in pixels of the image; labels: 'k', 1 foreground and 0 background.
      box: (x0, y0, x1, y1) in pixels of the image, or None.
      num_masks: 3 or 1; by default 3 for a single click or box, which may mean several things.
    Returns:
      What masks.json holds.
    """
    image = read_image(image_path)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(
        np.array(points) if len(points) else None,
        np.array(labels) if len(points) else None,
        None if box is None else np.array(box),
        multimask_output=(num_masks or (3 if len(points) + (box is not None) == 1 else 1)) == 3,
    )
    order = np.argsort(-scores)
    records = [
        {
            "file": f"mask_{i}.png",
            "predicted_iou": round(float(scores[j]), 4),
            "area": int(masks[j].sum()),
            "bbox": xyxy_to_xywh(box_of_mask(masks[j])).tolist(),
            "segmentation": rle.encode(masks[j]),
        }
        for i, j in enumerate(order)
    ]
    result = {
        "image": str(image_path),
        "height": image.shape[0],
        "width": image.shape[1],
        "points": [list(map(float, point)) for point in points],
        "labels": list(map(int, labels)),
        "box": None if box is None else list(map(float, box)),
        "masks": records,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    overlay = draw_overlay(image, masks[order[0]], points, labels, box)
    Image.fromarray(overlay).save(folder / "overlay.png")
    for record, j in zip(records, order, strict=True):
        Image.fromarray(masks[j]).save(folder / record["file"])
    (folder / "masks.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
