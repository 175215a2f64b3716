"""A tiny masked autoencoder on microscopy images, from which `sam_tiny_nuclei` can start.

    python -m train configs/mae_tiny_nuclei.py --workdir runs/mae --set data.source=labels:DIR

DIR is the folder that configs/sam_tiny_nuclei.py uses. Its masks are not read. The patch size is
that of `sam_tiny_nuclei`, and crops are enlarged about as much as its images. The autoencoder
predicts colors that are not normalized per patch: it is too small to learn what a nucleus looks
like within a patch, but it does learn which patches are bright and which are dark.

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
