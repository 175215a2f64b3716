"""A masked autoencoder for ViT-H on ImageNet. Source: He et al. 2022, facebookresearch/mae.

    python -m train configs/mae_vit_h.py --workdir runs/mae_h --set data.source=images:DIR

The config of configs/mae_vit_b.py with a larger model, whose state is sharded over eight devices.
"""

import dataclasses

from configs.mae_vit_b import config as mae_vit_b
from sam_jax.model.mae import mae_vit_h

config = dataclasses.replace(mae_vit_b, model=mae_vit_h(dtype="bfloat16"), fsdp=8)
