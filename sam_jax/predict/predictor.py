"""Predicts masks of an image from points, boxes and masks: numpy in, numpy out.

Source: segment-anything `predictor.py`, whose signatures, shapes and numerics are kept.

Differences: `predict_many` and `predict_batch`; prompts are padded to a few fixed sizes, so that
neither their number nor the image's size compiles a new program. Images may be seen in tiles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy.typing import ArrayLike

from sam_jax.images.resize import fit_size, postprocess_masks
from sam_jax.model.mask_decoder import NUM_MASK_TOKENS
from sam_jax.model.sam import Sam
from sam_jax.predict.decode import decode_objects
from sam_jax.predict.encode import check_image, resize_and_encode, unbind
from sam_jax.predict.image_slot import ImageSlot
from sam_jax.predict.official_names import OfficialNames
from sam_jax.predict.prompts import ObjectPrompt, Prompt, named_in_errors, prepare_prompt
from sam_jax.predict.tile_masks import paste
from sam_jax.predict.tiled_image import TiledImage
from sam_jax.predict.tiles import Tile
from sam_jax.predict.tiles_option import resolve_tiles

# Masks (logits if asked for), scores and low-resolution logits, of one object and of several.
ObjectPrediction = tuple[
    Bool[np.ndarray, "m h w"] | Float32[np.ndarray, "m h w"],
    Float32[np.ndarray, " m"],
    Float32[np.ndarray, "m lh lw"],
]
Prediction = tuple[
    Bool[np.ndarray, "n m h w"] | Float32[np.ndarray, "n m h w"],
    Float32[np.ndarray, "n m"],
    Float32[np.ndarray, "n m lh lw"],
]


class TilePrediction(NamedTuple):
    """The prediction for one object, in pixels of its tile.

    Attributes:
      tile: The part of the image in which the object was seen.
      masks: Masks, or logits, of the tile.
      scores: The predicted IoU of each mask.
      low_res_logits: The masks' low-resolution logits.
    """

    tile: Tile
    masks: Bool[np.ndarray, "m th tw"] | Float32[np.ndarray, "m th tw"]
    scores: Float32[np.ndarray, " m"]
    low_res_logits: Float32[np.ndarray, "m lh lw"]


class SamPredictor(OfficialNames):
    """Encodes an image once and predicts masks from any number of prompts.

    A predictor has one image. Threads may predict on it together, but a thread whose image was
    replaced by another thread gets a RuntimeError. Predictors are cheap: make one for each thread.

    Example:
      >>> model, variables = sam_jax.load("sam_tiny")
      >>> predictor = sam_jax.SamPredictor(model, variables)
      >>> predictor.set_image(np.zeros((60, 80, 3), np.uint8))
      >>> masks, scores, low_res_logits = predictor.predict([[45, 30]], [1])
      >>> masks.shape, scores.shape
      ((3, 60, 80), (3,))

    Attributes:
      model: The model.
      variables: Its variables.
      tiles_used: The tile in which each object of the latest prediction on the image was seen.
    """

    def __init__(self, model: Sam, variables: dict[str, Any] | None = None) -> None:
        """Makes a predictor without an image.

        Args:
          model: The model, as `sam_jax.load` returns it.
          variables: Its variables; not needed if the model is bound to them, as by
            `model.bind(variables)`.

        Raises:
          ValueError: If there are no variables.
        """
        self.model, self.variables = unbind(model, variables)
        self.tiles_used: list[Tile] = []
        self._slot = ImageSlot()

    def set_image(
        self, image: np.ndarray, image_format: str = "RGB", tiles: int | str | None = None
    ) -> None:
        """Encodes an image for the predictions that follow, or plans its tiles.

        With tiles, each object is predicted in a part of the image, which is enlarged to the
        model's input. The tile for a box has about 1.4 times its size. Points are predicted in
        tiles of several sizes; the best mask is then predicted again in a tile of about twice its
        size. The best mask has the highest predicted IoU times stability score; masks that are cut
        off by their tile, or small in it, count less. An object with `mask_input`, the logits of an
        earlier prediction on this image, keeps its tile while it takes 0.3 to 0.9 of the tile's
        side and all points are inside; otherwise it moves to the tile for its box. Tiles are read
        and encoded when a prompt needs them, so that the image may be a `np.memmap`; it must not
        change meanwhile.

        Args:
          image: 'h w 3' uint8, values 0 to 255.
          image_format: The order of its channels, "RGB" or "BGR".
          tiles: "none" to see the entire image only; "auto" for tiles of many sizes, the smallest
            of which the model sees at 16 times their size; or the longer side of all tiles in
            pixels. The entire image is always one of the tiles, and an image that fits into a tile
            is the only one. By default "auto" for a model that was trained on windows around
            objects (`Sam.object_share`), and "none" for others.

        Raises:
          ValueError: If an argument is invalid. The image that was set before stays.
        """
        image = check_image(image, image_format)
        resolved = resolve_tiles(self.model, tiles)
        self.reset_image()  # its memory is free before the next image needs it
        self._slot.change(
            image=TiledImage(self.model, self.variables, image, resolved),
            features=None,
            original_size=image.shape[:2],
            input_size=fit_size(image.shape[:2], self.model.image_size),
        )

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> ObjectPrediction:
        """Predicts masks of one object.

        Args:
          point_coords: 'k 2', points (x, y) in pixels of the image.
          point_labels: 'k', 1 for foreground and 0 for background. As in the reference, -1 is its
            padding point, which has no position, and 2 and 3 are positions without a label.
          box: '4', (x0, y0, x1, y1) in pixels of the image.
          mask_input: '1 lh lw', low-resolution logits of an earlier prediction.
          multimask_output: Return three masks, for an ambiguous prompt, instead of one.
          return_logits: Return logits instead of masks.

        Returns:
          masks: At the size of the image.
          scores: The predicted IoU of each mask.
          low_res_logits: The masks' low-resolution logits, which `mask_input` takes.

        Raises:
          RuntimeError: If no image is set, or another thread has replaced it.
          ValueError: If an argument is invalid. The message names it.
        """
        prompt = {
            "point_coords": point_coords,
            "point_labels": point_labels,
            "box": box,
            "mask_input": mask_input,
        }
        masks, scores, low_res = self.predict_many([prompt], multimask_output, return_logits)
        return masks[0], scores[0], low_res[0]

    def predict_many(
        self,
        prompts: Sequence[Prompt],
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """Predicts masks of n objects in the image.

        Args:
          prompts: One dict per object with the first four arguments of `predict`, each optional.
            Objects may have different numbers of points.
          multimask_output: Return three masks of each object instead of one.
          return_logits: Return logits instead of masks.

        Returns:
          Masks, scores and low-resolution logits as of `predict`, with an axis of objects in front.
          Outside of an object's tile masks are False, and logits OUTSIDE_LOGIT. Masks take a byte
          per pixel of the image; `predict_tiles` returns those of the tiles alone.

        Raises:
          RuntimeError: If no image is set, or another thread has replaced it.
          ValueError: If a prompt is invalid. The message names the prompt and the argument.
        """
        image = self._require_image()
        predictions = image.predict(prompts, multimask_output)
        self.tiles_used = [prediction.tile for prediction in predictions]
        outputs = len(predictions), NUM_MASK_TOKENS - 1 if multimask_output else 1
        dtype = np.float32 if return_logits else bool
        masks = np.empty((*outputs, *image.pyramid.image_size), dtype)
        scores = np.empty(outputs, np.float32)
        low_res = np.empty((*outputs, *self.model.low_res), np.float32)
        for i, (tile, logits, iou) in enumerate(predictions):
            paste(masks[i], self._resize(logits, tile.size, return_logits), tile)
            scores[i], low_res[i] = iou, logits
        return masks, scores, low_res

    def predict_tiles(
        self,
        prompts: Sequence[Prompt],
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> list[TilePrediction]:
        """Predicts masks of n objects, each in pixels of the tile in which it was seen.

        For many objects in a large image this takes less memory than `predict_many`. The image is
        its only tile if it was set without tiles.

        Args:
          prompts: As for `predict_many`, in pixels of the image.
          multimask_output: Return three masks of each object instead of one.
          return_logits: Return logits instead of masks.

        Raises:
          RuntimeError: If no image is set, or another thread has replaced it.
          ValueError: If a prompt is invalid. The message names the prompt and the argument.
        """
        predictions = self._require_image().predict(prompts, multimask_output)
        self.tiles_used = [prediction.tile for prediction in predictions]
        return [
            TilePrediction(tile, self._resize(logits, tile.size, return_logits), iou, logits)
            for tile, logits, iou in predictions
        ]

    def predict_batch(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[Prompt]],
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        image_format: str = "RGB",
        batch_size: int = 1,
        tiles: int | str | None = None,
    ) -> list[Prediction]:
        """Predicts masks of any number of objects in each of many images.

        The image that is set stays.

        Args:
          images: 'h w 3' uint8 each, of any sizes.
          prompts: For each image, a list of prompts as of `predict_many`.
          multimask_output: Return three masks of each object instead of one.
          return_logits: Return logits instead of masks.
          image_format: The order of the images' channels, "RGB" or "BGR".
          batch_size: The number of images in one program. More images use an accelerator better and
            need more memory. With tiles, images are seen one after another.
          tiles: As for `set_image`. With tiles, prompts have no `mask_input`.

        Returns:
          For each image, masks, scores and low-resolution logits as of `predict_many`.

        Raises:
          ValueError: If an argument is invalid. It is raised before anything is computed, and the
            message names the prompt and the argument.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"prompts must hold one list for each of {len(images)} images; got {len(prompts)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        images = [check_image(image, image_format) for image in images]
        objects = [
            self._prepare(i, image_prompts, image.shape[:2])
            for i, (image, image_prompts) in enumerate(zip(images, prompts, strict=True))
        ]
        resolved = resolve_tiles(self.model, tiles)
        if resolved is not None:
            if any(prompt.mask is not None for image in objects for prompt in image):
                raise ValueError(
                    'mask_input must be None in a batch with tiles: use set_image, or tiles="none"'
                )
            return self._predict_each(images, prompts, multimask_output, return_logits, resolved)
        predictions = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            embedding, _ = resize_and_encode(self.model, self.variables, images[batch], batch_size)
            decoded = decode_objects(
                self.model, self.variables, embedding, objects[batch], multimask_output
            )
            for image, (low_res, scores) in zip(images[batch], decoded, strict=True):
                shape = (*low_res.shape[:2], *image.shape[:2])
                masks = np.empty(shape, np.float32 if return_logits else bool)
                for i, logits in enumerate(low_res):
                    masks[i] = self._resize(logits, image.shape[:2], return_logits)
                predictions.append((masks, scores, low_res))
        return predictions

    def _predict_each(
        self,
        images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
        prompts: Sequence[Sequence[Prompt]],
        multimask_output: bool,
        return_logits: bool,
        tiles: int | str,
    ) -> list[Prediction]:
        """Predicts on one image after another, in tiles."""
        predictor = SamPredictor(self.model, self.variables)
        predictions = []
        for image, image_prompts in zip(images, prompts, strict=True):
            predictor.set_image(image, tiles=tiles)
            predictions.append(
                predictor.predict_many(image_prompts, multimask_output, return_logits)
            )
        return predictions

    def get_image_embedding(self) -> Float32[np.ndarray, "1 c gh gw"]:
        """Returns the entire image's embedding with its axes in the reference's order.

        Raises:
          RuntimeError: If no image is set.
        """
        self._require_image()
        assert self.features is not None
        return self.features

    def _prepare(
        self, image: int, prompts: Sequence[Prompt], original_size: tuple[int, int]
    ) -> list[ObjectPrompt]:
        """Validates the prompts of the image of number `image`."""
        canvas, low_res = self.model.image_size, self.model.low_res
        objects = []
        for i, prompt in enumerate(prompts):
            with named_in_errors(f"prompts[{image}][{i}]"):
                objects.append(prepare_prompt(prompt, original_size, canvas, low_res))
        return objects

    def _resize(
        self, low_res: Float32[np.ndarray, "m lh lw"], size: tuple[int, int], return_logits: bool
    ) -> Bool[np.ndarray, "m h w"] | Float32[np.ndarray, "m h w"]:
        """Resizes the masks of an object to the size of their image or tile."""
        canvas = self.model.image_size
        if return_logits:
            return postprocess_masks(low_res, size, canvas)
        masks = np.empty((len(low_res), *size), bool)
        for i, logits in enumerate(low_res):  # one at a time: their logits take four times as much
            masks[i] = postprocess_masks(logits, size, canvas) > self.model.mask_threshold
        return masks
