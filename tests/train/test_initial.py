"""What a run begins with: attention that is matched looks where the prompt is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sam_jax
from sam_jax.model.sam import sam_tiny
from train.config import ConfigError, Data, TrainConfig
from train.initial import initial_variables

MODEL = sam_tiny(position_scale=1.0)
CONFIG = TrainConfig(model=MODEL, data=Data(source="scenes"))
SIDE = 8  # tokens


@pytest.fixture(scope="module")
def drawn():
    return initial_variables(CONFIG)


@pytest.fixture(scope="module")
def matched():
    return initial_variables(dataclasses.replace(CONFIG, match_attention=2.0))


def test_matching_changes_queries_and_keys_of_cross_attention_alone(drawn, matched):
    before, after = (flatten_dict(v["params"], sep="/") for v in (drawn, matched))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    layers = [
        f"layer_{i}/{attention}"
        for i in range(MODEL.decoder_depth)
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
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "w"), match_attention=2.0)
    taken = initial_variables(config)
    assert jax.tree.all(jax.tree.map(np.array_equal, taken, drawn))
    other = dataclasses.replace(config, model=sam_tiny(embed_dim=32))
    with pytest.raises(ConfigError, match="embed_dim was 64, is 32"):
        initial_variables(other)


def test_a_negative_scale_is_refused():
    with pytest.raises(ConfigError, match="match_attention must be at least 0"):
        dataclasses.replace(CONFIG, match_attention=-1.0)
