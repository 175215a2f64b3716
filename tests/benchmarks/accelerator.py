"""Times SAM on the local accelerator: `python -m tests.benchmarks.accelerator`.

It first times a matrix product and a copy, which show the speed that the chip reaches. Then it
times, in bfloat16 and with random weights:
- the image encoder, alternating with that of transformers if PyTorch supports the chip; the encoder
  of transformers uses PyTorch's fused attention, eager or compiled;
- the mask decoder for 64 prompts on one embedding;
- everything mode on a photo with 1024 points. Two photos are processed at a time, as in
  `sam-jax everything`. The thresholds are those of `tests.benchmarks.everything`, and the masks are
  returned as run lengths;
- a training step of 64 masks and eleven rounds.

All figures are medians. The model FLOPs utilization (MFU) is the number of FLOPs of the reference
implementation (`train.flops`), divided by the time and by the peak FLOP/s of the chip.
"""

import argparse
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import sam_jax
from sam_jax.model.init import init_variables
from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import sam_vit_b, sam_vit_h, sam_vit_l
from tests.benchmarks.everything import thresholds_of
from train.config import Interactive, Optimizer
from train.flops import decoder_flops, encoder_flops, peak_flops, step_flops
from train.objectives.interactive import InteractiveObjective
from train.optimizer import make_optimizer
from train.sharding import init_sharded, make_mesh
from train.state import init_state
from train.step import make_step

SIZES = {"b": sam_vit_b, "l": sam_vit_l, "h": sam_vit_h}
PROMPT_TOKENS = 2
REPEATS = 5

