"""Attention over the full grid of tokens. Its 't t' logits are never all in memory at once.

Source: segment-anything `modeling/image_encoder.py`, blocks without windows.

Differences, exact up to rounding: the reference keeps the logits 'heads t t' in memory. Here
- TPUs run JAX's splash attention, a Pallas kernel with a backward pass;
- NVIDIA GPUs run cuDNN's fused attention, if the heads are narrow enough for it: up to 128 channels
  on Ampere and Ada, and 256 from Hopper on, where ViT-B has 192 and ViT-H 208 at 1024 pixels;
- elsewhere the queries are processed a few rows at a time, so that the logits of one step stay in
  the cache.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from sam_jax.model.ops.kernel_cost import Cost, CostFunction, Shapes
from sam_jax.model.ops.relative_positions import Attend, attend_folded, project_positions
from sam_jax.model.ops.softmax import softmax_matmul

LANES = 128  # of a TPU register; blocks of tokens are multiples of it, channels are padded to it
# Tokens of a block: the fastest powers of two, by the bundles that the compiler schedules.
QUERY_BLOCK, KEY_BLOCK = 512, 1024
CUDNN_CHANNELS = 8  # cuDNN needs head widths that are multiples of it
QUERIES_PER_STEP = 256  # of one head on the CPU; their logits over 4096 keys take 4 MiB


def attend_xla(
    qkv: Float[Array, "b h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
) -> Float[Array, "b h w c"]:
    """Attends in plain JAX; see `dispatch.attend_globally`."""
    return lax.map(lambda x: _attend_by_rows(x, rel_h, rel_w, num_heads), qkv)


def attend_splash(
    qkv: Float[Array, "b h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
) -> Float[Array, "b h w c"]:
    """Attends with splash attention on a TPU; see `dispatch.attend_globally`."""
    return _vmap_folded(qkv, rel_h, rel_w, num_heads, splash_attention)


def attend_cudnn(
    qkv: Float[Array, "b h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
) -> Float[Array, "b h w c"]:
    """Attends with cuDNN on a GPU; see `dispatch.attend_globally`."""
    return _vmap_folded(qkv, rel_h, rel_w, num_heads, cudnn_attention)


def splash_supports(shape: tuple[int, ...]) -> bool:
    """Returns True if the tokens of queries 'b h w head d' can be cut into blocks."""
    return shape[1] * shape[2] % LANES == 0


def cudnn_supports(shape: tuple[int, ...]) -> bool:
    """Returns True if cuDNN accepts queries 'b h w head d' with relative positions folded in."""
    _, height, width, _, channels = shape
    return _round_up(channels + height + width, CUDNN_CHANNELS) <= max_cudnn_channels()


def max_cudnn_channels() -> int:
    """Returns the largest head width that cuDNN's fused attention accepts on this host's GPUs.

    These are the limits that `jax.nn.dot_product_attention` checks. For programs that are traced
    for GPUs that the host does not have, the limit is that of an H100.
    """
    if jax.default_backend() != "gpu":
        return 256
    device = jax.local_devices(backend="gpu")[0]
    if "cuda" not in device.client.platform_version:
        return 0
    major = int(device.compute_capability.split(".")[0])
    return 0 if major < 8 else 128 if major == 8 else 256


def splash_attention(
    q: Float[Array, "head t d"],
    k: Float[Array, "head t d"],
    v: Float[Array, "head t e"],
    interpret: bool = False,
) -> Float[Array, "head t e"]:
    """Computes softmax(q k^T) v with JAX's splash attention.

    Args:
      q: Scaled queries.
      k: Keys.
      v: Values.
      interpret: Run the kernel on any device, slowly.

    Returns:
      The attended values.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, tokens = q.shape[:2]
    query_block, key_block = _largest_block(tokens, QUERY_BLOCK), _largest_block(tokens, KEY_BLOCK)
    sizes = splash.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        use_fused_bwd_kernel=True,
    )
    mask = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads)
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    return kernel(q, k, v)


def cudnn_attention(
    q: Float[Array, "head t d"], k: Float[Array, "head t d"], v: Float[Array, "head t e"]
) -> Float[Array, "head t e"]:
    """Computes softmax(q k^T) v with cuDNN, which needs values as wide as the keys."""
    width = _round_up(q.shape[-1], CUDNN_CHANNELS)

    def to_cudnn(x: Float[Array, "head t d"]) -> Float[Array, "t head wide"]:
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, width - x.shape[-1])])
        return rearrange(x, "head t d -> t head d")

    out = jax.nn.dot_product_attention(
        to_cudnn(q), to_cudnn(k), to_cudnn(v), scale=1.0, implementation="cudnn"
    )
    return rearrange(out, "t head d -> head t d")[..., : v.shape[-1]]


def _splash_cost(key_products: int, value_products: int) -> CostFunction:
    """Returns the cost of a splash kernel with so many matrix products over keys and values."""

    def cost(operands: Shapes, num_bytes: int) -> Cost:
        (heads, tokens, key), _, (*_, value) = operands[:3]
        channels = key_products * _round_up(key, LANES) + value_products * _round_up(value, LANES)
        return Cost(attention_flops=2 * heads * tokens**2 * channels)

    return cost


COSTS: Mapping[str, CostFunction] = {
    "splash_mha_fwd": _splash_cost(key_products=1, value_products=1),
    "splash_mha_dkv": _splash_cost(key_products=3, value_products=2),
}


def _vmap_folded(
    qkv: Float[Array, "b h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
    attend: Attend,
) -> Float[Array, "b h w c"]:
    return jax.vmap(lambda x: attend_folded(x, rel_h, rel_w, num_heads, attend))(qkv)


def _attend_by_rows(
    qkv: Float[Array, "h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
) -> Float[Array, "h w c"]:
    """Attends a few rows of queries of one head at a time.

    The relative terms are added to the logits: extra channels would cost more than they save where
    the logits stay in the cache.
    """
    height, width = qkv.shape[:2]
    rows = next(r for r in range(max(1, QUERIES_PER_STEP // width), 0, -1) if height % r == 0)

    def attend_head(inputs: tuple[Array, ...]) -> Float[Array, "s t d"]:
        q, k, v, q_rel_h, q_rel_w = inputs
        k, v = (rearrange(x, "h w d -> (h w) d") for x in (k, v))

        @jax.checkpoint
        def attend_rows(inputs: list[Array]) -> Float[Array, "t d"]:
            q, q_rel_h, q_rel_w = inputs
            logits = rearrange(q, "r w d -> (r w) d") @ k.T
            logits = rearrange(logits, "(r w) (u v) -> r w u v", w=width, v=width)
            logits = logits + q_rel_h[..., :, None] + q_rel_w[..., None, :]
            return softmax_matmul(rearrange(logits, "r w u v -> (r w) (u v)"), v)

        steps = [rearrange(x, "(s r) w d -> s r w d", r=rows) for x in (q, q_rel_h, q_rel_w)]
        return lax.map(attend_rows, steps)

    out = lax.map(attend_head, project_positions(qkv, rel_h, rel_w, num_heads))
    return rearrange(out, "head s (r w) d -> (s r) w (head d)", w=width)


def _largest_block(tokens: int, limit: int) -> int:
    """Returns the largest multiple of `LANES` up to `limit` that divides the tokens."""
    return next(b for b in range(min(limit, tokens), 0, -LANES) if tokens % b == 0)


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
