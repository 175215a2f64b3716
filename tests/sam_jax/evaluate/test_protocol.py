"""Tests that every registered evaluation implements the protocol."""

import argparse

import pytest

from sam_jax.evaluate.protocol import EVALUATIONS, load_evaluation


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_has_the_functions_of_the_protocol(name):
    evaluation = load_evaluation(name)
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser)
    assert parser.description
    assert f"example: sam-jax evaluate {name} " in parser.epilog
    assert callable(evaluation.run)
    assert callable(evaluation.format_table)
    assert EVALUATIONS[name].help == EVALUATIONS[name].help.strip(".")
