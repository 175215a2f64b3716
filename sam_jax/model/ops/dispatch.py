"""The operations that have several implementations, and the table that chooses among them.

An implementation is chosen while a program is traced. The choice depends on the platform that the
program is traced for, and on the dtype and the shape of the operation's main operand. Like
`jax.nn.dot_product_attention`, every operation has an argument `implementation`: None chooses by
the table, and a name chooses that implementation on any platform.

To add a kernel, write a file with the kernel, an equivalent in plain JAX and the kernel's cost, and
add a row to `TABLE`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt32

from sam_jax.model.ops import (
    global_attention,
    image_to_token,
    token_attention,
    token_to_image,
    upscaling,
    window_attention,
    windows,
)
from sam_jax.model.ops.blocks import has_whole_steps
from sam_jax.model.ops.image_to_token import FoldedTokens
from sam_jax.model.ops.kernel_cost import CostFunction
from sam_jax.model.ops.platform import platform
from sam_jax.model.ops.upscaling import UpscalingWeights


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row of the table.

    Attributes:
      name: The name that callers can ask for.
      function: The implementation; all functions of an operation have the same signature.
      platform: "cpu", "gpu" or "tpu"; None for any.
      dtype: Dtype of the main operand; None for any.
      supports: Returns True for the shapes of the main operand that the function accepts; None if
        it accepts all of them.
      costs: Costs of the kernels that the function calls, by the name of the kernel.
    """

    name: str
    function: Callable[..., Any]
    platform: str | None = None
    dtype: str | None = None
    supports: Callable[[tuple[int, ...]], bool] | None = None
    costs: Mapping[str, CostFunction] = dataclasses.field(default_factory=dict)


# The first row of an operation that matches is chosen. The last row always matches.
TABLE: Mapping[str, tuple[Implementation, ...]] = {
    "attend_among_tokens": (
        Implementation(
            "pallas",
            token_attention.attend_pallas,
            platform="tpu",
            dtype="bfloat16",
            supports=token_attention.pallas_supports,
            costs=token_attention.COSTS,
        ),
        Implementation("xla", token_attention.attend_xla),
    ),
    "attend_globally": (
        Implementation(
            "splash",
            global_attention.attend_splash,
            platform="tpu",
            supports=global_attention.splash_supports,
            costs=global_attention.COSTS,
        ),
        Implementation(
            "cudnn",
            global_attention.attend_cudnn,
            platform="gpu",
            dtype="bfloat16",
            supports=global_attention.cudnn_supports,
        ),
        Implementation("xla", global_attention.attend_xla),
    ),
    "project_windows": (
        Implementation("after_split", windows.project_after_split, platform="tpu"),
        Implementation("xla", windows.project_xla),
    ),
    "attend_in_windows": (
        Implementation(
            "pallas",
            window_attention.attend_pallas,
            platform="tpu",
            dtype="bfloat16",
            costs=window_attention.COSTS,
        ),
        Implementation("sequential", window_attention.attend_sequentially, platform="cpu"),
        Implementation("xla", window_attention.attend_xla),
    ),
    "attend_to_image": (
        Implementation(
            "pallas",
            token_to_image.attend_pallas,
            platform="tpu",
            dtype="bfloat16",
            supports=has_whole_steps,
            costs=token_to_image.COSTS,
        ),
        Implementation("xla", token_to_image.attend_xla),
    ),
    "update_image": (
        Implementation(
            "pallas",
            image_to_token.update_pallas,
            platform="tpu",
            dtype="bfloat16",
            supports=has_whole_steps,
            costs=image_to_token.COSTS,
        ),
        Implementation("xla", image_to_token.update_xla),
    ),
    "upscale_masks": (
        Implementation(
            "pallas",
            upscaling.upscale_pallas,
            platform="tpu",
            dtype="bfloat16",
            supports=has_whole_steps,
            costs=upscaling.COSTS,
        ),
        Implementation("xla", upscaling.upscale_xla),
    ),
    "arrange_pixels": (
        Implementation(
            "matmul",
            upscaling.arrange_matmul,
            platform="tpu",
            dtype="bfloat16",
            supports=has_whole_steps,
        ),
        Implementation("xla", upscaling.arrange_xla),
    ),
}


def choose(
    operation: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    implementation: str | None = None,
) -> Implementation:
    """Chooses the implementation of an operation.

    Args:
      operation: A key of `TABLE`.
      shape: Shape of the main operand.
      dtype: Dtype of the main operand.
      implementation: Name of an implementation; None for the first row that matches.

    Returns:
      The row of the table.

    Raises:
      ValueError: If the operation has no implementation of that name, or if that implementation
        does not accept the shape.
    """
    rows = TABLE[operation]
    if implementation is None:
        return next(row for row in rows if _matches(row, shape, dtype))
    row = next((row for row in rows if row.name == implementation), None)
    if row is None:
        names = ", ".join(repr(row.name) for row in rows)
        raise ValueError(
            f"implementation of {operation} must be None or one of {names}; got {implementation!r}"
        )
    if row.supports is not None and not row.supports(shape):
        raise ValueError(
            f"implementation {implementation!r} of {operation} does not accept shape {shape}"
        )
    return row


