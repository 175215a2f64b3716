"""The initial variables of a run: saved weights, mimetic initialization, pre-trained encoders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sam_jax
from configs.mae_tiny import config as pretraining
from sam_jax.data.open import open_source, select
from sam_jax.model.init import init_variables
from sam_jax.model.mae import mae_tiny
from sam_jax.model.sam import replace_fields, sam_tiny
from sam_jax.weights import safetensors_file
from train.config import ConfigError, Data, TrainConfig
from train.initialization import parse_init_from, sam_variables
from train.tasks.base import make_task

MODEL = sam_tiny(position_scale=1.0)
CONFIG = TrainConfig(model=MODEL, data=Data(source="scenes"))
GRID = 8  # tokens along each side


IMAGES = select(open_source("scenes"), ":100")


def initial_variables(config):
    return make_task(config).initial_variables(IMAGES)


def no_batch():
    raise AssertionError("no images are needed")


@pytest.fixture(scope="module")
def default_variables():
    """Variables without `init_from` and `mimetic_init_scale`."""
    return initial_variables(CONFIG)


@pytest.fixture(scope="module")
def mimetic_variables():
    """The same variables with `mimetic_init_scale=2.0`."""
    return initial_variables(dataclasses.replace(CONFIG, mimetic_init_scale=2.0))


def test_mimetic_init_changes_only_queries_and_keys_of_cross_attention(
    default_variables, mimetic_variables
):
    before, after = (
        flatten_dict(v["params"], sep="/") for v in (default_variables, mimetic_variables)
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    layers = [
        f"layer_{i}/{attention}"
        for i in range(MODEL.mask_decoder.depth)
        for attention in ("token_to_image", "image_to_token")
    ]
    paths = [f"mask_decoder/transformer/{name}" for name in (*layers, "final_attention")]
    assert changed == {f"{path}/{name}/kernel" for path in paths for name in "qk"}
    for path in paths:
        np.testing.assert_array_equal(after[f"{path}/k/kernel"], after[f"{path}/q/kernel"])
        np.testing.assert_array_equal(
            after[f"{path}/q/kernel"], 2 * np.asarray(before[f"{path}/q/kernel"])
        )
    assert before.keys() == after.keys()
    constants = (v["constants"] for v in (default_variables, mimetic_variables))
    assert jax.tree.all(jax.tree.map(np.array_equal, *constants))


def test_mimetic_attention_is_strongest_at_the_prompt(default_variables, mimetic_variables):
    def argmax_of_attention(variables):
        """Returns, for a query at each token's position, the token of the highest logit."""
        positions = MODEL.apply(
            variables, method=lambda sam: sam.prompt_encoder.encode_grid(GRID, GRID)
        )
        weights = variables["params"]["mask_decoder"]["transformer"]["layer_0"]["token_to_image"]
        logits = (positions @ weights["q"]["kernel"]) @ (positions @ weights["k"]["kernel"]).T
        return jnp.argmax(logits, axis=1)

    tokens = np.arange(GRID**2)
    assert np.mean(argmax_of_attention(mimetic_variables) == tokens) > 0.7
    assert np.mean(argmax_of_attention(default_variables) == tokens) < 0.2


def test_saved_weights_are_used_without_changes(default_variables, tmp_path):
    sam_jax.save(tmp_path / "w", MODEL, default_variables)
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "w"), mimetic_init_scale=2.0)
    variables = initial_variables(config)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, default_variables))
    other_config = dataclasses.replace(config, model=sam_tiny(embed_dim=32))
    with pytest.raises(ConfigError, match="embed_dim was 64, is 32"):
        initial_variables(other_config)


def test_a_negative_mimetic_init_scale_is_an_error():
    with pytest.raises(ConfigError, match="mimetic_init_scale must be at least 0"):
        dataclasses.replace(CONFIG, mimetic_init_scale=-1.0)


# Weights of masked autoencoders.

MAE = mae_tiny(image_size=(32, 48))


@pytest.fixture(scope="module")
def autoencoder():
    return init_variables(MAE, 3)


