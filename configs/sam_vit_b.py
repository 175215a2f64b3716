"""SAM ViT-B on SA-1B, end to end. Source: Kirillov et al. 2023, appendix A.

    python -m train configs/sam_vit_b.py --workdir runs/sam_b --set init_from=mae_vit_b/

The paper does not say when the learning rate of this size drops. Here it drops at the same
fractions of the run as for ViT-H, after 2/3 and 26/27 of the steps.

Cost: 180,000 steps of 128 images. Small version: configs/sam_tiny.py.
"""

import dataclasses

from configs.sam_vit_h import config as sam_vit_h
from sam_jax.model.sam import sam_vit_b
from train.config import Optimizer

config = dataclasses.replace(
    sam_vit_h,
    model=sam_vit_b(drop_path=0.6, dropout=0.1, remat="blocks", dtype="bfloat16"),
    optimizer=Optimizer(
        peak_lr=8e-4,
        warmup_steps=250,
        lr_boundaries=(120_000, 173_333),
        weight_decay=0.1,
        layer_decay=0.6,
    ),
    batch_size=128,
    num_steps=180_000,
    fsdp=1,
)
