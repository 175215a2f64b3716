"""A tiny SAM from scratch on generated scenes, with all eleven rounds: what `make train` runs.

    python -m train configs/sam_tiny.py --workdir runs/sam_tiny

Cost: under ten minutes on two CPU cores. The recipe is the paper's but for its size: fewer and
smaller steps at a higher rate, more drops of it, no drop path, dropout or layer-wise decay, a
second moment that forgets sooner, as the first steps' gradients are far larger than the rest, and a
focal loss of weight 4: with the paper's 20, masks this coarse learn later and end a little worse.
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
