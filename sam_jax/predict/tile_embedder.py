"""Encodes tiles of one image when they are asked for, and keeps the latest of them."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from sam_jax.images.read import MAX_IMAGE_PIXELS
from sam_jax.images.resize import fit_size, resize_in_bands
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import device_of, resize_and_encode
from sam_jax.predict.tiles import Tile

CACHE_BYTES = 256 << 20
BATCH_SIZE = 8  # tiles in one program, where there are that many and the device is not a CPU


class TileEmbedder:
    """Encodes tiles of one image lazily.

    Only the pixels of tiles that are asked for are read, so that the image may be a `np.memmap`
    that does not fit into memory; see `read_tile`.
    """

    def __init__(
        self,
        model: Sam,
        variables: dict[str, Any],
        image: UInt8[np.ndarray, "h w 3"],
        *,
        max_tile_pixels: int = MAX_IMAGE_PIXELS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Makes an embedder without reading the image.

        Args:
          model: The model.
          variables: Its variables.
          image: RGB pixels, which must not change.
          max_tile_pixels: See `read_tile`.
          cache_bytes: The size of the embeddings to keep. The least recently used ones are dropped,
            except the last one.
        """
        self._model = model
        self._variables = variables
        self._image = image
        self._max_tile_pixels = max_tile_pixels
        self._cache: OrderedDict[Tile, Float[Array, "1 gh gw c"]] = OrderedDict()
        self._cache_bytes = cache_bytes

    def add(self, tile: Tile, embedding: Float[Array, "1 gh gw c"]) -> None:
        """Adds the embedding of a tile that was computed elsewhere to the cache."""
        self._cache[tile] = embedding

    def release_image(self) -> None:
        """Forgets the pixels; only tiles in the cache can be asked for from then on."""
        self._image = self._image[:0].copy()

    def embed(self, tiles: Sequence[Tile]) -> Iterator[Float[Array, "1 gh gw c"]]:
        """Encodes tiles, or takes their embeddings from the cache.

        Args:
          tiles: Different tiles of the image.

        Yields:
          The embedding of each tile. Tiles are encoded in batches of BATCH_SIZE or 1, so that their
          number compiles nothing.
        """
        batch_size = 1 if device_of(self._variables).platform == "cpu" else BATCH_SIZE
        batch: dict[Tile, Float[Array, "1 gh gw c"]] = {}
        for i, tile in enumerate(tiles):
            if tile not in batch and tile not in self._cache:
                missing = [x for x in tiles[i:] if x not in self._cache][:batch_size]
                if len(missing) < batch_size:
                    missing = missing[:1]
                batch = dict(zip(missing, self._encode(missing), strict=True))
            embedding = self._cache.pop(tile) if tile in self._cache else batch[tile]
            self._cache[tile] = embedding
            self._shrink_cache()
            yield embedding

    def _encode(self, tiles: Sequence[Tile]) -> list[Float[Array, "1 gh gw c"]]:
        pixels = [
            read_tile(self._image, tile, self._model.image_size, self._max_tile_pixels)
            for tile in tiles
        ]
        embedding, _ = resize_and_encode(self._model, self._variables, pixels, len(tiles))
        return [embedding[i : i + 1] for i in range(len(tiles))]

    def _shrink_cache(self) -> None:
        size = sum(embedding.nbytes for embedding in self._cache.values())
        while size > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            size -= dropped.nbytes


def read_tile(
    image: UInt8[np.ndarray, "h w 3"],
    tile: Tile,
    canvas: tuple[int, int],
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> UInt8[np.ndarray, "th tw 3"]:
    """Reads a tile of an image in bounded memory.

    Args:
      image: RGB pixels, in memory or in a mapped file.
      tile: The tile.
      canvas: (height, width) of the padded input that the model takes.
      max_pixels: The most pixels that are taken into memory at full resolution; by default the
        limit of images in files.

    Returns:
      A view of the tile's pixels if they are at most `max_pixels`. A larger tile is resized to the
      canvas while it is read, see `resize_in_bands`.
    """
    pixels = image[tile.region]
    if tile.height * tile.width <= max_pixels:
        return pixels
    return resize_in_bands(pixels, fit_size(tile.size, canvas))
