"""Predicts the prompted objects of one image, each in the tile that shows it best."""

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from sam_jax.images.read import MAX_IMAGE_PIXELS
from sam_jax.model.prompt_encoder import NOT_A_POINT
from sam_jax.model.sam import Sam
from sam_jax.predict.decode import decode_objects
from sam_jax.predict.prompts import ObjectPrompt, Prompt, named_in_errors, prepare_prompt
from sam_jax.predict.tile_embedder import TileEmbedder
from sam_jax.predict.tile_masks import MaskTiles, mask_corners, move_logits, score_masks
from sam_jax.predict.tiles import (
    MASK_SHARE,
    Tile,
    plan_pyramid,
    tile_for_box,
    tile_for_object,
    tiles_for_points,
)

MAX_MOVES = 3  # of an object whose points do not tell the size of its tile


class TilePrompt(NamedTuple):
    """A prompt in one of the tiles in which it may be predicted.

    Attributes:
      object_index: The index of the prompt among those of the call.
      tile: The tile.
      prompt: The prompt in that tile.
    """

    object_index: int
    tile: Tile
    prompt: ObjectPrompt


class Prediction(NamedTuple):
    """The masks of one object in its tile.

    Attributes:
      tile: The tile.
      logits: The low-resolution logits of each mask.
      iou: The predicted IoU of each mask.
    """

    tile: Tile
    logits: Float32[np.ndarray, "m lh lw"]
    iou: Float32[np.ndarray, " m"]


class TiledImage:
    """An image and its tiles, or one that is its only tile.

    Threads may share it. Their predictions run one after another.

    Attributes:
      pyramid: The tiles.
    """

    def __init__(
        self,
        model: Sam,
        variables: dict[str, Any],
        image: UInt8[np.ndarray, "h w 3"],
        tiles: int | str | None,
        embedding: Float[Array, "1 gh gw c"] | None = None,
    ) -> None:
        """Plans the tiles. If the image is its only tile, it is encoded and not kept.

        Args:
          model: The model.
          variables: Its variables.
          image: RGB pixels.
          tiles: See `plan_pyramid`; None for no tiles.
          embedding: The embedding of an image without tiles, whose pixels are then not read; None
            to compute it.

        Raises:
          ValueError: If `tiles` is wrong.
        """
        self.pyramid = plan_pyramid(image.shape[:2], model.image_size, tiles)
        self._model = model
        self._variables = variables
        self._mask_tiles = MaskTiles()
        max_tile_pixels = sys.maxsize if tiles is None else MAX_IMAGE_PIXELS
        self._embedder = TileEmbedder(model, variables, image, max_tile_pixels=max_tile_pixels)
        self._lock = threading.Lock()
        if self._is_only_tile:
            if embedding is None:
                self.embed_image()
            else:
                self._embedder.add(self.pyramid.image_tile, embedding)
            self._embedder.release_image()

    def embed_image(self) -> Float[Array, "1 gh gw c"]:
        """Returns the embedding of the entire image."""
        with self._lock:
            (embedding,) = self._embedder.embed([self.pyramid.image_tile])
        return embedding

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for pickling and copying: everything but the lock."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or copied image."""
        vars(self).update(state, _lock=threading.Lock())

    def predict(self, prompts: Sequence[Prompt], multimask_output: bool) -> list[Prediction]:
        """Decodes each object in the tile that shows it best.

        Args:
          prompts: See `SamPredictor.predict_many`.
          multimask_output: Return three masks of each object instead of one.

        Raises:
          ValueError: If a prompt is invalid. The message names it; nothing is computed then.
        """
        with self._lock:
            return self._predict(prompts, multimask_output)

    def _predict(self, prompts: Sequence[Prompt], multimask_output: bool) -> list[Prediction]:
        tile_prompts = []
        for i, prompt in enumerate(prompts):
            with named_in_errors(f"prompts[{i}]" if len(prompts) > 1 else ""):
                tile_prompts += [
                    TilePrompt(i, *candidate) for candidate in self._candidates(prompt)
                ]
        best: dict[int, tuple[float, int, Prediction]] = {}
        for i, prediction in self._decode(tile_prompts, multimask_output):
            # Of equal scores, that of the finer tile is kept.
            rank = self._score(prediction), -prediction.tile.height * prediction.tile.width
            if i not in best or rank > best[i][:2]:
                best[i] = (*rank, prediction)
        predictions = [best[i][-1] for i in range(len(prompts))]
        if not self._is_only_tile:
            self._move_to_fitting_tiles(prompts, predictions, multimask_output)
            for prediction in predictions:
                self._mask_tiles.add(prediction.logits, prediction.tile)
        return predictions

    def _decode(
        self, tile_prompts: Sequence[TilePrompt], multimask_output: bool
    ) -> Iterator[tuple[int, Prediction]]:
        """Yields each object's index and its prediction, tile by tile."""
        by_tile: dict[Tile, list[TilePrompt]] = {}
        for tile_prompt in tile_prompts:
            by_tile.setdefault(tile_prompt.tile, []).append(tile_prompt)
        for tile, embedding in zip(by_tile, self._embedder.embed(list(by_tile)), strict=True):
            indices, _, objects = zip(*by_tile[tile], strict=True)
            ((logits, iou),) = decode_objects(
                self._model, self._variables, embedding, [objects], multimask_output
            )
            yield from zip(indices, map(Prediction, [tile] * len(iou), logits, iou), strict=True)

    def _move_to_fitting_tiles(
        self, prompts: Sequence[Prompt], predictions: list[Prediction], multimask_output: bool
    ) -> None:
        """Predicts points again in the tile that fits the predicted mask, at most MAX_MOVES times.

        Points alone do not tell the size of their object; the first prediction does.
        """
        moving = {i for i, prompt in enumerate(prompts) if _has_only_points(prompt)}
        for _ in range(MAX_MOVES):
            tile_prompts = []
            for i in sorted(moving):
                points, _ = _points_and_corners(prompts[i])
                tile = self._fitting_tile(predictions[i], _located(prompts[i]))
                if tile == predictions[i].tile:
                    moving.discard(i)
                else:
                    shifted = _shift(prompts[i], points, np.zeros((0, 2)), None, tile)
                    tile_prompts.append(TilePrompt(i, tile, self._prepare(shifted, tile)))
            for i, prediction in self._decode(tile_prompts, multimask_output):
                predictions[i] = prediction

    def _fitting_tile(self, prediction: Prediction, points: Float[np.ndarray, "k 2"]) -> Tile:
        """Returns the tile for the box of the best mask; the same tile if the mask is empty."""
        mask = prediction.logits[np.argmax(prediction.iou)]
        corners = mask_corners(mask, prediction.tile, self.pyramid.canvas)
        if not len(corners):
            return prediction.tile
        return tile_for_box(self.pyramid, corners.ravel(), points, MASK_SHARE)

    def _candidates(self, prompt: Prompt) -> list[tuple[Tile, ObjectPrompt]]:
        """Returns the tiles in which a prompt may be predicted, and the prompt in each of them."""
        prepared = self._prepare(prompt, self.pyramid.image_tile)
        if self._is_only_tile:
            return [(self.pyramid.image_tile, prepared)]
        points, corners = _points_and_corners(prompt)
        mask = prepared.mask
        if mask is None:
            tiles = self._tiles_without_mask(_located(prompt), corners)
        else:
            source = self._mask_tiles.find(mask)
            given = prompt.get("point_labels")
            labels = np.asarray([] if given is None else given).reshape(-1)
            seen = mask_corners(mask, source, self.pyramid.canvas)
            object_points = np.concatenate([seen, corners, points[labels == 1]])
            tile = source
            if len(object_points):
                box = np.concatenate([object_points.min(axis=0), object_points.max(axis=0)])
                tile = tile_for_object(self.pyramid, source, box, _located(prompt))
            if tile != source:
                mask = move_logits(mask, source, tile, self.pyramid.canvas)
            tiles = [tile]
        return [
            (tile, self._prepare(_shift(prompt, points, corners, mask, tile), tile))
            for tile in tiles
        ]

    def _tiles_without_mask(
        self, points: Float[np.ndarray, "k 2"], corners: Float[np.ndarray, "corners 2"]
    ) -> list[Tile]:
        if len(corners):
            return [tile_for_box(self.pyramid, np.sort(corners, axis=0).ravel(), points)]
        return tiles_for_points(self.pyramid, points) if len(points) else [self.pyramid.image_tile]

    def _prepare(self, prompt: Prompt, tile: Tile) -> ObjectPrompt:
        return prepare_prompt(prompt, tile.size, self._model.image_size, self._model.low_res)

    def _score(self, prediction: Prediction) -> float:
        return score_masks(prediction.logits, prediction.iou, prediction.tile, self.pyramid)

    @property
    def _is_only_tile(self) -> bool:
        return len(self.pyramid.scales) == 1


