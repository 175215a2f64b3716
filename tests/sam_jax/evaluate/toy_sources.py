"""Sources of masks with known measurements, for tests."""

import numpy as np

from sam_jax.data.example import Example
from sam_jax.masks import rle


class ToySource(list):
    """A source of the given examples, or masks of images, or errors that reading raises."""

    def __getitem__(self, index):
        value = super().__getitem__(index)
        if isinstance(value, Exception):
            raise value
        if isinstance(value, Example):
            return value
        return Example(image=np.zeros((1, 1, 3), np.uint8), masks=value)

    def image(self, index):
        return self[index].image

    def encoded(self, index):
        return None

    def name(self, index):
        return f"{index}.jpg"


def columns(start, stop, size=(4, 100)):
    """Returns a mask of the columns from `start` to before `stop`."""
    mask = np.zeros(size, bool)
    mask[:, start:stop] = True
    return rle.encode(mask)
