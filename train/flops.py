"""Ideal FLOP counts of one image, by the formulas of the paper.

They count the operations of the reference implementation, padding of windows included, whatever a
program actually does. The model FLOPs utilization (MFU) of a program is this count over its time
and the peak of the chip. A multiplication and an addition are two FLOPs. Norms, softmax and
activations are left out, as is usual.
"""

from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.mask_decoder import NUM_MASK_TOKENS, NUM_OUTPUT_TOKENS
from sam_jax.model.sam import Sam
from sam_jax.model.two_way_transformer import CROSS_DOWNSAMPLE
from train.config import Interactive
from train.objectives.prompt_sampling import FIRST_SLOTS

# Peak FLOP/s in bfloat16 without sparsity by the start of `device_kind`. Source: data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of a device; None if it is unknown."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def encoder_flops(model: Sam) -> float:
    """Returns the forward FLOPs of the image encoder."""
    encoder, tokens = model.image_encoder, num_tokens(model)
    c, out = encoder.embed_dim, encoder.out_dim
    patches = 2 * tokens * c * 3 * model.patch_size**2
    blocks = sum(block_flops(model, i not in encoder.global_blocks) for i in range(encoder.depth))
    neck = 2 * tokens * c * out + 18 * tokens * out**2
    return float(patches + blocks + neck)


def block_flops(model: Sam, in_windows: bool) -> float:
    """Returns the forward FLOPs of one block of the image encoder."""
    encoder, grid = model.image_encoder, model.grid
    c = encoder.embed_dim
    height, width = (encoder.window_size,) * 2 if in_windows else grid
    windows = -(-grid[0] // height) * -(-grid[1] // width)
    area = height * width
    projections = 8 * windows * area * c * c
    products = 4 * windows * area * area * c
    positions = 2 * windows * area * (height + width) * c
    mlp = 4 * encoder.mlp_ratio * num_tokens(model) * c * c
    return float(projections + products + positions + mlp)


def num_tokens(model: Sam) -> int:
    """Returns the number of tokens of an image."""
    return model.grid[0] * model.grid[1]


def decoder_flops(model: Sam, prompt_tokens: int | float) -> float:
    """Returns the forward FLOPs of prompt encoder and mask decoder for one object.

    Args:
      model: The model.
      prompt_tokens: Tokens of points and boxes; a mask prompt is counted in addition.

    Returns:
      FLOPs of all masks of the object.
    """
    decoder, pixels = model.mask_decoder, num_tokens(model)
    c = decoder.dim
    tokens, inner = NUM_OUTPUT_TOKENS + prompt_tokens, c // CROSS_DOWNSAMPLE
    attention = 4 * (pixels + tokens) * c * inner + 4 * tokens * pixels * inner
    attention *= 2 * decoder.depth + 1
    block = 8 * tokens * c * c + 4 * tokens**2 * c + 4 * tokens * c * decoder.mlp_dim
    upscaling = 2 * pixels * c * c + 8 * pixels * (c // 4) * (c // 2)
    masks = 2 * 16 * pixels * (c // 8) * NUM_MASK_TOKENS
    heads = 2 * NUM_MASK_TOKENS * (2 * c * c + c * c // 8)
    m = model.prompt_encoder.mask_channels
    mask_prompt = 2 * pixels * (4 * m + m * m + m * c)
    return float(attention + decoder.depth * block + upscaling + masks + heads + mask_prompt)


def step_flops(model: Sam, config: Interactive) -> float:
    """Returns the FLOPs of a training step: encoder and all rounds, forward and backward."""
    return 3 * (encoder_flops(model) + config.masks_per_image * rounds_flops(model, config))


def reconstruction_flops(model: MaskedAutoencoder) -> float:
    """Returns the FLOPs of a training step of a masked autoencoder, forward and backward."""
    patches, p = model.grid[0] * model.grid[1], model.patch_size
    c, d = model.embed_dim, model.decoder_dim
    visible = 1 + model.num_visible
    encoder = 6 * patches * c * p**2 + model.depth * transformer_flops(visible, c, model.mlp_ratio)
    decoder = model.decoder_depth * transformer_flops(1 + patches, d, model.mlp_ratio)
    ends = 2 * visible * c * d + 6 * (1 + patches) * d * p**2
    return 3 * (encoder + decoder + ends)


def transformer_flops(tokens: int, c: int, mlp_ratio: int) -> float:
    """Returns the forward FLOPs of a block in which all tokens attend to all tokens."""
    return float((8 + 4 * mlp_ratio) * tokens * c * c + 4 * tokens**2 * c)


def rounds_flops(model: Sam, config: Interactive) -> float:
    """Returns the forward FLOPs of all rounds of one mask.

    The first of two extra rounds is inserted before a random click, so that its number of clicks is
    a mean.
    """
    clicks = list(range(config.num_clicks + 1))
    mean = sum(clicks) / max(1, config.num_clicks)
    if config.num_extra_rounds > 0:
        clicks.append(config.num_clicks)
    extra = [mean - 1] if config.num_extra_rounds == 2 else []
    return sum(decoder_flops(model, FIRST_SLOTS + n) for n in clicks + extra)
