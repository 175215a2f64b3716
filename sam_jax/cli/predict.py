"""`sam-jax predict`: masks of one object of an image, from points and a box."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sam_jax.cli.help_texts import WEIGHTS_HELP
from sam_jax.images.read import read_image
from sam_jax.images.resize import MAX_ZOOM
from sam_jax.io.atomic import atomic_path, write_json
from sam_jax.io.compilation_cache import use_compilation_cache
from sam_jax.io.output import check_folder
from sam_jax.masks import rle
from sam_jax.masks.boxes import box_of_mask, xyxy_to_xywh
from sam_jax.predict.predictor import SamPredictor
from sam_jax.predict.tiles import Tile
from sam_jax.predict.tiles_option import DEFAULT_TILES_HELP, parse_tiles, resolve_tiles
from sam_jax.visualize.overlay import draw_overlay
from sam_jax.weights.formats import load

CLOSEUP_SIDE = 512  # pixels


class Prompt(NamedTuple):
    """The prompt for one object, in pixels of the image.

    Attributes:
      points: (x, y) of each point.
      labels: The label of each point: 1 foreground, 0 background.
      box: (x0, y0, x1, y1), or None.
    """

    points: list[tuple[float, float]]
    labels: list[int]
    box: list[float] | None

    @property
    def is_single(self) -> bool:
        """True for a single point or box, which may be ambiguous."""
        return len(self.points) + (self.box is not None) == 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.description = (
        "Segments one object of an image, prompted by points and a box. Writes DIR/overlay.png "
        "with the best mask, DIR/mask_0.png and so on, best first, and DIR/masks.json with run "
        "lengths, boxes and scores. If the object was seen in a tile, DIR/closeup.png shows the "
        "best mask in that tile."
    )
    parser.epilog = (
        "example: sam-jax predict photo.jpg --weights sam_vit_b --point 500,375 --out masks/"
    )
    parser.add_argument(
        "image", type=os.path.expanduser, metavar="IMAGE", help="a JPEG, PNG or WebP file"
    )
    parser.add_argument("--weights", type=os.path.expanduser, required=True, help=WEIGHTS_HELP)
    parser.add_argument(
        "--point",
        action="append",
        default=[],
        type=parse_point,
        metavar="X,Y[,LABEL]",
        help="a point in pixels; its label is 1 on the object (default) or 0 on the background; "
        "repeat for more",
    )
    parser.add_argument(
        "--box", type=parse_box, metavar="X0,Y0,X1,Y1", help="a box around the object, in pixels"
    )
    parser.add_argument(
        "--masks",
        type=int,
        choices=(1, 3),
        help="the number of masks; default: 3 for a single point or box, which may be ambiguous, "
        "otherwise 1",
    )
    parser.add_argument(
        "--tiles",
        type=parse_tiles,
        metavar="SIZE|auto|none",
        help="see the object in a tile of the image, enlarged: tiles of SIZE pixels per side, auto "
        f"for many sizes, or none to see the entire image; {DEFAULT_TILES_HELP}",
    )
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        required=True,
        metavar="DIR",
        help="the folder of the results",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    prompt = Prompt(
        points=[(x, y) for x, y, _ in args.point],
        labels=[label for _, _, label in args.point],
        box=args.box,
    )
    if not prompt.points and prompt.box is None:
        raise ValueError("there is no prompt: give --point X,Y, --box X0,Y0,X1,Y1 or both")
    if prompt.box and not (prompt.box[0] < prompt.box[2] and prompt.box[1] < prompt.box[3]):
        raise ValueError(f"--box must have X0 < X1 and Y0 < Y1; got {prompt.box}")
    folder = check_folder(args.out, "--out")
    num_masks = args.masks or (3 if prompt.is_single else 1)
    use_compilation_cache()
    predictor = SamPredictor(*load(args.weights))
    image = read_image(args.image)
    predictor.set_image(image, tiles=args.tiles)
    masks, scores = predict_masks(predictor, prompt, num_masks)
    for text in outside_of_image(prompt, image.shape[:2]):
        print(f"warning: {text}", file=sys.stderr)
    records = make_records(masks, scores)
    write_pictures(folder, image, prompt, masks, records)
    # Last: the folder is complete if it has a masks.json.
    description = describe(args.image, image, prompt)
    if resolve_tiles(predictor.model, args.tiles) is not None:
        (tile,) = predictor.tiles_used
        description["tile"] = tile._asdict()
        if tile.size != image.shape[:2]:
            _write_png(folder / "closeup.png", draw_closeup(image, masks[0], prompt, tile))
    write_json(folder / "masks.json", description | {"masks": records})
    for record in records:
        print(
            f"{record['file']}  predicted IoU {record['predicted_iou']:.3f}  "
            f"{record['area']} pixels"
        )
    print(f"overlay.png, masks and masks.json are in {args.out}")


def outside_of_image(prompt: Prompt, size: tuple[int, int]) -> list[str]:
    """Describes the points of a prompt, and the box, that lie outside of an image.

    The model accepts them, but they are more likely mistakes, for instance in the order of x and y.

    Args:
      prompt: The prompt.
      size: (height, width) of the image in pixels.
    """
    height, width = size
    where = f"lies outside of the image, which is {width} pixels wide and {height} pixels high"
    texts = [
        f"--point {x:g},{y:g} {where}"
        for x, y in prompt.points
        if not (0 <= x <= width and 0 <= y <= height)
    ]
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        if right < 0 or bottom < 0 or left > width or top > height:
            texts.append(f"--box {','.join(f'{x:g}' for x in prompt.box)} {where}")
    return texts


def predict_masks(
    predictor: SamPredictor, prompt: Prompt, num_masks: int
) -> tuple[Bool[np.ndarray, "m h w"], Float[np.ndarray, " m"]]:
    """Predicts masks of one object.

    Args:
      predictor: The model, with the image set.
      prompt: The prompt.
      num_masks: 3 or 1.

    Returns:
      The masks and their predicted IoUs, best first.
    """
    masks, scores, _ = predictor.predict(
        np.array(prompt.points) if prompt.points else None,
        np.array(prompt.labels) if prompt.points else None,
        None if prompt.box is None else np.array(prompt.box),
        multimask_output=num_masks == 3,
    )
    order = np.argsort(-scores)
    return masks[order], scores[order]


def make_records(
    masks: Bool[np.ndarray, "m h w"], scores: Float[np.ndarray, " m"]
) -> list[dict[str, Any]]:
    """Describes each mask for masks.json: boxes are XYWH, run lengths those of COCO."""
    return [
        {
            "file": f"mask_{i}.png",
            "predicted_iou": round(float(score), 4),
            "area": int(mask.sum()),
            "bbox": xyxy_to_xywh(box_of_mask(mask)).tolist(),
            "segmentation": rle.encode(mask),
        }
        for i, (mask, score) in enumerate(zip(masks, scores, strict=True))
    ]


def describe(path: str, image: UInt8[np.ndarray, "h w 3"], prompt: Prompt) -> dict[str, Any]:
    """Describes the image and the prompt for masks.json."""
    return {
        "image": path,
        "height": image.shape[0],
        "width": image.shape[1],
        "points": prompt.points,
        "labels": prompt.labels,
        "box": prompt.box,
    }


def write_pictures(
    folder: Path,
    image: UInt8[np.ndarray, "h w 3"],
    prompt: Prompt,
    masks: Bool[np.ndarray, "m h w"],
    records: list[dict[str, Any]],
) -> None:
    """Writes the overlay of the best mask, and every mask.

    Args:
      folder: Created if it is missing.
      image: The image.
      prompt: The prompt, which is drawn too.
      masks: The masks, best first.
      records: The records of the masks, with the names of their files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overlay = draw_overlay(image, masks[0], *prompt)
    _write_png(folder / "overlay.png", overlay)
    for mask, record in zip(masks, records, strict=True):
        _write_png(folder / record["file"], mask)


