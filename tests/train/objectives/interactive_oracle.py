"""The objective of `train.objectives.interactive` once more, as a plain loop.

One mask after the other, without scan and vmap, with all gradients by `jax.grad`. The loop shares
with the objective the model, the sampling of `train.objectives.prompt_sampling`, and the rule of
the keys.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD
from train.objectives.interactive import CLICK, DROP_PATH, DROPOUT, INSERTION
from train.objectives.prompt_sampling import sample_click_on_error, sample_first_prompt


def fold(key, *numbers):
    return functools.reduce(jax.random.fold_in, numbers, key)


def upsample(x, scale):
    """'... h w' at `scale` times the resolution, bilinear, pixel centres at +0.5."""
    for axis in (-2, -1) if scale > 1 else ():
        size = x.shape[axis]
        at = np.clip((np.arange(scale * size) + 0.5) / scale - 0.5, 0, size - 1)
        weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
        x = jnp.moveaxis(jnp.tensordot(x, weights.astype(np.float32), (axis, 1)), -1, axis)
    return x


@functools.cache
def pieces(jit, model, train):
    """The compiled pieces of `plain`; of the first three `jax.grad` knows the gradients."""

    def encode(variables, image, key):
        rngs = {"drop_path": key}
        return model.apply(variables, image[None], train, rngs=rngs, method="encode")[0]

    def decode(inputs, clicks, has_mask, key):
        variables, embedding, mask = inputs
        prompts = Prompts(clicks.points, clicks.labels, mask, has_mask)
        prompts = jax.tree.map(lambda x: x[None, None], prompts)
        rngs = {"dropout": key}
        masks = model.apply(variables, embedding[None], prompts, train, rngs=rngs, method="decode")
        return masks.logits[0, 0], masks.iou[0, 0]

    def measure(logits, target):
        """Focal loss, dice loss and IoU of outputs 'm lh lw': 'm' each."""
        t = jnp.broadcast_to(target, logits.shape).astype(jnp.float32)
        focal = optax.losses.sigmoid_focal_loss(logits, t, alpha=0.25, gamma=2.0).mean((1, 2))
        dice = optax.losses.dice_loss(
            logits[..., None], t[..., None], smooth=0.5, axis=(-3, -2), reduction="none"
        )[:, 0]
        both, either = (logits > 0) & target, (logits > 0) | target
        return focal, dice, both.sum((1, 2)) / jnp.maximum(1, either.sum((1, 2)))

    def differentiable(f):
        """Compiles f and its gradient by its first argument."""
        run, whole = jit(f), jax.custom_vjp(f)
        pull = jit(lambda args, g: jax.vjp(lambda x: f(x, *args[1:]), args[0])[1](g)[0])
        forward = lambda *args: (run(*args), args)
        whole.defvjp(forward, lambda args, g: (pull(args, g), *[None] * (len(args) - 1)))
        return whole

    return SimpleNamespace(
        encode=differentiable(encode),
        decode=differentiable(decode),
        measure=differentiable(measure),
        first_prompt=jit(sample_first_prompt, static_argnames=("num_slots", "box_noise")),
        click_on_error=jit(sample_click_on_error, static_argnums=5),
    )


def judge(config, focal, dice, truth, iou):
    """The values of a round from those of its outputs 'm', and which of them goes on."""
    error = jnp.abs(iou - truth) if config.iou_loss == "l1" else (iou - truth) ** 2
    best, chosen = jnp.argmin(config.focal * focal + config.dice * dice), jnp.argmax(iou)
    values = {
        "focal": focal[best],
        "dice": dice[best],
        "iou": jnp.mean(error) if config.iou_supervision == "all" else error[best],
        "miou": truth[chosen],
    }
    parts = {"focal": config.focal, "dice": config.dice, "iou": config.iou}
    return values | {"loss": sum(w * values[part] for part, w in parts.items())}, chosen


def cells_of(model, config, mask, size):
    """The target, and the cells whose centre is in the image or that it holds: 'lh lw' bool."""
    cell = model.patch_size // (4 * config.loss_scale)
    rows, columns = (range(0, side, cell) for side in model.image_size)
    parts = np.array([[mask[y : y + cell, x : x + cell].mean() for x in columns] for y in rows])
    target = parts >= 0.5
    target = target if target.any() else parts > 0
    middle = cell / 2
    inside = [[y + middle <= size[0] and x + middle <= size[1] for x in columns] for y in rows]
    return target, np.array(inside) | target


def normalized(image, size):
    """'h w 3' uint8: colours are normalised first, what is padding is set to zero then."""
    rows, columns = (np.arange(side) for side in image.shape[:2])
    inside = (rows[:, None] < size[0]) & (columns < size[1])
    colors = (image - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return jnp.where(inside[..., None], colors, 0)


def unpack(model, batch):
    return np.unpackbits(batch.masks, axis=-1, count=model.image_size[1]).astype(bool)


def plain(jit, model, config, train=True):
    """Computes what `InteractiveObjective` does, as a plain loop."""
    do = pieces(jit, model, train)
    rounds = 1 + config.num_clicks + config.num_extra_rounds
    cell = model.patch_size // (4 * config.loss_scale)
    low = tuple(4 * side // model.patch_size for side in model.image_size)

    def play(variables, embedding, mask, size, key):
        target, inside = cells_of(model, config, mask, size)
        nothing_new = set()
        if config.num_extra_rounds >= 1:
            nothing_new.add(rounds - 1)
        if config.num_extra_rounds == 2:
            k = jax.random.randint(fold(key, INSERTION), (), 0, config.num_clicks)
            nothing_new.add(1 + int(k))
        slots = 2 + config.num_clicks
        clicks = do.first_prompt(
            fold(key, CLICK, 0), mask, size, num_slots=slots, box_noise=config.box_noise
        )
        sampled, before, values = 0, jnp.zeros(low), []
        for r in range(rounds):
            if r > 0 and r not in nothing_new:
                shown = upsample(jax.lax.stop_gradient(before), config.loss_scale)
                clicks = do.click_on_error(fold(key, CLICK, r), clicks, shown, target, inside, cell)
                sampled += 1
            inputs, dropout = (variables, embedding, before), fold(key, DROPOUT, r)
            logits, iou = do.decode(inputs, clicks, jnp.array(r > 0), dropout)
            one_prompt = r == 0 or (config.multimask_extra and sampled == 0)
            outputs = slice(1, 4) if config.multimask and one_prompt else slice(0, 1)
            scaled = upsample(logits[outputs], config.loss_scale)
            value, chosen = judge(config, *do.measure(scaled, target), iou[outputs])
            values.append(value)
            before = logits[outputs][chosen]
            if config.detach_mask:
                before = jax.lax.stop_gradient(before)
        return jax.tree.map(lambda *x: jnp.stack(x), *values)

    def objective(params, constants, batch, key):
        variables = {"params": params, "constants": constants}
        masks, values = unpack(model, batch), []
        for b, size in enumerate(batch.size):
            image_key = fold(key, batch.image_id[b])
            image = normalized(batch.image[b], size)
            embedding = do.encode(variables, image, fold(image_key, DROP_PATH))
            for n in np.flatnonzero(batch.valid[b]):
                key_of_mask = fold(image_key, batch.mask_id[b, n])
                values.append(play(variables, embedding, masks[b, n], size, key_of_mask))
        values = jax.tree.map(lambda *x: sum(x) / len(x), *values)
        return jnp.mean(values["loss"]), values

    return objective
