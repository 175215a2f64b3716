"""A SAM for photographs on a frozen DINOv2 encoder: ViT-S and a mask decoder that is trained.

    python -m train configs/sam_photo.py --workdir runs/photo \
        --set data.source=coco:DIR init_from=image_encoder=DINOV2

DINOV2 is the folder `dinov2-small` of Hugging Face (facebook/dinov2-small). DIR holds
instances.json and images/. Every tenth image is held out.

The encoder is frozen and sees eight fixed windows of each image, around objects. Their features are
computed once and kept in `feature_cache`, also between runs. The neck begins as a projection onto
the principal components of these features (`fit_neck`). Prompt encoder and decoder start at random.
The stages have the objectives of `sam_nuclei`, in the same order.

Only the first steps of this recipe have been run so far, not all of it. A step of its first stage
took about half a second on two CPU cores, features included.
"""

import dataclasses

from configs.sam_nuclei import eleven_rounds, one_round, three_rounds
from sam_jax.model.sam import build_sam
from train.config import Data, Optimizer, Stage, TrainConfig

config = TrainConfig(
    model=build_sam(
        image_size=(256, 256),
        embed_dim=384,
        depth=12,
        num_heads=6,
        global_blocks=tuple(range(12)),
        prompt_dim=128,
        decoder_heads=4,
        decoder_mlp_dim=512,
        iou_hidden_dim=128,
        position_scale=0.5,
    ),
    objective=one_round,
    data=Data(
        source="coco:data/coco",
        held_out="0::10",
        flips=True,
        jitter=(0.3, 0.75),
        jitter_unit="object",
        views=8,
    ),
    optimizer=Optimizer(
        peak_lr=8e-4,
        warmup_steps=50,
        lr_boundaries=(),
        cosine_start=3000,
        cosine_steps=6000,
        weight_decay=0.05,
        layer_decay=1.0,
        b2=0.95,
    ),
    init_from="image_encoder=dinov2-small",
    fit_neck=True,
    mimetic_init_scale=2.0,
    trainable=("image_encoder/neck", "prompt_encoder", "mask_decoder"),
    batch_size=4,
    num_steps=6000,
    stages=(
        Stage(start=1000, objective=dataclasses.replace(three_rounds, masks_per_image=6)),
        Stage(start=3500, objective=eleven_rounds),
        Stage(start=4500, objective=dataclasses.replace(three_rounds, masks_per_image=6)),
    ),
    log_every=50,
    checkpoint_every=500,
)
