"""Tests of the base class for sources of images in files."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.decode_masks import check_masks
from sam_jax.data.example import BadSample, Source
from sam_jax.data.sources.base import FileSource
from sam_jax.masks import rle

SIZE = (40, 60)


@dataclasses.dataclass(frozen=True)
class ImagesOnly(FileSource):
    """The smallest possible source."""

    paths: tuple[str, ...]

    def __len__(self):
        return len(self.paths)

    def image_path(self, index):
        return self.paths[index]


@dataclasses.dataclass(frozen=True)
class WithMasks(ImagesOnly):
    size: tuple[int, int] = SIZE

    def read_masks(self, index):
        masks = [rle.encode(np.ones(self.size, bool))] * (index + 1)
        return check_masks(masks, self.size)


@pytest.fixture
def paths(tmp_path):
    for number, name in enumerate("ab"):
        Image.new("RGB", SIZE[::-1], (number, 2, 3)).save(tmp_path / f"{name}.jpg", quality=100)
    return tuple(str(tmp_path / f"{name}.jpg") for name in "ab")


def test_a_source_of_images_without_masks(paths):
    source = ImagesOnly(paths)
    assert isinstance(source, Source)
    assert [source.name(i) for i in range(len(source))] == list(paths)
    for i, path in enumerate(paths):
        example = source[i]
        np.testing.assert_array_equal(example.image, np.asarray(Image.open(path)))
        np.testing.assert_array_equal(example.image, source.image(i))
        assert example.masks == []
        with open(path, "rb") as file:
            assert source.encoded(i) == file.read()


@pytest.mark.parametrize("index", [-1, 2])
@pytest.mark.parametrize("read", ["__getitem__", "image", "encoded"])
def test_an_index_out_of_range_is_an_error(paths, read, index):
    with pytest.raises(IndexError, match=f"index must be 0 to 1; got {index}"):
        getattr(WithMasks(paths), read)(index)


def test_masks_keep_the_original_size_when_images_are_decoded_smaller(paths):
    source = WithMasks(paths, decode_size=(10, 15))
    assert source[1].image.shape == source.image(1).shape == (10, 15, 3)
    assert [mask["size"] for mask in source[1].masks] == [list(SIZE)] * 2
    assert dataclasses.replace(source, decode_size=None)[1].image.shape == (*SIZE, 3)


@pytest.mark.parametrize("decode_size", [None, (10, 15)])
def test_an_image_must_have_the_size_of_its_masks(paths, decode_size):
    source = WithMasks(paths, size=(20, 30), decode_size=decode_size)
    with pytest.raises(BadSample, match="the image is 40 x 60, its masks are 20 x 30"):
        source[0]
    assert source.image(0).ndim == 3, "the image alone can be used"


def test_a_missing_file_is_a_bad_sample(paths):
    os.remove(paths[0])
    with pytest.raises(BadSample, match="missing file: there is no file"):
        ImagesOnly(paths)[0]
