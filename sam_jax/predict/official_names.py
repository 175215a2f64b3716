"""Names of segment-anything that its users read and set, beside the methods of a predictor.

Source: segment-anything `predictor.py` and `utils/transforms.py`.

Differences: arrays are numpy's. Methods on tensors of PyTorch are errors that name ours.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Num, UInt8
from numpy.typing import ArrayLike

from sam_jax.images.resize import apply_coords, fit_size, resize_and_pad
from sam_jax.model.sam import Sam
from sam_jax.predict.encode import device_of
from sam_jax.predict.image_slot import ImageSlot, SetImage
from sam_jax.predict.tiled_image import TiledImage
from sam_jax.predict.tiles import Tile


class ResizeLongestSide:
    """Resizes images, points and boxes as a predictor does.

    Attributes:
      canvas: (height, width) that images are resized to fit into.
      target_length: The longer side of the canvas.
    """

    def __init__(self, target_length: int | tuple[int, int]) -> None:
        """Makes the transform.

        Args:
          target_length: The side of the model's input, or its (height, width).
        """
        if isinstance(target_length, int):
            target_length = target_length, target_length
        self.canvas = target_length
        self.target_length = max(self.canvas)

    def apply_image(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "ih iw 3"]:
        """Resizes an image; there is no padding."""
        resized, (height, width) = resize_and_pad(image, self.canvas)
        return resized[:height, :width]

    def apply_coords(
        self, coords: Num[np.ndarray, "*batch 2"], original_size: tuple[int, int]
    ) -> Float[np.ndarray, "*batch 2"]:
        """Maps points (x, y) from an image of (height, width) `original_size` to the canvas."""
        return apply_coords(coords, original_size, self.canvas)

    def apply_boxes(
        self, boxes: Num[np.ndarray, "*batch 4"], original_size: tuple[int, int]
    ) -> Float[np.ndarray, "n 4"]:
        """Maps boxes (x0, y0, x1, y1), as `apply_coords` maps points."""
        return self.apply_coords(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Returns the (height, width) of an image after it is resized to its longer side."""
        return fit_size((oldh, oldw), (long_side_length, long_side_length))


