"""A training step against PyTorch: the same loss, gradients and parameters from the same prompts.

Our rounds are played one by one, and their prompts are given to the reference in `training_twin`.
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
NOISE, SIGNAL = 1e-6, 1e-3  # the most of gradients that are zero, the least of any other
FRAME = 64
SIZES = ((64, 44), (48, 64))  # of the images in the frame
NUM_MASKS = (5, 4)  # of the images; fillers take the other slots
SLOTS = 7
OBJECTIVE = Interactive(masks_per_chunk=4)  # seven slots: the last chunk is filled up
# The paper's highest rate; warm-up and drops come early, so that they are seen.
OPTIMIZER = Optimizer(warmup_steps=2, lr_boundaries=(3, 4), lr_decay_factor=0.5)
STEPS = 5
# Of a tensor's change in these steps, as an L2 norm: Adam takes as large a step where a gradient is
# rounding noise, in a few entries of each tensor, as anywhere else.
CHANGE_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def theirs(build_tiny_reference):
    """The reference, with weights and a batch for which each of three outputs is somewhere best."""
    return build_tiny_reference(seed=15)


@pytest.fixture(scope="module")
def ours(theirs):
    """Our model and its variables, with the reference's weights."""
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return from_torch(state, [])


@pytest.fixture(scope="module")
def overheard(ours):
    """(params, constants, batch, key) -> loss, gradients, and the prompts of all rounds.

    The objective tells its prompts while it runs. To play the rounds again would not do: a program
    compiled otherwise rounds otherwise, and one logit of a sign of its own moves all later clicks.
    """
    heard = {}

    def hear(index, keys, *prompts):
        for i, key in np.ndenumerate(keys[..., 0]):
            heard[int(index), int(key)] = [x[i] for x in prompts]

    @dataclasses.dataclass(frozen=True)
    class RecordingObjective(InteractiveObjective):
        """The objective, which also tells `hear` the prompts of each round."""

        def predict_round(self, inputs, targets, state, index):
            clicks, masks = super().predict_round(inputs, targets, state, index)
            keys = jax.random.key_data(targets.key)
            logits = to_image_layout(state.logits, self.model.grid)
            jax.debug.callback(hear, index, keys, clicks.points, clicks.labels, logits)
            return clicks, masks

    objective = RecordingObjective(ours[0], OBJECTIVE)
    gradients = jax.value_and_grad(lambda *args: objective(*args).mean(), has_aux=True)
    gradients = jax.jit(gradients)

    def run(params, constants, batch, key):
        heard.clear()
        (loss, _), got = jax.block_until_ready(gradients(params, constants, batch, key))
        jax.effects_barrier()
        return loss, got, [round_of(heard, i, batch, key) for i in range(11)]

    return run


def round_of(heard, index, batch, key):
    """The prompts of one round, in the order of the masks in the batch, without the fillers."""
    prompts = []
    for image, slot in np.argwhere(batch.valid):
        of_image = jax.random.fold_in(key, batch.image_id[image])
        of_mask = jax.random.fold_in(of_image, batch.mask_id[image, slot])
        prompts.append(heard[index, int(jax.random.key_data(of_mask)[0])])
    points, labels, mask = (torch.from_numpy(np.stack(x)) for x in zip(*prompts, strict=True))
    return twin.Round(points, labels, mask if index else None, multimask=index == 0)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def test_prompts_are_of_all_kinds(ours, batch, overheard):
    _, _, rounds = overheard(ours[1]["params"], ours[1]["constants"], batch, jax.random.key(0))
    first = rounds[0].labels[:, 0]
    assert set(first.tolist()) == {twin.FOREGROUND, twin.TOP_LEFT}
    clicks = torch.stack([(prompts.labels[:, 2:] != twin.ABSENT).sum(1) for prompts in rounds])
    assert (clicks[-2:] == 8).all()
    assert (clicks[1:-1].diff(dim=0).sum(0) + clicks[1] == 8).all()
    inserted = clicks.diff(dim=0)[:-1].argmin(0)  # the round without a new click, by mask
    assert len(set(inserted.tolist())) > 2
    assert set(rounds[-1].labels[:, 2:].ravel().tolist()) == {twin.FOREGROUND, twin.BACKGROUND}


def test_loss_and_gradients(ours, theirs, batch, overheard, difference):
    model, variables = ours
    key = jax.random.key(0)
    loss, got, rounds = overheard(variables["params"], variables["constants"], batch, key)
    got = to_torch(model, variables | {"params": got})
    their_loss, logits = twin.replay(theirs, for_torch(batch), rounds)
    expected = torch.autograd.grad(their_loss, list(theirs.parameters()))
    expected = dict(zip(dict(theirs.named_parameters()), expected, strict=True))

    assert difference(loss, their_loss.detach()) <= TOLERANCE
    for prompts, mask in zip(rounds[1:], logits[:-1], strict=True):
        assert difference(prompts.mask, mask) <= TOLERANCE
    num_key_biases = 0
    for name, tensor in expected.items():
        (ours_, our_noise), (theirs_, noise) = map(
            functools.partial(split_key_bias, name), (got[name], tensor.numpy())
        )
        if len(noise):
            num_key_biases += 1
            assert max(np.abs(our_noise).max(), np.abs(noise).max()) < NOISE, name
        if len(theirs_):
            assert np.abs(theirs_).max() > SIGNAL, name
            assert difference(ours_, theirs_) <= TOLERANCE, name
    assert num_key_biases == 7 + model.image_encoder.depth
    assert (np.abs(got["mask_decoder.mask_tokens.weight"]).max(axis=1) > SIGNAL).all()


