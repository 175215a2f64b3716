"""To paint what is hidden of images: a run of the masked autoencoder."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sam_jax.data.crop_batch import ImageBatch, RandomResizedCrop
from sam_jax.data.open import Subset
from sam_jax.evaluate.reconstruction import evaluate_reconstruction
from sam_jax.model.init import init_variables
from train.config import TrainConfig
from train.flops import reconstruction_flops
from train.objectives.reconstruction import ReconstructionObjective
from train.report.reconstruction import write_reconstruction_report


class MaeTask:
    """See `Task`."""

    needs_masks = False

    def __init__(self, config: TrainConfig) -> None:
        model, data = config.model, config.data
        self.config = config
        self.transform = RandomResizedCrop(
            model.image_size, model.patch_size, data.min_area, data.flips, data.rot90
        )
        smallest = tuple(int(side * data.min_area**-0.5) for side in model.image_size)
        self.decode_size = smallest if data.half_size_jpeg else None
        self.objective = ReconstructionObjective(model, config.objective)
        self.flops = reconstruction_flops(model)
        self.initialize = functools.partial(init_variables, model, config.seed)
        self.encoder_depth = model.depth

    def batch_like(self) -> ImageBatch:
        b = self.config.batch_size
        like = jax.ShapeDtypeStruct
        return ImageBatch(
            image=like((b, *self.config.model.image_size, 3), jnp.uint8),
            image_id=like((b,), jnp.int32),
        )

    def completion(self, variables: dict, path: Path, seen: Subset) -> Callable:
        """Nothing."""
        del variables, path, seen
        return lambda batch: batch

    def bytes_on_disk(self, seen: Subset) -> int:
        del seen
        return 0

    def evaluate(self, variables: dict, held_out: Subset) -> dict:
        """See `evaluate_reconstruction`."""
        indices = tqdm(held_out.indices.tolist(), "evaluation", unit="image", leave=False)
        model, objective = self.config.model, self.config.objective
        return evaluate_reconstruction(
            model, variables["params"], objective.normalized, held_out.source, indices
        )

    def report(self, workdir: Path, variables: dict, held_out: Subset, evaluation: dict) -> None:
        model, objective = self.config.model, self.config.objective
        write_reconstruction_report(
            workdir, model, variables["params"], objective, held_out, evaluation
        )
        print(f"loss of {evaluation['images']} held-out images: {evaluation['loss']:.4f}")