def _matches(row: Implementation, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    return (
        row.platform in (None, platform())
        and (row.dtype is None or jnp.dtype(row.dtype) == jnp.dtype(dtype))
        and (row.supports is None or row.supports(shape))
    )


def kernel_costs() -> dict[str, CostFunction]:
    """Returns the cost functions of all kernels by the name of the kernel."""
    rows = [row for rows in TABLE.values() for row in rows]
    return {name: cost for row in rows for name, cost in row.costs.items()}


def attend_among_tokens(
    qkv: Float[Array, "b t c3"], num_heads: int, *, implementation: str | None = None
) -> Float[Array, "b t c"]:
    """Computes self-attention among a few tokens, without relative positions.

    Args:
      qkv: Queries, keys and values, '(3 head d)' channels.
      num_heads: Attention heads.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      The attended values, '(head d)' channels.
    """
    row = choose("attend_among_tokens", qkv.shape, qkv.dtype, implementation)
    return row.function(qkv, num_heads)


def attend_globally(
    qkv: Float[Array, "b h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "b h w c"]:
    """Computes self-attention over full grids of tokens, with relative positions.

    The logits of a grid are never all in memory at once.

    Args:
      qkv: Queries, keys and values, '(3 head d)' channels.
      rel_h: Embeddings 'h u d' of the vertical position of key row u relative to query row h.
      rel_w: Embeddings 'w v d' of the position of key column v relative to query column w.
      num_heads: Attention heads.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      The attended values, '(head d)' channels.
    """
    query_shape = (*qkv.shape[:-1], num_heads, qkv.shape[-1] // (3 * num_heads))
    row = choose("attend_globally", query_shape, qkv.dtype, implementation)
    return row.function(qkv, rel_h, rel_w, num_heads)


def project_windows(
    x: Float[Array, "b gh gw c"],
    project: windows.Projection,
    window: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "n {window} {window} d"]:
    """Splits grids into windows and projects the tokens, in whichever order is faster.

    Args:
      x: Grids of tokens.
      project: A dense layer.
      window: Side of a window.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      The projected windows. Padding tokens are zero before the projection.
    """
    row = choose("project_windows", x.shape, x.dtype, implementation)
    return row.function(x, project, window)


def attend_in_windows(
    qkv: Float[Array, "n h w c3"],
    rel_h: Float[Array, "h h d"],
    rel_w: Float[Array, "w w d"],
    num_heads: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "n h w c"]:
    """Computes self-attention within each of many small grids, with relative positions.

    Args:
      qkv: Queries, keys and values, '(3 head d)' channels.
      rel_h: As in `attend_globally`.
      rel_w: As in `attend_globally`.
      num_heads: Attention heads.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      The attended values, '(head d)' channels.
    """
    row = choose("attend_in_windows", qkv.shape, qkv.dtype, implementation)
    return row.function(qkv, rel_h, rel_w, num_heads)


def attend_to_image(
    queries: Float[Array, "b n q c"],
    image: Float[Array, " b #n p c"],
    positions: Float[Array, "p c"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "b n q c"], Float[Array, " b #n p c"]]:
    """Computes softmax(queries (image + positions)^T) image.

    Args:
      queries: Scaled queries in the channels of the image, q = heads x tokens.
      image: Pixels, one image for all objects if its n is 1.
      positions: Positional encoding of the pixels.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      The attended pixels, and `image` unchanged. Later operations must use this image and not the
      argument, because the kernels accumulate its cotangents.
    """
    row = choose("attend_to_image", image.shape, image.dtype, implementation)
    return row.function(queries, image, positions)


def update_image(
    image: Float[Array, " b #n p c"],
    positions: Float[Array, "p c"],
    tokens: FoldedTokens,
    words: UInt32[Array, "b n words c"] | None,
    num_heads: int,
    rate: float,
    *,
    implementation: str | None = None,
) -> Float[Array, "b n p c"]:
    """Computes norm(image + dropout(attention of image + positions to the tokens)).

    Args:
      image: Pixels, one image for all objects if its n is 1.
      positions: Positional encoding of the pixels.
      tokens: Tokens with the projections of the image folded in.
      words: Random bits from `image_to_token.random_words`; None for no dropout.
      num_heads: Attention heads.
      rate: Dropout rate.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      The updated pixels of every object.
    """
    row = choose("update_image", image.shape, image.dtype, implementation)
    return row.function(image, positions, tokens, words, num_heads, rate)


def upscale_masks(
    image: Float[Array, "b n p c"],
    weights: UpscalingWeights,
    hypernetwork_out: Float[Array, "b n m e"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "b n m 16 p"]:
    """Upscales images and computes mask logits with the outputs of the hypernetworks.

    Args:
      image: Pixels of every object.
      weights: Weights of both upscaling layers.
      hypernetwork_out: The weights of the upscaled channels for each mask.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      Mask logits of the 4x4 pixels of each token.
    """
    row = choose("upscale_masks", image.shape, image.dtype, implementation)
    return row.function(image, weights, hypernetwork_out)


def arrange_pixels(
    logits: Float32[Array, "b n m 16 p"],
    gh: int,
    dtype: DTypeLike,
    *,
    implementation: str | None = None,
) -> Float32[Array, "b n m 4*{gh} lw"]:
    """Places the 4x4 pixels of each token in the image.

    Args:
      logits: From `upscale_masks`.
      gh: Rows of tokens.
      dtype: Dtype of the image that the logits were computed from.
      implementation: Name of an implementation; None to choose by the table.

    Returns:
      Mask logits, row by row.
    """
    tokens = (logits.shape[-1], logits.shape[-2])  # as the 'p c' of an image
    row = choose("arrange_pixels", tokens, dtype, implementation)
    return row.function(logits, gh)
