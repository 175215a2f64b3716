"""SAM's objective equals a plain loop over rounds and masks, and its rounds obey the rules.

`interactive_oracle.py` has the loop. `toy_model.py` has a model for tests of the objective alone.
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
    cells_of,
    fold,
    normalized,
    pieces,
    plain,
    unpack,
)
from tests.train.objectives.toy_model import (
    KEY,
    TOY,
    Recorder,
    Toy,
    make_batch,
    masks_in,
    rearranged,
    rectangle,
)
from train.config import Interactive
from train.objectives.interactive import (
    DROP_PATH,
    InteractiveObjective,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def jit(jit):
    """The suite's, without fused kernels, which take half of the time, if XLA has the option."""
    options = jit.keywords["compiler_options"] | {"xla_cpu_use_fusion_emitters": False}
    quicker = functools.partial(jit, compiler_options=options)
    try:
        quicker(lambda: 0.0)()
    except jax.errors.JaxRuntimeError:
        return jit
    return quicker


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Compares trees leaf by leaf, relative to the largest magnitude of each leaf."""
    expected = jax.tree_util.tree_leaves_with_path(expected)
    for a, (path, e) in zip(jax.tree.leaves(actual), expected, strict=True):
        limit = tolerance * float(np.abs(e).max()) + 1e-7
        np.testing.assert_allclose(a, e, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


def mean_of(objective):
    """Returns the function of the objective's means (loss, values)."""
    return lambda *args: objective(*args).mean()


@functools.cache
def compiled(jit, model, config, train=True):
    """Loss, values and gradients of the objective, as a function of (variables, batch, key)."""
    f = jit(jax.value_and_grad(mean_of(InteractiveObjective(model, config, train)), has_aux=True))
    return lambda variables, batch, key=KEY: f(
        variables["params"], variables["constants"], batch, key
    )


def by_hand(jit, model, config, variables, batch, train=True):
    f = jax.value_and_grad(plain(jit, model, config, train), has_aux=True)
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

    def draw(path, like):
        x, name = rng.standard_normal(like.shape).astype(np.float32), path[-1].key
        if name == "scale":
            return 1 + 0.1 * x
        small = name in ("bias", "pos_embed", "rel_pos_h", "rel_pos_w")
        return x * (0.1 if small else 0.6 * math.prod(like.shape[:-1]) ** -0.5)

    variables = jax.tree.map_with_path(draw, shapes)
    sizes = [(48, 72), (48, 41)]
    batch = make_batch(SMALL, sizes, [masks_in(SMALL, s, 3 - i, i) for i, s in enumerate(sizes)])
    config = Interactive(num_clicks=3, masks_per_chunk=3)
    return compiled(jit, SMALL, config), config, variables, batch


