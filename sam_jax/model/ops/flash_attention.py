"""Attention over many tokens of which no 't t' array is ever in memory, by accelerator.

TPUs: JAX's splash attention (a Pallas kernel with a backward pass). NVIDIA GPUs: cuDNN's. Both
take relative positions folded into the channels of queries and keys, and softmax of plain products.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from sam_jax.model.ops.platform import platform

LANES = 128  # of a TPU's registers: blocks of tokens are multiples of it
QUERIES, KEYS = 512, 1024  # of a block: fastest of powers of two by the compiler's bundles
CUDNN_CHANNELS = 8  # cuDNN takes multiples of it


def choose(tokens: int, dtype: jnp.dtype) -> Callable | None:
    """The kernel for this platform, of `attend_on_tpu`'s signature; None if there is none."""
    if platform() == "tpu" and tokens % LANES == 0:
        return attend_on_tpu
    if platform() == "gpu" and dtype == jnp.bfloat16:
        return attend_on_gpu
    return None


def attend_on_tpu(q, k, v, interpret=False):
    """softmax(q k^T) v of queries and keys 'head t d' and values 'head t e' -> 'head t e'.

    With `interpret` the kernel runs on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, tokens = q.shape[:2]
    block = lambda most: next(b for b in range(min(most, tokens), 0, -LANES) if tokens % b == 0)
    queries, keys = block(QUERIES), block(KEYS)
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        use_fused_bwd_kernel=True,
    )
    everything = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads)
    kernel = splash.make_splash_mha(
        everything, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    return kernel(q, k, v)


def attend_on_gpu(q, k, v):
    """The same by cuDNN, which takes values of as many channels as the keys have."""
    wide = -(-q.shape[-1] // CUDNN_CHANNELS) * CUDNN_CHANNELS
    fill = lambda x: jnp.pad(x, [(0, 0)] * 2 + [(0, wide - x.shape[-1])])
    q, k, values = (rearrange(fill(x), "head t d -> t head d") for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, values, scale=1.0, implementation="cudnn")
    return rearrange(out, "t head d -> head t d")[..., : v.shape[-1]]
