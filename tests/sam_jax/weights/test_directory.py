"""Tests weights directories: damaged JSON, wrong fields, and weights of another model."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from sam_jax.model.sam import FLAT_FIELDS, Sam, replace_fields, sam_tiny
from sam_jax.weights import formats, safetensors_file
from sam_jax.weights.formats import convert_file, load
from sam_jax.weights.model_json import sam_from_json, sam_to_json
from sam_jax.weights.tensors import WeightsError
from tests.sam_jax.weights.official_state import assert_same_variables, flatten


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Changes to an empty working folder, and returns it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path, model, variables):
    """Saves a weights directory without digests, whose files can be changed."""
    formats.save(path, model, variables)
    Path(path, "SHA256SUMS").unlink()


def change_model(version, **fields):
    """Changes fields of w/model.json by their flat names, and writes the given version."""
    path = Path("w/model.json")
    model = sam_from_json(json.loads(path.read_text()), path)
    content = flat_json(model) if version == 1 else sam_to_json(model)
    for name, value in fields.items():
        if version == 1:
            content[name] = value
            continue
        for part, field in (location.split(".") for location in FLAT_FIELDS[name]):
            content[part][field] = value
    path.write_text(json.dumps(content))


def flat_json(model):
    """Returns a model's fields as version 1 of model.json has them."""
    first = {name: locations[0].split(".") for name, locations in FLAT_FIELDS.items()}
    return {name: getattr(getattr(model, part), field) for name, (part, field) in first.items()}


VERSIONS = pytest.mark.parametrize("version", [1, 2])


@VERSIONS
def test_both_versions_of_model_json_are_read(tiny, version):
    model = replace_fields(tiny[0], dtype="bfloat16", dropout=0.1, drop_path=0.4, remat="blocks")
    save("w", model, tiny[1])
    assert json.loads(Path("w/model.json").read_text())["version"] == 2
    change_model(version)
    assert json.loads(Path("w/model.json").read_text()).get("version", 1) == version
    loaded, variables = load("w")
    assert loaded == model
    assert_same_variables(variables, tiny[1])


def test_the_share_of_objects_is_written_only_if_it_is_known(tiny):
    save("w", *tiny)
    assert "object_share" not in json.loads(Path("w/model.json").read_text())
    assert load("w")[0].object_share is None
    model = replace_fields(tiny[0], object_share=(0.25, 1.0))
    save("w", model, tiny[1])
    assert json.loads(Path("w/model.json").read_text())["object_share"] == [0.25, 1.0]
    assert load("w")[0] == model
    convert_file("w", "half", storage="float16")
    assert load("half")[0] == model


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "a list of 2 numbers; got 0.5"),
        ([0.5], r"a list of 2 numbers; got \[0.5\]"),
        ([0.5, "1"], r"a list of 2 numbers; got \[0.5, '1'\]"),
        ([0.75, 0.25], r"a smallest and a largest share above 0; got \(0.75, 0.25\)"),
        ([0, 1], r"a smallest and a largest share above 0; got \(0, 1\)"),
    ],
)
def test_a_bad_share_of_objects_is_named(tiny, value, message):
    save("w", *tiny)
    content = sam_to_json(tiny[0]) | {"object_share": value}
    Path("w/model.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=rf"w/model.json: object_share must be .*{message}"):
        load("w")


@pytest.mark.parametrize("version", [0, 3, "2", 2.0, True, None, [2]], ids=repr)
def test_an_unknown_version_is_named(tiny, version):
    save("w", *tiny)
    content = sam_to_json(tiny[0]) | {"version": version}
    Path("w/model.json").write_text(json.dumps(content))
    message = rf"w/model.json: version must be 1 to 2; got {re.escape(repr(version))}"
    with pytest.raises(WeightsError, match=message):
        load("w")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"w"', "[" * 100_000, '{"depth": 1e999}', "\x00", "{'depth': 2}"],
)
def test_a_bad_model_json_is_named(tiny, text):
    save("w", *tiny)
    Path("w/model.json").write_text(text)
    with pytest.raises(WeightsError, match=r"w/model.json"):
        load("w")


def test_a_model_json_that_is_not_text_is_named(tiny):
    save("w", *tiny)
    Path("w/model.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match=r"w/model.json"):
        load("w")


def test_a_huge_model_json_is_not_read(tiny):
    save("w", *tiny)
    with open("w/model.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(WeightsError, match=r"w/model.json is larger than"):
        load("w")


@VERSIONS
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", "2"),
        ("depth", 2.0),
        ("depth", True),
        ("depth", 0),
        ("depth", -2),
        ("depth", None),
        ("depth", [2]),
        ("image_size", 48),
        ("image_size", "48"),
        ("image_size", [48, 72.0]),
        ("image_size", [48, "72"]),
        ("global_blocks", [-1]),
        ("global_blocks", [[1]]),
        ("global_blocks", {"0": 1}),
        ("drop_path", 1.5),
        ("drop_path", -0.1),
        ("drop_path", float("nan")),
        ("dropout", "0"),
        ("position_scale", 0),
        ("position_scale", float("inf")),
        ("position_scale", "1"),
        ("dtype", "float16"),
        ("dtype", 32),
        ("remat", True),
        ("remat", "all"),
        ("scan_blocks", 1),
    ],
)
def test_a_field_of_the_wrong_type_is_named(tiny, field, value, version):
    save("w", *tiny)
    change_model(version, **{field: value})
    location = FLAT_FIELDS[field][0]
    with pytest.raises(WeightsError, match=rf"w/model.json: {location} must be.*got"):
        load("w")