def test_the_objective_is_the_plain_loop(jit, small):
    objective, config, variables, batch = small
    actual = objective(variables, batch)
    assert_close(actual, by_hand(jit, SMALL, config, variables, batch))
    # All is reached but the biases of keys, which a softmax does not see, and masks never best.
    for path, gradient in jax.tree_util.tree_leaves_with_path(actual[1]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("k/bias") and "hypernetwork" not in name:
            assert np.abs(gradient).max() > 1e-6, name


def test_paths_and_units_drop_by_image_and_mask_not_by_place(small):
    objective, _, variables, batch = small
    (loss, values), gradients = objective(variables, batch)
    columns = np.array([2, 3, 0, 1])
    moved = jax.tree.map(lambda x: x[::-1], batch)
    moved = moved.replace(
        masks=moved.masks[:, columns],
        mask_id=moved.mask_id[:, columns],
        valid=moved.valid[:, columns],
    )
    assert_close(objective(variables, moved), ((loss, values), gradients))
    # Another step, another image or another mask drops others.
    for other, key in [
        (batch, jax.random.key(6)),
        (batch.replace(image_id=batch.image_id + 1), KEY),
        (batch.replace(mask_id=batch.mask_id + 1), KEY),
    ]:
        assert abs(objective(variables, other, key)[0][0] - loss) > 1e-4


# The fields of the objective, with the toy.

FIELDS = [
    {},
    dict(detach_mask=False),
    dict(multimask_extra=True, iou_supervision="all", focal=3.0, dice=2.0, iou=0.5),
    dict(num_extra_rounds=1, multimask=False, loss_scale=2),
    dict(num_extra_rounds=0, iou_supervision="all", iou_loss="l1", box_noise="uniform"),
    dict(num_clicks=0, multimask_extra=True, iou_loss="l1", detach_mask=False),
]
GAME = Interactive(num_clicks=3, masks_per_chunk=3)
VARIABLES = TOY.init()


@pytest.fixture(scope="module")
def batch():
    """A whole frame, one padded at the right, one padded below; fillers in each."""
    sizes = [(24, 40), (24, 29), (11, 40)]
    return make_batch(TOY, sizes, [masks_in(TOY, s, 3 - i, i) for i, s in enumerate(sizes)])


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_field_is_as_in_the_plain_loop(jit, batch, fields):
    config = dataclasses.replace(GAME, **fields)
    train = config.num_extra_rounds > 0
    actual = compiled(jit, TOY, config, train)(VARIABLES, batch)
    assert_close(actual, by_hand(jit, TOY, config, VARIABLES, batch, train))
    rounds = 1 + config.num_clicks + config.num_extra_rounds
    assert all(value.shape == (rounds,) for value in actual[0][1].values())
    for path, gradient in jax.tree_util.tree_leaves_with_path(actual[1]):
        assert np.abs(gradient).max() > 1e-6, path


@pytest.fixture(scope="module")
def toy_objective(jit):
    """The objective of the toy."""
    return compiled(jit, TOY, GAME, True)


@pytest.fixture(scope="module")
def expected(toy_objective, batch):
    """(loss, values), gradients of the batch."""
    return toy_objective(VARIABLES, batch)


def assert_same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e)


