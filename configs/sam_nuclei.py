"""A small SAM from scratch on microscopy images: the nuclei of the 2018 Data Science Bowl.

    python -m train configs/sam_nuclei.py --workdir runs/nuclei --set data.source=labels:DIR

DIR is the public stage1_train folder (one folder per image), or a folder of label maps with an
index.json. Every fifth image is held out.

Nuclei are small. The model is therefore trained on windows around them, in which the longer side of
a nucleus takes a quarter to three quarters of the input. The weights state this as `object_share`,
so that prediction is in tiles, which show nuclei at the same size.

Training runs in stages. A single round teaches what points and boxes mean, in few and cheap steps.
Three rounds teach corrections, and eleven rounds long sequences of them. The last stage lets the
learning rate fall. The predicted IoU of all three masks is supervised, so that the model can choose
among them. Mimetic initialization shortens the start, when masks are empty.

Cost: 30 minutes, evaluation included, on two CPU cores that also ran other programs.
"""

import dataclasses

from sam_jax.model.sam import sam_tiny
from train.config import Data, Interactive, Optimizer, Stage, TrainConfig

one_round = Interactive(
    num_clicks=0,
    num_extra_rounds=0,
    focal=4.0,
    iou_supervision="all",
    masks_per_image=4,
    masks_per_chunk=4,
)
three_rounds = dataclasses.replace(one_round, num_clicks=2)
eleven_rounds = dataclasses.replace(
    one_round, num_clicks=8, num_extra_rounds=2, masks_per_image=2, masks_per_chunk=2
)

config = TrainConfig(
    model=sam_tiny(
        image_size=(128, 128),
        embed_dim=128,
        depth=4,
        num_heads=4,
        window_size=8,
        global_blocks=(1, 3),
        position_scale=0.5,
    ),
    objective=one_round,
    data=Data(
        source="labels:data/dsb2018",
        held_out="0::5",
        flips=True,
        rot90=True,
        jitter=(0.25, 0.75),
        jitter_unit="object",
    ),
    optimizer=Optimizer(
        peak_lr=1.2e-3,
        warmup_steps=50,
        lr_boundaries=(),
        cosine_start=1800,
        cosine_steps=3600,
        weight_decay=0.05,
        layer_decay=1.0,
        b2=0.95,
    ),
    mimetic_init_scale=2.0,
    batch_size=4,
    num_steps=3600,
    stages=(
        Stage(start=400, objective=three_rounds, batch_size=8),
        Stage(start=1800, objective=eleven_rounds, batch_size=8),
        Stage(start=2400, objective=three_rounds, batch_size=8),
    ),
    log_every=50,
    checkpoint_every=600,
)
