"""Tests fields of modules as plain values, and the rules for their values."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.fields import Rule, check_rules, module_fields, module_to_dict, multiple_of
from sam_jax.model.image_encoder import ImageEncoder
from sam_jax.model.mae import mae_tiny
from sam_jax.model.sam import Sam, sam_tiny


def test_fields_are_listed_without_those_of_flax():
    names = ["image_encoder", "prompt_encoder", "mask_decoder", "object_share"]
    assert [field.name for field in module_fields(Sam)] == names
    assert [field.name for field in module_fields(sam_tiny())] == names
    assert not {"parent", "name"} & {field.name for field in module_fields(ImageEncoder)}


def test_a_composed_model_as_a_dict():
    model = sam_tiny(object_share=(0.25, 0.75))
    fields = module_to_dict(model)
    assert list(fields) == ["image_encoder", "prompt_encoder", "mask_decoder", "object_share"]
    share = fields.pop("object_share")
    assert share == (0.25, 0.75)
    assert fields["prompt_encoder"] == {
        "dim": 64,
        "mask_channels": 16,
        "position_scale": 0.35,
        "dtype": "float32",
    }
    assert fields["image_encoder"]["image_size"] == (64, 64)
    parts = {name: type(getattr(model, name))(**values) for name, values in fields.items()}
    assert Sam(**parts, object_share=share) == model


def test_a_module_without_parts_as_a_dict():
    model = mae_tiny()
    assert type(model)(**module_to_dict(model)) == model
    assert not any(isinstance(x, nn.Module | dict) for x in module_to_dict(model).values())


def test_the_first_rule_that_does_not_hold_is_raised():
    rules = [Rule("a", 1, True, "1"), Rule("b", "x", False, "1"), Rule("c", 2, False, "1")]
    with pytest.raises(ValueError, match=r"^part\.b must be 1; got 'x'$"):
        check_rules(rules, "part.")
    check_rules(rules[:1])
    check_rules([])


@pytest.mark.parametrize(
    ("value", "divisor", "message"),
    [
        (6, 3, None),
        (3, 3, None),
        (7, 3, "width must be a positive multiple of heads = 3; got 7"),
        (0, 3, "width must be a positive multiple of heads = 3; got 0"),
        (-3, 3, "width must be a positive multiple of heads = 3; got -3"),
        (6, 0, "heads must be at least 1; got 0"),
        (6, -3, "heads must be at least 1; got -3"),
    ],
)
def test_multiples(value, divisor, message):
    rules = multiple_of("width", value, divisor, "heads")
    if message is None:
        check_rules(rules)
    else:
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_rules(rules)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dtype", "float16", "one of 'float32', 'bfloat16'"),
        ("dtype", np.float32, "one of 'float32', 'bfloat16'"),
        ("dtype", jnp.float32, "one of 'float32', 'bfloat16'"),
        ("remat", "all", "one of 'none', 'products', 'blocks'"),
    ],
)
def test_a_string_must_be_among_those_of_its_annotation(name, value, allowed):
    """Sets the field after construction, whose types the tests check and users do not."""
    encoder = ImageEncoder()
    object.__setattr__(encoder, name, value)
    with pytest.raises(ValueError, match=f"^{name} must be {allowed}; got "):
        encoder.validate()
