"""A tiny SAM from scratch on synthetic scenes, with all eleven rounds, which `make train` trains.

    python -m train configs/sam_tiny.py --workdir runs/sam_tiny

The recipe is the paper's at a smaller size. There are fewer and smaller steps at a higher learning
rate, which drops more often. There is no drop path, dropout or layer-wise decay. b2 is 0.95,
because the gradients of the first steps are far larger than those of later ones. The weight of the
focal loss is 4: with the paper's 20, masks as coarse as these are learnt later and end up slightly
worse.

Cost: less than ten minutes on two CPU cores.
"""

from sam_jax.model.sam import sam_tiny
from train.config import Data, Interactive, Optimizer, TrainConfig

config = TrainConfig(
    model=sam_tiny(),
    objective=Interactive(focal=4.0, masks_per_image=1, masks_per_chunk=1),
    data=Data(source="scenes", held_out="::1000"),
    optimizer=Optimizer(
        peak_lr=1.2e-3,
        warmup_steps=1,
        lr_boundaries=(2500, 3900, 4600),
        lr_decay_factor=0.35,
        weight_decay=0.05,
        layer_decay=1.0,
        b2=0.95,
    ),
    batch_size=8,
    num_steps=5000,
    log_every=50,
    checkpoint_every=1000,
)
