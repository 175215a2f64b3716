"""Compares training with PyTorch: loss, gradients and parameters for the same prompts.

The JAX objective runs first and its prompts are recorded. The PyTorch step in `training_twin` then
uses the recorded prompts.
"""

import copy
import dataclasses
import functools
import importlib

import jax
import numpy as np
import optax
import pytest

from sam_jax.data.segmentation_batch import Batch
from sam_jax.weights.convert import from_torch, to_torch
from train.config import Interactive, Optimizer
from train.objectives.interactive import InteractiveObjective
from train.objectives.token_layout import to_image_layout
from train.optimizer import make_optimizer

torch = pytest.importorskip("torch")
twin = importlib.import_module("tests.reference.training_twin")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-4  # of the largest magnitude
# Zero gradients are below NOISE, where they are rounding errors. Others are above SIGNAL.
NOISE, SIGNAL = 1e-6, 1e-3
FRAME = 64
SIZES = ((64, 44), (48, 64))  # of the images within the padding
NUM_MASKS = (5, 4)  # of each image; the other slots are padding
SLOTS = 7
OBJECTIVE = Interactive(masks_per_chunk=4)  # the last chunk of the seven slots is padded
# The peak learning rate of the paper. Warm-up and decay happen within the tested steps.
OPTIMIZER = Optimizer(warmup_steps=2, lr_boundaries=(3, 4), lr_decay_factor=0.5)
STEPS = 5
# Relative to the L2 norm of the change of a tensor in these steps.
CHANGE_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def reference(build_tiny_reference):
    """Returns the reference. With this seed, each of the three outputs is best for some mask."""
    return build_tiny_reference(seed=15)


@pytest.fixture(scope="module")
def model_and_variables(reference):
    """Returns the `sam_jax` model and its variables, with the weights of the reference."""
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return from_torch(state, [])


@pytest.fixture(scope="module")
def run_objective(model_and_variables):
    """Returns a function (params, constants, batch, key) -> (loss, gradients, rounds).

    The prompts of the rounds are recorded by callbacks while the objective runs. A second program
    that computes the prompts could round differently. If a single logit then changed its sign, all
    later clicks could differ.
    """
    recorded = {}

    def record(index, keys, *prompts):
        for i, key in np.ndenumerate(keys[..., 0]):
            recorded[int(index), int(key)] = [x[i] for x in prompts]

    @dataclasses.dataclass(frozen=True)
    class RecordingObjective(InteractiveObjective):
        """An objective that also passes the prompts of each round to `record`."""

        def predict_round(self, inputs, targets, state, index):
            clicks, masks = super().predict_round(inputs, targets, state, index)
            keys = jax.random.key_data(targets.key)
            logits = to_image_layout(state.logits, self.model.grid)
            jax.debug.callback(record, index, keys, clicks.points, clicks.labels, logits)
            return clicks, masks

    objective = RecordingObjective(model_and_variables[0], OBJECTIVE)
    value_and_grad = jax.value_and_grad(lambda *args: objective(*args).mean(), has_aux=True)
    value_and_grad = jax.jit(value_and_grad)

    def run(params, constants, batch, key):
        recorded.clear()
        (loss, _), gradients = jax.block_until_ready(value_and_grad(params, constants, batch, key))
        jax.effects_barrier()
        return loss, gradients, [round_of(recorded, i, batch, key) for i in range(11)]

    return run


