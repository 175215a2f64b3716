"""Pre-training: a run of the masked autoencoder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sam_jax.data.crop_batch import ImageBatch, RandomResizedCrop
from sam_jax.data.loader import Transform
from sam_jax.data.open import Subset
from sam_jax.evaluate.reconstruction import evaluate_reconstruction
from sam_jax.model.init import init_variables
from sam_jax.model.mae import MaskedAutoencoder
from train.config import ConfigError, PretrainData, Reconstruction, TrainConfig
from train.flops import reconstruction_flops
from train.initialization import InitFn, autoencoder_variables
from train.objectives.reconstruction import ReconstructionObjective
from train.report.reconstruction import write_reconstruction_report
from train.sharding import Objective


class ReconstructionTask:
    """A run of the masked autoencoder; see `train.tasks.base.Task`."""

    needs_masks = False

    def __init__(self, config: TrainConfig) -> None:
        """Makes the task.

        Raises:
          ConfigError: If an autoencoder cannot be trained with the values of some fields.
        """
        if config.mimetic_init_scale:
            raise ConfigError(
                "mimetic_init_scale must be 0, because a masked autoencoder has no prompts; got "
                f"{config.mimetic_init_scale}"
            )
        if config.fit_neck:
            raise ConfigError("fit_neck must be False, because a masked autoencoder has no neck")
        # The table of tasks says which classes these are.
        model, data = cast(MaskedAutoencoder, config.model), cast(PretrainData, config.data)
        self.config = config
        self.model = model
        self.trained_model: MaskedAutoencoder = model
        self.objective_config = cast(Reconstruction, config.objective)
        self.transform: Transform = RandomResizedCrop(
            model.image_size, model.patch_size, data.min_area, data.flips, data.rot90
        )
        height, width = (int(side * data.min_area**-0.5) for side in model.image_size)
        self.decode_size: tuple[int, int] | None = (height, width) if data.half_size_jpeg else None
        self.init_fn: InitFn = functools.partial(init_variables, model, config.seed)
        self.objective: Objective = ReconstructionObjective(model, self.objective_config)
        self.encoder_depth = model.depth
        self.flops: float | None = reconstruction_flops(model)

    def initial_variables(self, train_split: Subset) -> dict[str, Any]:
        """Returns the variables of `init_from`, or initialized ones."""
        del train_split
        return autoencoder_variables(self.config, self.init_fn)

    def batch_spec(self) -> ImageBatch:
        """Returns the shapes of a batch of all hosts."""
        b = self.config.batch_size
        return ImageBatch(
            image=_struct((b, *self.model.image_size, 3), jnp.uint8),
            image_id=_struct((b,), jnp.int32),
        )

    def batch_transform(
        self, get_variables: Callable[[], dict[str, Any]], train_split: Subset, name: str
    ) -> Callable[[ImageBatch], ImageBatch]:
        """Returns the identity."""
        del get_variables, train_split, name
        return lambda batch: batch

    def evaluate(
        self, variables: dict[str, Any], eval_split: Subset
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Computes the mean loss; see `evaluate_reconstruction`."""
        indices = tqdm(
            eval_split.indices.tolist(), "evaluation", unit="image", leave=False, disable=None
        )
        normalized = self.objective_config.normalized
        evaluation = evaluate_reconstruction(
            self.model, variables["params"], normalized, eval_split.source, indices
        )
        return evaluation, []

    def report(
        self,
        workdir: Path,
        variables: dict[str, Any],
        eval_split: Subset,
        evaluation: dict[str, Any],
    ) -> None:
        """Writes the report and prints the evaluation."""
        objective, params = self.objective_config, variables["params"]
        write_reconstruction_report(workdir, self.model, params, objective, eval_split, evaluation)
        print(f"loss of {evaluation['images']} held-out images: {evaluation['loss']:.4f}")


def _struct(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
