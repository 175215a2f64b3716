"""Masks of an image from points, boxes and masks: numpy in, numpy out.

Source: segment-anything `predictor.py`, whose signatures, shapes and numerics are kept.

Differences: `predict_many` and `predict_batch`; prompts are padded to a few fixed sizes, so that
neither their number nor the image's size compiles a new program.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from sam_jax.images.resize import postprocess_masks, resize_and_pad
from sam_jax.model.mask_decoder import choose_masks
from sam_jax.model.sam import Sam, normalize
from sam_jax.predict.prompts import check_prompt, mask_of, points_of, stack_prompts

Prompt = dict[str, Any]  # some of the first four arguments of `SamPredictor.predict`
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # masks, scores, low-resolution logits

MASK_THRESHOLD = 0.0
CHUNK = 4  # objects decoded at a time: what they need stays in the cache
GROUP = 32  # objects of one program, where there are as many


@functools.partial(jax.jit, static_argnames="model")
def encode_images(model, variables, images, sizes):
    """Encodes padded images 'b h w 3' uint8, whose sizes are 'b 2', in one program."""
    return model.apply(variables, normalize(images, sizes), method="encode")


@functools.partial(jax.jit, static_argnames="model")
def decode_prompts(model, variables, embedding, prompts):
    """Decodes `Prompts` into `Masks`, CHUNK objects at a time, in one program for each shape."""
    decode = functools.partial(model.apply, variables, embedding, method="decode")
    if prompts.points.shape[1] <= CHUNK:
        return decode(prompts)
    split = lambda x: rearrange(x, "b (s r) ... -> s b r ...", r=CHUNK)
    join = lambda x: rearrange(x, "s b r ... -> b (s r) ...")
    return jax.tree.map(join, jax.lax.map(decode, jax.tree.map(split, prompts)))


class SamPredictor:
    """Encodes an image once and predicts masks from prompts.

    Attributes:
      model, variables: as given.
      original_size, input_size: (height, width) of the image, and of it in the model's frame.
    """

    def __init__(self, model: Sam, variables: dict[str, Any]) -> None:
        self.model = model
        self.variables = variables
        self.original_size: tuple[int, ...] | None = None
        self.input_size: tuple[int, ...] | None = None
        self._embedding: jax.Array | None = None

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Encodes an image for the predictions that follow.

        Args:
          image: 'h w 3' uint8.
          image_format: the order of its channels, "RGB" or "BGR".
        Raises:
          ValueError: if the image has another shape or type.
        """
        image = check_image(image, image_format)
        self.reset_image()
        self._embedding, (self.input_size,) = self._encode([image], 1)
        self.original_size = image.shape[:2]

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Arrays:
        """Predicts masks of one object.

        Args:
          point_coords: 'k 2' points (x, y) in pixels of the image.
          point_labels: 'k', 1 foreground and 0 background.
          box: '4', (x0, y0, x1, y1) in pixels of the image.
          mask_input: '1 lh lw' low-resolution logits of an earlier prediction.
          multimask_output: return three masks, for an ambiguous prompt, instead of one.
          return_logits: return logits instead of masks.
        Returns:
          masks: 'm h w' bool (float32 if logits); scores: 'm' float32, the predicted IoU of each;
          low_res_logits: 'm lh lw' float32.
        Raises:
          RuntimeError: if no image is set.
          ValueError: naming the argument that is wrong.
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
        self, prompts: Sequence[Prompt], multimask_output: bool = True, return_logits: bool = False
    ) -> Arrays:
        """Predicts masks of n objects of the image.

        Args:
          prompts: n dicts of `predict`'s first four arguments, each with any number of points.
          multimask_output, return_logits: as in `predict`.
        Returns:
          masks 'n m h w', scores 'n m' and low_res_logits 'n m lh lw', as in `predict`.
        """
        self._check_image_set()
        objects = [self._objects(prompts, self.original_size)]
        ((low_res, scores),) = self.decode(self._embedding, objects, multimask_output)
        return self._finish(low_res, scores, self.original_size, return_logits)

    def predict_batch(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[Prompt]],
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        image_format: str = "RGB",
        batch_size: int = 1,
    ) -> list[Arrays]:
        """Predicts masks of any number of objects in each of many images.

        Args:
          images: 'h w 3' uint8 each, of any sizes.
          prompts: for each image, a list of prompts as in `predict_many`.
          multimask_output, return_logits, image_format: as in `predict` and `set_image`.
          batch_size: images in one program; more use an accelerator better, and take more memory.
        Returns:
          For each image, what `predict_many` returns.
        Raises:
          ValueError: naming the argument that is wrong, before anything is computed.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"prompts must hold one list for each of {len(images)} images; got {len(prompts)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        images = [check_image(image, image_format) for image in images]
        objects = [
            self._objects(of_image, image.shape[:2])
            for image, of_image in zip(images, prompts, strict=True)
        ]
        results = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            embedding, _ = self._encode(images[batch], batch_size)
            decoded = self.decode(embedding, objects[batch], multimask_output)
            for image, (low_res, scores) in zip(images[batch], decoded, strict=True):
                results.append(self._finish(low_res, scores, image.shape[:2], return_logits))
        return results

    @property
    def is_image_set(self) -> bool:
        """Whether there is an image to predict on."""
        return self._embedding is not None

    def get_image_embedding(self) -> np.ndarray:
        """The image's embedding '1 c gh gw' float32, as the reference lays it out."""
        self._check_image_set()
        return rearrange(np.asarray(self._embedding, np.float32), "b gh gw c -> b c gh gw")

    def reset_image(self) -> None:
        """Forgets the image."""
        self.original_size = self.input_size = self._embedding = None

    def _check_image_set(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("no image is set: call set_image(image) first")

    def _objects(self, prompts, original_size):
        """Checks the prompts of one image -> a list of (points, labels, mask) in the frame."""
        frame, patch = self.model.image_size, self.model.patch_size
        low_res = (4 * frame[0] // patch, 4 * frame[1] // patch)
        objects = []
        for prompt in prompts:
            check_prompt(prompt)
            points, labels = points_of(prompt, original_size, frame)
            objects.append((points, labels, mask_of(prompt, low_res)))
        return objects

    def _encode(self, images, batch_size):
        """Encodes up to batch_size images -> 'batch_size gh gw c', and their sizes in the frame."""
        padded, sizes = zip(
            *(resize_and_pad(i, self.model.image_size) for i in images), strict=True
        )
        missing = batch_size - len(images)
        padded, all_sizes = padded + padded[-1:] * missing, sizes + sizes[-1:] * missing
        arrays = np.stack(padded), np.array(all_sizes, np.int32)
        return encode_images(self.model, self.variables, *arrays), sizes

    def decode(self, embedding, objects, multimask_output):
        """Decodes the objects of each image -> for each, logits 'n m lh lw' and IoUs 'n m'."""
        decoded, start = [], 0
        for size in group_sizes(max(map(len, objects))):
            some = [of_image[start : start + size] for of_image in objects]
            some += [[]] * (len(embedding) - len(some))
            slots = max((len(labels) for of_image in some for _, labels, _ in of_image), default=0)
            prompts = stack_prompts(some, size, num_slots(slots))
            masks = decode_prompts(self.model, self.variables, embedding, prompts)
            decoded.append(jax.device_get(masks))
            start += size
        masks = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *decoded)
        masks = choose_masks(masks, multimask_output)
        counts = map(len, objects)
        return [(masks.logits[i, :n], masks.iou[i, :n]) for i, n in enumerate(counts)]

    def _finish(self, low_res, scores, original_size, return_logits):
        """Brings the masks of an image to its size, an object at a time as they are large."""
        shape = (*low_res.shape[:2], *original_size)
        masks = np.empty(shape, np.float32 if return_logits else bool)
        for i, logits in enumerate(low_res):
            logits = postprocess_masks(logits, original_size, self.model.image_size)
            masks[i] = logits if return_logits else logits > MASK_THRESHOLD
        return masks, scores, low_res


def group_sizes(n: int) -> list[int]:
    """Splits n objects into programs of 1, CHUNK or GROUP of them, the last perhaps padded."""
    if n <= 1:
        return [1]
    return [GROUP] * (n // GROUP) + [CHUNK] * -(-(n % GROUP) // CHUNK)


def num_slots(most: int) -> int:
    """The slots for up to `most` points, so that with the decoder's five outputs there are 7 tokens
    (for a click or a box), 16, 32, 64, ...: few programs, and no wasted lanes."""
    return 2 if most <= 2 else max(16, 1 << (most + 4).bit_length()) - 5


def check_image(image: np.ndarray, image_format: str = "RGB") -> np.ndarray:
    """Checks an image 'h w 3' uint8 -> the same in the order RGB."""
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f'image_format must be "RGB" or "BGR"; got {image_format!r}')
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a numpy array of uint8, values 0 to 255; got {got}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape (height, width, 3); got {image.shape}")
    return image if image_format == "RGB" else image[..., ::-1]