def round_of(recorded, index, batch, key):
    """Returns the prompts of one round for the valid masks, in their order in the batch."""
    prompts = []
    for image, slot in np.argwhere(batch.valid):
        image_key = jax.random.fold_in(key, batch.image_id[image])
        mask_key = jax.random.fold_in(image_key, batch.mask_id[image, slot])
        prompts.append(recorded[index, int(jax.random.key_data(mask_key)[0])])
    points, labels, mask = (torch.from_numpy(np.stack(x)) for x in zip(*prompts, strict=True))
    return twin.Round(points, labels, mask if index else None, multimask=index == 0)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def test_prompts_include_every_kind(model_and_variables, batch, run_objective):
    _, _, rounds = run_objective(
        model_and_variables[1]["params"],
        model_and_variables[1]["constants"],
        batch,
        jax.random.key(0),
    )
    first = rounds[0].labels[:, 0]
    assert set(first.tolist()) == {twin.FOREGROUND, twin.TOP_LEFT}
    clicks = torch.stack([(prompts.labels[:, 2:] != twin.ABSENT).sum(1) for prompts in rounds])
    assert (clicks[-2:] == 8).all()
    assert (clicks[1:-1].diff(dim=0).sum(0) + clicks[1] == 8).all()
    without_click = clicks.diff(dim=0)[:-1].argmin(0)  # the round without a new click, by mask
    assert len(set(without_click.tolist())) > 2
    assert set(rounds[-1].labels[:, 2:].ravel().tolist()) == {twin.FOREGROUND, twin.BACKGROUND}


def test_loss_and_gradients_equal_the_reference(
    model_and_variables, reference, batch, run_objective, difference
):
    model, variables = model_and_variables
    key = jax.random.key(0)
    loss, gradients, rounds = run_objective(variables["params"], variables["constants"], batch, key)
    gradients = to_torch(model, variables | {"params": gradients})
    expected_loss, logits = twin.replay(reference, for_torch(batch), rounds)
    expected = torch.autograd.grad(expected_loss, list(reference.parameters()))
    expected = dict(zip(dict(reference.named_parameters()), expected, strict=True))

    assert difference(loss, expected_loss.detach()) <= TOLERANCE
    for prompts, mask in zip(rounds[1:], logits[:-1], strict=True):
        assert difference(prompts.mask, mask) <= TOLERANCE
    num_key_biases = 0
    for name, tensor in expected.items():
        (part, key_bias), (expected_part, expected_key_bias) = map(
            functools.partial(split_key_bias, name), (gradients[name], tensor.numpy())
        )
        if len(expected_key_bias):
            num_key_biases += 1
            assert max(np.abs(key_bias).max(), np.abs(expected_key_bias).max()) < NOISE, name
        if len(expected_part):
            assert np.abs(expected_part).max() > SIGNAL, name
            assert difference(part, expected_part) <= TOLERANCE, name
    assert num_key_biases == 7 + model.image_encoder.depth
    assert (np.abs(gradients["mask_decoder.mask_tokens.weight"]).max(axis=1) > SIGNAL).all()


def test_five_steps_equal_the_reference(
    model_and_variables, reference, batch, run_objective, difference
):
    """Compares five optimizer steps, whose prompts are drawn by JAX from the current parameters.

    Adam divides gradients by their magnitude. Where a gradient is only rounding noise, the update
    is random and as large as other updates. These few entries have small gradients and are not
    compared one by one.
    """
    model, variables = model_and_variables
    params, constants = variables["params"], variables["constants"]
    optimizer = make_optimizer(OPTIMIZER, model.image_encoder.depth)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    trained = copy.deepcopy(reference)
    reference_optimizer = twin.make_optimizer(trained, OPTIMIZER, fused=False)
    is_significant = {name: True for name, _ in trained.named_parameters()}
    for step in range(STEPS):
        key = jax.random.key(1 + step)
        loss, gradients, rounds = run_objective(params, constants, batch, key)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)

        twin.set_rates(reference_optimizer, OPTIMIZER, step)
        reference_optimizer.zero_grad()
        expected_loss, _ = twin.replay(trained, for_torch(batch), rounds)
        expected_loss.backward()
        reference_optimizer.step()
        assert difference(loss, expected_loss.detach()) <= TOLERANCE
        for name, tensor in trained.named_parameters():
            size = split_key_bias(name, tensor.grad.abs().numpy())[0]
            if len(size):
                is_significant[name] &= (size == 0) | (size > TOLERANCE * size.max())

    before, after = to_torch(model, variables), to_torch(model, variables | {"params": params})
    entries = sum(np.size(x) for x in is_significant.values())
    assert sum(np.count_nonzero(x) for x in is_significant.values()) > 0.95 * entries
    for name, tensor in trained.named_parameters():
        initial, actual, expected = (
            split_key_bias(name, x)[0] for x in (before[name], after[name], tensor.detach().numpy())
        )
        if not len(expected):
            continue
        error = np.abs(actual - expected)[is_significant[name]]
        change = (expected - initial)[is_significant[name]]
        assert error.max() <= TOLERANCE * np.abs(expected).max(), name
        assert np.abs(change).max() >= 3 * TOLERANCE * np.abs(expected).max(), name
        assert np.linalg.norm(error) <= CHANGE_TOLERANCE * np.linalg.norm(change), name


