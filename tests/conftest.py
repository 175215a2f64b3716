"""Settings of the tests, and a tiny model in which every tensor affects the output."""

import functools
import math

from tests import compilation, typecheck

# These calls must precede the imports of JAX and of the project.
compilation.share_cache()
typecheck.install()

import flax.traverse_util  # noqa: E402 - see above
import jax  # noqa: E402 - see above
import jaxtyping  # noqa: E402 - see above
import numpy as np  # noqa: E402 - see above
import pytest  # noqa: E402 - see above

from sam_jax.model.init import variable_shapes  # noqa: E402 - see above
from sam_jax.model.sam import build_sam, replace_fields  # noqa: E402 - see above

jax.config.update("jax_num_cpu_devices", 8)  # for tests of meshes

# These tests compile with full optimization, as for users. All others compile quickly.
OPTIMIZED = ("tests/sam_jax/predict/", "tests/sam_jax/everything/", "tests/reference/")

# A worker runs all tests of a file. Slow files are started first to balance the workers.
LONGEST_FIRST = (
    "tests/train/",
    "tests/sam_jax/predict/",
    "tests/sam_jax/everything/",
    "tests/configs/",
    "tests/sam_jax/engine/",
    "tests/sam_jax/cli/",
)


def pytest_collection_modifyitems(items):
    """Sorts the tests so that slow files come first."""

    def rank(item):
        matches = (i for i, path in enumerate(LONGEST_FIRST) if item.nodeid.startswith(path))
        return next(matches, len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="module", autouse=True)
def optimizations(request):
    """Compiles with few optimizations, except for the tests in OPTIMIZED."""
    disable = not request.node.nodeid.startswith(OPTIMIZED)
    if jax.config.values["jax_disable_most_optimizations"] != disable:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", disable)


# All sizes differ, so that tests detect if two are confused. The canvas is not square. Windows of 4
# pad 6 rows to 8 and 9 columns to 12.
TINY = build_sam(
    image_size=(48, 72),
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=3,
    global_blocks=(1,),
    window_size=4,
    prompt_dim=32,
    mask_channels=8,
    decoder_mlp_dim=40,
    iou_hidden_dim=20,
)


SHARPENED = ("token_to_image/q/kernel", "token_to_image/k/kernel", "neck/conv2/kernel")


def random_variables(model, seed=0):
    """Returns variables for which an error in any tensor changes the logits.

    The logits span about -10 to 10. Unlike initial values, biases and positions are not zero and
    scales of norms are not one. Attention between tokens and image is sharp. The neck's 3x3 kernel
    has zero mean over its input channels.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for path, struct in variable_shapes(model).items():
        normal = rng.standard_normal(struct.shape)
        if path.endswith("scale"):
            value = 1 + 0.1 * normal
        elif path.endswith("bias"):
            value = 0.1 * normal
        elif path.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
            value = 0.2 * normal
        elif path.endswith("kernel"):
            shape = struct.shape
            fan_in = shape[0] if "upscaling" in path else math.prod(shape[:-1])
            value = normal * fan_in**-0.5
        else:
            value = normal
        if path.endswith(SHARPENED):
            value = 4 * value
        if path.endswith("neck/conv2/kernel"):
            value = value - value.mean(axis=2, keepdims=True)
        if "hypernetwork" in path and path.endswith("lin3/kernel"):
            value = 10 * value
        flat[path] = value.astype(np.float32)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="session")
def tiny():
    """Returns a model for images of 48 by 72 pixels, and its variables."""
    return TINY, random_variables(TINY)


@pytest.fixture(scope="session")
def square():
    """Returns a model for images of 64 by 64 pixels, and its variables."""
    model = replace_fields(TINY, image_size=(64, 64), window_size=3)
    return model, random_variables(model, seed=1)


@pytest.fixture(scope="session")
def variables_of():
    """Returns a function that draws the variables of a model from a seed."""
    return random_variables


@pytest.fixture(scope="session")
def jit():
    """Returns `jax.jit` with options for quick compilation."""
    return functools.partial(jax.jit, compiler_options=compilation.QUICK)


@pytest.fixture(scope="session")
def encode(jit):
    """Returns `Sam.encode`, which is compiled once for each model in a process."""
    return functools.partial(jit, static_argnames=("model", "train"))(
        lambda model, variables, image, train=False, rngs=None: model.apply(
            variables, image, train, rngs=rngs, method="encode"
        )
    )


@pytest.fixture(scope="session")
def decode(jit):
    """Returns `Sam.decode`, which is compiled once for each model in a process."""
    return functools.partial(jit, static_argnames=("model", "train"))(
        lambda model, variables, embedding, prompts, train=False, rngs=None: model.apply(
            variables, embedding, prompts, train, rngs=rngs, method="decode"
        )
    )


@pytest.fixture
def without_type_checks():
    """Disables the type checks, for tests of how the code handles wrong types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