def test_a_mask_prompt_that_is_not_detached_changes_gradients_alone(jit, batch, expected):
    config = dataclasses.replace(GAME, detach_mask=False)
    values, gradients = compiled(jit, TOY, config, True)(VARIABLES, batch)
    assert_close(values, expected[0], 1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        detached = functools.reduce(lambda tree, key: tree[key.key], path, expected[1])
        if path[-1].key == "head":  # which makes IoUs, and these no mask prompts
            assert_close(gradient, detached, 1e-6)
        else:
            assert np.abs(gradient - detached).max() > 1e-4, path


def test_gradients_are_scaled_by_what_the_loss_is_scaled_by(jit, batch, expected):
    objective = mean_of(InteractiveObjective(TOY, GAME))

    def scaled(params, constants, batch, key):
        loss, values = objective(params, constants, batch, key)
        return 1 - 3 * loss, values

    f = jit(jax.grad(scaled, has_aux=True))
    gradients, values = f(VARIABLES["params"], VARIABLES["constants"], batch, KEY)
    assert_close(gradients, jax.tree.map(lambda g: -3 * g, expected[1]), 1e-6)
    assert_close(values, expected[0][1], 1e-6)


def test_known_embeddings_are_taken_as_they_are(jit, toy_objective, batch, expected):
    encode = pieces(jit, TOY, True).encode
    embedding = [
        encode(VARIABLES, normalized(image, size), fold(KEY, index, DROP_PATH))
        for image, size, index in zip(batch.image, batch.size, batch.image_id, strict=True)
    ]
    known = batch.replace(embedding=np.stack(embedding), image=np.zeros_like(batch.image))
    values, gradients = toy_objective(VARIABLES, known)
    assert_close(values, expected[0], 1e-6)
    for part in ("prompt_encoder", "mask_decoder"):
        assert_close(gradients[part], expected[1][part], 1e-6)
    assert not np.any(gradients["image_encoder"]["kernel"])


def test_a_batch_without_masks_is_no_loss(toy_objective, batch):
    result = toy_objective(VARIABLES, batch.replace(valid=np.zeros_like(batch.valid)))
    assert_same(result, jax.tree.map(np.zeros_like, result))


def test_what_fillers_hold_does_not_matter(toy_objective, batch, expected):
    masks = batch.masks | np.where(batch.valid, 0, 255)[:, :, None, None].astype(np.uint8)
    mask_id = np.where(batch.valid, batch.mask_id, batch.mask_id[:, :1])  # that of a valid one
    assert_same(toy_objective(VARIABLES, batch.replace(masks=masks, mask_id=mask_id)), expected)


def test_what_lies_outside_an_image_does_not_matter(toy_objective, batch, expected):
    image = batch.image.copy()
    for b, (h, w) in enumerate(batch.size):
        image[b, h:] = image[b, :, w:] = 17
    assert (image != batch.image).any()
    assert_same(toy_objective(VARIABLES, batch.replace(image=image)), expected)


def test_other_steps_other_prompts(toy_objective, batch, expected):
    loss = lambda key: float(toy_objective(VARIABLES, batch, key)[0][0])
    assert loss(KEY) == float(expected[0][0])
    assert len({loss(jax.random.key(seed)) for seed in range(5)}) == 5


# Which of three outputs learns, and which goes on.


@dataclasses.dataclass(frozen=True)
class Fixed(Toy):
    """Predicts its parameters: 'round m lh lw' logits and 'round m' IoUs of two rounds."""

    def decode(self, params, constants, embedding, prompts, train, dropout):
        later = prompts.has_mask[0, 0].astype(int)
        logits, iou = (params["mask_decoder"][name][later] for name in ("logits", "iou"))
        return Masks(logits=logits[None, None], iou=iou[None, None])


TRUTH = rectangle(TOY, 8, 4, 24, 16)  # 4 to 12 by 2 to 8 at low resolution: 48 pixels


@pytest.fixture(scope="module")
def fixed():
    """Variables, and a batch of one mask.

    In the first round output 0 is right but does not count, output 2 has the lowest mask loss but
    the worst predicted IoU, output 3 the highest predicted IoU; output 1 would win by the sum of
    mask and IoU loss.
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
    return variables, make_batch(TOY, [(24, 40)], [[TRUTH]]), target


def mask_loss(logits, target):
    t = target.astype(np.float32)
    focal = optax.losses.sigmoid_focal_loss(logits, t, alpha=0.25, gamma=2.0).mean()
    p = jax.nn.sigmoid(logits)
    return 20 * focal + 1 - (2 * jnp.sum(p * t) + 1) / (jnp.sum(p) + jnp.sum(t) + 1)


@pytest.mark.parametrize("iou_supervision", ["best", "all"])
def test_only_the_best_of_three_learns(jit, fixed, iou_supervision):
    variables, batch, target = fixed
    config = Interactive(num_clicks=1, num_extra_rounds=0, iou_supervision=iou_supervision)
    (loss, values), gradients = compiled(jit, Fixed(), config)(variables, batch)
    logits, iou = variables["params"]["mask_decoder"].values()
    slopes_of = jax.vmap(jax.vmap(jax.value_and_grad(mask_loss), (0, None)), (0, None))
    losses, slopes = jit(slopes_of)(logits, target)
    truth = [[1, 0.5, 1, 0], [0.5, 1, 1, 1]]
    errors = (iou - truth) ** 2
    assert np.argmin(losses[0, 1:]) == 1
    assert np.argmin((losses + errors)[0, 1:]) == 0
    assert np.argmax(iou[0, 1:]) == 2

    # The first round's best is output 2, of two rounds; the next has output 0 alone.
    expected = np.zeros_like(logits)
    expected[0, 2], expected[1, 0] = slopes[0, 2] / 2, slopes[1, 0] / 2
    got = gradients["mask_decoder"]
    np.testing.assert_allclose(got["logits"], expected, rtol=1e-4, atol=1e-9)
    assert (np.asarray(got["logits"])[expected == 0] == 0).all()
    expected = np.zeros_like(iou)
    expected[1, 0] = 2 * (0.2 - 0.5) / 2
    if iou_supervision == "all":
        expected[0, 1:] = 2 * (iou - truth)[0, 1:] / 3 / 2
    else:
        expected[0, 2] = 2 * (-9 - 1) / 2
    np.testing.assert_allclose(got["iou"], expected, rtol=1e-5)
    error = [errors[0, 1:].mean() if iou_supervision == "all" else errors[0, 2], errors[1, 0]]
    np.testing.assert_allclose(values["iou"], error, rtol=1e-5)
    rounds = np.array([losses[0, 2], losses[1, 0]]) + error
    np.testing.assert_allclose(values["round_loss"], rounds, rtol=1e-5)
    np.testing.assert_allclose(loss, rounds.mean(), rtol=1e-5)
    # The mask that goes on is output 3: of the highest predicted IoU, and all wrong.
    np.testing.assert_allclose(values["miou"], [0, 0.5])


# The rounds of many masks.


@dataclasses.dataclass(frozen=True)
class Played:
    """The prompts that the toy model received: a list of rounds for each (image, mask)."""

    notes: dict
    batch: Batch
    result: tuple

    def masks(self):
        """(size of the image, mask 'h w', rounds) of each mask."""
        bits = unpack(TOY, self.batch)
        for b, n in zip(*np.nonzero(self.batch.valid), strict=True):
            ids = int(self.batch.image_id[b]), int(self.batch.mask_id[b, n])
            yield self.batch.size[b], bits[b, n], self.notes[ids]


RECORDER = Recorder(TOY)


def play(jit, batch, config):
    RECORDER.notes.clear()
    result = jax.block_until_ready(compiled(jit, RECORDER, config, True)(VARIABLES, batch))
    rounds = 1 + config.num_clicks + config.num_extra_rounds
    return Played(RECORDER.of(batch, rounds), batch, result)


@pytest.fixture(scope="module")
def played(jit):
    """The paper's eleven rounds, with 200 masks."""
    sizes = [(24, 40), (24, 29), (11, 40), (20, 20)]
    masks = [masks_in(TOY, size, 50, i) for i, size in enumerate(sizes)]
    batch = make_batch(TOY, sizes, masks, image_id=(7, 3, 11, 5))
    return play(jit, batch, Interactive(masks_per_chunk=51))


def sampled(prompts):
    """Returns the number of sampled clicks; the slots after them are empty."""
    present = prompts.labels[2:] != ABSENT
    assert (present == (np.arange(8) < present.sum())).all()
    return int(present.sum())


def slot_of(rounds):
    """k: after how many clicks the round without news is inserted."""
    counts = [sampled(prompts) for prompts, _ in rounds]
    news = np.diff(counts)
    assert set(news) <= {0, 1}
    return next(k for k in range(10) if not news[k])


def test_the_number_of_clicks_in_each_round(played):
    """r up to the inserted round, then r - 1, and 8 in the last."""
    for _, _, rounds in played.masks():
        k = slot_of(rounds)
        assert k in range(8)
        expected = [r if r <= k else r - 1 for r in range(10)] + [8]
        assert [sampled(prompts) for prompts, _ in rounds] == expected


def test_the_inserted_round_is_uniform(played):
    """It comes before any of the clicks, and never last."""
    k = [slot_of(rounds) for _, _, rounds in played.masks()]
    assert len(k) == 200
    assert scipy.stats.chisquare(np.bincount(k, minlength=8)).pvalue > 1e-3


def test_rounds_keep_what_there_was(played):
    for _, _, rounds in played.masks():
        for (before, _), (after, _) in itertools.pairwise(rounds):
            kept = 2 + sampled(before)
            np.testing.assert_array_equal(after.points[:kept], before.points[:kept])
            np.testing.assert_array_equal(after.labels[:kept], before.labels[:kept])
            if sampled(after) == sampled(before):  # nothing new: the mask prompt alone
                np.testing.assert_array_equal(after.points, before.points)
                np.testing.assert_array_equal(after.labels, before.labels)
        assert rounds[0][0].points.shape == (10, 2)


def test_first_prompts(played):
    boxes = 0
    for size, mask, rounds in played.masks():
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
            at = prompts.points[0].astype(int)
            assert mask[at[1], at[0]]
            np.testing.assert_array_equal(prompts.points[0], at)
    assert scipy.stats.binomtest(boxes, 200, 0.5).pvalue > 1e-3


def test_the_mask_of_the_highest_predicted_iou_goes_on(played):
    differ = 0
    for _, _, rounds in played.masks():
        assert [bool(prompts.has_mask) for prompts, _ in rounds] == [False] + [True] * 10
        for r in range(10):
            logits, iou = rounds[r][1].logits, rounds[r][1].iou
            chosen = 1 + np.argmax(iou[1:]) if r == 0 else 0
            differ += r == 0 and chosen != 1
            np.testing.assert_array_equal(rounds[r + 1][0].mask, logits[chosen])
    assert differ > 20


def test_clicks_lie_where_the_mask_that_goes_on_is_wrong(played):
    wrong_clicks, labels = 0, []
    for size, mask, rounds in played.masks():
        target, inside = cells_of(TOY, GAME, mask, size)
        for r in range(1, 11):
            prompts = rounds[r][0]
            count = sampled(prompts)
            if count == sampled(rounds[r - 1][0]):
                continue
            point, label = prompts.points[1 + count], prompts.labels[1 + count]
            x, y = cell = ((point + 0.5) / 2 - 0.5).astype(int)
            np.testing.assert_array_equal(point, (cell + 0.5) * 2 - 0.5)  # cells are 2 by 2
            assert inside[y, x]
            assert label == (FOREGROUND if target[y, x] else BACKGROUND)
            wrong = ((prompts.mask > 0) != target) & inside
            wrong_clicks += wrong.any()
            assert wrong[y, x] or not wrong.any()
            assert wrong.any() or (label == BACKGROUND) == (~target & inside).any()
            labels.append(int(label))
    assert wrong_clicks > 1000
    assert set(labels) == {FOREGROUND, BACKGROUND}


def test_masks_that_vanish_are_clicked_at_their_pixel(played):
    """A mask of one pixel is a target of one cell."""
    vanished = 0
    for size, mask, rounds in played.masks():
        if mask.sum() == 1:
            target, _ = cells_of(TOY, GAME, mask, size)
            assert target.sum() == 1
            last, (y, x) = rounds[-1][0], np.argwhere(mask)[0]
            clicks = last.points[2:][last.labels[2:] == FOREGROUND]
            assert (np.abs(clicks - [x, y]) == 0.5).all()
            vanished += 1
    assert vanished >= 4


# The layout of a batch.


@pytest.fixture(scope="module")
def game(jit, batch):
    return play(jit, batch, GAME)


def assert_same_prompts(actual, expected):
    """All masks are shown the same points, and the same mask up to rounding."""
    for ids, rounds in actual.notes.items():
        for (a, _), (e, _) in zip(rounds, expected.notes[ids], strict=True):
            np.testing.assert_array_equal(a.points, e.points)
            np.testing.assert_array_equal(a.labels, e.labels)
            np.testing.assert_allclose(a.mask, e.mask, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_chunks_change_nothing(jit, batch, game, chunk):
    """Neither prompts nor, up to the order of sums, the loss and its gradients."""
    other = play(jit, batch, dataclasses.replace(GAME, masks_per_chunk=chunk))
    assert other.notes.keys() == game.notes.keys()
    assert_same_prompts(other, game)
    assert_close(other.result, game.result)


def test_order_and_fillers_change_nothing(jit, batch, game):
    other = play(jit, rearranged(batch), GAME)
    assert other.notes.keys() == game.notes.keys()
    assert_same_prompts(other, game)
    assert_close(other.result, game.result)


def test_the_loss_is_the_mean_over_the_masks_of_the_batch(jit, batch, game):
    """However many an image has: masks apart are as in company."""
    is_first = np.arange(batch.valid.shape[1]) == 0
    parts = [
        play(jit, batch.replace(valid=batch.valid & which), GAME) for which in (is_first, ~is_first)
    ]
    assert [len(part.notes) for part in parts] == [3, 3]
    for part in parts:
        assert_same_prompts(part, game)
    mean = jax.tree.map(lambda *x: sum(x) / 2, *[part.result for part in parts])
    assert_close(mean, game.result)
