"""The initial variables of a run: given weights, mimetic attention, pretrained encoders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sam_jax
from configs.mae_tiny import config as pretraining
from sam_jax.model.init import init_variables
from sam_jax.model.mae import mae_tiny
from sam_jax.model.sam import sam_tiny
from sam_jax.weights import safetensors_file
from train.config import ConfigError, Data, TrainConfig
from train.initialization import sam_variables
from train.tasks.base import make_task

MODEL = sam_tiny(position_scale=1.0)
CONFIG = TrainConfig(model=MODEL, data=Data(source="scenes"))
SIDE = 8  # tokens


def begin(config):
    return make_task(config).initial_variables()


@pytest.fixture(scope="module")
def drawn():
    return begin(CONFIG)


@pytest.fixture(scope="module")
def matched():
    return begin(dataclasses.replace(CONFIG, mimetic_init_scale=2.0))


def test_matching_changes_queries_and_keys_of_cross_attention_alone(drawn, matched):
    before, after = (flatten_dict(v["params"], sep="/") for v in (drawn, matched))
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
    assert jax.tree.all(jax.tree.map(np.array_equal, drawn["constants"], matched["constants"]))


def test_matched_attention_looks_where_the_prompt_is(drawn, matched):
    def where_it_looks(variables):
        """The tokens '(gh gw)' that positions equal to each of theirs look at most."""
        grid = MODEL.apply(variables, method=lambda sam: sam.prompt_encoder.encode_grid(SIDE, SIDE))
        weights = variables["params"]["mask_decoder"]["transformer"]["layer_0"]["token_to_image"]
        logits = (grid @ weights["q"]["kernel"]) @ (grid @ weights["k"]["kernel"]).T
        return jnp.argmax(logits, axis=1)

    own = np.arange(SIDE**2)
    assert np.mean(where_it_looks(matched) == own) > 0.7
    assert np.mean(where_it_looks(drawn) == own) < 0.2


def test_given_weights_are_taken_as_they_are(drawn, tmp_path):
    sam_jax.save(tmp_path / "w", MODEL, drawn)
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "w"), mimetic_init_scale=2.0)
    taken = begin(config)
    assert jax.tree.all(jax.tree.map(np.array_equal, taken, drawn))
    other = dataclasses.replace(config, model=sam_tiny(embed_dim=32))
    with pytest.raises(ConfigError, match="embed_dim was 64, is 32"):
        begin(other)


def test_a_negative_scale_is_refused():
    with pytest.raises(ConfigError, match="mimetic_init_scale must be at least 0"):
        dataclasses.replace(CONFIG, mimetic_init_scale=-1.0)


# From masked autoencoders.

MAE = mae_tiny(image_size=(32, 48))


@pytest.fixture(scope="module")
def autoencoder():
    return init_variables(MAE, 3)


def test_an_autoencoders_encoder_is_taken_and_the_rest_is_drawn(drawn, autoencoder, tmp_path):
    sam_jax.save(tmp_path / "mae", MAE, autoencoder)
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "mae"))
    begun = sam_variables(config, lambda: drawn)
    before, after = (flatten_dict(v["params"], sep="/") for v in (drawn, begun))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    parts = ("attention/qkv/kernel", "attention/proj/kernel", "lin1/kernel", "lin2/kernel")
    assert changed == {
        *(f"image_encoder/block_0{i}/{part}" for i in range(2) for part in parts),
        *("image_encoder/patch_embed/kernel", "image_encoder/pos_embed"),
    }  # biases and norms are drawn alike
    kernel = autoencoder["params"]["block_01"]["lin1"]["kernel"]
    np.testing.assert_array_equal(after["image_encoder/block_01/lin1/kernel"], kernel)
    file = tmp_path / "mae.pth"
    sam_jax.save(file, MAE.clone(image_size=(40, 40)), init_variables(MAE, 3))
    matched = dataclasses.replace(CONFIG, init_from=str(file), mimetic_init_scale=2.0)
    begun = sam_variables(matched, lambda: drawn)
    again = flatten_dict(begun["params"], sep="/")
    np.testing.assert_array_equal(again["image_encoder/block_01/lin1/kernel"], kernel)
    assert again["image_encoder/pos_embed"].shape == before["image_encoder/pos_embed"].shape


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (sam_tiny(num_heads=4), "an encoder of 2 heads; model.image_encoder.num_heads is 4"),
        (sam_tiny(embed_dim=32), "64 wide and 2 deep; the model's is 32 wide"),
    ],
)
def test_an_autoencoder_of_another_encoder_is_refused(autoencoder, tmp_path, model, said):
    sam_jax.save(tmp_path / "mae", MAE, autoencoder)
    with pytest.raises(ConfigError, match=said):
        begin(dataclasses.replace(CONFIG, model=model, init_from=str(tmp_path / "mae")))


def test_an_autoencoder_begins_with_another_of_the_same_sizes(autoencoder, tmp_path):
    sam_jax.save(tmp_path / "mae", MAE, autoencoder)
    config = dataclasses.replace(pretraining, model=MAE, init_from=str(tmp_path / "mae"))
    assert jax.tree.all(jax.tree.map(np.array_equal, begin(config), autoencoder))
    with pytest.raises(ConfigError, match="decoder_depth was 1, is 2"):
        begin(dataclasses.replace(config, model=MAE.clone(decoder_depth=2)))
    sam_jax.save(tmp_path / "mae.pth", MAE, autoencoder)
    with pytest.raises(ConfigError, match="must be the weights directory of a masked autoencoder"):
        begin(dataclasses.replace(config, init_from=str(tmp_path / "mae.pth")))


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


def test_a_dinov2_encoder_is_taken_and_the_rest_is_drawn(drawn, dinov2, caplog):
    folder, state = dinov2
    config = dataclasses.replace(CONFIG, init_from=str(folder))
    begun = sam_variables(config, lambda: drawn)
    before, after = (flatten_dict(v["params"], sep="/") for v in (drawn, begun))
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
        begin(dataclasses.replace(config, model=sam_tiny(num_heads=4)))
