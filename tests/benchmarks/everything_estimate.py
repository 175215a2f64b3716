"""Estimates everything mode on TPUs: `python -m tests.benchmarks.everything_estimate`.

The number of iterations of its loops depends on the image, so that no compiler knows it. The
programs of one iteration are compiled, and their estimated times are multiplied for an image of
1500 x 2250 pixels with 1024 points. Three in five points give a mask with a high predicted IoU, a
point gives 1.2 such masks on average, each of them reaches into TILES tiles, and 100 masks remain.
Needs the extra [tpu].
"""

import os

if __name__ == "__main__":  # before JAX is imported
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }

import argparse
import functools

import jax
import jax.numpy as jnp

import sam_jax
from sam_jax.everything.candidates import UPSCALED, prompts_of
from sam_jax.everything.tiled_resize import BATCH, make_matrices, measure_tiles, tile_image
from sam_jax.model.mask_decoder import NUM_MASKS
from sam_jax.model.ops.platform import traced_for
from sam_jax.weights.convert import initialize
from train.aot.hlo_cost import estimate_cost
from train.aot.lower import devices_of, lower_on_first

SIZE = (1500, 2250)
POINTS, CHUNK = 1024, 64
GOOD_POINTS, GOOD_MASKS = 0.6, 1.2  # share of the points, and masks of a point
TILES = 40  # of 216 that a mask reaches into
FINAL_MASKS = 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--model", default="sam_vit_h")
    args = parser.parse_args()
    devices, chip = devices_of(args.topology)
    model = getattr(sam_jax, args.model)(dtype="bfloat16")
    seconds = {}
    with traced_for("tpu"):
        for name, (program, *shapes) in programs(model).items():
            compiled = lower_on_first(devices, program, *shapes).compile()
            cost = estimate_cost(compiled.as_text(), chip, {})
            assert not cost.unmodelled_kernels, cost.unmodelled_kernels
            seconds[name] = cost.total_seconds

    iterations = {
        "encode": 1,
        "attend": (POINTS + FINAL_MASKS) / CHUNK,
        "upscale": (GOOD_POINTS * POINTS + FINAL_MASKS) / UPSCALED["tpu"],
        "measure": (GOOD_MASKS * POINTS + FINAL_MASKS) * TILES / BATCH["tpu"],
    }
    print(f"{args.model} on {args.topology}, one image on one device")
    total = 0.0
    for name, count in iterations.items():
        product = count * seconds[name]
        total += product
        print(f"{name:8}{1e3 * seconds[name]:9.3f} ms, {count:6.1f} times: {1e3 * product:6.1f} ms")
    print(f"{'total':8}{1e3 * total:9.1f} ms: {1 / total:.1f} images/s a device")


def programs(model):
    """Returns {name: (a function, the shapes of its arguments)}."""
    struct = jax.ShapeDtypeStruct
    gh, gw = (side // model.patch_size for side in model.image_size)
    low, dtype, c = (4 * gh, 4 * gw), jnp.dtype(model.dtype), model.prompt_dim
    variables = jax.eval_shape(functools.partial(initialize, model, 0))
    encode = functools.partial(model.apply, method="encode")

    def attend(variables, embedding, points):
        return model.apply(variables, embedding, prompts_of(points), method="attend")

    upscale = functools.partial(model.apply, gh=gh, method="upscale")
    tiling = tile_image(SIZE, low, model.image_size)
    tiling = jax.tree.map(lambda x: struct(x.shape, x.dtype), tiling)
    measure = functools.partial(measure_tiles, offset=1.0)
    n = UPSCALED["tpu"]
    return {
        "encode": (encode, variables, struct((1, *model.image_size, 3), jnp.float32)),
        "attend": (
            attend,
            variables,
            struct((1, gh, gw, c), dtype),
            struct((CHUNK, 2), jnp.float32),
        ),
        "upscale": (
            upscale,
            variables,
            struct((1, n, gh * gw, c), dtype),
            struct((1, n, NUM_MASKS, c // 8), dtype),
        ),
        "measure": (
            measure,
            struct((3 * CHUNK, *low), jnp.float32),
            *[struct((BATCH["tpu"],), jnp.int32)] * 3,
            tiling,
            jax.eval_shape(make_matrices, tiling),
        ),
    }


if __name__ == "__main__":
    main()