def test_the_benchmarked_step_has_the_loss_and_gradients_of_its_prompts(
    reference, batch, difference
):
    """Compares the step that `tests.benchmarks.train` times with `replay` on the same prompts."""
    model, given = twin.use_native(copy.deepcopy(reference)), for_torch(batch)
    generator = torch.Generator().manual_seed(0)
    loss, rounds = twin.backward(
        model, given, OBJECTIVE.num_clicks, OBJECTIVE.num_extra_rounds, generator
    )
    expected_loss, _ = twin.replay(reference, given, rounds)
    expected = torch.autograd.grad(expected_loss, list(reference.parameters()))
    assert difference(loss, expected_loss.detach()) <= TOLERANCE
    assert len(rounds) == 11
    for (name, parameter), expected_grad in zip(model.named_parameters(), expected, strict=True):
        grad, expected_grad = (
            split_key_bias(name, x.numpy())[0] for x in (parameter.grad, expected_grad)
        )
        if expected_grad.any():
            assert difference(grad, expected_grad) <= TOLERANCE, name
        else:  # an output that is best for none of these prompts
            assert not grad.any(), name


def split_key_bias(name, value):
    """Returns a parameter without its key bias, and the key bias.

    The key bias adds one number to all logits of a query, which does not change the softmax. Its
    gradient is zero up to rounding.
    """
    if name.endswith(".k_proj.bias"):
        return value[:0], value
    if name.endswith(".attn.qkv.bias"):
        query, key, values = np.split(value, 3)
        return np.concatenate([query, values]), key
    return value, value[:0]


def make_batch(seed=7):
    """Returns two padded images of noise with elliptic masks, two special masks and empty slots."""
    rng = np.random.default_rng(seed)
    image = np.zeros((2, FRAME, FRAME, 3), np.uint8)
    masks = np.zeros((2, SLOTS, FRAME, FRAME), bool)
    y, x = np.mgrid[:FRAME, :FRAME]
    for i, (height, width) in enumerate(SIZES):
        image[i, :height, :width] = rng.integers(0, 256, (height, width, 3))
        for j in range(NUM_MASKS[i]):
            cy, cx = rng.uniform(0.2, 0.8, 2) * (height, width)
            ry, rx = rng.uniform(4, 18, 2)
            masks[i, j] = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        masks[i, :, height:] = masks[i, :, :, width:] = False
    masks[0, 0] = (y == 21) & (x == 9)  # less than half of a cell of the loss
    masks[1, 0] = (y < SIZES[1][0] - 1) & (x < SIZES[1][1])  # almost all of the image
    return Batch(
        image=image,
        size=np.array(SIZES, np.int32),
        image_id=np.array([7, 3], np.int32),
        masks=np.packbits(masks, axis=-1),
        mask_id=np.tile(np.arange(SLOTS, dtype=np.int32)[::-1], (2, 1)),
        valid=np.arange(SLOTS) < np.array(NUM_MASKS)[:, None],
    )


def for_torch(batch):
    """Returns the batch for PyTorch, without the empty slots for masks."""
    masks = np.unpackbits(batch.masks, axis=-1).astype(bool)
    return twin.Batch(
        image=torch.from_numpy(batch.image).permute(0, 3, 1, 2).float(),
        size=[tuple(size) for size in batch.size.tolist()],
        mask=torch.from_numpy(masks[batch.valid]),
        owner=torch.from_numpy(np.nonzero(batch.valid)[0]),
    )
