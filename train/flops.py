"""What the work costs: multiplications and additions of the paper's formulas, one image.

They are those of the reference implementation, padding of windows included, however a program does
the work; a program's model FLOPs utilisation (MFU) is these over its time and the chip's peak. A
product and a sum are two. Norms, softmax and activations are left out, as is usual.
"""

from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.mask_decoder import NUM_MASK_TOKENS
from sam_jax.model.sam import Sam
from train.config import Interactive

# Peaks of devices in bfloat16, dense, by what `device_kind` begins with; by their datasheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
OUTPUTS = 1 + NUM_MASK_TOKENS  # tokens that are read: of the IoUs, and of each mask
FIRST = 2  # tokens of the first prompt: two corners, or a click and the padding point
CROSS = 2  # channels of the decoder over those of its attention between tokens and image


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device, if it is known."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def encoder_flops(model: Sam) -> float:
    """Of the image encoder, forward."""
    encoder, tokens = model.image_encoder, tokens_of(model)
    c, out = encoder.embed_dim, encoder.out_dim
    patches = 2 * tokens * c * 3 * model.patch_size**2
    blocks = sum(block_flops(model, i not in encoder.global_blocks) for i in range(encoder.depth))
    neck = 2 * tokens * c * out + 18 * tokens * out**2
    return patches + blocks + neck


def block_flops(model: Sam, in_windows: bool) -> float:
    """Of one of the image encoder's blocks, forward."""
    encoder, grid = model.image_encoder, model.grid
    c = encoder.embed_dim
    height, width = (encoder.window_size,) * 2 if in_windows else grid
    windows = -(-grid[0] // height) * -(-grid[1] // width)
    area = height * width
    projections = 8 * windows * area * c * c
    products = 4 * windows * area * area * c
    positions = 2 * windows * area * (height + width) * c
    return projections + products + positions + 4 * encoder.mlp_ratio * tokens_of(model) * c * c


def tokens_of(model: Sam) -> int:
    """How many tokens an image has."""
    return model.grid[0] * model.grid[1]


def decoder_flops(model: Sam, prompt_tokens: float) -> float:
    """Of the prompt encoder and the mask decoder, forward, for one mask with a mask prompt."""
    decoder, pixels = model.mask_decoder, tokens_of(model)
    c = decoder.dim
    tokens, inner = OUTPUTS + prompt_tokens, c // CROSS
    attention = 4 * (pixels + tokens) * c * inner + 4 * tokens * pixels * inner
    attention *= 2 * decoder.depth + 1
    block = 8 * tokens * c * c + 4 * tokens**2 * c + 4 * tokens * c * decoder.mlp_dim
    upscaling = 2 * pixels * c * c + 8 * pixels * (c // 4) * (c // 2)
    masks = 2 * 16 * pixels * (c // 8) * NUM_MASK_TOKENS
    heads = 2 * NUM_MASK_TOKENS * (2 * c * c + c * c // 8)
    m = model.prompt_encoder.mask_channels
    mask_prompt = 2 * pixels * (4 * m + m * m + m * c)
    return attention + decoder.depth * block + upscaling + masks + heads + mask_prompt


def step_flops(model: Sam, config: Interactive) -> float:
    """Of a training step: the encoder, and every round of every mask, forward and backward."""
    return 3 * (encoder_flops(model) + config.masks_per_image * rounds_flops(model, config))


def reconstruction_flops(model: MaskedAutoencoder) -> float:
    """Of a training step of a masked autoencoder: one image, forward and backward."""
    patches, p = model.grid[0] * model.grid[1], model.patch_size
    c, d = model.embed_dim, model.decoder_dim
    visible = 1 + model.num_visible
    encoder = 6 * patches * c * p**2 + model.depth * transformer_flops(visible, c, model.mlp_ratio)
    decoder = model.decoder_depth * transformer_flops(1 + patches, d, model.mlp_ratio)
    ends = 2 * visible * c * d + 6 * (1 + patches) * d * p**2
    return 3 * (encoder + decoder + ends)


def transformer_flops(tokens: int, c: int, mlp_ratio: int) -> float:
    """Of a block in which all tokens attend to all."""
    return (8 + 4 * mlp_ratio) * tokens * c * c + 4 * tokens**2 * c


def rounds_flops(model: Sam, config: Interactive) -> float:
    """Of all rounds of a mask, forward. The inserted round comes before each click as often."""
    clicks = list(range(config.num_clicks + 1))
    mean = sum(clicks) / max(1, config.num_clicks)
    if config.num_extra_rounds > 0:
        clicks.append(config.num_clicks)
    extra = [mean - 1] if config.num_extra_rounds == 2 else []
    return sum(decoder_flops(model, FIRST + n) for n in clicks + extra)