def _has_only_points(prompt: Prompt) -> bool:
    has_points = len(_located(prompt)) > 0
    return has_points and prompt.get("box") is None and prompt.get("mask_input") is None


def _points_and_corners(
    prompt: Prompt,
) -> tuple[Float[np.ndarray, "k 2"], Float[np.ndarray, "corners 2"]]:
    """Returns the points of a valid prompt and the corners of its box, no rows if it has none."""
    points, corners = (
        np.asarray([] if prompt.get(key) is None else prompt[key], np.float64).reshape(-1, 2)
        for key in ("point_coords", "box")
    )
    return points, corners


def _located(prompt: Prompt) -> Float[np.ndarray, "k 2"]:
    """Returns the points of a valid prompt without those of label -1, which have no position."""
    points, _ = _points_and_corners(prompt)
    if not len(points):
        return points
    return points[np.asarray(prompt["point_labels"]).reshape(-1) != NOT_A_POINT]


def _shift(
    prompt: Prompt,
    points: Float[np.ndarray, "k 2"],
    corners: Float[np.ndarray, "corners 2"],
    mask: Float32[np.ndarray, "lh lw"] | None,
    tile: Tile,
) -> Prompt:
    """Returns a prompt in pixels of a tile, with logits of that tile."""
    shifted: Prompt = {"point_labels": prompt.get("point_labels"), "mask_input": mask}
    if prompt.get("point_coords") is not None:
        shifted["point_coords"] = points - tile.corner
    if len(corners):
        shifted["box"] = (corners - tile.corner).ravel()
    return shifted
