"""Helpers for tests of weights: variables by path, and state dicts with official or MAE names."""

import flax.traverse_util
import numpy as np

ZEROS = np.zeros((1, 32), np.float32)


def flatten(variables):
    """Returns variables by path."""
    return flax.traverse_util.flatten_dict(variables, sep="/")


def assert_same_variables(actual, expected):
    """Checks that variables have the same paths and values, in float32."""
    assert_same_arrays(flatten(actual), flatten(expected))
    assert {x.dtype.name for x in flatten(actual).values()} == {"float32"}


def assert_same_arrays(actual, expected):
    """Checks that arrays by name have the same names, types and values."""
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], name)


def without(state, part):
    """Returns a state dict without the names that contain `part`."""
    return {name: x for name, x in state.items() if part not in name}


def renamed(state, old, new):
    """Returns a state dict with `old` replaced by `new` in all names."""
    return {name.replace(old, new): x for name, x in state.items()}


def official_shapes(c, head, depth, global_blocks):
    """Returns the official names and shapes for images of 1024 pixels."""
    block = {
        "norm1": (c,),
        "norm2": (c,),
        "attn.qkv": (3 * c, c),
        "attn.proj": (c, c),
        "mlp.lin1": (4 * c, c),
        "mlp.lin2": (c, 4 * c),
    }
    layers = {"image_encoder.patch_embed.proj": (c, 3, 16, 16)}
    layers |= {f"image_encoder.blocks.{i}.{k}": v for i in range(depth) for k, v in block.items()}
    layers |= {"image_encoder.neck.1": (256,), "image_encoder.neck.3": (256,)}
    mask = "prompt_encoder.mask_downscaling"
    layers |= {f"{mask}.0": (4, 1, 2, 2), f"{mask}.1": (4,), f"{mask}.3": (16, 4, 2, 2)}
    layers |= {f"{mask}.4": (16,), f"{mask}.6": (256, 16, 1, 1)}
    transformer = "mask_decoder.transformer"
    for i in range(2):
        layer = f"{transformer}.layers.{i}"
        layers |= {f"{layer}.self_attn.{p}_proj": (256, 256) for p in ("q", "k", "v", "out")}
        layers |= {f"{layer}.norm{j}": (256,) for j in (1, 2, 3, 4)}
        layers |= {f"{layer}.mlp.lin1": (2048, 256), f"{layer}.mlp.lin2": (256, 2048)}
    crosses = [
        *(f"layers.{i}.cross_attn_token_to_image" for i in range(2)),
        *(f"layers.{i}.cross_attn_image_to_token" for i in range(2)),
        "final_attn_token_to_image",
    ]
    for cross in crosses:
        layers |= {f"{transformer}.{cross}.{p}_proj": (128, 256) for p in ("q", "k", "v")}
        layers |= {f"{transformer}.{cross}.out_proj": (256, 128)}
    layers |= {f"{transformer}.norm_final_attn": (256,)}
    heads = {f"mask_decoder.output_hypernetworks_mlps.{m}": 32 for m in range(4)}
    for name, out in (heads | {"mask_decoder.iou_prediction_head": 4}).items():
        layers |= {f"{name}.layers.{j}": (256, 256) for j in (0, 1)}
        layers |= {f"{name}.layers.2": (out, 256)}
    shapes = {}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    up = "mask_decoder.output_upscaling"
    shapes |= {f"{up}.0.weight": (256, 64, 2, 2), f"{up}.0.bias": (64,)}
    shapes |= {f"{up}.1.weight": (64,), f"{up}.1.bias": (64,)}
    shapes |= {f"{up}.3.weight": (64, 32, 2, 2), f"{up}.3.bias": (32,)}
    shapes |= {"image_encoder.pos_embed": (1, 64, 64, c)}
    shapes |= {"image_encoder.neck.0.weight": (256, c, 1, 1)}
    shapes |= {"image_encoder.neck.2.weight": (256, 256, 3, 3)}
    for i in range(depth):
        rows = 127 if i in global_blocks else 27
        for axis in "hw":
            shapes[f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"] = (rows, head)
    shapes |= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128)}
    embeddings = [f"point_embeddings.{k}" for k in range(4)] + [
        "not_a_point_embed",
        "no_mask_embed",
    ]
    shapes |= {f"prompt_encoder.{name}.weight": (1, 256) for name in embeddings}
    shapes |= {"mask_decoder.iou_token.weight": (1, 256)}
    return shapes | {"mask_decoder.mask_tokens.weight": (4, 256)}


def mae_state(patch=16, side=3, width=768, depth=4):
    """Returns a random state dict of an MAE encoder.

    The first two channels of the positions are the row and the column.
    """
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    layers = {"patch_embed.proj": (width, 3, patch, patch), "norm": (width,)}
    for i in range(depth):
        layers |= {f"blocks.{i}.norm1": (width,), f"blocks.{i}.norm2": (width,)}
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
        }
        layers |= {
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
        }
    state = {f"{name}.weight": normal(*shape) for name, shape in layers.items()}
    state |= {f"{name}.bias": normal(shape[0]) for name, shape in layers.items()}
    positions = normal(1, 1 + side * side, width)
    positions[0, 1:, 0], positions[0, 1:, 1] = np.divmod(np.arange(side * side), side)
    return state | {"cls_token": normal(1, 1, width), "pos_embed": positions}
