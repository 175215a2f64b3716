"""Segment Anything in JAX: the model, its weights, prediction, evaluation and data.

Predict masks from a click:

    image = sam_jax.read_image("photo.jpg")
    predictor = sam_jax.SamPredictor(*sam_jax.load("sam_photo"))
    predictor.set_image(image)
    masks, scores, logits = predictor.predict(point_coords=[[270, 130]], point_labels=[1])

Public names, by what they are for:

    prediction    SamPredictor, SamAutomaticMaskGenerator, sa1b_preset
    weights       load, save
    images        read_image, draw_masks, draw_overlay, open_source
    models        Sam, build_sam, sam_tiny, sam_vit_b, sam_vit_l, sam_vit_h, replace_fields,
                  init_variables, MaskedAutoencoder
    their arrays  normalize, Prompts, Masks, choose_masks

`sam_jax.segment_anything` has the names of the official package. The guides are in docs/.
"""

from etils import epy as _epy

__version__ = "0.1.0"

# The public names. Each is imported when it is first used, so that `import sam_jax` and
# `sam-jax --help` do not wait for jax.
with _epy.lazy_api_imports(globals()):
    from sam_jax.data.open import open_source as open_source
    from sam_jax.everything.generator import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
    from sam_jax.everything.options import sa1b_preset as sa1b_preset
    from sam_jax.images.read import read_image as read_image
    from sam_jax.model.init import init_variables as init_variables
    from sam_jax.model.mae import MaskedAutoencoder as MaskedAutoencoder
    from sam_jax.model.mask_decoder import Masks as Masks
    from sam_jax.model.mask_decoder import choose_masks as choose_masks
    from sam_jax.model.prompt_encoder import Prompts as Prompts
    from sam_jax.model.sam import Sam as Sam
    from sam_jax.model.sam import build_sam as build_sam
    from sam_jax.model.sam import normalize as normalize
    from sam_jax.model.sam import replace_fields as replace_fields
    from sam_jax.model.sam import sam_tiny as sam_tiny
    from sam_jax.model.sam import sam_vit_b as sam_vit_b
    from sam_jax.model.sam import sam_vit_h as sam_vit_h
    from sam_jax.model.sam import sam_vit_l as sam_vit_l
    from sam_jax.predict.predictor import SamPredictor as SamPredictor
    from sam_jax.visualize.overlay import draw_masks as draw_masks
    from sam_jax.visualize.overlay import draw_overlay as draw_overlay
    from sam_jax.weights.formats import load as load
    from sam_jax.weights.formats import save as save

__all__ = sorted(name for name in globals()["__dir__"]() if not name.startswith("_"))
