"""Draws the first picture of the README: what `sam_photo` makes of free photographs.

    python docs/draw_hero.py docs/hero.jpg

The points and boxes were chosen by hand. Each mask is the one with the highest predicted IoU.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sam_jax
from sam_jax.images.read import read_image
from sam_jax.visualize.overlay import draw_masks, draw_overlay

PHOTOS = Path(__file__).parent / "photos"

# (x, y) of points and (x0, y0, x1, y1) of boxes, in pixels of the photographs.
PROMPTS = {
    "dogs": ([(270, 130), (378, 345)], [(188, 33, 350, 226), (312, 271, 460, 474)]),
    "fig": ([(347, 269), (122, 137)], [(220, 169, 428, 357)]),
    "coffee": ([(198, 94), (398, 339)], [(165, 20, 455, 262)]),
    "brushes": ([(296, 224), (520, 204)], [(232, 130, 360, 380)]),
    "dandelion": ([(159, 145)], [(540, 320, 640, 415), (35, 45, 305, 300)]),
}
GAP, WIDTH, TITLE_HEIGHT = 8, 360, 40  # pixels


def main(path: str) -> None:
    """Draws the picture and writes it to a file."""
    model, variables = sam_jax.load("sam_photo")
    predictor = sam_jax.SamPredictor(model, variables)
    generator = sam_jax.SamAutomaticMaskGenerator(
        model,
        variables,
        points_per_side=24,
        pred_iou_thresh=0.5,
        stability_score_thresh=0.6,
        box_nms_thresh=0.5,
        tiles=None,
    )
    rows: dict[str, list[np.ndarray]] = {"One click": [], "A box": [], "Everything": []}
    for name, (points, boxes) in PROMPTS.items():
        photo = read_image(PHOTOS / f"{name}.jpg")
        predictor.set_image(photo)
        clicked = boxed = photo
        for point in points:
            masks, scores, _ = predictor.predict(np.array([point]), np.array([1]))
            clicked = draw_overlay(clicked, masks[np.argmax(scores)], [point], [1])
        for box in boxes:
            masks, scores, _ = predictor.predict(box=np.array(box))
            boxed = draw_overlay(boxed, masks[np.argmax(scores)], box=box)
        records = generator.generate(photo)
        rows["One click"].append(clicked)
        rows["A box"].append(boxed)
        rows["Everything"].append(draw_masks(photo, [r["segmentation"] for r in records]))
    arrange(rows).save(path, quality=80, optimize=True)


def arrange(rows: dict[str, list[np.ndarray]]) -> Image.Image:
    """Arranges pictures in titled rows."""
    columns = len(next(iter(rows.values())))
    height = WIDTH * 3 // 4
    size = (columns * (WIDTH + GAP) - GAP, len(rows) * (height + TITLE_HEIGHT))
    canvas = Image.new("RGB", size, "white")
    font = ImageFont.load_default(size=26)
    for i, (title, pictures) in enumerate(rows.items()):
        top = i * (height + TITLE_HEIGHT)
        ImageDraw.Draw(canvas).text((0, top + 6), title, fill="black", font=font)
        for j, picture in enumerate(pictures):
            small = Image.fromarray(picture).resize((WIDTH, height), Image.Resampling.LANCZOS)
            canvas.paste(small, (j * (WIDTH + GAP), top + TITLE_HEIGHT))
    return canvas


if __name__ == "__main__":
    main(sys.argv[1])
