"""A masked autoencoder for ViT-L on ImageNet. Source: He et al. 2022, facebookresearch/mae.

    python -m train configs/mae_vit_l.py --workdir runs/mae_l --set data.source=images:DIR

The config of configs/mae_vit_b.py with a larger model.
"""

import dataclasses

from configs.mae_vit_b import config as mae_vit_b
from sam_jax.model.mae import mae_vit_l

config = dataclasses.replace(mae_vit_b, model=mae_vit_l(dtype="bfloat16"))
