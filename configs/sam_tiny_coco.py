"""A tiny SAM from scratch on everyday photographs with COCO annotations.

    python -m train configs/sam_tiny_coco.py --workdir runs/coco --set data.source=coco:DIR

DIR holds instances.json beside images/. Every fifth image is held out. A model of this size learns
what a box and a click are, hardly what objects look like: for that, fine-tune official weights
(see the README).

Cost: about ten minutes on two CPU cores.
"""

import dataclasses

from configs.sam_tiny import config as tiny
from sam_jax.model.sam import sam_tiny
from train.config import Data

config = dataclasses.replace(
    tiny,
    model=sam_tiny(image_size=(128, 128), position_scale=0.7),
    objective=dataclasses.replace(tiny.objective, masks_per_image=2, chunk=2),
    data=Data(source="coco:data/coco", held_out="0::5", flips=True),
    optimizer=dataclasses.replace(tiny.optimizer, drop_at=(1500, 2300, 2800)),
    batch_size=4,
    num_steps=3000,
)
