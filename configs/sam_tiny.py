"""A tiny SAM from scratch on generated scenes.

python -m train configs/sam_tiny.py --workdir runs/tiny
"""

from sam_jax.model.sam import sam_tiny
from train.config import Data, Interactive, Optimizer, TrainConfig

config = TrainConfig(
    model=sam_tiny(),
    objective=Interactive(masks_per_image=4, chunk=4),
    data=Data(source="scenes", held_out="::1000"),
    optimizer=Optimizer(
        peak_lr=1e-3, warmup_steps=50, drop_at=(400, 550), weight_decay=0.05, layer_decay=1.0
    ),
    batch_size=16,
    num_steps=600,
    log_every=10,
    checkpoint_every=100,
)
