"""A small SAM for photographs, whose encoder starts from DINOv2's ViT-S.

    python -m train configs/sam_photo_64.py --workdir runs/photo_64 --set data.source=coco:DIR
    python -m train configs/sam_photo.py --workdir runs/photo --set data.source=coco:DIR

The first command trains a model with a narrow mask decoder, see `sam_photo_64.py`. The second one
doubles the decoder's channels without changing what it computes, and trains on: more layers of the
encoder, windows in which objects are larger, and eleven rounds at the end. The weights in the
package are those after 4000 steps, before the eleven rounds.

Cost: 66 minutes for the first command, on two CPU cores that also ran other programs, and 75
minutes for 4000 steps of the second.
"""

import dataclasses

from configs.sam_photo_64 import config as narrow
from configs.sam_photo_64 import decoder, new_windows, three_rounds
from sam_jax.model.sam import replace_fields
from train.config import Optimizer, Stage

three_rounds = dataclasses.replace(three_rounds, masks_per_image=6, masks_per_chunk=6)
eleven_rounds = dataclasses.replace(
    three_rounds, num_clicks=8, num_extra_rounds=2, masks_per_image=4, masks_per_chunk=4
)

config = dataclasses.replace(
    narrow,
    model=replace_fields(narrow.model, prompt_dim=128, decoder_mlp_dim=512),
    objective=three_rounds,
    data=dataclasses.replace(new_windows, jitter=(0.4, 1.0)),
    init_from="runs/photo_64/weights",
    fit_neck=False,
    trainable=(*decoder, *(f"image_encoder/block_{i:02d}" for i in range(4, 12))),
    optimizer=Optimizer(
        peak_lr=3e-4,
        warmup_steps=100,
        lr_boundaries=(),
        cosine_start=1000,
        cosine_steps=4400,
        weight_decay=0.05,
        layer_decay=0.7,
        b2=0.98,
    ),
    num_steps=4400,
    stages=(Stage(start=4000, objective=eleven_rounds),),
)
