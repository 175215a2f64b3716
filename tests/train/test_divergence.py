"""Steps with a loss or a gradient that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import Optimizer
from train.divergence import MAX_MESSAGES, BadSteps, DivergedError, check_finite
from train.objectives.sums import Sums
from train.optimizer import make_optimizer
from train.sharding import MIN_SHARD_SIZE, make_mesh, shard_batch
from train.state import init_state
from train.step import make_step

GOOD = np.linspace(-1, 1, 8, dtype=np.float32)


def objective(params, constants, batch, key):
    """Returns a loss whose gradient is infinite where a row of the batch is 0."""
    del constants, key
    small, large = params["mask_decoder"]["small"], params["mask_decoder"]["large"]
    x = batch["x"]
    loss = jnp.sum(small * x) + jnp.sum(large[:, 0]) * x.sum() + jnp.sqrt(jnp.abs(small * x)).sum()
    return Sums(loss=loss, count=jnp.float32(x.size), values={})


@pytest.fixture(scope="module", params=[1, 4], ids=["replicated", "sharded"])
def trainer(request):
    """Returns a step on eight devices, a function that makes its state, and its mesh."""
    mesh = make_mesh(8, request.param)
    # The second array is large enough to be sharded over the devices of the `fsdp` axis.
    params = {"mask_decoder": {"small": jnp.ones(3), "large": jnp.ones((MIN_SHARD_SIZE // 16, 16))}}
    optimizer = make_optimizer(Optimizer(warmup_steps=1), 1)

    def make_state():
        variables = {"params": jax.tree.map(jnp.copy, params), "constants": {}}
        return init_state(variables, optimizer)

    step = make_step(objective, optimizer, 0, mesh, jax.eval_shape(make_state))
    return step, make_state, mesh


def shards(state):
    """Returns the bytes of every array of the state on every device."""
    return [
        [np.asarray(shard.data).tobytes() for shard in x.addressable_shards]
        for x in jax.tree.leaves((state.params, state.opt_state))
    ]


def run_steps(trainer, rows):
    """Returns the state after each step, and whether it was finite."""
    step, make_state, mesh = trainer
    state, states, flags = make_state(), [], []
    for row in rows:
        state, values = step(state, shard_batch(mesh, {"x": row[:, None]}))
        states.append((int(state.step), shards(state)))
        flags.append(bool(values["is_finite"]))
    return states, flags


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e38], ids=str)
@pytest.mark.parametrize("device", [0, 5])
def test_a_bad_row_on_one_device_changes_nothing_on_any(trainer, value, device):
    # The gradient of 0 is infinite though its loss is finite. 1e38 overflows the gradient's norm.
    bad = GOOD.copy()
    bad[device] = value
    states, flags = run_steps(trainer, [GOOD, bad, bad, GOOD])
    assert flags == [True, False, False, True]
    assert [step for step, _ in states] == [1, 2, 3, 4]
    assert states[0][1] == states[1][1] == states[2][1] != states[3][1]
    # The schedule and Adam's bias correction continue as if there had been no bad steps.
    assert states[3][1] == run_steps(trainer, [GOOD, GOOD])[0][1][1]


def flags_of(bad_steps, *flags):
    for step, flag in enumerate(flags, start=1):
        bad_steps.add(step, jnp.bool_(flag))


def test_bad_steps_are_named_and_counted(caplog):
    bad_steps = BadSteps(limit=10)
    flags_of(bad_steps, True, False, False, True, *[False] * 6)
    bad_steps.read()
    assert caplog.messages == [
        "step 2, 3, 5, 6, 7 and 3 more changed nothing: the loss or the gradient is not finite"
    ]
    assert (bad_steps.take_count(), bad_steps.take_count(), bad_steps.in_a_row) == (8, 0, 6)


def test_too_many_bad_steps_in_a_row_are_an_error_although_they_were_read_apart():
    bad_steps = BadSteps(limit=3)
    flags_of(bad_steps, True, False, False)
    bad_steps.read()
    flags_of(bad_steps, True, False, False)
    bad_steps.read()
    bad_steps.add(7, jnp.bool_(False))
    with pytest.raises(DivergedError, match=r"of 3 steps in a row, up to step 7, .*peak_lr"):
        bad_steps.read()


def test_messages_are_limited(caplog):
    bad_steps = BadSteps(limit=2)
    for step in range(0, 100, 2):
        bad_steps.add(step, jnp.bool_(False))
        bad_steps.add(step + 1, jnp.bool_(True))
        bad_steps.read()
    assert len(caplog.messages) == MAX_MESSAGES
    assert caplog.messages[-1].endswith("metrics.jsonl counts further ones")


def test_parameters_that_are_not_finite_are_never_saved(trainer):
    state = trainer[1]()
    check_finite(state, 3)
    state.params["mask_decoder"]["small"] = jnp.array([1.0, jnp.inf, 1.0])
    with pytest.raises(DivergedError, match="parameters are not finite after step 3"):
        check_finite(state, 3)
