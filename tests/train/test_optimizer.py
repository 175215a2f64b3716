"""The optimizer: schedule, layer-wise learning rates, weight decay, and AdamW steps."""

import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.init import init_variables
from sam_jax.model.mae import mae_tiny
from sam_jax.model.sam import sam_tiny, sam_vit_b, sam_vit_h, sam_vit_l
from train.config import ConfigError, Optimizer
from train.optimizer import (
    check_trainable,
    is_decayed,
    is_trainable,
    lr_multiplier,
    make_optimizer,
    make_schedule,
)

SIZES = {
    "vit_b": (sam_vit_b, 12, 0.6),
    "vit_l": (sam_vit_l, 24, 0.8),
    "vit_h": (sam_vit_h, 32, 0.8),
}


@functools.cache
def param_shapes(model):
    """Returns the nested shapes of a model's parameters, without computing the parameters."""
    return jax.eval_shape(lambda: init_variables(model, 0))["params"]


def flatten(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


# The schedule.


def test_default_schedule_is_that_of_the_paper():
    rate = make_schedule(Optimizer())
    expected = {
        0: 8e-4 / 250,
        1: 8e-4 * 2 / 250,
        124: 8e-4 / 2,
        248: 8e-4 * 249 / 250,
        249: 8e-4,
        250: 8e-4,
        59_999: 8e-4,
        60_000: 8e-5,
        86_665: 8e-5,
        86_666: 8e-6,
        89_999: 8e-6,
    }
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, err_msg=str(step))
        np.testing.assert_allclose(rate(jnp.int32(step)), value, rtol=1e-6, err_msg=str(step))


def test_half_cosine_follows_the_warm_up():
    rate = make_schedule(
        Optimizer(peak_lr=2e-3, warmup_steps=100, lr_boundaries=(), cosine_steps=1100)
    )
    expected = {0: 2e-5, 99: 2e-3, 100: 2e-3, 350: 1e-3 + 2**-0.5 * 1e-3, 600: 1e-3, 1100: 0}
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value, rel=1e-5, abs=1e-9)
    assert rate(5000) == pytest.approx(0, abs=1e-9)


def test_schedule_without_warm_up_and_drops_is_constant():
    rate = make_schedule(Optimizer(peak_lr=0.5, warmup_steps=0, lr_boundaries=()))
    np.testing.assert_allclose([rate(0), rate(1), rate(10**6)], 0.5)


def test_drops_apply_during_the_warm_up():
    rate = make_schedule(
        Optimizer(peak_lr=1.0, warmup_steps=4, lr_boundaries=(1, 3), lr_decay_factor=0.5)
    )
    expected = [0.25, 0.25, 0.375, 0.25, 0.25]
    np.testing.assert_allclose([rate(step) for step in range(5)], expected)


# Layer-wise learning rates.


@pytest.mark.parametrize("size", SIZES)
def test_learning_rate_of_every_parameter(size):
    model, depth, decay = SIZES[size]
    all_expected = []
    for path in flatten(param_shapes(model())):
        multiplier = lr_multiplier(path, decay, depth)
        block = re.match(r"image_encoder/block_(\d\d)/", path)
        if block:
            expected = decay ** (depth - int(block[1]))
        elif path.startswith(("image_encoder/patch_embed/", "image_encoder/pos_embed")):
            expected = decay ** (depth + 1)
        else:
            assert path.startswith(("image_encoder/neck/", "prompt_encoder/", "mask_decoder/"))
            expected = 1.0
        assert multiplier == pytest.approx(expected, rel=1e-12), path
        all_expected.append(expected)
    # One rate for the embeddings, one for each block and one for all other parameters.
    assert len({round(np.log(x) / np.log(decay)) for x in all_expected}) == depth + 2


def test_learning_rates_of_vit_h():
    def rate(path):
        return lr_multiplier(path, 0.8, 32)

    assert rate("image_encoder/pos_embed") == pytest.approx(6.3e-4, rel=0.01)
    assert rate("image_encoder/block_00/lin1/bias") == pytest.approx(0.8**32)
    assert rate("image_encoder/block_31/attention/rel_pos_h") == pytest.approx(0.8)
    assert rate("image_encoder/neck/conv1/kernel") == 1
    assert rate("mask_decoder/transformer/layer_0/norm1/scale") == 1


# Weight decay.

