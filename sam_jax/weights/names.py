"""Names and layouts of each parameter in sam_jax, segment-anything, Hugging Face and MAE.

Sources: the state dicts of facebookresearch/segment-anything, of transformers' `SamModel`
(`models/sam/convert_sam_to_hf.py`) and of facebookresearch/mae (`models_mae.py`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How PyTorch stores an array, and how we do; the two functions undo each other."""

    from_torch: Callable
    to_torch: Callable


def _axes(*order):
    back = np.argsort(order)
    return Layout(lambda x: x.transpose(order), lambda x: x.transpose(back))


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = _axes(1, 0)  # (out, in) -> (in, out)
CONV = _axes(2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
DECONV = _axes(0, 2, 3, 1)  # (in, out, h, w) -> (in, h, w, out)
TOKEN = Layout(lambda x: x.reshape(x.shape[-1]), lambda x: x.reshape(1, 1, -1))
ROW = Layout(lambda x: x.reshape(x.shape[-1]), lambda x: x.reshape(1, -1))  # an embedding (1, c)


def official_names(depth, decoder_depth):
    """Every array of a SAM with so many blocks: {our path: (official name, Layout)}."""
    names = {
        "params/image_encoder/pos_embed": ("image_encoder.pos_embed", SAME),
        **_layer("params/image_encoder/patch_embed", "image_encoder.patch_embed.proj", CONV),
        "params/image_encoder/neck/conv1/kernel": ("image_encoder.neck.0.weight", CONV),
        **_norm("params/image_encoder/neck/norm1", "image_encoder.neck.1"),
        "params/image_encoder/neck/conv2/kernel": ("image_encoder.neck.2.weight", CONV),
        **_norm("params/image_encoder/neck/norm2", "image_encoder.neck.3"),
    }
    for i in range(depth):
        ours, theirs = f"params/image_encoder/block_{i:02d}", f"image_encoder.blocks.{i}"
        names |= {
            **_norm(f"{ours}/norm1", f"{theirs}.norm1"),
            **_norm(f"{ours}/norm2", f"{theirs}.norm2"),
            **_layer(f"{ours}/attention/qkv", f"{theirs}.attn.qkv"),
            **_layer(f"{ours}/attention/proj", f"{theirs}.attn.proj"),
            f"{ours}/attention/rel_pos_h": (f"{theirs}.attn.rel_pos_h", SAME),
            f"{ours}/attention/rel_pos_w": (f"{theirs}.attn.rel_pos_w", SAME),
            **_layer(f"{ours}/lin1", f"{theirs}.mlp.lin1"),
            **_layer(f"{ours}/lin2", f"{theirs}.mlp.lin2"),
        }
    return names | _prompt_encoder_names() | _mask_decoder_names(decoder_depth)


def _prompt_encoder_names():
    ours, theirs = "params/prompt_encoder", "prompt_encoder"
    down, mask = f"{ours}/mask_downscaling", f"{theirs}.mask_downscaling"
    embeddings = {
        "background": "point_embeddings.0",
        "foreground": "point_embeddings.1",
        "top_left": "point_embeddings.2",
        "bottom_right": "point_embeddings.3",
        "not_a_point": "not_a_point_embed",
        "no_mask": "no_mask_embed",
    }
    return {
        "constants/prompt_encoder/gaussian": (
            f"{theirs}.pe_layer.positional_encoding_gaussian_matrix",
            SAME,
        ),
        **{f"{ours}/{a}": (f"{theirs}.{b}.weight", ROW) for a, b in embeddings.items()},
        **_layer(f"{down}/conv1", f"{mask}.0", CONV),
        **_norm(f"{down}/norm1", f"{mask}.1"),
        **_layer(f"{down}/conv2", f"{mask}.3", CONV),
        **_norm(f"{down}/norm2", f"{mask}.4"),
        **_layer(f"{down}/conv3", f"{mask}.6", CONV),
    }


def _mask_decoder_names(depth):
    ours, theirs = "params/mask_decoder", "mask_decoder"
    names = {
        f"{ours}/iou_token": (f"{theirs}.iou_token.weight", SAME),
        f"{ours}/mask_tokens": (f"{theirs}.mask_tokens.weight", SAME),
        **_layer(f"{ours}/upscaling/conv1", f"{theirs}.output_upscaling.0", DECONV),
        **_norm(f"{ours}/upscaling/norm", f"{theirs}.output_upscaling.1"),
        **_layer(f"{ours}/upscaling/conv2", f"{theirs}.output_upscaling.3", DECONV),
    }
    heads = {"iou_head": "iou_prediction_head"}
    heads |= {f"hypernetwork_{m}": f"output_hypernetworks_mlps.{m}" for m in range(4)}
    for a, b in heads.items():
        for j in range(3):
            names |= _layer(f"{ours}/{a}/lin{j + 1}", f"{theirs}.{b}.layers.{j}")

    ours, theirs = f"{ours}/transformer", f"{theirs}.transformer"
    attentions = {"final_attention": "final_attn_token_to_image"}
    names |= _norm(f"{ours}/final_norm", f"{theirs}.norm_final_attn")
    for i in range(depth):
        a, b = f"layer_{i}", f"layers.{i}"
        attentions |= {
            f"{a}/self_attention": f"{b}.self_attn",
            f"{a}/token_to_image": f"{b}.cross_attn_token_to_image",
            f"{a}/image_to_token": f"{b}.cross_attn_image_to_token",
        }
        for j in (1, 2, 3, 4):
            names |= _norm(f"{ours}/{a}/norm{j}", f"{theirs}.{b}.norm{j}")
        for j in (1, 2):
            names |= _layer(f"{ours}/{a}/mlp/lin{j}", f"{theirs}.{b}.mlp.lin{j}")
    for a, b in attentions.items():
        for part in ("q", "k", "v", "out"):
            names |= _layer(f"{ours}/{a}/{part}", f"{theirs}.{b}.{part}_proj")
    return names


def _layer(ours, theirs, layout=LINEAR):
    return {
        f"{ours}/kernel": (f"{theirs}.weight", layout),
        f"{ours}/bias": (f"{theirs}.bias", SAME),
    }


def _norm(ours, theirs):
    return {f"{ours}/scale": (f"{theirs}.weight", SAME), f"{ours}/bias": (f"{theirs}.bias", SAME)}


GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
HF_GAUSSIAN = "prompt_encoder.shared_embedding.positional_embedding"
HF_GAUSSIAN_TWIN = "shared_image_embedding.positional_embedding"  # tied to the other

_TO_HF = (  # applied in turn
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


def huggingface_name(official):
    """The name in transformers' `SamModel` of a tensor with this official name."""
    for pattern, replacement in _TO_HF:
        official = re.sub(pattern, replacement, official)
    return official


def mae_encoder_names(depth):
    """An MAE encoder's layers: {our path in it, as in SAM's image encoder: (MAE name, Layout)}."""
    names = _layer("patch_embed", "patch_embed.proj", CONV)
    for i in range(depth):
        names |= _mae_block(f"block_{i:02d}", f"blocks.{i}")
    return names


def mae_names(depth, decoder_depth):
    """Every array of a masked autoencoder: {our path: (MAE name, Layout)}."""
    names = mae_encoder_names(depth) | {
        "class_token": ("cls_token", TOKEN),
        "mask_token": ("mask_token", TOKEN),
        **_norm("norm", "norm"),
        **_layer("decoder_embed", "decoder_embed"),
        **_norm("decoder_norm", "decoder_norm"),
        **_layer("decoder_pred", "decoder_pred"),
    }
    for i in range(decoder_depth):
        names |= _mae_block(f"decoder_block_{i:02d}", f"decoder_blocks.{i}")
    return {f"params/{ours}": theirs for ours, theirs in names.items()}


def _mae_block(ours, theirs):
    return {
        **_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        **_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        **_layer(f"{ours}/attention/qkv", f"{theirs}.attn.qkv"),
        **_layer(f"{ours}/attention/proj", f"{theirs}.attn.proj"),
        **_layer(f"{ours}/lin1", f"{theirs}.mlp.fc1"),
        **_layer(f"{ours}/lin2", f"{theirs}.mlp.fc2"),
    }


# What of an MAE checkpoint a SAM encoder has no place for.
MAE_DROPPED = re.compile(r"(cls_token|mask_token|(fc_)?norm\.|decoder_|head\.).*")
