"""A minimal promptable model for tests of the objective, and functions that make batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.data.segmentation_batch import Batch
from sam_jax.model.mask_decoder import Masks
from sam_jax.model.prompt_encoder import ABSENT
from tests.train.objectives.interactive_oracle import fold
from train.objectives.interactive import DROPOUT

KEY = jax.random.key(5)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A model with the fields and methods of `Sam` that the objective uses.

    Every prompt affects the outputs, and every parameter has a gradient.
    """

    image_size: tuple[int, int] = (24, 40)
    patch_size: int = 8
    channels: int = 5

    @property
    def grid(self):
        return tuple(side // self.patch_size for side in self.image_size)

    @property
    def low_res(self):
        return tuple(4 * side for side in self.grid)

    def init(self, seed=0):
        rng, c = np.random.default_rng(seed), self.channels
        h, w = self.low_res

        def normal(*shape):
            return rng.normal(size=shape).astype(np.float32)

        return {
            "params": {
                "image_encoder": {"kernel": normal(3, c)},
                "prompt_encoder": {"table": normal(6, c), "no_mask": normal(), "mask": normal()},
                "mask_decoder": {
                    "mix": normal(c, 4),
                    "hint": normal(4),
                    "bias": normal(4),
                    "head": normal(c, 4),
                },
            },
            "constants": {"waves": 0.2 * normal(2, c), "ramp": normal(h, w, c)},
        }

    def apply(self, variables, *args, rngs, method):
        return getattr(self, method)(variables["params"], variables["constants"], *args, **rngs)

    def encode(self, params, constants, image, train, drop_path):
        p = self.patch_size
        b, h, w, c = image.shape
        patches = image.reshape(b, h // p, p, w // p, p, c).mean(axis=(2, 4))
        noise = jax.random.normal(drop_path, (self.channels,)) if train else 0.0
        return jnp.tanh(patches @ params["image_encoder"]["kernel"] + 0.3 * noise)

    def decode(self, params, constants, embedding, prompts, train, dropout):
        encoder, decoder = params["prompt_encoder"], params["mask_decoder"]
        points, labels, mask, has_mask = (x[0, 0] for x in jax.tree.leaves(prompts))
        tokens = encoder["table"][labels + 2] * jnp.cos(points @ constants["waves"])
        feature = jnp.sum(jnp.where((labels == ABSENT)[:, None], 0.0, tokens), axis=0)
        if train:
            feature = feature + 0.3 * jax.random.normal(dropout, feature.shape)
        pixels = embedding[0].repeat(4, axis=0).repeat(4, axis=1) + constants["ramp"]
        hint = jnp.where(has_mask, encoder["mask"] * jnp.tanh(mask), encoder["no_mask"])
        logits = (pixels * feature) @ decoder["mix"] + hint[..., None] * decoder["hint"]
        logits = jnp.moveaxis(logits + decoder["bias"], -1, 0)
        iou = feature @ decoder["head"] + jnp.mean(jnp.tanh(logits), axis=(1, 2))
        return Masks(logits=logits[None, None], iou=jax.nn.sigmoid(iou)[None, None])


TOY = Toy()


@jax.jit
def dropout_keys(key, image_id, mask_id, rounds):
    """Returns the key data 'n round ...' that the dropout of masks 'n' uses in each round."""

    def keys_of_mask(image, mask):
        return jax.vmap(lambda index: fold(key, image, mask, DROPOUT, index))(rounds)

    return jax.random.key_data(jax.vmap(keys_of_mask)(image_id, mask_id))


class Recorder:
    """A wrapper of a model that records prompts and outputs of the decoder by dropout key."""

    def __init__(self, model):
        self.model, self.records = model, {}
        for name in ("image_size", "patch_size", "grid", "low_res"):  # of `PromptableModel`
            setattr(self, name, getattr(model, name))

    def __getattr__(self, name):
        return getattr(self.model, name)

    def apply(self, variables, *args, rngs, method):
        out = self.model.apply(variables, *args, rngs=rngs, method=method)
        if method != "decode":
            return out
        key = jax.random.key_data(rngs["dropout"])
        record = jax.lax.stop_gradient((key, args[1], out))
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        zero = jax.pure_callback(self.store, shape, record, vmap_method="broadcast_all")
        return out.replace(logits=out.logits + zero)

    def store(self, record):
        """Stores the records of masks 'b n ...' and returns zeros of the shape 'b n'."""
        key, *leaves = (np.array(x) for x in jax.tree.leaves(record))
        structure, shape = jax.tree.structure(record[1:]), key.shape[:-1]
        for index in np.ndindex(shape):
            mask_leaves = [x[index][0, 0] for x in leaves]
            self.records[key[index].tobytes()] = jax.tree.unflatten(structure, mask_leaves)
        return np.zeros(shape, np.float32)

    def records_by_mask(self, batch, rounds, key=KEY):
        """Returns {(image, mask): the records of all rounds} of the valid masks of a batch."""
        ids = [
            (int(i), int(m))
            for i, masks, valid in zip(batch.image_id, batch.mask_id, batch.valid, strict=True)
            for m in masks[valid]
        ]
        keys = dropout_keys(key, *np.array(ids).T, np.arange(rounds))
        return {
            mask_ids: [self.records[key.tobytes()] for key in mask_keys]
            for mask_ids, mask_keys in zip(ids, np.asarray(keys), strict=True)
        }


def make_batch(model, sizes, masks, image_id=(7, 3, 11), mask_id=None, seed=0):
    """Returns a batch of images of noise with the given masks, a list of 'h w' bool per image."""
    rng, (h, w) = np.random.default_rng(seed), model.image_size
    b, n = len(sizes), max(map(len, masks)) + 1
    bits = np.zeros((b, n, h, w), bool)
    for i, image_masks in enumerate(masks):
        bits[i, : len(image_masks)] = image_masks
    if mask_id is None:
        mask_id = [1 + rng.permutation(n) for _ in sizes]  # chunks are padded with the id 0
    image = rng.integers(0, 256, (b, h, w, 3), np.uint8)
    image[:, ::8] = rng.integers(0, 256, (b, 1, 1, 3), np.uint8)
    return Batch(
        image=image,
        size=np.array(sizes, np.int32),
        image_id=np.array(image_id[:b], np.int32),
        masks=np.packbits(bits, axis=-1),
        mask_id=np.array(mask_id, np.int32),
        valid=np.arange(n) < np.array([len(image_masks) for image_masks in masks])[:, None],
    )


def rectangle(model, x0, y0, x1, y1):
    mask = np.zeros(model.image_size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def random_masks(model, size, count, seed):
    """Returns random rectangles and one mask of a single pixel, within an image's size.

    The single pixel covers less than half of a pixel at the resolution of the loss.
    """
    rng, masks = np.random.default_rng(seed), []
    for _ in range(count - 1):
        (y0, y1), (x0, x1) = (np.sort(rng.choice(s + 1, 2, replace=False)) for s in size)
        masks.append(rectangle(model, x0, y0, x1, y1))
    y, x = (int(rng.integers(s)) for s in size)
    return [*masks, rectangle(model, x, y, x + 1, y + 1)]


def permute(batch):
    """Returns a batch with the images and masks in another order and with more invalid masks."""
    order, columns = [2, 0, 1], [3, 1, 0, 2]
    permuted = jax.tree.map(lambda x: x[order], batch)
    n = batch.valid.shape[1]
    assert n == 4
    rng = np.random.default_rng(9)
    invalid = {
        "masks": rng.integers(0, 256, (3, 2, *batch.masks.shape[2:]), np.uint8),
        "mask_id": np.arange(50, 56, dtype=np.int32).reshape(3, 2),
        "valid": np.zeros((3, 2), bool),
    }
    padded = {
        field: np.concatenate([x[:, :1], getattr(permuted, field)[:, columns], x[:, 1:]], axis=1)
        for field, x in invalid.items()
    }
    return permuted.replace(**padded)
