"""Estimates everything mode on TPUs: `python -m tests.benchmarks.everything_estimate`.

The number of iterations of its loops depends on the image, so the compiler cannot estimate the
total time. This script compiles the programs of one iteration. It multiplies their estimated times
by numbers of iterations for an image of 1500 x 2250 pixels with 1024 points. It assumes that three
in five points have a mask with a high predicted IoU, that a point has 1.2 such masks on average,
that each of them overlaps with TILES tiles, and that 100 masks remain. It needs the extra [tpu].
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
from sam_jax.everything.candidates import point_prompts
from sam_jax.everything.tiled_resize import make_matrices, measure_tiles
from sam_jax.everything.tiling import plan_tiles
from sam_jax.everything.tuning import TUNINGS
from sam_jax.model.init import init_variables
from sam_jax.model.mask_decoder import NUM_MASK_TOKENS
from sam_jax.model.ops.platform import traced_for
from train.aot.hlo_cost import estimate_cost
from train.aot.lower import devices_of, lower_on_first

SIZE = (1500, 2250)
POINTS, CHUNK = 1024, 64
GOOD_POINTS, GOOD_MASKS = 0.6, 1.2  # share of points with a good mask, and good masks per point
TILES = 40  # that a mask overlaps with, of 216 tiles
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
            assert not cost.unmodeled_kernels, cost.unmodeled_kernels
            seconds[name] = cost.total_seconds

    tuning = TUNINGS["tpu"]
    iterations = {
        "encode": 1,
        "decode_tokens": (POINTS + FINAL_MASKS) / CHUNK,
        "upscale": (GOOD_POINTS * POINTS + FINAL_MASKS) / tuning.prompts_per_upscaling,
        "measure": (GOOD_MASKS * POINTS + FINAL_MASKS)
        * TILES
        / TUNINGS["tpu"].tiles_per_measurement,
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
    (gh, gw), low_res = model.grid, model.low_res
    dtype, c = jnp.dtype(model.dtype), model.embedding_dim
    variables = jax.eval_shape(functools.partial(init_variables, model, 0))
    encode = functools.partial(model.apply, method="encode")

    def decode_tokens(variables, embedding, points):
        return model.apply(variables, embedding, point_prompts(points), method="decode_tokens")

    upscale = functools.partial(model.apply, gh=gh, method="upscale_masks")
    tiling = plan_tiles(SIZE, low_res, model.image_size, TUNINGS["tpu"].window)
    tiling = jax.tree.map(lambda x: struct(x.shape, x.dtype), tiling)
    measure = functools.partial(measure_tiles, offset=1.0)
    n = TUNINGS["tpu"].prompts_per_upscaling
    return {
        "encode": (encode, variables, struct((1, *model.image_size, 3), jnp.float32)),
        "decode_tokens": (
            decode_tokens,
            variables,
            struct((1, gh, gw, c), dtype),
            struct((CHUNK, 2), jnp.float32),
        ),
        "upscale": (
            upscale,
            variables,
            struct((1, n, gh * gw, c), dtype),
            struct((1, n, NUM_MASK_TOKENS, c // 8), dtype),
        ),
        "measure": (
            measure,
            struct((3 * CHUNK, *low_res), jnp.float32),
            *[struct((TUNINGS["tpu"].tiles_per_measurement,), jnp.int32)] * 3,
            tiling,
            jax.eval_shape(make_matrices, tiling),
        ),
    }


if __name__ == "__main__":
    main()
