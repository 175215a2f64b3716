"""Segment Anything in JAX: the model, its weights, prediction, and what it learns from."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sam_jax.everything.generator import SamAutomaticMaskGenerator
    from sam_jax.everything.options import sa1b_preset
    from sam_jax.model.init import init_variables
    from sam_jax.model.mask_decoder import Masks, choose_masks
    from sam_jax.model.prompt_encoder import Prompts
    from sam_jax.model.sam import (
        Sam,
        build_sam,
        normalize,
        replace_fields,
        sam_tiny,
        sam_vit_b,
        sam_vit_h,
        sam_vit_l,
    )
    from sam_jax.predict.predictor import SamPredictor
    from sam_jax.weights.formats import load, save

__version__ = "0.1.0"

# Imported when first used: `import sam_jax` and `sam-jax --help` need not wait for jax.
_HOMES = {
    "Masks": "sam_jax.model.mask_decoder",
    "Prompts": "sam_jax.model.prompt_encoder",
    "Sam": "sam_jax.model.sam",
    "SamAutomaticMaskGenerator": "sam_jax.everything.generator",
    "SamPredictor": "sam_jax.predict.predictor",
    "build_sam": "sam_jax.model.sam",
    "choose_masks": "sam_jax.model.mask_decoder",
    "init_variables": "sam_jax.model.init",
    "load": "sam_jax.weights.formats",
    "normalize": "sam_jax.model.sam",
    "replace_fields": "sam_jax.model.sam",
    "sa1b_preset": "sam_jax.everything.options",
    "sam_tiny": "sam_jax.model.sam",
    "sam_vit_b": "sam_jax.model.sam",
    "sam_vit_h": "sam_jax.model.sam",
    "sam_vit_l": "sam_jax.model.sam",
    "save": "sam_jax.weights.formats",
}

__all__ = [
    "Masks",
    "Prompts",
    "Sam",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "build_sam",
    "choose_masks",
    "init_variables",
    "load",
    "normalize",
    "replace_fields",
    "sa1b_preset",
    "sam_tiny",
    "sam_vit_b",
    "sam_vit_h",
    "sam_vit_l",
    "save",
]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return __all__
