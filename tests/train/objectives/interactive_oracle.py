"""A reference implementation of `train.objectives.interactive` in plain Python loops.

It processes one mask at a time, without scan and vmap, and `jax.grad` computes all gradients. It
shares with the objective the model, the sampling functions of `train.objectives.prompt_sampling`
and the scheme of the random keys.
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
    """Upsamples '... h w' by `scale`: bilinear, with pixel centers at +0.5."""
    for axis in (-2, -1) if scale > 1 else ():
        size = x.shape[axis]
        positions = np.clip((np.arange(scale * size) + 0.5) / scale - 0.5, 0, size - 1)
        weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(size)))
        x = jnp.moveaxis(jnp.tensordot(x, weights.astype(np.float32), (axis, 1)), -1, axis)
    return x


@functools.cache
def compile_functions(jit, model, train):
    """Compiles the functions that `make_reference` calls.

    `jax.grad` can differentiate "encode", "decode" and "mask_metrics".
    """

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

    def mask_metrics(logits, target):
        """Returns the focal losses, the dice losses and the IoUs 'm' of outputs 'm lh lw'."""
        t = jnp.broadcast_to(target, logits.shape).astype(jnp.float32)
        focal = optax.losses.sigmoid_focal_loss(logits, t, alpha=0.25, gamma=2.0).mean((1, 2))
        dice = optax.losses.dice_loss(
            logits[..., None], t[..., None], smooth=0.5, axis=(-3, -2), reduction="none"
        )[:, 0]
        intersection, union = (logits > 0) & target, (logits > 0) | target
        return focal, dice, intersection.sum((1, 2)) / jnp.maximum(1, union.sum((1, 2)))

    def differentiable(f):
        """Compiles f and its vector-Jacobian product with respect to the first argument."""
        compiled_f, f_with_vjp = jit(f), jax.custom_vjp(f)

        @jit
        def vjp(args, cotangent):
            return jax.vjp(lambda x: f(x, *args[1:]), args[0])[1](cotangent)[0]

        def forward(*args):
            return compiled_f(*args), args

        def backward(args, cotangent):
            return vjp(args, cotangent), *[None] * (len(args) - 1)

        f_with_vjp.defvjp(forward, backward)
        return f_with_vjp

    return SimpleNamespace(
        encode=differentiable(encode),
        decode=differentiable(decode),
        mask_metrics=differentiable(mask_metrics),
        first_prompt=jit(sample_first_prompt, static_argnames=("num_slots", "box_noise")),
        sample_click_on_error=jit(sample_click_on_error, static_argnums=5),
    )


def round_values(config, focal, dice, true_iou, predicted_iou):
    """Computes the values of a round from those of its outputs 'm'.

    Returns:
      The values, and the index of the output that becomes the next mask prompt.
    """
    difference = predicted_iou - true_iou
    error = jnp.abs(difference) if config.iou_loss == "l1" else difference**2
    best, chosen = jnp.argmin(config.focal * focal + config.dice * dice), jnp.argmax(predicted_iou)
    values = {
        "focal": focal[best],
        "dice": dice[best],
        "iou": jnp.mean(error) if config.iou_supervision == "all" else error[best],
        "miou": true_iou[chosen],
    }
    weights = {"focal": config.focal, "dice": config.dice, "iou": config.iou}
    return values | {"round_loss": sum(w * values[name] for name, w in weights.items())}, chosen


def target_and_inside(model, config, mask, size):
    """Returns the target of a mask and the allowed pixels of clicks, at the loss's resolution.

    Clicks are allowed on pixels whose center is in the image, and on the target. Both results are
    'lh lw' bool.
    """
    stride = model.patch_size // (4 * config.loss_scale)
    rows, columns = (range(0, side, stride) for side in model.image_size)
    fraction = np.array(
        [[mask[y : y + stride, x : x + stride].mean() for x in columns] for y in rows]
    )
    target = fraction >= 0.5
    target = target if target.any() else fraction > 0
    half = stride / 2
    inside = [[y + half <= size[0] and x + half <= size[1] for x in columns] for y in rows]
    return target, np.array(inside) | target


def normalize(image, size):
    """Normalizes the colors of an image 'h w 3' uint8 and then sets the padding to zero."""
    rows, columns = (np.arange(side) for side in image.shape[:2])
    inside = (rows[:, None] < size[0]) & (columns < size[1])
    colors = (image - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return jnp.where(inside[..., None], colors, 0)


def unpack_masks(model, batch):
    """Returns the masks 'b n h w' bool of a batch."""
    return np.unpackbits(batch.masks, axis=-1, count=model.image_size[1]).astype(bool)


def make_reference(jit, model, config, train=True):
    """Returns a function with the results of `InteractiveObjective`, in plain Python loops."""
    functions = compile_functions(jit, model, train)
    rounds = 1 + config.num_clicks + config.num_extra_rounds
    stride = model.patch_size // (4 * config.loss_scale)
    low_res = tuple(4 * side // model.patch_size for side in model.image_size)

    def run_rounds(variables, embedding, mask, size, key):
        target, inside = target_and_inside(model, config, mask, size)
        without_click = set()
        if config.num_extra_rounds >= 1:
            without_click.add(rounds - 1)
        if config.num_extra_rounds == 2:
            k = jax.random.randint(fold(key, INSERTION), (), 0, config.num_clicks)
            without_click.add(1 + int(k))
        slots = 2 + config.num_clicks
        clicks = functions.first_prompt(
            fold(key, CLICK, 0), mask, size, num_slots=slots, box_noise=config.box_noise
        )
        num_sampled, mask_prompt, values = 0, jnp.zeros(low_res), []
        for r in range(rounds):
            if r > 0 and r not in without_click:
                prediction = upsample(jax.lax.stop_gradient(mask_prompt), config.loss_scale)
                clicks = functions.sample_click_on_error(
                    fold(key, CLICK, r), clicks, prediction, target, inside, stride
                )
                num_sampled += 1
            inputs, dropout = (variables, embedding, mask_prompt), fold(key, DROPOUT, r)
            logits, iou = functions.decode(inputs, clicks, jnp.array(r > 0), dropout)
            one_prompt = r == 0 or (config.multimask_extra and num_sampled == 0)
            outputs = slice(1, 4) if config.multimask and one_prompt else slice(0, 1)
            scaled = upsample(logits[outputs], config.loss_scale)
            metrics = functions.mask_metrics(scaled, target)
            value, chosen = round_values(config, *metrics, iou[outputs])
            values.append(value)
            mask_prompt = logits[outputs][chosen]
            if config.detach_mask:
                mask_prompt = jax.lax.stop_gradient(mask_prompt)
        return jax.tree.map(lambda *x: jnp.stack(x), *values)

    def objective(params, constants, batch, key):
        variables = {"params": params, "constants": constants}
        masks, values = unpack_masks(model, batch), []
        for b, size in enumerate(batch.size):
            image_key = fold(key, batch.image_id[b])
            image = normalize(batch.image[b], size)
            embedding = functions.encode(variables, image, fold(image_key, DROP_PATH))
            for n in np.flatnonzero(batch.valid[b]):
                mask_key = fold(image_key, batch.mask_id[b, n])
                values.append(run_rounds(variables, embedding, masks[b, n], size, mask_key))
        values = jax.tree.map(lambda *x: sum(x) / len(x), *values)
        return jnp.mean(values["round_loss"]), values

    return objective
