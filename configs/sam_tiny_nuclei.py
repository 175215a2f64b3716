"""A tiny SAM from scratch on real microscopy: the nuclei of the 2018 Data Science Bowl.

    python -m train configs/sam_tiny_nuclei.py --workdir runs/nuclei --set data.source=labels:DIR

DIR is the public stage1_train folder (one folder an image), or one of label images with an
index.json. Every fifth image is held out.

Cost: 21 minutes on two CPU cores. Nuclei are small: the frame has three times the tokens a side of
`sam_tiny` and finer positions, the loss sees halves of the decoder's pixels, and attention starts
out matched, without which masks stay empty three times as long. Still finer positions find a first
click sooner and are worse at boxes.
"""

import dataclasses

from configs.sam_tiny import config as tiny
from sam_jax.model.sam import sam_tiny
from train.config import Data

config = dataclasses.replace(
    tiny,
    model=sam_tiny(
        image_size=(384, 384),
        patch_size=16,
        window_size=12,
        global_blocks=(1,),
        position_scale=1.0,
    ),
    objective=dataclasses.replace(
        tiny.objective, masks_per_image=2, masks_per_chunk=2, loss_scale=2
    ),
    data=Data(source="labels:data/dsb2018", held_out="0::5", flips=True, rot90=True),
    optimizer=dataclasses.replace(tiny.optimizer, lr_boundaries=(1200, 1870, 2210)),
    mimetic_init_scale=2.0,
    batch_size=4,
    num_steps=2400,
)
