"""Compares SAM's objective with a plain loop over rounds and masks, and checks its prompts.

`interactive_oracle.py` implements the loop. `toy_model.py` implements a minimal model for tests of
the objective alone.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from sam_jax.data.segmentation_batch import Batch
from sam_jax.model.init import init_variables
from sam_jax.model.mask_decoder import Masks
from sam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    NOT_A_POINT,
    TOP_LEFT,
)
from sam_jax.model.sam import build_sam
from tests.train.objectives.interactive_oracle import (
    compile_functions,
    fold,
    make_reference,
    normalize,
    target_and_inside,
    unpack_masks,
)
from tests.train.objectives.toy_model import (
    KEY,
    TOY,
    Recorder,
    Toy,
    make_batch,
    permute,
    random_masks,
    rectangle,
)
from train.config import Interactive
from train.objectives.interactive import (
    DROP_PATH,
    InteractiveObjective,
)

TOLERANCE = 1e-5


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Compares trees leaf by leaf; the tolerance is relative to a leaf's largest magnitude."""
    expected = jax.tree_util.tree_leaves_with_path(expected)
    for a, (path, e) in zip(jax.tree.leaves(actual), expected, strict=True):
        limit = tolerance * float(np.abs(e).max()) + 1e-7
        np.testing.assert_allclose(a, e, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


def mean_objective(objective):
    """Returns a function that computes the objective's means (loss, values)."""
    return lambda *args: objective(*args).mean()


@functools.cache
def compile_objective(jit, model, config, train=True):
    """Returns a function f(variables, batch, key) -> ((loss, values), gradients)."""
    objective = mean_objective(InteractiveObjective(model, config, train))
    f = jit(jax.value_and_grad(objective, has_aux=True))
    return lambda variables, batch, key=KEY: f(
        variables["params"], variables["constants"], batch, key
    )


def reference_result(jit, model, config, variables, batch, train=True):
    """Computes ((loss, values), gradients) with the plain loop."""
    f = jax.value_and_grad(make_reference(jit, model, config, train), has_aux=True)
    return f(variables["params"], variables["constants"], batch, KEY)


# The objective of a real model.

SMALL = build_sam(
    image_size=(48, 72),
    patch_size=8,
    embed_dim=12,
    depth=2,
    num_heads=3,
    global_blocks=(0, 1),
    prompt_dim=16,
    decoder_depth=1,
    decoder_mlp_dim=20,
    iou_hidden_dim=12,
    drop_path=0.5,
    dropout=0.2,
)


@pytest.fixture(scope="module")
def small(jit):
    """The objective of a small `Sam`, its variables, and a batch."""
    shapes = jax.eval_shape(lambda: init_variables(SMALL, 0))
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        x, name = rng.standard_normal(leaf.shape).astype(np.float32), path[-1].key
        if name == "scale":
            return 1 + 0.1 * x
        is_small = name in ("bias", "pos_embed", "rel_pos_h", "rel_pos_w")
        return x * (0.1 if is_small else 0.6 * math.prod(leaf.shape[:-1]) ** -0.5)

    variables = jax.tree.map_with_path(draw, shapes)
    sizes = [(48, 72), (48, 41)]
    masks = [random_masks(SMALL, size, 3 - i, i) for i, size in enumerate(sizes)]
    batch = make_batch(SMALL, sizes, masks)
    config = Interactive(num_clicks=3, masks_per_chunk=3)
    return compile_objective(jit, SMALL, config), config, variables, batch


def test_objective_matches_the_plain_loop(jit, small):
    objective, config, variables, batch = small
    actual = objective(variables, batch)
    assert_close(actual, reference_result(jit, SMALL, config, variables, batch))
    # Every parameter has a gradient, with two exceptions. Key biases do not change a softmax, and
    # some hypernetworks never predict the best mask.
    for path, gradient in jax.tree_util.tree_leaves_with_path(actual[1]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("k/bias") and "hypernetwork" not in name:
            assert np.abs(gradient).max() > 1e-6, name


def test_drop_path_and_dropout_depend_on_the_ids_not_on_the_positions(small):
    objective, _, variables, batch = small
    (loss, values), gradients = objective(variables, batch)
    columns = np.array([2, 3, 0, 1])
    permuted = jax.tree.map(lambda x: x[::-1], batch)
    permuted = permuted.replace(
        masks=permuted.masks[:, columns],
        mask_id=permuted.mask_id[:, columns],
        valid=permuted.valid[:, columns],
    )
    assert_close(objective(variables, permuted), ((loss, values), gradients))
    # They also depend on the step.
    for other, key in [
        (batch, jax.random.key(6)),
        (batch.replace(image_id=batch.image_id + 1), KEY),
        (batch.replace(mask_id=batch.mask_id + 1), KEY),
    ]:
        assert abs(objective(variables, other, key)[0][0] - loss) > 1e-4


# The fields of the objective, with the toy model.

FIELDS = [
    {},
    dict(detach_mask=False),
    dict(multimask_extra=True, iou_supervision="all", focal=3.0, dice=2.0, iou=0.5),
    dict(num_extra_rounds=1, multimask=False, loss_scale=2),
    dict(num_extra_rounds=0, iou_supervision="all", iou_loss="l1", box_noise="uniform"),
    dict(num_clicks=0, multimask_extra=True, iou_loss="l1", detach_mask=False),
]
CONFIG = Interactive(num_clicks=3, masks_per_chunk=3)
VARIABLES = TOY.init()


@pytest.fixture(scope="module")
def batch():
    """One image without padding, one padded at the right and one at the bottom.

    Each of them has invalid masks.
    """
    sizes = [(24, 40), (24, 29), (11, 40)]
    masks = [random_masks(TOY, size, 3 - i, i) for i, size in enumerate(sizes)]
    return make_batch(TOY, sizes, masks)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_field_matches_the_plain_loop(jit, batch, fields):
    config = dataclasses.replace(CONFIG, **fields)
    train = config.num_extra_rounds > 0
    actual = compile_objective(jit, TOY, config, train)(VARIABLES, batch)
    assert_close(actual, reference_result(jit, TOY, config, VARIABLES, batch, train))
    rounds = 1 + config.num_clicks + config.num_extra_rounds
    assert all(value.shape == (rounds,) for value in actual[0][1].values())
    for path, gradient in jax.tree_util.tree_leaves_with_path(actual[1]):
        assert np.abs(gradient).max() > 1e-6, path


@pytest.fixture(scope="module")
def toy_objective(jit):
    """The objective of the toy model."""
    return compile_objective(jit, TOY, CONFIG, True)


@pytest.fixture(scope="module")
def expected(toy_objective, batch):
    """The ((loss, values), gradients) of the batch."""
    return toy_objective(VARIABLES, batch)


def assert_same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e)


def test_detach_mask_changes_only_gradients(jit, batch, expected):
    config = dataclasses.replace(CONFIG, detach_mask=False)
    values, gradients = compile_objective(jit, TOY, config, True)(VARIABLES, batch)
    assert_close(values, expected[0], 1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        detached = functools.reduce(lambda tree, key: tree[key.key], path, expected[1])
        if path[-1].key == "head":  # predicts IoUs, on which no mask prompt depends
            assert_close(gradient, detached, 1e-6)
        else:
            assert np.abs(gradient - detached).max() > 1e-4, path


def test_gradients_scale_with_the_loss(jit, batch, expected):
    objective = mean_objective(InteractiveObjective(TOY, CONFIG))

    def scaled(params, constants, batch, key):
        loss, values = objective(params, constants, batch, key)
        return 1 - 3 * loss, values

    f = jit(jax.grad(scaled, has_aux=True))
    gradients, values = f(VARIABLES["params"], VARIABLES["constants"], batch, KEY)
    assert_close(gradients, jax.tree.map(lambda g: -3 * g, expected[1]), 1e-6)
    assert_close(values, expected[0][1], 1e-6)


def test_embeddings_of_a_batch_are_used_instead_of_its_images(jit, toy_objective, batch, expected):
    encode = compile_functions(jit, TOY, True).encode
    embeddings = [
        encode(VARIABLES, normalize(image, size), fold(KEY, index, DROP_PATH))
        for image, size, index in zip(batch.image, batch.size, batch.image_id, strict=True)
    ]
    encoded = batch.replace(embedding=np.stack(embeddings), image=np.zeros_like(batch.image))
    values, gradients = toy_objective(VARIABLES, encoded)
    assert_close(values, expected[0], 1e-6)
    for part in ("prompt_encoder", "mask_decoder"):
        assert_close(gradients[part], expected[1][part], 1e-6)
    assert not np.any(gradients["image_encoder"]["kernel"])


def test_loss_of_a_batch_without_masks_is_zero(toy_objective, batch):
    result = toy_objective(VARIABLES, batch.replace(valid=np.zeros_like(batch.valid)))
    assert_same(result, jax.tree.map(np.zeros_like, result))


def test_contents_of_invalid_masks_have_no_effect(toy_objective, batch, expected):
    masks = batch.masks | np.where(batch.valid, 0, 255)[:, :, None, None].astype(np.uint8)
    mask_id = np.where(batch.valid, batch.mask_id, batch.mask_id[:, :1])  # the id of a valid mask
    assert_same(toy_objective(VARIABLES, batch.replace(masks=masks, mask_id=mask_id)), expected)


def test_contents_of_the_padding_have_no_effect(toy_objective, batch, expected):
    image = batch.image.copy()
    for b, (h, w) in enumerate(batch.size):
        image[b, h:] = image[b, :, w:] = 17
    assert (image != batch.image).any()
    assert_same(toy_objective(VARIABLES, batch.replace(image=image)), expected)


def test_prompts_depend_on_the_step(toy_objective, batch, expected):
    def loss(key):
        return float(toy_objective(VARIABLES, batch, key)[0][0])

    assert loss(KEY) == float(expected[0][0])
    assert len({loss(jax.random.key(seed)) for seed in range(5)}) == 5


# The choice of the output that is trained, and of the one that becomes the next mask prompt.


@dataclasses.dataclass(frozen=True)
class ConstantModel(Toy):
    """A model whose parameters are its predictions in two rounds.

    The parameters are logits 'round m lh lw' and IoUs 'round m'.
    """

    def decode(self, params, constants, embedding, prompts, train, dropout):
        index = prompts.has_mask[0, 0].astype(int)  # of the round
        logits, iou = (params["mask_decoder"][name][index] for name in ("logits", "iou"))
        return Masks(logits=logits[None, None], iou=iou[None, None])


MASK = rectangle(TOY, 8, 4, 24, 16)  # at low resolution x is 4 to 12 and y is 2 to 8


@pytest.fixture(scope="module")
def constant_model():
    """Variables of a `ConstantModel`, a batch of one mask, and the mask at low resolution.

    In the first round, output 0 is right but is not among the three outputs that are compared.
    Output 1 has the lowest sum of mask loss and IoU loss. Output 2 has the lowest mask loss and the
    lowest predicted IoU. Output 3 has the highest predicted IoU.
    """
    target = np.zeros((12, 20), bool)
    target[2:8, 4:12] = True
    half = target & (np.arange(20) < 8)
    shapes = [[target, half, target | half, ~target], [half, target, target, target]]
    sizes = np.array([[8, 1.0, 1.1, 1], [1, 8, 8, 8]], np.float32)
    logits = np.where(shapes, 1, -1).astype(np.float32) * sizes[..., None, None]
    iou = np.array([[0.1, 0.5, -9, 0.9], [0.2, 0.9, 0.9, 0.9]], np.float32)
    variables = TOY.init()
    variables["params"]["mask_decoder"] = {"logits": logits, "iou": iou}
    return variables, make_batch(TOY, [(24, 40)], [[MASK]]), target


def mask_loss(logits, target):
    """Returns the weighted sum of the focal loss and the dice loss, with the default weights."""
    t = target.astype(np.float32)
    focal = optax.losses.sigmoid_focal_loss(logits, t, alpha=0.25, gamma=2.0).mean()
    p = jax.nn.sigmoid(logits)
    return 20 * focal + 1 - (2 * jnp.sum(p * t) + 1) / (jnp.sum(p) + jnp.sum(t) + 1)


@pytest.mark.parametrize("iou_supervision", ["best", "all"])
def test_only_the_best_of_three_outputs_is_trained(jit, constant_model, iou_supervision):
    variables, batch, target = constant_model
    config = Interactive(num_clicks=1, num_extra_rounds=0, iou_supervision=iou_supervision)
    (loss, values), gradients = compile_objective(jit, ConstantModel(), config)(variables, batch)
    logits, iou = variables["params"]["mask_decoder"].values()
    value_and_grad = jax.vmap(jax.vmap(jax.value_and_grad(mask_loss), (0, None)), (0, None))
    losses, loss_gradients = jit(value_and_grad)(logits, target)
    true_iou = [[1, 0.5, 1, 0], [0.5, 1, 1, 1]]
    errors = (iou - true_iou) ** 2
    assert np.argmin(losses[0, 1:]) == 1
    assert np.argmin((losses + errors)[0, 1:]) == 0
    assert np.argmax(iou[0, 1:]) == 2

    # The best output is output 2 in the first round; the second round has only output 0. The loss
    # is the mean over the two rounds.
    expected = np.zeros_like(logits)
    expected[0, 2], expected[1, 0] = loss_gradients[0, 2] / 2, loss_gradients[1, 0] / 2
    actual = gradients["mask_decoder"]
    np.testing.assert_allclose(actual["logits"], expected, rtol=1e-4, atol=1e-9)
    assert (np.asarray(actual["logits"])[expected == 0] == 0).all()
    expected = np.zeros_like(iou)
    expected[1, 0] = 2 * (0.2 - 0.5) / 2
    if iou_supervision == "all":
        expected[0, 1:] = 2 * (iou - true_iou)[0, 1:] / 3 / 2
    else:
        expected[0, 2] = 2 * (-9 - 1) / 2
    np.testing.assert_allclose(actual["iou"], expected, rtol=1e-5)
    error = [errors[0, 1:].mean() if iou_supervision == "all" else errors[0, 2], errors[1, 0]]
    np.testing.assert_allclose(values["iou"], error, rtol=1e-5)
    rounds = np.array([losses[0, 2], losses[1, 0]]) + error
    np.testing.assert_allclose(values["round_loss"], rounds, rtol=1e-5)
    np.testing.assert_allclose(loss, rounds.mean(), rtol=1e-5)
    # The chosen output of the first round is output 3. It has the highest predicted IoU, and its
    # true IoU is zero.
    np.testing.assert_allclose(values["miou"], [0, 0.5])


# The prompts of many masks.


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """The prompts and outputs of the toy model in one evaluation of the objective.

    Attributes:
      records: {(image, mask): a list of (prompts, outputs) of the rounds}.
      batch: The batch.
      result: The ((loss, values), gradients).
    """

    records: dict
    batch: Batch
    result: tuple

    def masks(self):
        """Yields (size of the image, mask 'h w', records of the rounds) of each valid mask."""
        masks = unpack_masks(TOY, self.batch)
        for b, n in zip(*np.nonzero(self.batch.valid), strict=True):
            ids = int(self.batch.image_id[b]), int(self.batch.mask_id[b, n])
            yield self.batch.size[b], masks[b, n], self.records[ids]


RECORDER = Recorder(TOY)


def record_run(jit, batch, config):
    """Evaluates the objective of the toy model and records its prompts and outputs."""
    RECORDER.records.clear()
    result = jax.block_until_ready(compile_objective(jit, RECORDER, config, True)(VARIABLES, batch))
    rounds = 1 + config.num_clicks + config.num_extra_rounds
    return RecordedRun(RECORDER.records_by_mask(batch, rounds), batch, result)


@pytest.fixture(scope="module")
def paper_run(jit):
    """The eleven rounds of the paper, with 200 masks."""
    sizes = [(24, 40), (24, 29), (11, 40), (20, 20)]
    masks = [random_masks(TOY, size, 50, i) for i, size in enumerate(sizes)]
    batch = make_batch(TOY, sizes, masks, image_id=(7, 3, 11, 5))
    return record_run(jit, batch, Interactive(masks_per_chunk=51))


def num_sampled_clicks(prompts):
    """Returns the number of sampled clicks and checks that the slots after them are empty."""
    present = prompts.labels[2:] != ABSENT
    assert (present == (np.arange(8) < present.sum())).all()
    return int(present.sum())


def clicks_before_inserted_round(rounds):
    """Returns the number of clicks before the inserted round, which adds no click."""
    counts = [num_sampled_clicks(prompts) for prompts, _ in rounds]
    added = np.diff(counts)
    assert set(added) <= {0, 1}
    return next(k for k in range(10) if not added[k])


def test_number_of_clicks_in_each_round(paper_run):
    """Round r has r clicks before the inserted round and r - 1 from it on; the last round has 8."""
    for _, _, rounds in paper_run.masks():
        k = clicks_before_inserted_round(rounds)
        assert k in range(8)
        expected = [r if r <= k else r - 1 for r in range(10)] + [8]
        assert [num_sampled_clicks(prompts) for prompts, _ in rounds] == expected


def test_position_of_the_inserted_round_is_uniform(paper_run):
    """It is inserted before one of the eight clicks."""
    k = [clicks_before_inserted_round(rounds) for _, _, rounds in paper_run.masks()]
    assert len(k) == 200
    assert scipy.stats.chisquare(np.bincount(k, minlength=8)).pvalue > 1e-3


def test_rounds_keep_earlier_points(paper_run):
    for _, _, rounds in paper_run.masks():
        for (before, _), (after, _) in itertools.pairwise(rounds):
            kept = 2 + num_sampled_clicks(before)
            np.testing.assert_array_equal(after.points[:kept], before.points[:kept])
            np.testing.assert_array_equal(after.labels[:kept], before.labels[:kept])
            # Rounds without a new click change only the mask prompt.
            if num_sampled_clicks(after) == num_sampled_clicks(before):
                np.testing.assert_array_equal(after.points, before.points)
                np.testing.assert_array_equal(after.labels, before.labels)
        assert rounds[0][0].points.shape == (10, 2)


def test_first_prompts_are_clicks_on_the_mask_or_noisy_boxes(paper_run):
    boxes = 0
    for size, mask, rounds in paper_run.masks():
        prompts = rounds[0][0]
        y, x = np.nonzero(mask)
        if prompts.labels[0] == TOP_LEFT:
            boxes += 1
            assert prompts.labels[1] == BOTTOM_RIGHT
            corners = np.array([[x.min(), y.min()], [x.max(), y.max()]])
            limit = 5 * 0.1 * (corners[1] - corners[0])
            assert (np.abs(prompts.points[:2] - corners) <= limit).all()
            assert (prompts.points[:2] <= size[::-1] - 1).all()
        else:
            assert prompts.labels[:2].tolist() == [FOREGROUND, NOT_A_POINT]
            pixel = prompts.points[0].astype(int)
            assert mask[pixel[1], pixel[0]]
            np.testing.assert_array_equal(prompts.points[0], pixel)
    assert scipy.stats.binomtest(boxes, 200, 0.5).pvalue > 1e-3


def test_mask_prompt_has_the_highest_predicted_iou(paper_run):
    differ = 0
    for _, _, rounds in paper_run.masks():
        assert [bool(prompts.has_mask) for prompts, _ in rounds] == [False] + [True] * 10
        for r in range(10):
            logits, iou = rounds[r][1].logits, rounds[r][1].iou
            chosen = 1 + np.argmax(iou[1:]) if r == 0 else 0
            differ += r == 0 and chosen != 1
            np.testing.assert_array_equal(rounds[r + 1][0].mask, logits[chosen])
    assert differ > 20


def test_clicks_are_where_the_mask_prompt_is_wrong(paper_run):
    wrong_clicks, labels = 0, []
    for size, mask, rounds in paper_run.masks():
        target, inside = target_and_inside(TOY, CONFIG, mask, size)
        for r in range(1, 11):
            prompts = rounds[r][0]
            count = num_sampled_clicks(prompts)
            if count == num_sampled_clicks(rounds[r - 1][0]):
                continue
            point, label = prompts.points[1 + count], prompts.labels[1 + count]
            x, y = pixel = ((point + 0.5) / 2 - 0.5).astype(int)  # at the loss's resolution
            np.testing.assert_array_equal(point, (pixel + 0.5) * 2 - 0.5)
            assert inside[y, x]
            assert label == (FOREGROUND if target[y, x] else BACKGROUND)
            wrong = ((prompts.mask > 0) != target) & inside
            wrong_clicks += wrong.any()
            assert wrong[y, x] or not wrong.any()
            assert wrong.any() or (label == BACKGROUND) == (~target & inside).any()
            labels.append(int(label))
    assert wrong_clicks > 1000
    assert set(labels) == {FOREGROUND, BACKGROUND}


def test_masks_of_one_pixel_are_clicked_at_this_pixel(paper_run):
    """Their target is one pixel at the resolution of the loss."""
    num_masks = 0
    for size, mask, rounds in paper_run.masks():
        if mask.sum() == 1:
            target, _ = target_and_inside(TOY, CONFIG, mask, size)
            assert target.sum() == 1
            last, (y, x) = rounds[-1][0], np.argwhere(mask)[0]
            clicks = last.points[2:][last.labels[2:] == FOREGROUND]
            assert (np.abs(clicks - [x, y]) == 0.5).all()
            num_masks += 1
    assert num_masks >= 4


# The layout of a batch.


@pytest.fixture(scope="module")
def recorded(jit, batch):
    """A run with the objective `CONFIG`."""
    return record_run(jit, batch, CONFIG)


def assert_same_prompts(actual, expected):
    """Checks that all masks have the same points, and the same mask prompts up to rounding."""
    for ids, rounds in actual.records.items():
        for (a, _), (e, _) in zip(rounds, expected.records[ids], strict=True):
            np.testing.assert_array_equal(a.points, e.points)
            np.testing.assert_array_equal(a.labels, e.labels)
            np.testing.assert_allclose(a.mask, e.mask, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_chunk_size_does_not_change_prompts_and_results(jit, batch, recorded, chunk):
    """The loss and its gradients are equal up to rounding, because the order of sums differs."""
    other = record_run(jit, batch, dataclasses.replace(CONFIG, masks_per_chunk=chunk))
    assert other.records.keys() == recorded.records.keys()
    assert_same_prompts(other, recorded)
    assert_close(other.result, recorded.result)


def test_order_and_invalid_masks_do_not_change_prompts_and_results(jit, batch, recorded):
    other = record_run(jit, permute(batch), CONFIG)
    assert other.records.keys() == recorded.records.keys()
    assert_same_prompts(other, recorded)
    assert_close(other.result, recorded.result)


def test_loss_is_the_mean_over_all_masks_of_the_batch(jit, batch, recorded):
    """Every mask has the same weight and prompts, whatever other masks its image has."""
    is_first = np.arange(batch.valid.shape[1]) == 0
    parts = [
        record_run(jit, batch.replace(valid=batch.valid & which), CONFIG)
        for which in (is_first, ~is_first)
    ]
    assert [len(part.records) for part in parts] == [3, 3]
    for part in parts:
        assert_same_prompts(part, recorded)
    mean = jax.tree.map(lambda *x: sum(x) / 2, *[part.result for part in parts])
    assert_close(mean, recorded.result)
