"""A tiny SAM from scratch on everyday photographs with COCO annotations.

    python -m train configs/sam_tiny_coco.py --workdir runs/coco --set data.source=coco:DIR

DIR holds instances.json and images/. Every fifth image is held out. A model of this size learns
what boxes and clicks mean, but hardly what objects look like. For that, fine-tune the official
weights (see the README). The model is that of `sam_tiny_nuclei`, so it can start from its weights.

Cost: about fifteen minutes on two CPU cores.
"""

import dataclasses

from configs.sam_tiny_nuclei import config as nuclei
from train.config import Data

config = dataclasses.replace(
    nuclei,
    data=Data(source="coco:data/coco", held_out="0::5", flips=True),
    optimizer=dataclasses.replace(nuclei.optimizer, lr_boundaries=(900, 1400, 1660)),
    num_steps=1800,
)