print_now = functools.partial(print, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--everything", nargs="*", choices=SIZES, default=["b", "h"])
    parser.add_argument("--train", nargs="*", choices=SIZES, default=["b", "h"])
    parser.add_argument("--train-images", type=int, default=1)
    parser.add_argument("--chunks", nargs="+", type=int, default=[64])
    parser.add_argument("--torch", nargs="*", choices=["eager", "compiled"], default=["eager"])
    args = parser.parse_args()

    kind = jax.devices()[0].device_kind
    print_now(f"{kind}, jax {jax.__version__}")
    product, bandwidth = measure_peaks()
    print_now(f"product 8192^3 {product / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")
    peak = peak_flops(kind) or product
    for size in args.sizes:
        for batch in args.batches:
            time_encoder(size, batch, args.torch, peak)
        time_decoder(size, peak)
    for size in args.everything:
        time_everything(size)
    for size in args.train:
        for chunk in args.chunks:
            time_step(size, args.train_images, chunk, peak)


def median_seconds(functions, repeats=REPEATS):
    """Returns {name: median seconds} of functions that block until their results are ready.

    In each repetition, the functions are timed one after the other.
    """
    for f in functions.values():
        f()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure_peaks():
    """Returns the FLOP/s of a bfloat16 matrix product and the bandwidth of a copy in bytes/s."""
    n, runs = 8192, 10
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    products = jax.jit(lambda a, b: jax.lax.fori_loop(0, runs, lambda _, x: (x @ b) / 90, a))
    x = jnp.zeros((2**29,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = median_seconds(
        {
            "product": lambda: products(a, b).block_until_ready(),
            "copy": lambda: copy(x).block_until_ready(),
        }
    )
    return 2 * n**3 * runs / seconds["product"], 2 * x.nbytes / seconds["copy"]


@functools.cache
def make_model(size):
    model = SIZES[size](dtype="bfloat16")
    return model, jax.jit(init_variables, static_argnums=(0, 1))(model, 0)


def time_encoder(size, batch, torch_modes, peak):
    model, variables = make_model(size)
    image = jnp.zeros((batch, *model.image_size, 3))
    encode = jax.jit(functools.partial(model.apply, method="encode"))
    functions = {"sam_jax": lambda: encode(variables, image).block_until_ready()}
    for mode in torch_modes:
        try:
            functions[f"transformers {mode}"] = transformers_encoder(size, batch, mode)
        # PyTorch may be missing, lack support for the chip, or run out of memory.
        except Exception as error:
            print_now(f"  transformers {mode}: {str(error).splitlines()[0]}")
    for name, seconds in median_seconds(functions).items():
        mfu = batch * encoder_flops(model) / seconds / peak
        print_now(
            f"encoder {size}, {batch} images, {name}: {1e3 * seconds:.1f} ms, "
            f"{batch / seconds:.1f} images/s, MFU {mfu:.1%}"
        )


@functools.cache
def transformers_model(size, mode):
    import torch
    import transformers

    model = SIZES[size]()
    config = transformers.SamVisionConfig(
        hidden_size=model.image_encoder.embed_dim,
        num_hidden_layers=model.image_encoder.depth,
        num_attention_heads=model.image_encoder.num_heads,
        global_attn_indexes=list(model.image_encoder.global_blocks),
        attn_implementation="sdpa",
    )
    encoder = transformers.SamVisionModel(config).to("cuda", torch.bfloat16).eval()
    return torch.compile(encoder) if mode == "compiled" else encoder


def transformers_encoder(size, batch, mode):
    import torch

    encoder = transformers_model(size, mode)
    image = torch.zeros(batch, 3, 1024, 1024, device="cuda", dtype=torch.bfloat16)

    def run():
        with torch.inference_mode():
            encoder(image)
        torch.cuda.synchronize()

    run()
    return run


def time_decoder(size, peak, n=64):
    model, variables = make_model(size)
    gh, gw = (side // model.patch_size for side in model.image_size)
    embedding = jnp.zeros((1, gh, gw, model.embedding_dim))
    prompts = Prompts(
        points=jnp.ones((1, n, PROMPT_TOKENS, 2)), labels=jnp.ones((1, n, PROMPT_TOKENS), int)
    )
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    seconds = median_seconds(
        {"sam_jax": lambda: jax.block_until_ready(decode(variables, embedding, prompts))}
    )["sam_jax"]
    mfu = n * decoder_flops(model, PROMPT_TOKENS) / seconds / peak
    print_now(
        f"decoder {size}, {n} prompts: {1e3 * seconds:.1f} ms, {n / seconds:.0f} prompts/s, "
        f"MFU {mfu:.1%}"
    )


def time_everything(size, photos=8):
    model, variables = make_model(size)
    photo = np.random.default_rng(0).integers(0, 256, (1500, 2250, 3), np.uint8)
    iou, stability = thresholds_of(model, variables, photo)
    generator = sam_jax.SamAutomaticMaskGenerator(
        model,
        variables,
        pred_iou_thresh=iou,
        stability_score_thresh=stability,
        box_nms_thresh=1.0,
        output_mode="coco_rle",
    )
    count = len(generator.generate(photo))

    def run():
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(generator.generate, [photo] * photos))

    seconds = median_seconds({"sam_jax": run})["sam_jax"] / photos
    print_now(
        f"everything {size}, 1024 points, {count} masks: {1e3 * seconds:.0f} ms, "
        f"{1 / seconds:.1f} images/s"
    )


def time_step(size, images, chunk, peak):
    rates = {"drop_path": 0.4, "dropout": 0.1}
    model = SIZES[size](remat="none", dtype="bfloat16", **rates)
    config = Interactive(masks_per_chunk=chunk)
    optimizer = make_optimizer(Optimizer(), model.image_encoder.depth)
    mesh = make_mesh(images, devices=jax.devices()[:1])
    state = init_sharded(mesh, lambda: init_state(init_variables(model, 0), optimizer))
    step = make_step(InteractiveObjective(model, config), optimizer, 0, mesh, state, model.dtype)
    batch = random_batch(model, images, config.masks_per_image)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    states = [state]

    def run():
        state, values = compiled(states.pop(), batch)
        jax.block_until_ready(values)
        states.append(state)

    seconds = median_seconds({"sam_jax": run})["sam_jax"]
    memory = compiled.memory_analysis()
    num_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    mfu = images * step_flops(model, config) / seconds / peak
    print_now(
        f"training step {size}, {images} images of {config.masks_per_image} masks, "
        f"chunks of {chunk}: "
        f"{1e3 * seconds:.0f} ms, {images / seconds:.2f} images/s, MFU {mfu:.1%}, "
        f"{num_bytes / 2**30:.1f} GiB, compiled in {compile_seconds:.0f} s"
    )


def random_batch(model, images, masks):
    """Returns a `Batch` of noise images with discs as masks."""
    from sam_jax.data.segmentation_batch import Batch

    rng = np.random.default_rng(0)
    h, w = model.image_size
    y, x = np.mgrid[:h, :w]
    bits = np.zeros((images, masks, h, w // 8), np.uint8)
    for i in range(images):
        for j in range(masks):
            cy, cx, radius = rng.uniform((100, 100, 10), (900, 900, 100))
            bits[i, j] = np.packbits((y - cy) ** 2 + (x - cx) ** 2 < radius**2, axis=-1)
    return Batch(
        image=rng.integers(0, 256, (images, h, w, 3), np.uint8),
        size=np.full((images, 2), (h, w), np.int32),
        image_id=np.arange(images, dtype=np.int32),
        masks=bits,
        mask_id=np.tile(np.arange(masks, dtype=np.int32), (images, 1)),
        valid=np.ones((images, masks), bool),
    )


if __name__ == "__main__":
    main()
