"""Draws docs/photos.jpg: photographs, segmented by a click, by a box, and entirely.

    pip install scikit-image
    python docs/photos.py --weights sam_photo --out docs/photos.jpg

The photographs come with scikit-image and may be used freely: a cat (`chelsea`, CC0), a cup
(`coffee`, CC0) and an astronaut (`astronaut`, NASA, public domain). The prompts are fixed, and the
mask of the highest predicted IoU is drawn.
"""

import argparse
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from skimage import data

import sam_jax
from sam_jax.visualize.overlay import draw_masks, draw_overlay

HEIGHT, GAP = 300, 8  # pixels of the figure


class Photo(NamedTuple):
    """A photograph and its prompts, in pixels.

    Attributes:
      image: The photograph.
      point: (x, y) of the click.
      box: (x0, y0, x1, y1).
    """

    image: UInt8[np.ndarray, "h w 3"]
    point: tuple[float, float]
    box: tuple[float, float, float, float]


PHOTOS = (
    Photo(data.chelsea(), (250, 220), (5, 3, 400, 299)),
    Photo(data.coffee(), (330, 330), (172, 17, 408, 310)),
    Photo(data.astronaut(), (225, 120), (40, 5, 430, 511)),
)


def main() -> None:
    """Draws the figure: a row per photograph."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="sam_photo", help="as for sam-jax predict")
    parser.add_argument("--out", default="docs/photos.jpg", help="the figure's file")
    args = parser.parse_args()
    model, variables = sam_jax.load(args.weights)
    predictor = sam_jax.SamPredictor(model, variables)
    generator = sam_jax.SamAutomaticMaskGenerator(model, variables)
    rows = [draw_row(photo, predictor, generator) for photo in PHOTOS]
    width = max(row.shape[1] for row in rows)
    figure = np.concatenate([pad(row, (HEIGHT + GAP, width)) for row in rows])
    Image.fromarray(figure).save(args.out, quality=88)


def draw_row(
    photo: Photo,
    predictor: sam_jax.SamPredictor,
    generator: sam_jax.SamAutomaticMaskGenerator,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws a photograph three times, with the masks of its click, of its box, and all masks."""
    image, point, box = photo
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(np.array([point]), np.array([1]))
    clicked = draw_overlay(image, masks[np.argmax(scores)], [point], [1])
    masks, scores, _ = predictor.predict(box=np.array(box))
    boxed = draw_overlay(image, masks[np.argmax(scores)], box=box)
    everything = draw_masks(image, [record["segmentation"] for record in generator.generate(image)])
    parts = [resize(part) for part in (clicked, boxed, everything)]
    return np.concatenate([pad(part, (HEIGHT, part.shape[1] + GAP)) for part in parts], axis=1)


def resize(image: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes an image to HEIGHT pixels."""
    width = round(HEIGHT * image.shape[1] / image.shape[0])
    return np.asarray(Image.fromarray(image).resize((width, HEIGHT), Image.Resampling.LANCZOS))


def pad(image: UInt8[np.ndarray, "_ _ 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Pads an image with white at the bottom and on the right."""
    margins = [(0, size[axis] - image.shape[axis]) for axis in (0, 1)]
    return np.pad(image, [*margins, (0, 0)], constant_values=255)


if __name__ == "__main__":
    main()
