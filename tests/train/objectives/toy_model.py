"""A promptable model of a few lines, every part of which reacts to every prompt; and batches."""

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
    """A model with the fields and methods of `Sam` that the objective uses."""

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
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
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
def keys_of_rounds(key, image_id, mask_id, rounds):
    """The data 'n round ...' of the keys with which masks 'n' drop units."""
    of_mask = lambda i, m: jax.vmap(lambda r: fold(key, i, m, DROPOUT, r))(rounds)
    return jax.random.key_data(jax.vmap(of_mask)(image_id, mask_id))


class Recorder:
    """A model that notes each mask's prompts and outputs by the key of its round."""

    def __init__(self, model):
        self.model, self.notes = model, {}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def apply(self, variables, *args, rngs, method):
        out = self.model.apply(variables, *args, rngs=rngs, method=method)
        if method != "decode":
            return out
        key = jax.random.key_data(rngs["dropout"])
        note = jax.lax.stop_gradient((key, args[1], out))
        like = jax.ShapeDtypeStruct((), jnp.float32)
        zero = jax.pure_callback(self.take, like, note, vmap_method="broadcast_all")
        return out.replace(logits=out.logits + zero)

    def take(self, note):
        """Takes the notes of masks 'b n ...'."""
        key, *leaves = (np.array(x) for x in jax.tree.leaves(note))
        shape = key.shape[:-1]
        for at in np.ndindex(shape):
            some = [x[at][0, 0] for x in leaves]
            self.notes[key[at].tobytes()] = jax.tree.unflatten(jax.tree.structure(note[1:]), some)
        return np.zeros(shape, np.float32)

    def of(self, batch, rounds, key=KEY):
        """The notes of all valid masks by (image, mask): a list of rounds."""
        ids = [
            (int(i), int(m))
            for i, masks, valid in zip(batch.image_id, batch.mask_id, batch.valid, strict=True)
            for m in masks[valid]
        ]
        keys = keys_of_rounds(key, *np.array(ids).T, np.arange(rounds))
        return {
            which: [self.notes[key.tobytes()] for key in some]
            for which, some in zip(ids, np.asarray(keys), strict=True)
        }


def make_batch(model, sizes, masks, image_id=(7, 3, 11), mask_id=None, seed=0):
    """A batch of images of random grey, and masks: for each image a list of 'h w' bool."""
    rng, (h, w) = np.random.default_rng(seed), model.image_size
    b, n = len(sizes), max(map(len, masks)) + 1
    bits = np.zeros((b, n, h, w), bool)
    for image, some in enumerate(masks):
        bits[image, : len(some)] = some
    if mask_id is None:
        mask_id = [1 + rng.permutation(n) for _ in sizes]  # 0 is that of fillers of chunks
    image = rng.integers(0, 256, (b, h, w, 3), np.uint8)
    image[:, ::8] = rng.integers(0, 256, (b, 1, 1, 3), np.uint8)
    return Batch(
        image=image,
        size=np.array(sizes, np.int32),
        image_id=np.array(image_id[:b], np.int32),
        masks=np.packbits(bits, axis=-1),
        mask_id=np.array(mask_id, np.int32),
        valid=np.arange(n) < np.array([len(some) for some in masks])[:, None],
    )


def rectangle(model, x0, y0, x1, y1):
    mask = np.zeros(model.image_size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def masks_in(model, size, number, seed):
    """Random rectangles in an image, and at last one pixel, which vanishes at low resolution."""
    rng, masks = np.random.default_rng(seed), []
    for _ in range(number - 1):
        (y0, y1), (x0, x1) = (np.sort(rng.choice(s + 1, 2, replace=False)) for s in size)
        masks.append(rectangle(model, x0, y0, x1, y1))
    y, x = (int(rng.integers(s)) for s in size)
    return [*masks, rectangle(model, x, y, x + 1, y + 1)]


def rearranged(batch):
    """The images and their masks in another order, with fillers among them."""
    order, columns = [2, 0, 1], [3, 1, 0, 2]
    moved = jax.tree.map(lambda x: x[order], batch)
    n = batch.valid.shape[1]
    assert n == 4
    rng = np.random.default_rng(9)
    filler = {
        "masks": rng.integers(0, 256, (3, 2, *batch.masks.shape[2:]), np.uint8),
        "mask_id": np.arange(50, 56, dtype=np.int32).reshape(3, 2),
        "valid": np.zeros((3, 2), bool),
    }
    changed = {
        field: np.concatenate([more[:, :1], getattr(moved, field)[:, columns], more[:, 1:]], axis=1)
        for field, more in filler.items()
    }
    return moved.replace(**changed)
