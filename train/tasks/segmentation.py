"""Promptable segmentation: a run of SAM."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sam_jax.data.loader import Transform
from sam_jax.data.open import Subset
from sam_jax.data.segmentation_batch import Batch, SegmentationTransform
from sam_jax.evaluate.clicks import evaluate_clicks, format_table
from sam_jax.model.init import init_variables
from sam_jax.model.sam import UPSCALING, Sam
from sam_jax.predict.predictor import SamPredictor
from train.config import ConfigError, Interactive, TrainConfig
from train.embedding_cache import EmbeddingCache
from train.flops import step_flops
from train.initialization import InitFn, sam_variables
from train.objectives.interactive import InteractiveObjective
from train.report.segmentation import write_report
from train.sharding import Objective


class SegmentationTask:
    """A run of SAM; see `train.tasks.base.Task`."""

    needs_masks = True

    def __init__(self, config: TrainConfig) -> None:
        """Makes the task.

        Raises:
          ConfigError: If a SAM cannot be trained with the values of some fields.
        """
        check_config(config)
        # The table of tasks says which classes these are.
        model, objective = cast(Sam, config.model), cast(Interactive, config.objective)
        data = config.data
        self.config = config
        self.model = model
        self.transform: Transform = SegmentationTransform(
            model.image_size, objective.masks_per_image, data.flips, data.rot90
        )
        self.decode_size: tuple[int, int] | None = model.image_size if data.half_size_jpeg else None
        self.init_fn: InitFn = functools.partial(init_variables, model, config.seed)
        self.objective: Objective = InteractiveObjective(model, objective)
        self.encoder_depth = model.image_encoder.depth
        self.flops = step_flops(model, objective) if trains_encoder(config) else None

    def initial_variables(self) -> dict[str, Any]:
        """Returns the variables of `init_from`, or initialized ones; see `sam_variables`."""
        return sam_variables(self.config, self.init_fn)

    def batch_spec(self) -> Batch:
        """Returns the shapes of a batch of all hosts."""
        b = self.config.batch_size
        n = cast(Interactive, self.config.objective).masks_per_image
        h, w = self.model.image_size
        return Batch(
            image=_struct((b, h, w, 3), jnp.uint8),
            size=_struct((b, 2), jnp.int32),
            image_id=_struct((b,), jnp.int32),
            masks=_struct((b, n, h, -(-w // 8)), jnp.uint8),
            mask_id=_struct((b, n), jnp.int32),
            valid=_struct((b, n), bool),
        )

    def batch_transform(
        self, variables: dict[str, Any], cache_path: Path, train_split: Subset
    ) -> Callable[[Batch], Batch]:
        """Returns a transform that adds the embeddings of a frozen image encoder."""
        if trains_encoder(self.config):
            return lambda batch: batch
        return EmbeddingCache(self.model, variables, cache_path, len(train_split.source))

    def bytes_on_disk(self, train_split: Subset) -> int:
        """Returns the size of all embeddings."""
        if trains_encoder(self.config):
            return 0
        return 4 * len(train_split.source) * math.prod(self.model.grid) * self.model.embedding_dim

    def evaluate(self, variables: dict[str, Any], eval_split: Subset) -> dict[str, Any]:
        """Measures the mean IoU after clicks and a box; see `evaluate_clicks`."""
        predictor = SamPredictor(self.model, variables)
        indices = tqdm(range(len(eval_split)), "evaluation", unit="image", leave=False)
        return evaluate_clicks(predictor, eval_split, indices)

    def report(
        self,
        workdir: Path,
        variables: dict[str, Any],
        eval_split: Subset,
        evaluation: dict[str, Any],
    ) -> None:
        """Writes the report and prints the evaluation."""
        write_report(workdir, SamPredictor(self.model, variables), eval_split, evaluation)
        print(format_table(evaluation))


def check_config(config: TrainConfig) -> None:
    """Raises ConfigError, naming the field, if a SAM cannot be trained with these values."""
    if not trains_encoder(config) and (config.data.flips or config.data.rot90):
        raise ConfigError(
            "data.flips and data.rot90 must be False if the image encoder is not trained, because "
            f"its embeddings are computed once; got trainable={config.trainable}"
        )
    patch, scale = config.model.patch_size, cast(Interactive, config.objective).loss_scale
    if patch % (UPSCALING * scale):
        raise ConfigError(
            f"model.image_encoder.patch_size must be divisible by {UPSCALING} x "
            f"objective.loss_scale = {UPSCALING * scale}, so that the loss is computed at whole "
            f"pixels; got {patch}"
        )


def trains_encoder(config: TrainConfig) -> bool:
    """Returns True if any part of the image encoder is trained."""
    parts = (part.split("/")[0] for part in config.trainable)
    return not config.trainable or "image_encoder" in parts


def _struct(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
