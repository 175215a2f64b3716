"""Promptable segmentation: a run of SAM."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sam_jax.data.loader import Loader, Transform
from sam_jax.data.open import Subset
from sam_jax.data.segmentation_batch import Batch, SegmentationTransform
from sam_jax.evaluate.clicks import format_table, measure_objects
from sam_jax.evaluate.object_scores import object_rows, summarize
from sam_jax.model.init import init_variables
from sam_jax.model.sam import UPSCALING, Sam, replace_fields
from sam_jax.predict.predictor import SamPredictor
from sam_jax.predict.tiles_option import resolve_tiles
from train.config import ConfigError, Data, Interactive, TrainConfig
from train.feature_cache import FeatureCache, Part, fingerprint
from train.flops import step_flops
from train.initialization import InitFn, sam_variables
from train.objectives.interactive import InteractiveObjective
from train.report.segmentation import write_report
from train.sharding import Objective

NECK = ["image_encoder", "neck"]
NECK_IMAGES = 48  # that the initial neck is fitted to


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
        data = cast(Data, config.data)
        self.config = config
        self.model = model
        self.trained_model = describe_objects(model, data)
        self.transform: Transform = SegmentationTransform(
            model.image_size,
            objective.masks_per_image,
            data.flips,
            data.rot90,
            data.jitter,
            data.jitter_unit,
        )
        self.decode_size: tuple[int, int] | None = model.image_size if data.half_size_jpeg else None
        self.init_fn: InitFn = functools.partial(init_variables, model, config.seed)
        self.objective: Objective = InteractiveObjective(model, objective)
        self.encoder_depth = model.image_encoder.depth
        self.flops = None if frozen_part(config) else step_flops(model, objective)

    def initial_variables(self, train_split: Subset) -> dict[str, Any]:
        """Returns the variables of `init_from`, or initialized ones; see `sam_variables`."""

        def sample_batch() -> Batch:
            data, seed = cast(Data, self.config.data), self.config.seed
            source, indices = train_split.source, train_split.indices
            loader = Loader(source, indices, self.transform, NECK_IMAGES, seed, data.views)
            return cast(Batch, loader.batch(0)[0])

        return sam_variables(self.config, self.init_fn, sample_batch)

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
        self, get_variables: Callable[[], dict[str, Any]], train_split: Subset, name: str
    ) -> Callable[[Batch], Batch]:
        """Returns a transform that adds the features of a frozen image encoder."""
        part = frozen_part(self.config)
        if part is None:
            return lambda batch: dataclasses.replace(batch, view=None)
        data = cast(Data, self.config.data)
        transform = dataclasses.asdict(cast(SegmentationTransform, self.transform))
        key = {"images": fingerprint(train_split.source), "views": data.views}
        key["decode_size"] = self.decode_size
        key |= {k: v for k, v in transform.items() if k != "masks_per_image"}
        cache = FeatureCache(
            self.model,
            get_variables(),
            part,
            Path(self.config.feature_cache).expanduser(),
            key,
            len(train_split.source),
            data.views,
            name,
        )
        if jax.process_index() == 0:
            print(
                f"features of the frozen encoder: {cache.path}, {cache.num_bytes / 2**30:.1f} GiB "
                "when all are known; later runs reuse them, and the folder may be deleted"
            )
        return cache

    def evaluate(
        self, variables: dict[str, Any], eval_split: Subset
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measures the IoU after clicks and a box; see `evaluate_clicks` and `object_rows`.

        A model that is trained on windows of images is also evaluated on tiles.
        """
        predictor = self._predictor(variables)
        indices = tqdm(
            range(len(eval_split)), "evaluation", unit="image", leave=False, disable=None
        )
        is_jittered = bool(cast(Data, self.config.data).jitter)
        tiles = resolve_tiles(predictor.model, "auto" if is_jittered else None)
        objects, num_bad = measure_objects(predictor, eval_split, indices, tiles)
        return summarize(objects, tiles, num_bad), object_rows(objects)

    def report(
        self,
        workdir: Path,
        variables: dict[str, Any],
        eval_split: Subset,
        evaluation: dict[str, Any],
    ) -> None:
        """Writes the report and prints the evaluation."""
        write_report(workdir, self._predictor(variables), eval_split, evaluation)
        print(format_table(evaluation))

    def _predictor(self, variables: dict[str, Any]) -> SamPredictor:
        return SamPredictor(self.trained_model, variables)


def describe_objects(model: Sam, data: Data) -> Sam:
    """Returns a model that states how large objects were in the windows of its training data."""
    if not data.jitter or data.jitter_unit != "object":
        return model
    low, high = data.jitter
    return replace_fields(model, object_share=(low, high))


def check_config(config: TrainConfig) -> None:
    """Raises ConfigError, naming the field, if a SAM cannot be trained with these values."""
    data = cast(Data, config.data)
    is_random = data.flips or data.rot90 or bool(data.jitter)
    if frozen_part(config) and is_random and not data.views:
        raise ConfigError(
            "data.views must be at least 1 if the image encoder is not trained and data.flips, "
            "data.rot90 or data.jitter is set, because features are computed once per view; got 0 "
            f"and trainable={config.trainable}"
        )
    if data.half_size_jpeg and data.jitter:
        raise ConfigError(
            "data.half_size_jpeg must be False if data.jitter is set, because windows are parts of "
            f"full images; got True and {data.jitter}"
        )
    patch, scale = config.model.patch_size, cast(Interactive, config.objective).loss_scale
    if patch % (UPSCALING * scale):
        raise ConfigError(
            f"model.image_encoder.patch_size must be divisible by {UPSCALING} x "
            f"objective.loss_scale = {UPSCALING * scale}, so that the loss is computed at whole "
            f"pixels; got {patch}"
        )


def frozen_part(config: TrainConfig) -> Part | None:
    """Returns the features that do not change in training: embeddings, or tokens of the trunk."""
    parts = [part for part in config.trainable if part.split("/")[0] == "image_encoder"]
    if not config.trainable or any(part.split("/")[:2] != NECK for part in parts):
        return None
    return "trunk" if parts else "embedding"


def _struct(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