def draw_closeup(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], prompt: Prompt, tile: Tile
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draws a mask and its prompt over a tile of the image, which is enlarged if it is small.

    Args:
      image: The image.
      mask: The mask.
      prompt: The prompt, in pixels of the image.
      tile: The tile.

    Returns:
      RGB pixels. The longer side is at least CLOSEUP_SIDE if that needs no factor above MAX_ZOOM.
    """
    zoom = min(math.ceil(CLOSEUP_SIDE / max(tile.size)), int(MAX_ZOOM))
    size = (zoom * tile.width, zoom * tile.height)
    pixels = Image.fromarray(image[tile.region]).resize(size, Image.Resampling.BICUBIC)
    enlarged = mask[tile.region].repeat(zoom, axis=0).repeat(zoom, axis=1)

    def move(coords: object) -> Float[np.ndarray, "n 2"]:  # centers of pixels are integers
        offset = np.array(tile.corner) - 0.5
        return zoom * (np.reshape(np.array(coords, float), (-1, 2)) - offset) - 0.5

    box = None if prompt.box is None else move(prompt.box).ravel()
    return draw_overlay(np.array(pixels), enlarged, move(prompt.points), prompt.labels, box)


def _write_png(path: Path, pixels: UInt8[np.ndarray, "h w 3"] | Bool[np.ndarray, "h w"]) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


def parse_point(text: str) -> tuple[float, float, int]:
    """Parses 'X,Y' or 'X,Y,LABEL' into (x, y, label); the label is 1 by default."""
    numbers = _parse_numbers(text)
    if len(numbers) not in (2, 3) or numbers[2:] not in ([], [0], [1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y or X,Y,0 or X,Y,1")
    return numbers[0], numbers[1], int(numbers[2]) if len(numbers) == 3 else 1


def parse_box(text: str) -> list[float]:
    """Parses 'X0,Y0,X1,Y1'."""
    numbers = _parse_numbers(text)
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not X0,Y0,X1,Y1")
    return numbers


def _parse_numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        message = f"{text!r} is not a list of numbers separated by commas"
        raise argparse.ArgumentTypeError(message) from None
