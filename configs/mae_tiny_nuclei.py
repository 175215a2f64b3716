"""A tiny masked autoencoder of real microscopy, which `sam_tiny_nuclei` can begin with.

    python -m train configs/mae_tiny_nuclei.py --workdir runs/mae --set data.source=labels:DIR

DIR is that of configs/sam_tiny_nuclei.py, whose patches it has; no mask is looked at. A crop is
enlarged about as much as images are there. Plain colours are painted: what a nucleus looks like
within a patch is more than so small an autoencoder learns, where bright and dark are, it does.
Cost: five minutes on two CPU cores.
"""

import dataclasses

from configs.mae_tiny import config as tiny
from sam_jax.model.mae import mae_tiny
from train.config import PretrainData, Reconstruction

config = dataclasses.replace(
    tiny,
    model=mae_tiny(image_size=(160, 160), patch_size=16),
    objective=Reconstruction(normalized=False),
    data=PretrainData(source="labels:data/dsb2018", held_out="0::5", min_area=0.1, rot90=True),
    optimizer=dataclasses.replace(tiny.optimizer, peak_lr=3e-3, cosine_steps=1200),
    batch_size=32,
    num_steps=1200,
)
