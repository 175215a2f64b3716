"""Tests that type checks find wrong shapes and are compatible with JAX and Flax."""

import functools
import importlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError, install_import_hook

import sam_jax.masks.boxes
from tests import typecheck

NAME = "tests.typecheck_example"


@pytest.fixture(scope="module")
def example():
    """Yields the module of examples with type checks, independent of the environment."""
    with install_import_hook([NAME], "tests.typecheck.typecheck"):
        module = importlib.import_module(NAME)
    yield module
    del sys.modules[NAME]


def test_wrong_shapes_and_types_are_errors(example):
    with pytest.raises(TypeCheckError, match="outer"):
        example.outer(jnp.zeros((2, 1)), jnp.zeros(3))
    with pytest.raises(TypeCheckError, match="outer"):
        example.outer(jnp.zeros(2, int), jnp.zeros(3))
    with pytest.raises(TypeCheckError, match="return value"):
        example.returns_wrong_shape(jnp.zeros((2, 3)))
    with pytest.raises(TypeCheckError, match="count"):
        example.count(np.zeros((2, 3)))
    with pytest.raises(TypeCheckError, match="scale"):
        example.scale(jnp.zeros(2), "2")
    with pytest.raises(TypeCheckError, match="Settings"):
        example.Settings(rate="fast")
    with pytest.raises(TypeCheckError, match="Plain"):
        example.Plain("3")


def test_correct_shapes_and_types_are_accepted(example):
    assert example.outer(jnp.zeros(2), jnp.zeros(3)).shape == (2, 3)
    assert example.returns_wrong_shape(jnp.zeros((2, 2))).shape == (2, 2)
    assert example.count(np.ones((2, 3), bool)) == 6
    assert example.scale(jnp.ones(2), 2).shape == (2,)  # an int is a float
    assert [len(x) for x in example.indices(3)] == [0, 1, 2]
    with example.opened("file") as name:
        assert name == "file"
    assert example.Settings(rate=1).rate == 1
    assert example.Plain(3).size == 3


@pytest.mark.parametrize(
    "run", [lambda f, *args: jax.jit(f)(*args), jax.eval_shape], ids=["jit", "eval_shape"]
)
def test_shapes_are_checked_while_tracing(example, run):
    assert run(example.outer, jnp.zeros(2), jnp.zeros(3)).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="outer"):
        run(example.outer, jnp.zeros((2, 2)), jnp.zeros(3))


def test_shapes_are_checked_under_transformations(example):
    rows, y = jnp.ones((4, 2)), jnp.ones(3)
    assert jax.vmap(example.outer, in_axes=(0, None))(rows, y).shape == (4, 2, 3)
    with pytest.raises(TypeCheckError, match="outer"):
        jax.vmap(example.outer, in_axes=(None, 0))(rows, y)
    assert jax.grad(lambda x: example.outer(x, y).sum())(jnp.ones(2)).tolist() == [3, 3]
    with pytest.raises(TypeCheckError, match="outer"):
        jax.grad(lambda x: example.outer(x, y).sum())(rows)


def test_custom_gradients_are_kept_and_checked(example):
    gradient = jax.grad(lambda x: example.power(3, x).sum())
    assert gradient(jnp.full(2, 2.0)).tolist() == [1, 1]
    assert jax.jit(gradient)(jnp.full(2, 2.0)).tolist() == [1, 1]
    with pytest.raises(TypeCheckError, match="power"):
        gradient(jnp.ones((2, 2)))


def test_fields_of_pytrees_are_not_checked_but_their_methods_are(example):
    points = example.Points(xy=jnp.zeros((3, 2)), label=jnp.zeros(3, int))
    assert jax.tree.map(lambda x: x.shape, points).xy == (3, 2)
    assert jax.eval_shape(lambda p: p.moved(jnp.ones(2)), points).xy.shape == (3, 2)
    axes = example.Points(xy=0, label=None)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), points)
    moved = jax.vmap(lambda p: p.moved(jnp.ones(2)).xy, in_axes=(axes,))
    assert moved(stacked.replace(label=points.label)).shape == (2, 3, 2)
    with pytest.raises(TypeCheckError, match="moved"):
        points.moved(jnp.ones(3))


def test_fields_of_named_tuples_are_not_checked(example):
    pair = example.Pair(jnp.zeros(2), jnp.zeros(2))
    assert jax.tree.map(jnp.size, pair) == example.Pair(2, 2)


def test_linen_modules_work_and_are_checked(example):
    model = example.Stack(example.Head(5))
    assert model == example.Stack(example.Head(5))
    assert hash(model) == hash(example.Stack(example.Head(5)))
    assert model.clone(head=example.Head(4)).head.dim == 4
    x = jnp.ones((2, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    apply = functools.partial(jax.jit, static_argnames=("model", "train"))(
        lambda model, variables, x, train: model.apply(
            variables, x, train, rngs={"dropout": jax.random.key(1)}
        )
    )
    assert apply(model, variables, x, train=True).shape == (2, 5)
    jax.grad(lambda v: apply(model, v, x, train=True).sum())(variables)
    with pytest.raises(TypeCheckError, match="Stack"):
        apply(model, variables, jnp.ones(3), train=True)
    with pytest.raises(TypeCheckError, match="Head"):
        example.Head("5")
    assert isinstance(nn.Sequential([example.Head(5)]), nn.Module)


def test_pallas_kernels_run(example):
    assert example.double(jnp.ones((2, 3))).tolist() == [[2, 2, 2], [2, 2, 2]]
    with pytest.raises(TypeCheckError, match="double"):
        example.double(jnp.ones(2))


def test_the_project_is_checked_unless_disabled(monkeypatch):
    is_checked = hasattr(sam_jax.masks.boxes.box_of_mask, "__wrapped__")
    assert is_checked is typecheck.is_on()
    monkeypatch.setenv("SAM_JAX_TYPECHECK", "0")
    finders = list(sys.meta_path)
    typecheck.install()
    assert sys.meta_path == finders