def test_encoder_of_an_autoencoder_is_used_and_the_rest_is_initialized(
    default_variables, autoencoder, tmp_path
):
    sam_jax.save(tmp_path / "mae", MAE, autoencoder)
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "mae"))
    variables = sam_variables(config, lambda: default_variables, no_batch)
    before, after = (flatten_dict(v["params"], sep="/") for v in (default_variables, variables))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    parts = ("attention/qkv/kernel", "attention/proj/kernel", "lin1/kernel", "lin2/kernel")
    assert changed == {
        *(f"image_encoder/block_0{i}/{part}" for i in range(2) for part in parts),
        *("image_encoder/patch_embed/kernel", "image_encoder/pos_embed"),
    }  # biases and norms have the same initial values in both models
    kernel = autoencoder["params"]["block_01"]["lin1"]["kernel"]
    np.testing.assert_array_equal(after["image_encoder/block_01/lin1/kernel"], kernel)
    file = tmp_path / "mae.pth"
    sam_jax.save(file, MAE.clone(image_size=(40, 40)), init_variables(MAE, 3))
    mimetic = dataclasses.replace(CONFIG, init_from=str(file), mimetic_init_scale=2.0)
    variables = sam_variables(mimetic, lambda: default_variables, no_batch)
    after = flatten_dict(variables["params"], sep="/")
    np.testing.assert_array_equal(after["image_encoder/block_01/lin1/kernel"], kernel)
    assert after["image_encoder/pos_embed"].shape == before["image_encoder/pos_embed"].shape


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (sam_tiny(num_heads=4), "an encoder of 2 heads; model.image_encoder.num_heads is 4"),
        (sam_tiny(embed_dim=32), "64 wide and 2 deep; the model's is 32 wide"),
    ],
)
def test_an_autoencoder_with_another_encoder_is_an_error(autoencoder, tmp_path, model, message):
    sam_jax.save(tmp_path / "mae", MAE, autoencoder)
    with pytest.raises(ConfigError, match=message):
        initial_variables(dataclasses.replace(CONFIG, model=model, init_from=str(tmp_path / "mae")))


def test_an_autoencoder_is_initialized_from_another_of_the_same_sizes(autoencoder, tmp_path):
    sam_jax.save(tmp_path / "mae", MAE, autoencoder)
    config = dataclasses.replace(pretraining, model=MAE, init_from=str(tmp_path / "mae"))
    assert jax.tree.all(jax.tree.map(np.array_equal, initial_variables(config), autoencoder))
    with pytest.raises(ConfigError, match="decoder_depth was 1, is 2"):
        initial_variables(dataclasses.replace(config, model=MAE.clone(decoder_depth=2)))
    sam_jax.save(tmp_path / "mae.pth", MAE, autoencoder)
    with pytest.raises(ConfigError, match="must be the weights directory of a masked autoencoder"):
        initial_variables(dataclasses.replace(config, init_from=str(tmp_path / "mae.pth")))


# From other plain vision transformers.


