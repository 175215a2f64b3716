"""Mixtures of sources."""

import dataclasses

import numpy as np
import pytest

from configs.sam_tiny import config as tiny
from sam_jax.data.example import SourceError
from sam_jax.data.open import open_source, with_full_size
from sam_jax.data.sources.base import FileSource
from sam_jax.data.sources.mixed import Mixture
from tests.sam_jax.data.test_open import write_coco, write_labels
from train.config import Data
from train.data import open_data
from train.tasks.base import make_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_coco(folder / "coco+x")
    write_labels(folder / "labels")
    return folder


def test_examples_are_those_of_the_parts_in_order(folder):
    mixture = open_source(f"mix:coco:{folder}/coco+x*2+labels:{folder}/labels")
    assert len(mixture) == 3
    coco = open_source(f"coco:{folder}/coco+x")
    labels = open_source(f"labels:{folder}/labels")
    for index, source in enumerate((coco, coco, labels)):
        assert mixture.name(index) == source.name(0)
        np.testing.assert_array_equal(mixture.image(index), source.image(0))
        assert mixture[index].masks == source[0].masks
        assert mixture.encoded(index) == source.encoded(0)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            mixture[index]


def test_parts_are_decoded_for_a_size_and_in_full(folder):
    mixture = open_source(f"mix:coco:{folder}/coco+x+labels:{folder}/labels", decode_size=(40, 40))
    assert mixture.image(0).shape == (40, 60, 3)
    full = with_full_size(mixture)
    assert isinstance(full, Mixture)
    assert full.image(0).shape == (160, 240, 3)
    assert all(isinstance(source, FileSource) for source in full.sources)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mix:", "names no location"),
        ("mix:mix:scenes", "cannot contain a mixture"),
        ("mix:scenes+coco:/nowhere", "/nowhere"),
        ("mix:photos:x", "of no known kind"),
    ],
)
def test_bad_mixtures_are_errors(text, message):
    with pytest.raises(SourceError, match=message):
        open_source(text)


def test_generated_scenes_mix_too():
    mixture = open_source("mix:scenes+scenes:48x64*2")
    sizes = [len(source) for source in mixture.sources]
    assert len(mixture) == sum(sizes)
    assert len(sizes) == 3
    assert mixture.image(len(mixture) - 1).shape == (48, 64, 3)


def test_copies_of_held_out_images_are_not_trained_on():
    config = dataclasses.replace(tiny, data=Data(source="mix:scenes*2", held_out=":100"))
    train_split, eval_split = open_data(config, make_task(config))
    names = {eval_split.name(i) for i in range(len(eval_split))}
    assert len(names) == 100
    assert len(train_split) == len(train_split.source) - 200
    assert not names & {train_split.name(i) for i in range(0, len(train_split), 97)}