# Parameters without weight decay, except biases: norms, embeddings, tokens and positions.
NOT_DECAYED_EXCEPT_BIASES = [
    "image_encoder/block_##/attention/rel_pos_h",
    "image_encoder/block_##/attention/rel_pos_w",
    "image_encoder/block_##/norm#/scale",
    "image_encoder/neck/norm#/scale",
    "image_encoder/pos_embed",
    "mask_decoder/iou_token",
    "mask_decoder/mask_tokens",
    "mask_decoder/transformer/final_norm/scale",
    "mask_decoder/transformer/layer_#/norm#/scale",
    "mask_decoder/upscaling/norm/scale",
    "prompt_encoder/background",
    "prompt_encoder/bottom_right",
    "prompt_encoder/foreground",
    "prompt_encoder/mask_downscaling/norm#/scale",
    "prompt_encoder/no_mask",
    "prompt_encoder/not_a_point",
    "prompt_encoder/top_left",
]
DECAYED = [
    "image_encoder/block_##/attention/proj/kernel",
    "image_encoder/block_##/attention/qkv/kernel",
    "image_encoder/block_##/lin#/kernel",
    "image_encoder/neck/conv#/kernel",
    "image_encoder/patch_embed/kernel",
    "mask_decoder/hypernetwork_#/lin#/kernel",
    "mask_decoder/iou_head/lin#/kernel",
    "mask_decoder/transformer/final_attention/k/kernel",
    "mask_decoder/transformer/final_attention/out/kernel",
    "mask_decoder/transformer/final_attention/q/kernel",
    "mask_decoder/transformer/final_attention/v/kernel",
    "mask_decoder/transformer/layer_#/image_to_token/k/kernel",
    "mask_decoder/transformer/layer_#/image_to_token/out/kernel",
    "mask_decoder/transformer/layer_#/image_to_token/q/kernel",
    "mask_decoder/transformer/layer_#/image_to_token/v/kernel",
    "mask_decoder/transformer/layer_#/mlp/lin#/kernel",
    "mask_decoder/transformer/layer_#/self_attention/k/kernel",
    "mask_decoder/transformer/layer_#/self_attention/out/kernel",
    "mask_decoder/transformer/layer_#/self_attention/q/kernel",
    "mask_decoder/transformer/layer_#/self_attention/v/kernel",
    "mask_decoder/transformer/layer_#/token_to_image/k/kernel",
    "mask_decoder/transformer/layer_#/token_to_image/out/kernel",
    "mask_decoder/transformer/layer_#/token_to_image/q/kernel",
    "mask_decoder/transformer/layer_#/token_to_image/v/kernel",
    "mask_decoder/upscaling/conv#/kernel",
    "prompt_encoder/mask_downscaling/conv#/kernel",
]


@pytest.mark.parametrize("size", SIZES)
def test_weight_decay_of_every_parameter(size):
    is_decayed_by_path = flatten(is_decayed(param_shapes(SIZES[size][0]())))

    def patterns(decayed):
        """Returns the paths of parameters with or without weight decay; # replaces digits."""
        return {re.sub(r"\d", "#", path) for path, x in is_decayed_by_path.items() if x == decayed}

    assert sorted(patterns(decayed=True)) == DECAYED
    not_decayed = patterns(decayed=False)
    biases = {path for path in not_decayed if path.endswith("/bias")}
    assert sorted(not_decayed - biases) == NOT_DECAYED_EXCEPT_BIASES
    kernel_biases = {path.replace("kernel", "bias") for path in DECAYED if "neck" not in path}
    scales = [path for path in NOT_DECAYED_EXCEPT_BIASES if path.endswith("/scale")]
    assert biases == kernel_biases | {path.replace("scale", "bias") for path in scales}


# Steps against an AdamW in numpy.

PARAMS = {
    "image_encoder": {
        "pos_embed": jnp.array([1.0, -2.0]),
        "block_00": {"lin1": {"kernel": jnp.array([0.5, -4.0]), "bias": jnp.array([3.0])}},
        "block_01": {"lin1": {"kernel": jnp.array([2.0, 0.0])}},
    },
    "prompt_encoder": {"no_mask": jnp.array([7.0])},
    "mask_decoder": {"iou_head": {"lin1": {"kernel": jnp.array([10.0])}}},
}
GRADIENTS = {
    "image_encoder/pos_embed": [[0.1, 0.0], [-0.3, 0.2]],
    "image_encoder/block_00/lin1/kernel": [[-3.0, 1e-3], [-3.0, 1e-3]],
    "image_encoder/block_00/lin1/bias": [[2.0], [-1.0]],
    "image_encoder/block_01/lin1/kernel": [[5.0, -5.0], [1.0, 0.0]],
    "prompt_encoder/no_mask": [[1e-6], [1e-6]],
    "mask_decoder/iou_head/lin1/kernel": [[-0.7], [0.1]],
}
CONFIG = Optimizer(
    peak_lr=0.1,
    warmup_steps=2,
    lr_boundaries=(3,),
    weight_decay=0.2,
    layer_decay=0.5,
    b1=0.8,
    b2=0.9,
)


def test_weight_decay_of_masked_autoencoders():
    """All parameters except biases and norms have weight decay, as in MAE, also the tokens."""
    params = jax.eval_shape(lambda: init_variables(mae_tiny(), 0))["params"]
    for path, decayed in flatten(is_decayed(params)).items():
        assert decayed == (not path.endswith(("bias", "scale"))), path


