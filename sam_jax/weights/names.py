"""Names and layouts of each parameter in sam_jax, segment-anything, Hugging Face, MAE and timm.

Sources: the state dicts of facebookresearch/segment-anything, of transformers' `SamModel`
(`models/sam/convert_sam_to_hf.py`), `Dinov2Model`, `ViTModel` and `ViTMAEModel`, of
facebookresearch/mae (`models_mae.py`) and of timm (`vision_transformer.py`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np


@dataclass(frozen=True)
class Layout:
    """The axes of an array in PyTorch and in sam_jax.

    Attributes:
      from_torch: Converts PyTorch's array to ours.
      to_torch: Converts it back.
    """

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in PyTorch of an array that has this shape here."""
        return self.to_torch(np.broadcast_to(np.float32(0), shape)).shape


NameTable = dict[str, tuple[str, Layout]]  # by parameter path: the name in PyTorch and the layout


def _transposed(*order: int) -> Layout:
    inverse = np.argsort(order)
    return Layout(lambda x: x.transpose(order), lambda x: x.transpose(inverse))


def _reshaped(*shape: int) -> Layout:
    return Layout(lambda x: x.reshape(x.shape[-1]), lambda x: x.reshape(shape))


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = _transposed(1, 0)  # (out, in) -> (in, out)
CONV = _transposed(2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
DECONV = _transposed(0, 2, 3, 1)  # (in, out, h, w) -> (in, h, w, out)
TOKEN = _reshaped(1, 1, -1)  # (1, 1, c) -> (c)
ROW = _reshaped(1, -1)  # (1, c) -> (c), an embedding


def to_torch_tensors(
    table: NameTable, variables: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns variables by path as PyTorch's tensors: {name: contiguous float32 array}."""
    return {
        name: np.ascontiguousarray(layout.to_torch(np.asarray(variables[path], np.float32)))
        for path, (name, layout) in table.items()
    }


def from_torch_tensor(layout: Layout, tensor: np.ndarray) -> np.ndarray:
    """Returns PyTorch's tensor in our layout, as a contiguous float32 array."""
    with np.errstate(over="ignore"):  # infinite values are an error of the caller's
        return np.asarray(layout.from_torch(tensor), np.float32, order="C")


def official_names(depth: int, decoder_depth: int) -> NameTable:
    """Returns the official name and the layout of each variable of a `Sam`.

    Args:
      depth: Blocks of the image encoder.
      decoder_depth: Two-way blocks of the mask decoder.

    Returns:
      (official name, Layout) by path.
    """
    names = {
        "params/image_encoder/pos_embed": ("image_encoder.pos_embed", SAME),
        **_layer("params/image_encoder/patch_embed", "image_encoder.patch_embed.proj", CONV),
        "params/image_encoder/neck/conv1/kernel": ("image_encoder.neck.0.weight", CONV),
        **_norm("params/image_encoder/neck/norm1", "image_encoder.neck.1"),
        "params/image_encoder/neck/conv2/kernel": ("image_encoder.neck.2.weight", CONV),
        **_norm("params/image_encoder/neck/norm2", "image_encoder.neck.3"),
    }
    for i in range(depth):
        path, name = f"params/image_encoder/block_{i:02d}", f"image_encoder.blocks.{i}"
        names |= {
            **_norm(f"{path}/norm1", f"{name}.norm1"),
            **_norm(f"{path}/norm2", f"{name}.norm2"),
            **_layer(f"{path}/attention/qkv", f"{name}.attn.qkv"),
            **_layer(f"{path}/attention/proj", f"{name}.attn.proj"),
            f"{path}/attention/rel_pos_h": (f"{name}.attn.rel_pos_h", SAME),
            f"{path}/attention/rel_pos_w": (f"{name}.attn.rel_pos_w", SAME),
            **_layer(f"{path}/lin1", f"{name}.mlp.lin1"),
            **_layer(f"{path}/lin2", f"{name}.mlp.lin2"),
        }
    return names | _prompt_encoder_names() | _mask_decoder_names(decoder_depth)


def _prompt_encoder_names() -> NameTable:
    mask_path, mask_name = (
        "params/prompt_encoder/mask_downscaling",
        "prompt_encoder.mask_downscaling",
    )
    embeddings = {
        "background": "point_embeddings.0",
        "foreground": "point_embeddings.1",
        "top_left": "point_embeddings.2",
        "bottom_right": "point_embeddings.3",
        "not_a_point": "not_a_point_embed",
        "no_mask": "no_mask_embed",
    }
    return {
        "constants/prompt_encoder/gaussian": (GAUSSIAN, SAME),
        **{
            f"params/prompt_encoder/{ours}": (f"prompt_encoder.{official}.weight", ROW)
            for ours, official in embeddings.items()
        },
        **_layer(f"{mask_path}/conv1", f"{mask_name}.0", CONV),
        **_norm(f"{mask_path}/norm1", f"{mask_name}.1"),
        **_layer(f"{mask_path}/conv2", f"{mask_name}.3", CONV),
        **_norm(f"{mask_path}/norm2", f"{mask_name}.4"),
        **_layer(f"{mask_path}/conv3", f"{mask_name}.6", CONV),
    }


def _mask_decoder_names(depth: int) -> NameTable:
    names = {
        "params/mask_decoder/iou_token": ("mask_decoder.iou_token.weight", SAME),
        "params/mask_decoder/mask_tokens": ("mask_decoder.mask_tokens.weight", SAME),
    }
    upscaling_path, upscaling = "params/mask_decoder/upscaling", "mask_decoder.output_upscaling"
    names |= _layer(f"{upscaling_path}/conv1", f"{upscaling}.0", DECONV)
    names |= _norm(f"{upscaling_path}/norm", f"{upscaling}.1")
    names |= _layer(f"{upscaling_path}/conv2", f"{upscaling}.3", DECONV)
    heads = {"iou_head": "iou_prediction_head"}
    heads |= {f"hypernetwork_{m}": f"output_hypernetworks_mlps.{m}" for m in range(4)}
    for head, official_head in heads.items():
        for j in range(3):
            path = f"params/mask_decoder/{head}/lin{j + 1}"
            names |= _layer(path, f"mask_decoder.{official_head}.layers.{j}")
    return names | _transformer_names(depth)


def _transformer_names(depth: int) -> NameTable:
    transformer_path, transformer = "params/mask_decoder/transformer", "mask_decoder.transformer"
    names = _norm(f"{transformer_path}/final_norm", f"{transformer}.norm_final_attn")
    attentions = {"final_attention": "final_attn_token_to_image"}
    for i in range(depth):
        layer_path, layer = f"layer_{i}", f"layers.{i}"
        attentions |= {
            f"{layer_path}/self_attention": f"{layer}.self_attn",
            f"{layer_path}/token_to_image": f"{layer}.cross_attn_token_to_image",
            f"{layer_path}/image_to_token": f"{layer}.cross_attn_image_to_token",
        }
        for part in ("norm1", "norm2", "norm3", "norm4"):
            path, name = f"{transformer_path}/{layer_path}/{part}", f"{transformer}.{layer}.{part}"
            names |= _norm(path, name)
        for part in ("mlp/lin1", "mlp/lin2"):
            path = f"{transformer_path}/{layer_path}/{part}"
            names |= _layer(path, f"{transformer}.{layer}.{part.replace('/', '.')}")
    for attention_path, attention in attentions.items():
        for part in ("q", "k", "v", "out"):
            path = f"{transformer_path}/{attention_path}/{part}"
            names |= _layer(path, f"{transformer}.{attention}.{part}_proj")
    return names


def _layer(path: str, name: str, layout: Layout = LINEAR) -> NameTable:
    return {f"{path}/kernel": (f"{name}.weight", layout), f"{path}/bias": (f"{name}.bias", SAME)}


def _norm(path: str, name: str) -> NameTable:
    return {f"{path}/scale": (f"{name}.weight", SAME), f"{path}/bias": (f"{name}.bias", SAME)}


GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
HF_GAUSSIAN = "prompt_encoder.shared_embedding.positional_embedding"
HF_GAUSSIAN_TWIN = "shared_image_embedding.positional_embedding"  # the same tensor again

_TO_HUGGINGFACE = (  # patterns and replacements, applied one after the other
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (rf"^{re.escape(GAUSSIAN)}$", HF_GAUSSIAN),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(_mlps\.\d|_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d|_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(_mlps\.\d|_head)\.layers\.2\.", r"\1.proj_out."),
)


def huggingface_name(official: str) -> str:
    """Returns the name in transformers' `SamModel` of a tensor with this official name."""
    for pattern, replacement in _TO_HUGGINGFACE:
        official = re.sub(pattern, replacement, official)
    return official


_TO_TIMM = (  # of transformers' `Dinov2Model`, `ViTModel` and `ViTMAEModel`, as _TO_HUGGINGFACE
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def timm_name(huggingface: str) -> str:
    """Returns timm's name of a tensor of transformers' plain vision transformers.

    Args:
      huggingface: The name in transformers.

    Returns:
      The name in timm, where `attn.q`, `attn.k` and `attn.v` stand for the thirds of `attn.qkv`. A
      name that is timm's already, or unknown, is unchanged.
    """
    for pattern, replacement in _TO_TIMM:
        huggingface = re.sub(pattern, replacement, huggingface)
    return huggingface


def timm_names(depth: int) -> NameTable:
    """Returns timm's names of a plain encoder's layers, by their paths in `ImageEncoder`.

    facebookresearch/mae and facebookresearch/dinov2 have the same names.
    """
    names = _layer("patch_embed", "patch_embed.proj", CONV)
    for i in range(depth):
        names |= _timm_block(f"block_{i:02d}", f"blocks.{i}")
    return names


def mae_names(depth: int, decoder_depth: int) -> NameTable:
    """Returns the MAE name and the layout of each variable of a `MaskedAutoencoder`, by path."""
    names = timm_names(depth) | {
        "class_token": ("cls_token", TOKEN),
        "mask_token": ("mask_token", TOKEN),
        **_norm("norm", "norm"),
        **_layer("decoder_embed", "decoder_embed"),
        **_norm("decoder_norm", "decoder_norm"),
        **_layer("decoder_pred", "decoder_pred"),
    }
    for i in range(decoder_depth):
        names |= _timm_block(f"decoder_block_{i:02d}", f"decoder_blocks.{i}")
    return {f"params/{path}": entry for path, entry in names.items()}


def _timm_block(path: str, name: str) -> NameTable:
    return {
        **_norm(f"{path}/norm1", f"{name}.norm1"),
        **_norm(f"{path}/norm2", f"{name}.norm2"),
        **_layer(f"{path}/attention/qkv", f"{name}.attn.qkv"),
        **_layer(f"{path}/attention/proj", f"{name}.attn.proj"),
        **_layer(f"{path}/lin1", f"{name}.mlp.fc1"),
        **_layer(f"{path}/lin2", f"{name}.mlp.fc2"),
    }


# Tensors of a plain vision transformer, by timm's names, that a SAM's image encoder lacks.
VIT_DROPPED = re.compile(r"(cls_token|mask_token|fc_norm\.|decoder_|head\.|pooler\.).*")
