"""The argument `tiles` of predictors, and the option `--tiles` of the command line."""

import argparse
from typing import Literal

from sam_jax.model.sam import Sam

MIN_TILE_SIDE = 16  # pixels of the image

DEFAULT_TILES_HELP = (
    "default: auto for a model that was trained on windows around objects, such as sam_photo, and "
    "none for others"
)


def resolve_tiles(model: Sam, tiles: int | str | None) -> int | Literal["auto"] | None:
    """Returns the tiles in which a model sees images.

    Args:
      model: The model.
      tiles: The side of the tiles in pixels of the image; "auto" for tiles of many sizes; "none"
        for the entire image; or None for the model's default: "auto" if it was trained on windows
        around objects, that is if `Sam.object_share` is set, and the entire image otherwise.

    Returns:
      A side, "auto", or None for the entire image, as `plan_pyramid` takes them.

    Raises:
      ValueError: If `tiles` is something else.
    """
    check_tiles(tiles)
    if tiles is None and model.object_share is not None:
        return "auto"
    if isinstance(tiles, str):
        return "auto" if tiles == "auto" else None
    return tiles


def check_tiles(tiles: object) -> None:
    """Raises ValueError unless `tiles` is one of the values that `resolve_tiles` takes."""
    is_side = type(tiles) is int and tiles >= MIN_TILE_SIDE
    if not (is_side or tiles in (None, "auto", "none")):
        raise ValueError(
            f'tiles must be None, "auto", "none", or the side of a tile in pixels, an integer of '
            f"at least {MIN_TILE_SIDE}; got {tiles!r}"
        )


def parse_tiles(text: str) -> int | Literal["auto", "none"]:
    """Parses the option --tiles: "auto", "none", or a side in pixels.

    Args:
      text: The value on the command line.

    Raises:
      ArgumentTypeError: If it is something else.
    """
    if text == "auto":
        return "auto"
    if text == "none":
        return "none"
    if not text.isdecimal() or int(text) < MIN_TILE_SIDE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto, none or a number of pixels of at least {MIN_TILE_SIDE}"
        )
    return int(text)