def make_gradients(step):
    flat = {path: jnp.array(steps[step]) for path, steps in GRADIENTS.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def run(optimizer, params, steps):
    """Applies the updates of some steps and returns the parameters and the optimizer state."""
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(make_gradients(step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def adamw_in_numpy(path, value, steps):
    """Applies AdamW to one parameter in float64, with the equations of its paper."""
    rates = {"pos_embed": 0.5**3, "block_00": 0.5**2, "block_01": 0.5}
    rate = next((r for part, r in rates.items() if part in path), 1.0)
    decay = 0.2 if path.endswith("kernel") else 0.0
    value, m, v = np.array(value, np.float64), 0.0, 0.0
    for step in range(steps):
        g = np.array(GRADIENTS[path][step])
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
        lr = 0.1 * min(1, (step + 1) / 2) * rate
        value = value - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * value)
    return value


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_match_adamw_in_numpy(steps):
    params, _ = run(make_optimizer(CONFIG, depth=2), PARAMS, steps)
    start = flatten(PARAMS)
    for path, value in flatten(params).items():
        expected = adamw_in_numpy(path, start[path], steps)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-9, err_msg=path)


def test_the_first_step_is_the_sign_of_the_gradient():
    """The sign is multiplied by the learning rate, which is 0.1 / 2 * 0.5**2 in block_00.

    m_hat / sqrt(v_hat) is 1 or -1. The weight decay of 0.2 times the parameter is added to it.
    """
    params, _ = run(make_optimizer(CONFIG, depth=2), PARAMS, 1)
    kernel = params["image_encoder"]["block_00"]["lin1"]["kernel"]
    expected = [0.5 - 0.0125 * (-1 + 0.2 * 0.5), -4 - 0.0125 * (1 + 0.2 * -4)]
    np.testing.assert_allclose(
        kernel, expected, rtol=1e-5
    )  # epsilon is 1e-8, and a gradient is 1e-3
    bias = params["image_encoder"]["block_00"]["lin1"]["bias"]
    np.testing.assert_allclose(bias, [3 - 0.0125], rtol=1e-6)


# Trainable parts.

PART = ("mask_decoder", "image_encoder/block_01")


def test_frozen_parameters_do_not_change_and_others_do():
    params, _ = run(make_optimizer(CONFIG, depth=2, trainable=PART), PARAMS, 2)
    all_trained, _ = run(make_optimizer(CONFIG, depth=2), PARAMS, 2)
    start, all_trained = flatten(PARAMS), flatten(all_trained)
    for path, value in flatten(params).items():
        if path.startswith(PART):
            np.testing.assert_array_equal(value, all_trained[path], err_msg=path)
            assert not np.array_equal(value, start[path])
        else:
            assert value.tobytes() == start[path].tobytes(), path


def test_frozen_parameters_have_no_moments():
    def num_moments(state):
        return sum(x.size for x in jax.tree.leaves(state) if x.ndim)

    _, state = run(make_optimizer(CONFIG, depth=2, trainable=PART), PARAMS, 1)
    trained = [x.size for path, x in flatten(PARAMS).items() if path.startswith(PART)]
    assert num_moments(state) == 2 * sum(trained)
    _, state = run(make_optimizer(CONFIG, depth=2), PARAMS, 1)
    assert num_moments(state) == 2 * sum(x.size for x in flatten(PARAMS).values())


def test_schedule_of_a_trainable_part_counts_steps():
    """The optimizer state of a part can also be traced."""
    optimizer = make_optimizer(CONFIG, depth=2, trainable=("prompt_encoder",))
    params, _ = jax.jit(lambda params: run(optimizer, params, 2))(PARAMS)
    expected = adamw_in_numpy("prompt_encoder/no_mask", [7.0], 2)
    np.testing.assert_allclose(params["prompt_encoder"]["no_mask"], expected, rtol=1e-6)


def test_trainable_matches_complete_path_components():
    assert is_trainable("mask_decoder/iou_head/lin1/kernel", ("mask_decoder",))
    assert is_trainable("mask_decoder/iou_head/lin1/kernel", ("mask_decoder/iou_head",))
    assert is_trainable("image_encoder/pos_embed", ("prompt_encoder", "image_encoder/pos_embed"))
    assert not is_trainable("mask_decoder/iou_head/lin1/kernel", ("mask_decoder/iou",))
    assert not is_trainable("mask_decoder/iou_token", ("mask_decoder/iou_head",))
    assert not is_trainable("image_encoder/block_01/norm1/scale", ("image_encoder/block_0",))
    assert is_trainable("anything/at/all", ())


def test_trainable_parts_without_parameters_are_named_in_the_error():
    params = param_shapes(sam_tiny())
    check_trainable(params, ())
    check_trainable(params, ("mask_decoder", "image_encoder/neck", "image_encoder/pos_embed"))
    for wrong in ("decoder", "mask_decoder/iou", "image_encoder/block_4", "block_00", ""):
        with pytest.raises(ConfigError) as error:
            check_trainable(params, ("mask_decoder", wrong))
        assert f"trainable names {wrong!r}" in str(error.value)
        assert "image_encoder/block_00" in str(error.value)
        assert "mask_decoder/iou_head" in str(error.value)
