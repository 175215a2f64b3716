"""A tiny SAM from scratch on real microscopy: the nuclei of the 2018 Data Science Bowl.

    python -m train configs/sam_tiny_nuclei.py --workdir runs/nuclei --set data.source=labels:DIR

DIR is the public stage1_train folder (one folder an image), or one of label images with an
index.json. Every fifth image is held out.
"""

import dataclasses

from configs.sam_tiny import config as sam_tiny_config
from sam_jax.model.sam import sam_tiny
from train.config import Data

config = dataclasses.replace(
    sam_tiny_config,
    model=sam_tiny(image_size=(256, 256), patch_size=16),
    data=Data(source="labels:data/dsb2018", held_out="0::5", flips=True, turns=True),
)
