"""A masked autoencoder for ViT-B on ImageNet. Source: He et al. 2022, facebookresearch/mae.

    python -m train configs/mae_vit_b.py --workdir runs/mae_b --set data.source=images:DIR

DIR is a folder of images, such as ImageNet's train; `tfds:imagenet2012@FOLDER` works too. A SAM
starts from the encoder with `--set init_from=runs/mae_b/weights`. The learning rate is 1.5e-4 per
256 images, after a warm-up of 40 epochs.

Cost: 1600 epochs of 1.28 million images, see the README. Small version: configs/mae_tiny.py.
"""

from sam_jax.model.mae import mae_vit_b
from train.config import Optimizer, PretrainData, Reconstruction, TrainConfig

config = TrainConfig(
    model=mae_vit_b(dtype="bfloat16"),
    objective=Reconstruction(),
    data=PretrainData(source="tfds:imagenet2012", held_out="::1000"),
    optimizer=Optimizer(
        peak_lr=2.4e-3,
        warmup_steps=12_500,
        lr_boundaries=(),
        cosine_steps=500_000,
        weight_decay=0.05,
        layer_decay=1.0,
        b1=0.9,
        b2=0.95,
    ),
    batch_size=4096,
    num_steps=500_000,
    log_every=100,
    checkpoint_every=5000,
    evaluate_every=50_000,
)