def test_five_steps(ours, theirs, batch, overheard, difference):
    """Each step's prompts are drawn by ours, from the parameters that ours has then.

    Adam divides gradients by their size: the step of an entry whose gradient is rounding noise is
    noise too, as large as others are. Such entries are few, and are told by their gradients.
    """
    model, variables = ours
    params, constants = variables["params"], variables["constants"]
    optimizer = make_optimizer(OPTIMIZER, model.image_encoder.depth)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    trained = copy.deepcopy(theirs)
    their_optimizer = twin.make_optimizer(trained, OPTIMIZER, fused=False)
    sure = {name: True for name, _ in trained.named_parameters()}
    for step in range(STEPS):
        key = jax.random.key(1 + step)
        loss, got, rounds = overheard(params, constants, batch, key)
        updates, state = update(got, state, params)
        params = optax.apply_updates(params, updates)

        twin.set_rates(their_optimizer, OPTIMIZER, step)
        their_optimizer.zero_grad()
        their_loss, _ = twin.replay(trained, for_torch(batch), rounds)
        their_loss.backward()
        their_optimizer.step()
        assert difference(loss, their_loss.detach()) <= TOLERANCE
        for name, tensor in trained.named_parameters():
            size = split_key_bias(name, tensor.grad.abs().numpy())[0]
            if len(size):
                sure[name] &= (size == 0) | (size > TOLERANCE * size.max())

    before, after = to_torch(model, variables), to_torch(model, variables | {"params": params})
    entries = sum(np.size(x) for x in sure.values())
    assert sum(np.count_nonzero(x) for x in sure.values()) > 0.95 * entries
    for name, tensor in trained.named_parameters():
        start, ours_, theirs_ = (
            split_key_bias(name, x)[0] for x in (before[name], after[name], tensor.detach().numpy())
        )
        if not len(theirs_):
            continue
        error, change = np.abs(ours_ - theirs_), theirs_ - start
        assert error[sure[name]].max() <= TOLERANCE * np.abs(theirs_).max(), name
        assert np.abs(change[sure[name]]).max() >= 3 * TOLERANCE * np.abs(theirs_).max(), name
        norm = lambda x, name=name: np.linalg.norm(x[sure[name]])
        assert norm(error) <= CHANGE_TOLERANCE * norm(change), name


def test_the_timed_step_is_the_same(theirs, batch, difference):
    """The step that `tests.benchmarks.train` times has the loss and gradients of its prompts."""
    model, given = twin.use_native(copy.deepcopy(theirs)), for_torch(batch)
    generator = torch.Generator().manual_seed(0)
    loss, rounds = twin.backward(
        model, given, OBJECTIVE.num_clicks, OBJECTIVE.num_extra_rounds, generator
    )
    their_loss, _ = twin.replay(theirs, given, rounds)
    expected = torch.autograd.grad(their_loss, list(theirs.parameters()))
    assert difference(loss, their_loss.detach()) <= TOLERANCE
    assert len(rounds) == 11
    for (name, ours_), theirs_ in zip(model.named_parameters(), expected, strict=True):
        ours_, theirs_ = (split_key_bias(name, x.numpy())[0] for x in (ours_.grad, theirs_))
        if theirs_.any():
            assert difference(ours_, theirs_) <= TOLERANCE, name
        else:  # an output that is best for none of these prompts
            assert not ours_.any(), name


def split_key_bias(name, value):
    """A parameter without its part that is a bias of keys, and that part.

    It adds one number to all logits of a query, which softmax takes out: its gradient is zero, and
    rounding noise where it is computed all the same.
    """
    if name.endswith(".k_proj.bias"):
        return value[:0], value
    if name.endswith(".attn.qkv.bias"):
        query, key, values = np.split(value, 3)
        return np.concatenate([query, values]), key
    return value, value[:0]


def make_batch(seed=7):
    """Two images of noise with padding, ellipses and two special masks on them, and fillers."""
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
    masks[1, 0] = (y < SIZES[1][0] - 1) & (x < SIZES[1][1])  # nearly everything
    return Batch(
        image=image,
        size=np.array(SIZES, np.int32),
        image_id=np.array([7, 3], np.int32),
        masks=np.packbits(masks, axis=-1),
        mask_id=np.tile(np.arange(SLOTS, dtype=np.int32)[::-1], (2, 1)),
        valid=np.arange(SLOTS) < np.array(NUM_MASKS)[:, None],
    )


def for_torch(batch):
    """The batch without its fillers."""
    masks = np.unpackbits(batch.masks, axis=-1).astype(bool)
    return twin.Batch(
        image=torch.from_numpy(batch.image).permute(0, 3, 1, 2).float(),
        size=[tuple(size) for size in batch.size.tolist()],
        mask=torch.from_numpy(masks[batch.valid]),
        owner=torch.from_numpy(np.nonzero(batch.valid)[0]),
    )