def test_unknown_fields_are_named(tiny):
    save("w", *tiny)
    path = Path("w/model.json")
    path.write_text(json.dumps(flat_json(tiny[0]) | {"embed_dims": 24}))
    message = r"w/model.json: unknown fields \['embed_dims'\]; allowed are .*'embed_dim'"
    with pytest.raises(WeightsError, match=message):
        load("w")
    content = sam_to_json(tiny[0])
    content["image_encoder"]["embed_dims"] = 24
    path.write_text(json.dumps(content))
    message = r"unknown fields \['image_encoder.embed_dims'\]; allowed are .*'embed_dim'"
    with pytest.raises(WeightsError, match=message):
        load("w")
    path.write_text(json.dumps(sam_to_json(tiny[0]) | {"depth": 2, "text_encoder": {}}))
    message = r"unknown fields \['depth', 'text_encoder'\]; allowed are .*'mask_decoder'"
    with pytest.raises(WeightsError, match=message):
        load("w")


@pytest.mark.parametrize("part", [None, 3, [], "ImageEncoder"], ids=repr)
def test_a_part_that_is_not_an_object_is_named(tiny, part):
    save("w", *tiny)
    content = sam_to_json(tiny[0]) | {"image_encoder": part}
    Path("w/model.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"w/model.json: image_encoder must be an object; got"):
        load("w")


def test_shared_fields_must_agree(tiny):
    save("w", *tiny)
    content = sam_to_json(tiny[0])
    content["prompt_encoder"]["dtype"] = "bfloat16"
    Path("w/model.json").write_text(json.dumps(content))
    message = r"w/model.json: prompt_encoder.dtype and mask_decoder.dtype must be equal to"
    with pytest.raises(WeightsError, match=message):
        load("w")


@VERSIONS
def test_absent_fields_have_default_values(variables_of, version):
    model = sam_tiny(depth=1, global_blocks=(0,))
    save("w", model, variables_of(model))
    content = flat_json(model) if version == 1 else sam_to_json(model)
    encoder = content if version == 1 else content["image_encoder"]
    del encoder["dtype"], encoder["mlp_ratio"]
    Path("w/model.json").write_text(json.dumps(content))
    assert load("w")[0] == model


def test_an_absent_part_has_default_values():
    assert sam_from_json({"version": 2}, Path("model.json")) == Sam()
    assert sam_from_json({}, Path("model.json")) == Sam()


@VERSIONS
@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": [48]},
        {"image_size": [48, 72, 3]},
        {"image_size": [0, 0]},
        {"image_size": [50, 72]},
        {"image_size": [48, 8 << 60]},
        {"patch_size": 7},
        {"num_heads": 5},
        {"prompt_dim": 36},
        {"mask_channels": 2},
        {"global_blocks": [99]},
        {"window_size": 5},
        {"embed_dim": 48},
        {"decoder_depth": 3},
    ],
    ids=str,
)
def test_inconsistent_fields_are_named(tiny, fields, version):
    save("w", *tiny)
    change_model(version, **fields)
    (name,) = fields
    locations = "|".join(location.split(".")[1] for location in FLAT_FIELDS[name])
    with pytest.raises(WeightsError, match=rf"w/(model.json.*({locations})|weights.safetensors)"):
        load("w")


def test_a_depth_unlike_that_of_the_weights_is_refused_without_tracing(tiny, monkeypatch):
    save("w", *tiny)
    change_model(2, depth=10**9)
    # Tracing a model with so many blocks would take hours.
    monkeypatch.setattr(jax, "eval_shape", lambda *args: pytest.fail("traced"))
    with pytest.raises(WeightsError, match=r"w/(model.json.*depth|weights.safetensors)"):
        load("w")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_weights_of_other_dtypes_are_converted_or_refused(tiny, dtype):
    """Checks that floats are converted to float32 or refused, and that integers are refused."""
    save("w", *tiny)
    flat = {k: x.astype(dtype) for k, x in flatten(tiny[1]).items()}
    safetensors_file.write("w/weights.safetensors", flat)
    try:
        _, variables = load("w")
    except WeightsError as error:
        assert "w/weights.safetensors" in str(error)  # noqa: PT017 - either is right
    else:
        assert dtype != np.int32
        assert {x.dtype.name for x in jax.tree.leaves(variables)} == {"float32"}


def test_weights_of_another_model_are_named(tiny):
    save("w", *tiny)
    flat = flatten(tiny[1])
    first = min(flat)
    safetensors_file.write("w/weights.safetensors", {k: x for k, x in flat.items() if k != first})
    with pytest.raises(WeightsError, match=rf"w/weights.safetensors.*missing \[{first}\]"):
        load("w")
    safetensors_file.write("w/weights.safetensors", flat | {"params/extra": flat[first]})
    with pytest.raises(WeightsError, match=r"w/weights.safetensors.*unknown \[params/extra\]"):
        load("w")
    safetensors_file.write("w/weights.safetensors", flat | {first: flat[first][:1]})
    with pytest.raises(WeightsError, match=rf"w/weights.safetensors.*{first} \(1, 16\) instead of"):
        load("w")
    os.remove("w/weights.safetensors")
    with pytest.raises(WeightsError, match=r"w/weights.safetensors is missing"):
        load("w")
