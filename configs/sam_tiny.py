"""A tiny SAM from scratch on synthetic scenes, which `make train` trains.

    python -m train configs/sam_tiny.py --workdir runs/sam_tiny

Training runs in stages. A single round teaches what points and boxes mean, in few and cheap steps.
Three rounds teach corrections. The paper's eleven rounds teach long sequences of them, while the
learning rate falls. In the first two stages all masks of a scene are used, since drawing a scene
costs more than another mask does.

The predicted IoU of all three masks is supervised, so that the model can choose among them.
Mimetic initialization shortens the start, when masks are empty. b2 is 0.95, because the gradients
of the first steps are far larger than those of later ones. The weight of the focal loss is 4: with
the paper's 20, masks as coarse as these are learned later and end up slightly worse. There is no
drop path, dropout or layer-wise decay.

Cost: less than ten minutes on two CPU cores.
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
    model=sam_tiny(),
    objective=one_round,
    data=Data(source="scenes", held_out="::1000"),
    optimizer=Optimizer(
        peak_lr=1.2e-3,
        warmup_steps=50,
        lr_boundaries=(),
        cosine_start=2500,
        cosine_steps=5600,
        weight_decay=0.05,
        layer_decay=1.0,
        b2=0.95,
    ),
    mimetic_init_scale=2.0,
    batch_size=8,
    num_steps=5600,
    stages=(
        Stage(start=1000, objective=three_rounds),
        Stage(start=3000, objective=eleven_rounds),
    ),
    log_every=50,
    checkpoint_every=1000,
)
