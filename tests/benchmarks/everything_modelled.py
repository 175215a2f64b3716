"""What everything mode would cost on TPUs: `python -m tests.benchmarks.everything_modelled`.

Its loops run as often as an image needs, which no compiler knows. So the programs of one turn are
compiled, and their modelled times multiplied: for an image of 1500 x 2250 and 1024 points, of which
three in five give a mask that is predicted to be good, 1.2 such masks a point, each reaching into
TILES tiles, and 100 masks in the end. Needs the extra [tpu].
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
from train.aot.hlo_cost import model_program
from train.aot.lower import devices_of, on_one

SIZE = (1500, 2250)
POINTS, CHUNK = 1024, 64
GOOD_POINTS, GOOD_MASKS = 0.6, 1.2  # a point
TILES = 40  # of 216, that a mask reaches into
KEPT = 100


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
            found = model_program(on_one(devices, program, *shapes).compile().as_text(), chip, {})
            assert not found.unbounded, found.unbounded
            seconds[name] = sum(found.seconds.values()) + sum(found.kernel_seconds.values())

    turns = {
        "encode": 1,
        "attend": (POINTS + KEPT) / CHUNK,
        "upscale": (GOOD_POINTS * POINTS + KEPT) / TUNINGS["tpu"].prompts_per_upscaling,
        "measure": (GOOD_MASKS * POINTS + KEPT) * TILES / TUNINGS["tpu"].tiles_per_measurement,
    }
    print(f"{args.model} on {args.topology}, an image on one device")
    for name, turn in turns.items():
        whole = turn * seconds[name]
        print(f"{name:8}{1e3 * seconds[name]:9.3f} ms, {turn:6.1f} times: {1e3 * whole:6.1f} ms")
    total = sum(turn * seconds[name] for name, turn in turns.items())
    print(f"{'all':8}{1e3 * total:9.1f} ms: {1 / total:.1f} images/s a device")


def programs(model):
    """{name: (a function, the shapes of its arguments)}."""
    like = jax.ShapeDtypeStruct
    gh, gw = (side // model.patch_size for side in model.image_size)
    low, dtype, c = (4 * gh, 4 * gw), jnp.dtype(model.dtype), model.embedding_dim
    variables = jax.eval_shape(functools.partial(init_variables, model, 0))
    encode = functools.partial(model.apply, method="encode")
    attend = lambda variables, embedding, points: model.apply(
        variables, embedding, point_prompts(points), method="decode_tokens"
    )
    upscale = functools.partial(model.apply, gh=gh, method="upscale_masks")
    tiling = plan_tiles(SIZE, low, model.image_size, TUNINGS["tpu"].window)
    tiling = jax.tree.map(lambda x: like(x.shape, x.dtype), tiling)
    measure = functools.partial(measure_tiles, offset=1.0)
    n = TUNINGS["tpu"].prompts_per_upscaling
    return {
        "encode": (encode, variables, like((1, *model.image_size, 3), jnp.float32)),
        "attend": (
            attend,
            variables,
            like((1, gh, gw, c), dtype),
            like((CHUNK, 2), jnp.float32),
        ),
        "upscale": (
            upscale,
            variables,
            like((1, n, gh * gw, c), dtype),
            like((1, n, NUM_MASK_TOKENS, c // 8), dtype),
        ),
        "measure": (
            measure,
            like((3 * CHUNK, *low), jnp.float32),
            *[like((TUNINGS["tpu"].tiles_per_measurement,), jnp.int32)] * 3,
            tiling,
            jax.eval_shape(make_matrices, tiling),
        ),
    }


if __name__ == "__main__":
    main()
