"""The masked autoencoder's loss by hand; `tests/reference/test_mae.py` has it against theirs."""

import numpy as np
import pytest

from sam_jax.model.mae import Painted
from train.pretrain import painting_loss


def test_hidden_patches_alone_count_each_by_its_own_scale():
    image = np.zeros((1, 4, 4, 3), np.float32)
    image[0, :2, :2] = np.arange(12).reshape(2, 2, 3)  # patches of 2 x 2 pixels
    image[0, 2:, 2:] = 7 + 100 * np.arange(12).reshape(2, 2, 3)
    scaled = (np.arange(12) - 5.5) / np.sqrt(13)  # of a variance over 11
    patches = np.stack([scaled + 1, np.full(12, 9), np.full(12, 9), scaled + 3])[None]
    hidden = np.array([[True, False, False, True]])
    loss = painting_loss(Painted(patches.astype(np.float32), hidden), image, 2)
    assert loss == pytest.approx((1 + 9) / 2, rel=1e-4)
