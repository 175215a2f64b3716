"""The first part of the training of `sam_photo`: a SAM whose encoder starts from DINOv2's ViT-S.

    python -m train configs/sam_photo_64.py --workdir runs/photo_64 --set data.source=coco:DIR

The mask decoder has 64 channels. `sam_photo.py` widens it and trains on.

DIR holds instances.json and images/. Every tenth image is held out. Several folders can be mixed:
`data.source=mix:coco:A*6+coco:B data.held_out=0:50:5` uses A six times, and holds out every fifth
of its first 50 images. The encoder is read from the folder `dinov2-small`, which Hugging Face
distributes as facebook/dinov2-small; `init_from` names another place.

The model sees windows around objects, as `sam_nuclei` does, whose prompt encoder and mask decoder
it starts from. They already know what points and boxes mean, which a decoder of random weights
learns slowly from photographs.

The first stage keeps the encoder as it is. It sees six fixed windows of each image, whose features
are computed once and kept in `feature_cache`, so that a step is several times faster. The neck
begins as a projection onto the principal components of these features (`fit_neck`). Later stages
train the upper half of the encoder too, with new windows in every step and a lower learning rate.
The last stage has eleven rounds.

Cost: 66 minutes for 914 photographs, on two CPU cores that also ran other programs, and a few more
for the features.
"""

import dataclasses

from configs.sam_nuclei import three_rounds
from sam_jax.model.sam import build_sam
from train.config import Data, Optimizer, Stage, TrainConfig

data = Data(
    source="coco:data/coco",
    held_out="0::10",
    flips=True,
    jitter=(0.3, 1.0),
    jitter_unit="object",
    views=6,
)
new_windows = dataclasses.replace(data, views=0)
decoder = ("image_encoder/neck", "prompt_encoder", "mask_decoder")
upper_half = (*decoder, *(f"image_encoder/block_{i:02d}" for i in range(6, 12)))

config = TrainConfig(
    model=build_sam(
        image_size=(256, 256),
        embed_dim=384,
        depth=12,
        num_heads=6,
        global_blocks=tuple(range(12)),
        prompt_dim=64,
        decoder_heads=2,
        decoder_mlp_dim=256,
        iou_hidden_dim=64,
        position_scale=0.5,
    ),
    objective=three_rounds,
    data=data,
    optimizer=Optimizer(
        peak_lr=8e-4,
        warmup_steps=50,
        lr_boundaries=(4000,),
        lr_decay_factor=0.35,
        cosine_start=3500,
        cosine_steps=6700,
        weight_decay=0.05,
        layer_decay=0.65,
        b2=0.95,
    ),
    init_from="image_encoder=dinov2-small,prompt_encoder=sam_nuclei,mask_decoder=sam_nuclei",
    fit_neck=True,
    trainable=decoder,
    batch_size=4,
    num_steps=6700,
    stages=(
        Stage(
            start=4000,
            objective=dataclasses.replace(three_rounds, masks_per_image=6, masks_per_chunk=6),
            data=new_windows,
            trainable=upper_half,
        ),
        Stage(
            start=6200,
            objective=dataclasses.replace(three_rounds, num_clicks=8, num_extra_rounds=2),
            data=new_windows,
            trainable=upper_half,
        ),
    ),
    log_every=50,
    checkpoint_every=200,
)
