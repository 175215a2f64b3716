"""The argument `tiles` and the option `--tiles`."""

import argparse
import re

import pytest

from sam_jax.model.sam import sam_tiny
from sam_jax.predict.tiles import plan_pyramid
from sam_jax.predict.tiles_option import parse_tiles, resolve_tiles


@pytest.mark.parametrize("tiles", ["x", "64", 0, -5, 15, 64.0, True, (64,)])
def test_other_tiles_are_errors(tiles, without_type_checks):
    message = f'tiles must be None, "auto", "none", or the side of .*; got {re.escape(repr(tiles))}'
    with pytest.raises(ValueError, match=message):
        plan_pyramid((100, 100), (64, 64), tiles)
    with pytest.raises(ValueError, match=message):
        resolve_tiles(sam_tiny(), tiles)


def test_the_default_depends_on_the_objects_that_a_model_was_trained_on():
    entire, windows = sam_tiny(), sam_tiny(object_share=(0.25, 0.75))
    assert resolve_tiles(entire, None) is None
    assert resolve_tiles(windows, None) == "auto"
    for model in (entire, windows):
        assert resolve_tiles(model, "none") is None
        assert resolve_tiles(model, "auto") == "auto"
        assert resolve_tiles(model, 100) == 100


def test_the_option_is_parsed():
    assert parse_tiles("auto") == "auto"
    assert parse_tiles("none") == "none"
    assert parse_tiles("512") == 512
    for text in ("x", "0", "15", "-64", "64.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not auto, none or a number"):
            parse_tiles(text)
