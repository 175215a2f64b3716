"""A tiny masked autoencoder on synthetic scenes, which `make pretrain` trains.

    python -m train configs/mae_tiny.py --workdir runs/mae_tiny

`sam_tiny` can start from its encoder: `--set init_from=runs/mae_tiny/weights`. The recipe is that
of `mae_vit_b`, with a smaller model, fewer and smaller steps, and a different learning rate.

Cost: less than five minutes on two CPU cores.
"""

from sam_jax.model.mae import mae_tiny
from train.config import Optimizer, PretrainData, Reconstruction, TrainConfig

config = TrainConfig(
    model=mae_tiny(),
    objective=Reconstruction(),
    data=PretrainData(source="scenes", held_out="::500"),
    optimizer=Optimizer(
        peak_lr=1.5e-3,
        warmup_steps=100,
        lr_boundaries=(),
        cosine_steps=1500,
        weight_decay=0.05,
        layer_decay=1.0,
        b2=0.95,
    ),
    batch_size=32,
    num_steps=1500,
    log_every=50,
    checkpoint_every=1000,
)
