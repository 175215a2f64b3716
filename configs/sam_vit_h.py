"""SAM ViT-H on SA-1B, end to end. Source: Kirillov et al. 2023, appendix A.

    python -m train configs/sam_vit_h.py --workdir runs/sam_h --set init_from=mae_vit_h/

As in the paper, the image encoder is pre-trained as a masked autoencoder. `init_from` is the path
of the autoencoder's weights.

Cost: 90,000 steps of 256 images. The paper reports 68 hours on 256 A100 GPUs. Small version:
configs/sam_tiny.py.
"""

from sam_jax.model.sam import sam_vit_h
from train.config import Data, Interactive, Optimizer, TrainConfig

config = TrainConfig(
    model=sam_vit_h(drop_path=0.4, dropout=0.1, remat="blocks", dtype="bfloat16"),
    objective=Interactive(),
    data=Data(source="sa1b:data/sa1b", held_out="0:1000", workers=8),
    optimizer=Optimizer(
        peak_lr=8e-4,
        warmup_steps=250,
        lr_boundaries=(60_000, 86_666),
        weight_decay=0.1,
        layer_decay=0.8,
    ),
    batch_size=256,
    num_steps=90_000,
    fsdp=8,
)
