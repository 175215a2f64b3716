"""Records predictions of segment-anything, so that `make test` needs no torch to compare them.

    python tests/reference/record.py

For each model in MODELS, the script writes two files:

* `tests/data/NAME.safetensors` has the random weights under their official names.
* `tests/data/NAME.npz` has the images, the prompts and the predictions.

The second file has the key `PHOTO/image` for each photo, and these keys for each kind of prompt:

* `PHOTO/KIND/ARGUMENT` is an argument of `predict`.
* `PHOTO/KIND/low_res_logits` 'm lh lw', `PHOTO/KIND/scores` 'm' and `PHOTO/KIND/masks` 'm h w' are
  predictions. A byte of `masks` has eight pixels of a row.

The masks are m = 0 to 3. Mask 0 is the output of multimask_output=False.
"""

from pathlib import Path

import numpy as np
from conftest import (
    PROMPT_KINDS,
    build_reference,
    import_segment_anything,
    make_photo,
    make_prompts,
)

DATA = Path(__file__).parents[1] / "data"
PHOTOS = {"landscape": (43, 70), "portrait": (61, 37)}  # (height, width)
# Kinds of prompts. The second model has fewer because its tests compile another program.
KINDS = {
    "reference_tiny": PROMPT_KINDS,
    "reference_deep": ("one point", "box", "mask and points", "mask and box"),
}
MODELS = {
    # Windows of 3 need padding on a grid of 7.
    "reference_tiny": dict(
        image_size=56,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=2,
        global_blocks=(1,),
        window_size=3,
        prompt_dim=32,
        mask_channels=8,
        decoder_depth=2,
        decoder_mlp_dim=64,
        iou_hidden_dim=24,
    ),
    # Windows of 4 on a grid of 6, photos that are enlarged, and three blocks in the decoder.
    "reference_deep": dict(
        image_size=96,
        patch_size=16,
        embed_dim=24,
        depth=2,
        num_heads=3,
        global_blocks=(1,),
        window_size=4,
        prompt_dim=16,
        mask_channels=4,
        decoder_depth=3,
        decoder_mlp_dim=40,
        iou_hidden_dim=20,
    ),
}


def main():
    import_segment_anything()
    import safetensors.torch

    DATA.mkdir(exist_ok=True)
    for name, sizes in MODELS.items():
        model = build_reference(**sizes)
        safetensors.torch.save_file(model.state_dict(), DATA / f"{name}.safetensors")
        np.savez_compressed(DATA / f"{name}.npz", **record(model, KINDS[name]))
        for path in sorted(DATA.glob(f"{name}.*")):
            print(f"{path}: {path.stat().st_size} bytes")


def record(model, kinds):
    """Returns the arrays for the npz file of a model."""
    from segment_anything import SamPredictor

    arrays = {}
    predictor = SamPredictor(model)
    for photo, size in PHOTOS.items():
        image = arrays[f"{photo}/image"] = make_photo(size)
        predictor.set_image(image)
        prompts = make_prompts(size, 4 * predictor.get_image_embedding().shape[-1])
        for kind in kinds:
            results = [
                predictor.predict(**prompts[kind], multimask_output=m) for m in (False, True)
            ]
            masks, scores, low_res = (np.concatenate(parts) for parts in zip(*results, strict=True))
            predictions = dict(
                low_res_logits=low_res, scores=scores, masks=np.packbits(masks, axis=-1)
            )
            arrays |= {f"{photo}/{kind}/{k}": v for k, v in (prompts[kind] | predictions).items()}
    return arrays


if __name__ == "__main__":
    main()
