"""SAM's objective: eleven rounds of interactive prompts for every mask, in one scan.

Source: Kirillov et al. 2023, appendix A. A round adds a click where the last prediction is wrong,
and passes that prediction on as a mask prompt; two rounds add nothing new. The first prompt has
three outputs, of which only the best learns; every later one has the single output. What the paper
leaves unsaid is a field of `Interactive`, or stands beside the code.

As no gradient flows from a round into the one before, each round's gradient is taken inside the
scan and summed, so that memory does not grow with the rounds; masks are independent given the
image, and are taken a chunk at a time. Every random number is keyed by image and mask, so that
neither chunks nor the layout of a batch change it.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import normalize
from train.objectives.losses import dice_loss, focal_loss, mask_iou
from train.objectives.prompt_sampling import FIRST_SLOTS, Clicks, click_on_error, first_prompt

# What a key is folded with: one number a purpose. Masks are numbered from 0.
CLICK, DROPOUT, INSERTION = 0, 1, 2
DROP_PATH = 2**32 - 1


@flax.struct.dataclass
class Truth:
    """What is known of masks, 'b n ...': constant through the rounds.

    Attributes:
      mask: 'h w' bool in the frame; target: 's p' bool at the resolution of the loss, by token.
      inside: 's p' bool, what is not padding.
      size: '2' int32, (height, width) of the image in the frame.
      weight: '' float32, the mask's share of the loss of a round; 0 for a filler.
      key: of the mask.
    """

    mask: jax.Array
    target: jax.Array
    inside: jax.Array
    size: jax.Array
    weight: jax.Array
    key: jax.Array


@flax.struct.dataclass
class Session:
    """What the rounds have led to, 'b n ...': the clicks, and 's p' logits to go on from."""

    clicks: Clicks
    logits: jax.Array


def make_interactive(model, config, train=True):
    """Builds the objective of a model.

    Args:
      model: `Sam`; config: `Interactive`; train: whether to drop paths and units.
    Returns:
      f(params, constants, batch, key) -> (loss, values), where batch is a `Batch`, key that of the
      step, and values a dict of 'round' float32 means over masks: "loss", its parts "focal",
      "dice" and "iou" without their weights, and "miou" of the mask that goes on. Where the batch
      holds embeddings, they are taken as they are.
    """

    def objective(params, constants, batch, key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.image_id)
        embedding = batch.embedding
        if embedding is None:
            variables = {"params": params, "constants": constants}
            image = normalize(batch.image, batch.size)
            one = functools.partial(encode, model, variables, train=train)
            with jax.named_scope("encoder"):
                embedding = jax.vmap(one)(image, keys)

        def start(chunk):
            truth = make_truth(model, config, batch.size, keys, chunk)
            return truth, begin(model, config, truth)

        play = functools.partial(play_round, model, config, train, constants)
        decoder = {part: params[part] for part in ("prompt_encoder", "mask_decoder")}
        chunks = split_masks(config, batch)
        with jax.named_scope("rounds"):
            return sum_rounds(config, start, play, decoder, embedding.astype(jnp.float32), chunks)

    return objective


def sum_rounds(config, start, play, params, embedding, chunks):
    """Plays all rounds of all chunks of masks.

    Args:
      config: `Interactive`.
      start: one of the chunks -> (`Truth`, `Session`); play: `play_round` from its params on.
      params: of the decoder; embedding: 'b gh gw c' float32, in which its gradients are summed.
      chunks: what `split_masks` returns.
    Returns:
      The loss, and a dict of 'round' values.
    """

    def over_rounds(play, zero):
        """Sums what `play` returns first over rounds and chunks."""

        def play_chunk(sums, chunk):
            truth, session = start(chunk)

            def play_next(carry, index):
                sums, session = carry
                terms, (session, values) = play(truth, session, index)
                return (jax.tree.map(jnp.add, sums, terms), session), values

            rounds = jnp.arange(num_rounds(config))
            (sums, _), values = jax.lax.scan(play_next, (sums, session), rounds)
            return sums, values

        sums, values = jax.lax.scan(play_chunk, zero, chunks)
        return sums, jax.tree.map(lambda x: jnp.sum(x, axis=0) * num_rounds(config), values)

    def loss(params, embedding):
        return over_rounds(functools.partial(play, params, embedding), 0.0)

    def loss_and_gradients(params, embedding):
        def play_with_gradients(*args):
            gradients = jax.value_and_grad(play, argnums=(0, 1), has_aux=True)
            (loss, state), gradients = gradients(params, embedding, *args)
            return (loss, gradients), state

        zero = 0.0, jax.tree.map(jnp.zeros_like, (params, embedding))
        (loss, gradients), values = over_rounds(play_with_gradients, zero)
        return (loss, values), gradients

    if not config.detach_mask:
        play = jax.checkpoint(play)
        return loss(params, embedding)
    loss = jax.custom_vjp(loss)
    scale = lambda gradients, cotangents: jax.tree.map(lambda g: g * cotangents[0], gradients)
    loss.defvjp(loss_and_gradients, scale)
    return loss(params, embedding)


def encode(model, variables, image, key, train):
    """Encodes one normalised image 'h w 3', with paths dropped by its own key -> 'gh gw c'."""
    rngs = {"drop_path": jax.random.fold_in(key, DROP_PATH)}
    return model.apply(variables, image[None], train, rngs=rngs, method="encode")[0]


def split_masks(config, batch):
    """The masks of a batch in chunks 'chunk b n ...', the last one filled up with weight 0."""
    n = batch.valid.shape[1]
    chunk = min(config.masks_per_chunk, n)
    weight = batch.valid / jnp.maximum(1, jnp.sum(batch.valid)) / num_rounds(config)
    masks = {"bits": batch.masks, "mask_id": batch.mask_id, "weight": weight.astype(jnp.float32)}
    fill = lambda x: jnp.pad(x, ((0, 0), (0, -n % chunk), *[(0, 0)] * (x.ndim - 2)))
    return jax.tree.map(lambda x: rearrange(fill(x), "b (s n) ... -> s b n ...", n=chunk), masks)


def make_truth(model, config, size, keys, chunk):
    """Prepares masks for their rounds.

    Args:
      model, config: as in `make_interactive`.
      size: 'b 2' int32, of the images; keys: 'b', theirs.
      chunk: one of the chunks of `split_masks`.
    Returns:
      `Truth` of masks 'b n ...'.
    """
    mask = jnp.unpackbits(chunk["bits"], axis=-1, count=model.image_size[1]).astype(bool)
    cell = cell_size(model, config)
    fraction = reduce(
        mask.astype(jnp.float32), "b n (h i) (w j) -> b n h w", "mean", i=cell, j=cell
    )
    target = fraction >= 0.5
    vanished = ~jnp.any(target, axis=(2, 3), keepdims=True)
    target = target | (vanished & (fraction > 0))
    covered = (2 * size + cell) // (2 * cell)  # a cell is inside if its centre is, or the target
    rows = jnp.arange(target.shape[2]) < covered[:, :1]
    columns = jnp.arange(target.shape[3]) < covered[:, 1:]
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return Truth(
        mask=mask,
        target=by_token(target, model),
        inside=by_token(inside | target, model),
        size=jnp.broadcast_to(size[:, None], (*mask.shape[:2], 2)),
        weight=chunk["weight"],
        key=jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, chunk["mask_id"]),
    )


def cell_size(model, config):
    """Side in pixels of the frame of a pixel at the resolution of the loss."""
    return model.patch_size // (4 * config.loss_scale)


def num_rounds(config):
    """The first prompt, the sampled clicks, and the rounds without new information."""
    return 1 + config.num_clicks + config.num_extra_rounds


def begin(model, config, truth):
    """Draws the first prompts of masks 'b n ...' -> `Session`."""

    @over_masks
    def one(truth):
        return first_prompt(
            key_of(truth, 0, CLICK),
            truth.mask,
            truth.size,
            num_slots=FIRST_SLOTS + config.num_clicks,
            box_noise=config.box_noise,
        )

    gh, gw = (side // model.patch_size for side in model.image_size)
    logits = jnp.zeros((*truth.weight.shape, 4 * gh, 4 * gw))
    return Session(clicks=one(truth), logits=by_token(logits, model))


def play_round(model, config, train, constants, params, embedding, truth, session, index):
    """Plays one round of masks 'b n ...'.

    Args:
      model, config, train: as in `make_interactive`.
      constants: of the model; params: of the prompt encoder and the mask decoder.
      embedding: 'b gh gw c'.
      truth, session: `Truth` and `Session` of the masks.
      index: '' int32, the round.
    Returns:
      The weighted loss of the masks, and (the next `Session`, a dict of weighted sums).
    """
    session = session.replace(clicks=next_clicks(model, config, truth, session, index))
    variables = {"params": params, "constants": constants}

    def decode_one(embedding, session, key):
        prompts = Prompts(
            points=session.clicks.points,
            labels=session.clicks.labels,
            mask=by_place(session.logits, model),
            has_mask=index > 0,
        )
        prompts = jax.tree.map(lambda x: x[None, None], prompts)
        rngs = {"dropout": key}
        masks = model.apply(variables, embedding[None], prompts, train, rngs=rngs, method="decode")
        return jax.tree.map(lambda x: x[0, 0], masks)

    keys = over_masks(lambda truth: key_of(truth, index, DROPOUT))(truth)
    masks = jax.vmap(jax.vmap(decode_one, (None, 0, 0)))(embedding, session, keys)
    score = functools.partial(score_masks, model, config)
    loss, logits, values = jax.vmap(jax.vmap(score))(
        masks, truth.target, is_multimask(config, session, index)
    )
    total = lambda x: jnp.sum(x * truth.weight)
    if config.detach_mask:
        logits = jax.lax.stop_gradient(logits)
    return total(loss), (session.replace(logits=logits), jax.tree.map(total, values))


def next_clicks(model, config, truth, session, index):
    """Adds a click to each mask 'b n ...', unless this round has nothing new for it."""
    cell = cell_size(model, config)

    @over_masks
    def one(truth, session):
        logits = resize_logits(by_place(session.logits, model), config.loss_scale)
        shown = (
            jax.lax.stop_gradient(logits),
            *(by_place(x, model) for x in (truth.target, truth.inside)),
        )
        key = key_of(truth, index, CLICK)
        clicked = click_on_error(key, session.clicks, *shown, cell)
        is_new = has_click(config, truth.key, index)
        return jax.tree.map(lambda new, old: jnp.where(is_new, new, old), clicked, session.clicks)

    return one(truth, session)


def has_click(config, key, index):
    """Whether the round adds a click to the mask with this key.

    With two extra rounds one comes before a click drawn at random, the other last; so each of the
    rounds 1 to `points` is as likely to be the one inserted.
    """
    last = (config.num_extra_rounds > 0) & (index == num_rounds(config) - 1)
    inserted = False
    if config.num_extra_rounds == 2:
        before = jax.random.randint(jax.random.fold_in(key, INSERTION), (), 0, config.num_clicks)
        inserted = index == 1 + before
    return (index > 0) & ~last & ~inserted


def is_multimask(config, session, index):
    """Whether the prompts of masks 'b n' have three outputs in this round -> 'b n' bool."""
    first = (session.clicks.count == 0) if config.multimask_extra else (index == 0)
    return jnp.broadcast_to(config.multimask & first, session.clicks.count.shape)


def score_masks(model, config, masks, target, is_multimask):
    """The loss of one mask's outputs.

    Args:
      model, config: as in `make_interactive`.
      masks: `Masks` 'm lh lw' and 'm'.
      target: 's p' bool, at the resolution of the loss.
      is_multimask: '' bool, whether outputs 1 to 3 count, or output 0.
    Returns:
      '' the loss, 's p' the logits that go on, and a dict of '' values.
    """
    counts = is_multimask == (jnp.arange(len(masks.iou)) > 0)
    logits = by_token(masks.logits, model)
    scaled = scale_tokens(model, config, jax.lax.stop_gradient(logits))
    loss_of = lambda x: config.focal * focal_loss(x, target) + config.dice * dice_loss(x, target)
    best = jnp.argmin(jnp.where(counts, loss_of(scaled), jnp.inf))
    goes_on = jnp.argmax(jnp.where(counts, masks.iou, -jnp.inf))

    iou = mask_iou(scaled, target)
    iou_loss = jnp.abs(masks.iou - iou) if config.iou_loss == "l1" else (masks.iou - iou) ** 2
    if config.iou_supervision == "all":
        iou_loss = jnp.sum(jnp.where(counts, iou_loss, 0.0)) / jnp.sum(counts)
    else:
        iou_loss = iou_loss[best]
    learns = scale_tokens(model, config, logits[best])  # no other has a backward pass
    focal, dice = focal_loss(learns, target), dice_loss(learns, target)
    loss = config.focal * focal + config.dice * dice + config.iou * iou_loss
    values = {"loss": loss, "focal": focal, "dice": dice, "iou": iou_loss, "miou": iou[goes_on]}
    return loss, logits[goes_on], values


def scale_tokens(model, config, logits):
    """'... s p' logits of the decoder at the resolution of the loss."""
    return by_token(resize_logits(by_place(logits, model), config.loss_scale), model)


def by_token(x, model):
    """'... lh lw' pixels as '... s p': the s of each token together.

    So they leave the decoder, whose prompt takes them so: in this order they need not be moved,
    which on TPUs costs more than the losses.
    """
    gh, gw = (side // model.patch_size for side in model.image_size)
    return rearrange(x, "... (gh i) (gw j) -> ... (i j) (gh gw)", gh=gh, gw=gw)


def by_place(x, model):
    """Undoes `by_token`."""
    gh, _ = (side // model.patch_size for side in model.image_size)
    i = math.isqrt(x.shape[-2])
    return rearrange(x, "... (i j) (gh gw) -> ... (gh i) (gw j)", i=i, gh=gh)


def resize_logits(logits, scale):
    """'... h w' logits at `scale` times the resolution, bilinear."""
    if scale == 1:
        return logits
    shape = (*logits.shape[:-2], logits.shape[-2] * scale, logits.shape[-1] * scale)
    return jax.image.resize(logits, shape, "linear", antialias=False)


def key_of(truth, index, purpose):
    """The key of one mask, for a purpose and a round."""
    return jax.random.fold_in(jax.random.fold_in(truth.key, purpose), index)


def over_masks(f):
    """f of one mask -> f of masks 'b n ...'."""
    return jax.vmap(jax.vmap(f))