@pytest.fixture
def dinov2(tmp_path):
    """Returns a Hugging Face folder of a DINOv2 encoder of 64 channels, and its tensors."""
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.cls_token": (1, 1, 64),
        "embeddings.mask_token": (1, 64),
        "embeddings.patch_embeddings.projection.weight": (64, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (64,),
        "embeddings.position_embeddings": (1, 26, 64),
        "layernorm.weight": (64,),
        "layernorm.bias": (64,),
    }
    layers = {f"attention.attention.{part}": (64, 64) for part in ("query", "key", "value")}
    layers |= {"attention.output.dense": (64, 64), "mlp.fc1": (256, 64), "mlp.fc2": (64, 256)}
    layers |= {"norm1": (64,), "norm2": (64,)}
    for i in range(2):
        for layer, shape in layers.items():
            shapes[f"encoder.layer.{i}.{layer}.weight"] = shape
            shapes[f"encoder.layer.{i}.{layer}.bias"] = shape[:1]
        shapes |= {f"encoder.layer.{i}.layer_scale{j}.lambda1": (64,) for j in (1, 2)}
    state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    safetensors_file.write(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    return tmp_path, state


def test_a_dinov2_encoder_is_used_and_other_parts_are_initialized(
    default_variables, dinov2, caplog
):
    folder, state = dinov2
    config = dataclasses.replace(CONFIG, init_from=str(folder))
    variables = sam_variables(config, lambda: default_variables, no_batch)
    before, after = (flatten_dict(v["params"], sep="/") for v in (default_variables, variables))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    kept = ("image_encoder/neck/", "prompt_encoder/", "mask_decoder/")
    assert changed == {k for k in before if not k.startswith(kept) and "rel_pos" not in k}
    query = np.asarray(after["image_encoder/block_01/attention/qkv/kernel"])[:, :64]
    np.testing.assert_array_equal(
        query, state["encoder.layer.1.attention.attention.query.weight"].T
    )
    assert "patches were resized from 14 to 8 pixels" in caplog.text
    with pytest.raises(ConfigError, match=r"of 2 heads; model.image_encoder.num_heads is 4"):
        initial_variables(dataclasses.replace(config, model=sam_tiny(num_heads=4)))


# Parts from different places.


@pytest.fixture
def trained(tmp_path):
    """The path of a SAM's weights, and the variables."""
    variables = init_variables(MODEL, 5)
    sam_jax.save(tmp_path / "trained", MODEL, variables)
    return tmp_path / "trained", variables


def changed_parts(before, after):
    """Returns the parts in which variables differ, as "params/image_encoder/neck"."""
    before, after = (flatten_dict(v, sep="/") for v in (before, after))
    assert before.keys() == after.keys()
    names = [name for name in before if not np.array_equal(before[name], after[name])]
    return {"/".join(name.split("/")[:2]) for name in names}


def test_parts_start_from_different_weights(default_variables, trained, dinov2):
    path, variables = trained
    init_from = f"image_encoder={dinov2[0]},prompt_encoder={path},mask_decoder={path}"
    mixed = initial_variables(dataclasses.replace(CONFIG, init_from=init_from))
    assert changed_parts(variables, mixed) == {"params/image_encoder"}
    encoder = initial_variables(dataclasses.replace(CONFIG, init_from=str(dinov2[0])))
    decoders = {"params/prompt_encoder", "constants/prompt_encoder", "params/mask_decoder"}
    assert changed_parts(encoder, mixed) == decoders


def test_a_part_may_be_a_module_inside_of_another(default_variables, trained):
    path, variables = trained
    config = dataclasses.replace(CONFIG, init_from=f"image_encoder/neck={path}")
    mixed = initial_variables(config)
    before, after, saved = (
        flatten_dict(v["params"], sep="/") for v in (default_variables, mixed, variables)
    )
    for name in before:
        expected = saved if name.startswith("image_encoder/neck/") else before
        np.testing.assert_array_equal(after[name], expected[name])


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        ("image_encoder/head=WEIGHTS", "has no variables in image_encoder/head"),
        ("mask_decoder=ENCODER", "can only be used for image_encoder; got mask_decoder"),
    ],
)
def test_parts_that_weights_do_not_have_are_errors(trained, dinov2, init_from, message):
    init_from = init_from.replace("WEIGHTS", str(trained[0])).replace("ENCODER", str(dinov2[0]))
    with pytest.raises(ConfigError, match=message):
        initial_variables(dataclasses.replace(CONFIG, init_from=init_from))


def test_weights_may_be_of_objects_of_another_size(trained, tmp_path):
    model = replace_fields(MODEL, object_share=(0.25, 0.75))
    sam_jax.save(tmp_path / "windows", model, trained[1])
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "windows"))
    assert changed_parts(initial_variables(config), trained[1]) == set()


def test_a_part_of_another_size_is_an_error(trained):
    config = dataclasses.replace(
        CONFIG, model=sam_tiny(decoder_mlp_dim=128), init_from=f"mask_decoder={trained[0]}"
    )
    with pytest.raises(ConfigError, match="holds another mask_decoder: mlp_dim was 256, is 128"):
        initial_variables(config)


def test_a_path_with_an_equals_sign_is_a_path():
    assert parse_init_from("runs/lr=1,x/weights") == [("", "runs/lr=1,x/weights")]
    assert parse_init_from("") == []
    assert parse_init_from("mask_decoder=a=b") == [("mask_decoder", "a=b")]


def test_a_neck_is_fitted_only_to_an_encoder_without_one(trained, dinov2):
    for init_from in ("", str(trained[0])):
        config = dataclasses.replace(CONFIG, fit_neck=True, init_from=init_from)
        with pytest.raises(ConfigError, match="fit_neck must be False unless init_from names"):
            initial_variables(config)
    with pytest.raises(ConfigError, match="fit_neck must be False, because a masked autoencoder"):
        initial_variables(dataclasses.replace(pretraining, fit_neck=True))
    config = dataclasses.replace(CONFIG, fit_neck=True, init_from=str(dinov2[0]))
    neck = initial_variables(config)["params"]["image_encoder"]["neck"]
    assert (np.asarray(neck["conv2"]["kernel"])[1, 1] == np.eye(MODEL.embedding_dim)).all()
