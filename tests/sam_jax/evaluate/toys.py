"""Sources of masks whose figures are known, for tests."""

import numpy as np

from sam_jax.data.example import Example
from sam_jax.masks import rle


class Images(list):
    """A source of the masks of images, or of what reading them raises."""

    def __getitem__(self, index):
        value = super().__getitem__(index)
        if isinstance(value, Exception):
            raise value
        return Example(image=np.zeros((1, 1, 3), np.uint8), masks=value)

    def name(self, index):
        return f"{index}.jpg"


def columns(first, last, size=(4, 100)):
    """A mask of the columns from `first` to before `last`."""
    painted = np.zeros(size, bool)
    painted[:, first:last] = True
    return rle.encode(painted)
