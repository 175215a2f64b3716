"""SAM's objective: eleven rounds of interactive prompts for every mask, in one scan.

Source: Kirillov et al. 2023, appendix A. A round adds a click where the last prediction is wrong,
and passes that prediction on as a mask prompt; two rounds add no new point. The first prompt has
three outputs, of which only the best one is trained; later prompts have a single output. Where the
paper leaves a choice open, it is a field of `Interactive` or is explained where it is made.

No gradient flows from a round into the one before. So each round's gradient is computed inside the
scan (`scan_value_and_grad`), and memory does not grow with the number of rounds. Given the image,
masks are independent; they are processed in chunks. Every random number is keyed by image and
mask, so that neither the chunks nor the order of a batch change the result.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from sam_jax.data.segmentation_batch import Batch
from sam_jax.masks.overlap import mask_iou
from sam_jax.model.mask_decoder import Masks
from sam_jax.model.prompt_encoder import Prompts
from sam_jax.model.sam import normalize
from train.config import Interactive
from train.objectives.losses import iou_losses, mask_losses, weighted_sum
from train.objectives.prompt_sampling import (
    FIRST_SLOTS,
    Clicks,
    sample_click_on_error,
    sample_first_prompt,
)
from train.objectives.scan_value_and_grad import scan_value, scan_value_and_grad, with_gradient
from train.objectives.sums import Sums
from train.objectives.targets import (
    PromptableModel,
    Targets,
    loss_stride,
    num_rounds,
    prepare_targets,
    split_masks,
)
from train.objectives.token_layout import (
    to_image_layout,
    to_token_layout,
    upsample,
    upsample_tokens,
)

# Keys are folded with one number per purpose. Masks are numbered from 0, so that the key of an
# image's drop path, folded with the largest number, is never that of a mask.
CLICK, DROPOUT, INSERTION = 0, 1, 2
DROP_PATH = 2**32 - 1


@flax.struct.dataclass
class PromptState:
    """The prompts of n objects in each of b images, as they stand after a round.

    Attributes:
      clicks: The points so far.
      logits: The prediction that becomes the next mask prompt, in the token layout.
    """

    clicks: Clicks
    logits: Float32[Array, "b n s p"]


@flax.struct.dataclass
class DecoderInputs:
    """The inputs of a round's predictions, except the prompts.

    Attributes:
      params: Parameters of the prompt encoder and the mask decoder.
      constants: The model's constants.
      embedding: Embeddings of the images.
    """

    params: dict[str, Any]
    constants: dict[str, Any]
    embedding: Float32[Array, "b gh gw c"]


@dataclasses.dataclass(frozen=True)
class InteractiveObjective:
    """The objective of a model, a function of (params, constants, batch, key).

    Attributes:
      model: The model.
      config: The objective's configuration.
      train: Whether to apply drop path and dropout.
    """

    model: PromptableModel
    config: Interactive
    train: bool = True

    def __call__(
        self, params: dict[str, Any], constants: dict[str, Any], batch: Batch, key: Key[Array, ""]
    ) -> Sums:
        """Computes the loss of a batch.

        Args:
          params: The model's parameters.
          constants: The model's constants.
          batch: Images and masks. Where the batch holds features, the images are not encoded.
          key: The random key of the step.

        Returns:
          Sums over the valid masks. The values are one number per round: "round_loss", its
          unweighted parts "focal", "dice" and "iou", and "miou", the IoU of the mask with the
          highest predicted IoU.
        """
        keys = jax.vmap(lambda image_id: jax.random.fold_in(key, image_id))(batch.image_id)
        embedding = batch.embedding
        if embedding is None:
            with jax.named_scope("encoder"):
                embedding = self._encode(params, constants, batch, keys)
        inputs = DecoderInputs(
            params={part: params[part] for part in ("prompt_encoder", "mask_decoder")},
            constants=constants,
            embedding=jnp.asarray(embedding, jnp.float32),  # its gradients are summed in float32
        )

        def prepare(chunk: dict[str, Any]) -> tuple[Targets, PromptState]:
            targets = prepare_targets(self.model, self.config, batch.size, keys, chunk)
            return targets, self.init_prompt_state(targets)

        with jax.named_scope("rounds"):
            loss, values = self._sum_rounds(inputs, prepare, split_masks(self.config, batch))
        return Sums(loss, values, jnp.sum(batch.valid))

    def init_prompt_state(self, targets: Targets) -> PromptState:
        """Samples the first prompt of every mask: a click or a box."""

        @vmap_masks
        def sample(targets: Targets) -> Clicks:
            return sample_first_prompt(
                fold_key(targets.key, 0, CLICK),
                targets.mask,
                targets.size,
                num_slots=FIRST_SLOTS + self.config.num_clicks,
                box_noise=self.config.box_noise,
            )

        logits = jnp.zeros((*targets.weight.shape, *self.model.low_res))
        return PromptState(sample(targets), to_token_layout(logits, self.model.grid))

    def predict_round(
        self, inputs: DecoderInputs, targets: Targets, state: PromptState, index: Int[Array, ""]
    ) -> tuple[Clicks, Masks]:
        """Adds the round's clicks and predicts masks.

        Args:
          inputs: The inputs of the decoder other than the prompts.
          targets: The true masks.
          state: The prompts after the last round.
          index: The round, from 0.

        Returns:
          The clicks including the new ones, and all four masks of every object.
        """
        clicks = self._next_clicks(targets, state, index)
        variables = {"params": inputs.params, "constants": inputs.constants}

        def decode(embedding: Array, clicks: Clicks, logits: Array, key: Array) -> Masks:
            prompts = Prompts(
                points=clicks.points,
                labels=clicks.labels,
                mask=to_image_layout(logits, self.model.grid),
                has_mask=index > 0,
            )
            prompts = jax.tree.map(lambda x: x[None, None], prompts)
            masks = self.model.apply(
                variables,
                embedding[None],
                prompts,
                self.train,
                rngs={"dropout": key},
                method="decode",
            )
            return jax.tree.map(lambda x: x[0, 0], masks)

        # One mask is decoded at a time and vmapped, so that dropout has a key per mask.
        keys = vmap_masks(lambda key: fold_key(key, index, DROPOUT))(targets.key)
        decode_masks = jax.vmap(jax.vmap(decode, (None, 0, 0, 0)))
        return clicks, decode_masks(inputs.embedding, clicks, state.logits, keys)

    def run_round(
        self, inputs: DecoderInputs, targets: Targets, state: PromptState, index: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[PromptState, dict[str, Float[Array, ""]]]]:
        """Runs one round of all masks of a chunk; arguments as for `predict_round`.

        Returns:
          The weighted sum of the losses, and (the prompts of the next round, the weighted sums of
          the values).
        """
        clicks, masks = self.predict_round(inputs, targets, state, index)
        is_multimask = self.is_multimask(clicks.count, index)
        losses, logits, values = vmap_masks(self.score)(masks, targets.target, is_multimask)
        if self.config.detach_mask:
            logits = jax.lax.stop_gradient(logits)

        def total(x: Array) -> Array:
            return jnp.sum(x * targets.weight)

        return total(losses), (PromptState(clicks, logits), jax.tree.map(total, values))

    def score(
        self, masks: Masks, target: Bool[Array, "s p"], is_multimask: Bool[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, "s_low p"], dict[str, Float[Array, ""]]]:
        """Computes the loss of one object's masks.

        Args:
          masks: The object's four masks.
          target: The true mask, at the resolution of the loss.
          is_multimask: Whether masks 1 to 3 are the candidates, or mask 0.

        Returns:
          The loss, the logits that become the next mask prompt, and the values.
        """
        is_candidate = is_multimask == (jnp.arange(len(masks.iou)) > 0)
        logits = to_token_layout(masks.logits, self.model.grid)
        detached = self._to_loss_resolution(jax.lax.stop_gradient(logits))
        loss = weighted_sum(mask_losses(detached, target), self.config)
        best = jnp.argmin(jnp.where(is_candidate, loss, jnp.inf))
        chosen = jnp.argmax(jnp.where(is_candidate, masks.iou, -jnp.inf))

        iou = mask_iou(detached > 0, target)
        iou_loss = iou_losses(masks.iou, iou, self.config)
        if self.config.iou_supervision == "all":
            iou_loss = jnp.sum(jnp.where(is_candidate, iou_loss, 0.0)) / jnp.sum(is_candidate)
        else:
            iou_loss = iou_loss[best]
        # Only the best mask has a backward pass.
        losses = mask_losses(self._to_loss_resolution(logits[best]), target)
        loss = weighted_sum(losses, self.config) + self.config.iou * iou_loss
        values = {"round_loss": loss, **losses, "iou": iou_loss, "miou": iou[chosen]}
        return loss, logits[chosen], values

    def is_multimask(
        self, num_clicks: Int[Array, "b n"], index: Int[Array, ""]
    ) -> Bool[Array, "b n"]:
        """Returns True for prompts that have three outputs in this round.

        Args:
          num_clicks: Clicks of each mask after its first prompt.
          index: The round.
        """
        is_first = (num_clicks == 0) if self.config.multimask_extra else (index == 0)
        return jnp.broadcast_to(self.config.multimask & is_first, num_clicks.shape)

    def _encode(
        self, params: Any, constants: Any, batch: Batch, keys: Key[Array, " b"]
    ) -> Float[Array, "b gh gw c"]:
        """Encodes images, one at a time and vmapped, so that drop path has a key per image."""
        variables = {"params": params, "constants": constants}
        if batch.trunk is not None:
            return self.model.apply(variables, batch.trunk, method="apply_neck")

        def encode_one(image: Array, key: Array) -> Array:
            rngs = {"drop_path": jax.random.fold_in(key, DROP_PATH)}
            embedding = self.model.apply(
                variables, image[None], self.train, rngs=rngs, method="encode"
            )
            return embedding[0]

        if batch.image is None:
            raise ValueError("batch must hold images or their features; got neither")
        return jax.vmap(encode_one)(normalize(batch.image, batch.size), keys)

    def _sum_rounds(
        self, inputs: DecoderInputs, prepare: Callable[..., Any], chunks: dict[str, Any]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, " round"]]]:
        """Sums the losses and values of all rounds of all chunks of masks.

        Args:
          inputs: The inputs of the decoder other than the prompts.
          prepare: A function of a chunk that returns its `Targets` and first `PromptState`.
          chunks: The chunks, from `split_masks`.

        Returns:
          The sum of the losses, and the sums of the values in each round.
        """
        scan_chunks = functools.partial(self._scan_chunks, inputs, prepare, chunks)

        def value(differentiable: Any) -> Any:
            return scan_chunks(scan_value, 0.0, differentiable)

        def value_and_grad(differentiable: Any) -> Any:
            zero = 0.0, jax.tree.map(jnp.zeros_like, differentiable)
            (loss, gradients), values = scan_chunks(scan_value_and_grad, zero, differentiable)
            return (loss, values), gradients

        sum_rounds = with_gradient(value, value_and_grad) if self.config.detach_mask else value
        return sum_rounds((inputs.params, inputs.embedding))

    def _scan_chunks(
        self,
        inputs: DecoderInputs,
        prepare: Callable[..., Any],
        chunks: dict[str, Any],
        scan: Callable[..., Any],
        zero: Any,
        differentiable: Any,
    ) -> tuple[Any, dict[str, Float[Array, " round"]]]:
        """Scans over the chunks, and within each chunk over its rounds.

        Args:
          inputs: As for `_sum_rounds`.
          prepare: As for `_sum_rounds`.
          chunks: As for `_sum_rounds`.
          scan: `scan_value` or `scan_value_and_grad`, which runs the rounds of a chunk.
          zero: The initial total of `scan`.
          differentiable: (params, embedding), which replace those of `inputs`.

        Returns:
          The total of `scan`, and the sums of the values in each round.
        """
        rounds = jnp.arange(num_rounds(self.config))

        def sum_chunk(total: Any, chunk: Any) -> Any:
            targets, state = prepare(chunk)

            def run_round(differentiable: Any, state: PromptState, index: Array) -> Any:
                params, embedding = differentiable
                changed = dataclasses.replace(inputs, params=params, embedding=embedding)
                return self.run_round(changed, targets, state, index)

            if not self.config.detach_mask:
                run_round = jax.checkpoint(run_round)
            total, _, values = scan(run_round, differentiable, state, rounds, total)
            return total, values

        total, values = jax.lax.scan(sum_chunk, zero, chunks)
        # A mask's weight is its share of all rounds; the values are those of single rounds.
        return total, jax.tree.map(lambda x: jnp.sum(x, axis=0) * len(rounds), values)

    def _next_clicks(self, targets: Targets, state: PromptState, index: Int[Array, ""]) -> Clicks:
        """Adds a click to each mask, unless this round adds no new point to it."""
        grid, scale = self.model.grid, self.config.loss_scale
        stride = loss_stride(self.model, self.config)

        @vmap_masks
        def add_click(targets: Targets, state: PromptState) -> Clicks:
            logits = upsample(to_image_layout(state.logits, grid), scale)
            clicks = sample_click_on_error(
                fold_key(targets.key, index, CLICK),
                state.clicks,
                jax.lax.stop_gradient(logits),
                to_image_layout(targets.target, grid),
                to_image_layout(targets.inside, grid),
                stride,
            )
            is_new = has_click(self.config, targets.key, index)
            return jax.tree.map(lambda new, old: jnp.where(is_new, new, old), clicks, state.clicks)

        return add_click(targets, state)

    def _to_loss_resolution(self, logits: Float[Array, "*batch s p"]) -> Float[Array, "..."]:
        return upsample_tokens(logits, self.model.grid, self.config.loss_scale)


def has_click(config: Interactive, key: Key[Array, ""], index: Int[Array, ""]) -> Bool[Array, ""]:
    """Returns True if a round adds a click to a mask.

    With two extra rounds, one comes before a random click and the other one is the last, so that
    each of the rounds 1 to `num_clicks` is equally likely to be the inserted one.

    Args:
      config: The objective's configuration.
      key: The mask's key.
      index: The round.
    """
    is_last = (config.num_extra_rounds > 0) & (index == num_rounds(config) - 1)
    is_inserted = jnp.zeros((), bool)
    if config.num_extra_rounds == 2:
        insertion_key = jax.random.fold_in(key, INSERTION)
        clicks_before = jax.random.randint(insertion_key, (), 0, config.num_clicks)
        is_inserted = index == 1 + clicks_before
    return (index > 0) & ~is_last & ~is_inserted


def fold_key(key: Key[Array, ""], index: int | Int[Array, ""], purpose: int) -> Key[Array, ""]:
    """Derives the key of a mask for a round and a purpose."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), index)


def vmap_masks(f: Callable[..., Any]) -> Callable[..., Any]:
    """Maps a function of one mask over the masks 'b n' of a chunk."""
    return jax.vmap(jax.vmap(f))