class OfficialNames:
    """The attributes of segment-anything's predictor.

    A saved embedding is set as it is there: `features`, `original_size` and `input_size`, in any
    order.

    Attributes:
      model: The model.
      variables: Its variables.
      tiles_used: The tile in which each object of the latest prediction on the image was seen.
    """

    model: Sam
    variables: dict[str, Any]
    tiles_used: list[Tile]
    _slot: ImageSlot

    @property
    def transform(self) -> ResizeLongestSide:
        """Resizes images, points and boxes to the input of the model."""
        return ResizeLongestSide(self.model.image_size)

    @property
    def device(self) -> jax.Device:
        """The device that holds the variables, or the default device if they are numpy arrays."""
        return device_of(self.variables)

    @property
    def is_image_set(self) -> bool:
        """True if there is an image to predict on. Setting False forgets the image."""
        content = self._slot.content
        return content.image is not None or content.features is not None

    @is_image_set.setter
    def is_image_set(self, value: bool) -> None:
        if not value:
            self.reset_image()

    @property
    def original_size(self) -> tuple[int, int] | None:
        """(height, width) of the image, or None if no image is set."""
        return self._slot.content.original_size

    @original_size.setter
    def original_size(self, value: Sequence[int] | None) -> None:
        features = self._slot.content.features
        size = None if value is None else (int(value[0]), int(value[1]))
        values = {} if features is None else {"image": self._image_of(features, size)}
        self._slot.change(original_size=size, **values)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the resized image in the padded input of the model, or None."""
        return self._slot.content.input_size

    @input_size.setter
    def input_size(self, value: Sequence[int] | None) -> None:
        self._slot.change(input_size=None if value is None else (int(value[0]), int(value[1])))

    @property
    def features(self) -> Float32[np.ndarray, "1 c gh gw"] | None:
        """The embedding of the entire image, or None if no image is set."""
        content = self._slot.get()
        if content.image is None:
            return None if content.features is None else _to_official(content.features)
        return _to_official(content.image.embed_image())

    @features.setter
    def features(self, value: ArrayLike | None) -> None:
        if value is None:
            self.reset_image()
            return
        features = jnp.asarray(_check_features(value, self.model), self.model.dtype)
        image = self._image_of(features, self.original_size)
        self._slot.change(features=features, image=image)

    @property
    def orig_h(self) -> int | None:
        """The height of the image."""
        return None if self.original_size is None else self.original_size[0]

    @property
    def orig_w(self) -> int | None:
        """The width of the image."""
        return None if self.original_size is None else self.original_size[1]

    @property
    def input_h(self) -> int | None:
        """The height of the resized image."""
        return None if self.input_size is None else self.input_size[0]

    @property
    def input_w(self) -> int | None:
        """The width of the resized image."""
        return None if self.input_size is None else self.input_size[1]

    @property
    def predict_torch(self) -> NoReturn:
        """Raises AttributeError: `predict_many` predicts many objects at once."""
        raise AttributeError(
            "predict_torch takes tensors of PyTorch, which sam_jax does not use: "
            "predict_many(prompts) predicts any number of objects of the image at once, with "
            "points and boxes in pixels of the image"
        )

    @property
    def set_torch_image(self) -> NoReturn:
        """Raises AttributeError: `set_image` and `predict_batch` take images."""
        raise AttributeError(
            "set_torch_image takes tensors of PyTorch, which sam_jax does not use: call "
            "set_image(image) with the uint8 image, or predict_batch(images, prompts) for several "
            "images"
        )

    def reset_image(self) -> None:
        """Forgets the image."""
        self.tiles_used = []
        self._slot.change(image=None, features=None, original_size=None, input_size=None)

    def _require_image(self) -> TiledImage:
        """Returns the image that is set.

        Raises:
          RuntimeError: If there is none, if another thread replaced it, or if sizes were set that
            are not its own.
        """
        content = self._slot.get()
        if content.image is None:
            if content.features is not None:
                raise RuntimeError("features are set without original_size: set both")
            raise RuntimeError("no image is set: call set_image(image) first")
        _check_sizes(content, content.image)
        return content.image

    def _image_of(
        self, features: Float[Array, "1 gh gw c"], size: tuple[int, int] | None
    ) -> TiledImage | None:
        """Makes an image, of which only the embedding is known, once its size is known."""
        if size is None:
            return None
        no_pixels = np.broadcast_to(np.uint8(0), (*size, 3))
        return TiledImage(self.model, self.variables, no_pixels, None, features)


def _check_features(value: ArrayLike, model: Sam) -> Float32[np.ndarray, "1 gh gw c"]:
    """Validates an embedding in the official order of axes.

    Raises:
      ValueError: If it has another shape, or values that are not finite.
    """
    features = np.asarray(value, np.float32)
    expected = (1, model.embedding_dim, *model.grid)
    if features.shape != expected:
        raise ValueError(f"features must have shape {expected}; got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features must be finite; got NaN or infinity")
    return rearrange(features, "b c gh gw -> b gh gw c")


def _to_official(embedding: Float[Array, "1 gh gw c"]) -> Float32[np.ndarray, "1 c gh gw"]:
    return rearrange(np.asarray(embedding, np.float32), "b gh gw c -> b c gh gw")


def _check_sizes(content: SetImage, image: TiledImage) -> None:
    """Raises RuntimeError if sizes were set that are not those of the image."""
    size = image.pyramid.image_size
    if content.original_size != size:
        raise RuntimeError(
            f"original_size was set to {content.original_size}, but the image has {size}: set "
            "features too, or call set_image"
        )
    input_size = fit_size(size, image.pyramid.canvas)
    if content.input_size not in (None, input_size):
        raise RuntimeError(
            f"input_size was set to {content.input_size}, but an image of {size} has {input_size}"
        )
