"""Tests names and layouts of parameters in sam_jax, segment-anything and Hugging Face."""

import numpy as np
import pytest

from sam_jax.model.init import variable_shapes
from sam_jax.model.sam import sam_vit_b, sam_vit_l
from sam_jax.weights import names
from tests.sam_jax.weights.official_state import official_shapes


@pytest.mark.parametrize(
    ("layout", "torch_shape", "flax_shape"),
    [
        (names.SAME, (2, 3, 4), (2, 3, 4)),
        (names.LINEAR, (5, 3), (3, 5)),
        (names.CONV, (5, 3, 2, 4), (2, 4, 3, 5)),
        (names.DECONV, (5, 3, 2, 4), (5, 2, 4, 3)),
        (names.ROW, (1, 6), (6,)),
        (names.TOKEN, (1, 1, 6), (6,)),
    ],
)
def test_the_two_functions_of_a_layout_are_inverse(layout, torch_shape, flax_shape):
    x = np.arange(np.prod(torch_shape), dtype=np.float32).reshape(torch_shape)
    converted = layout.from_torch(x)
    assert converted.shape == flax_shape
    assert layout.torch_shape(flax_shape) == torch_shape
    np.testing.assert_array_equal(layout.to_torch(converted), x)
    np.testing.assert_array_equal(layout.from_torch(layout.to_torch(converted)), converted)


def test_layouts_element_by_element():
    x = np.random.default_rng(0).random((5, 3, 2, 4))
    assert names.CONV.from_torch(x)[1, 3, 2, 4] == x[4, 2, 1, 3]  # 'o i h w' -> 'h w i o'
    assert names.DECONV.from_torch(x)[4, 1, 3, 2] == x[4, 2, 1, 3]  # 'i o h w' -> 'i h w o'


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (sam_vit_b(), official_shapes(768, 64, 12, (2, 5, 8, 11))),
        (sam_vit_l(), official_shapes(1024, 64, 24, (5, 11, 17, 23))),
    ],
    ids=["vit_b", "vit_l"],
)
def test_official_names_and_shapes_equal_the_published_ones(model, expected):
    shapes = variable_shapes(model)
    table = names.official_names(model.image_encoder.depth, model.mask_decoder.depth)
    assert table.keys() == shapes.keys()
    actual = {
        official: layout.torch_shape(shapes[path].shape)
        for path, (official, layout) in table.items()
    }
    assert actual == expected


@pytest.mark.parametrize(
    ("official", "huggingface"),
    [
        ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
        ("image_encoder.patch_embed.proj.bias", "vision_encoder.patch_embed.projection.bias"),
        ("image_encoder.blocks.11.norm1.weight", "vision_encoder.layers.11.layer_norm1.weight"),
        ("image_encoder.blocks.3.attn.rel_pos_h", "vision_encoder.layers.3.attn.rel_pos_h"),
        ("image_encoder.blocks.3.attn.proj.bias", "vision_encoder.layers.3.attn.proj.bias"),
        ("image_encoder.blocks.3.mlp.lin2.weight", "vision_encoder.layers.3.mlp.lin2.weight"),
        ("image_encoder.neck.0.weight", "vision_encoder.neck.conv1.weight"),
        ("image_encoder.neck.1.bias", "vision_encoder.neck.layer_norm1.bias"),
        ("image_encoder.neck.2.weight", "vision_encoder.neck.conv2.weight"),
        ("image_encoder.neck.3.weight", "vision_encoder.neck.layer_norm2.weight"),
        (
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
            "prompt_encoder.shared_embedding.positional_embedding",
        ),
        ("prompt_encoder.point_embeddings.2.weight", "prompt_encoder.point_embed.2.weight"),
        ("prompt_encoder.not_a_point_embed.weight", "prompt_encoder.not_a_point_embed.weight"),
        ("prompt_encoder.mask_downscaling.0.weight", "prompt_encoder.mask_embed.conv1.weight"),
        ("prompt_encoder.mask_downscaling.1.bias", "prompt_encoder.mask_embed.layer_norm1.bias"),
        ("prompt_encoder.mask_downscaling.6.bias", "prompt_encoder.mask_embed.conv3.bias"),
        (
            "mask_decoder.transformer.layers.0.norm4.bias",
            "mask_decoder.transformer.layers.0.layer_norm4.bias",
        ),
        (
            "mask_decoder.transformer.norm_final_attn.weight",
            "mask_decoder.transformer.layer_norm_final_attn.weight",
        ),
        (
            "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight",
            "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight",
        ),
        ("mask_decoder.output_upscaling.0.weight", "mask_decoder.upscale_conv1.weight"),
        ("mask_decoder.output_upscaling.1.weight", "mask_decoder.upscale_layer_norm.weight"),
        ("mask_decoder.output_upscaling.3.bias", "mask_decoder.upscale_conv2.bias"),
        (
            "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight",
            "mask_decoder.output_hypernetworks_mlps.3.proj_in.weight",
        ),
        (
            "mask_decoder.output_hypernetworks_mlps.3.layers.1.weight",
            "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight",
        ),
        (
            "mask_decoder.iou_prediction_head.layers.2.bias",
            "mask_decoder.iou_prediction_head.proj_out.bias",
        ),
        ("mask_decoder.mask_tokens.weight", "mask_decoder.mask_tokens.weight"),
    ],
)
def test_huggingface_names(official, huggingface):
    assert names.huggingface_name(official) == huggingface


def test_huggingface_names_are_all_different():
    table = names.official_names(32, 3).values()
    assert len({names.huggingface_name(official) for official, _ in table}) == len(table)
