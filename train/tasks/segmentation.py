"""To segment what prompts mean: a run of SAM."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sam_jax.data.open import Subset
from sam_jax.data.segmentation_batch import Batch, SegmentationTransform
from sam_jax.evaluate.clicks import evaluate_clicks, format_table
from sam_jax.model.init import init_variables
from sam_jax.predict.predictor import SamPredictor
from train.config import TrainConfig, learns_encoder
from train.embedding_cache import Embeddings
from train.flops import step_flops
from train.objectives.interactive import InteractiveObjective
from train.report.segmentation import write_report


class SamTask:
    """See `Task`."""

    needs_masks = True

    def __init__(self, config: TrainConfig) -> None:
        model, data, objective = config.model, config.data, config.objective
        self.config = config
        self.transform = SegmentationTransform(
            model.image_size, objective.masks_per_image, data.flips, data.rot90
        )
        self.decode_size = model.image_size if data.half_size_jpeg else None
        self.objective = InteractiveObjective(model, objective)
        self.flops = step_flops(model, objective) if learns_encoder(config) else None
        self.initialize = functools.partial(init_variables, model, config.seed)
        self.encoder_depth = model.image_encoder.depth

    def batch_like(self) -> Batch:
        b, n = self.config.batch_size, self.config.objective.masks_per_image
        h, w = self.config.model.image_size
        like = jax.ShapeDtypeStruct
        return Batch(
            image=like((b, h, w, 3), jnp.uint8),
            size=like((b, 2), jnp.int32),
            image_id=like((b,), jnp.int32),
            masks=like((b, n, h, -(-w // 8)), jnp.uint8),
            mask_id=like((b, n), jnp.int32),
            valid=like((b, n), bool),
        )

    def completion(self, variables: dict, path: Path, seen: Subset) -> Callable:
        """A frozen encoder's embeddings are added."""
        if learns_encoder(self.config):
            return lambda batch: batch
        return Embeddings(self.config.model, variables, path, len(seen.source))

    def bytes_on_disk(self, seen: Subset) -> int:
        if learns_encoder(self.config):
            return 0
        model = self.config.model
        return 4 * len(seen.source) * math.prod(model.grid) * model.embedding_dim

    def evaluate(self, variables: dict, held_out: Subset) -> dict:
        """See `evaluate_clicks`."""
        predictor = SamPredictor(self.config.model, variables)
        indices = tqdm(range(len(held_out)), "evaluation", unit="image", leave=False)
        return evaluate_clicks(predictor, held_out, indices)

    def report(self, workdir: Path, variables: dict, held_out: Subset, evaluation: dict) -> None:
        write_report(workdir, SamPredictor(self.config.model, variables), held_out, evaluation)
        print(format_table(evaluation))
