"""Features of frozen encoders on disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from sam_jax.data.loader import Loader
from sam_jax.data.open import open_source
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.masks import rle
from sam_jax.model.init import init_variables
from sam_jax.model.sam import sam_tiny
from sam_jax.predict import encode
from train import feature_cache
from train.config import ConfigError
from train.feature_cache import FeatureCache

MODEL = sam_tiny(image_size=(32, 32), embed_dim=32, depth=1, global_blocks=(0,))
COUNT, VIEWS = 40, 2


@pytest.fixture(scope="module")
def variables():
    return init_variables(MODEL, 0)


@pytest.fixture
def loader():
    transform = SegmentationTransform((32, 32), 1, jitter=(0.3, 0.6), jitter_unit="object")
    source = open_source("scenes:48x48")
    return Loader(source, np.arange(COUNT), transform, 4, seed=0, views=VIEWS)


@pytest.fixture
def encoded(monkeypatch):
    """Lists the numbers of images that are encoded at once."""
    counts = []

    def encode_images(model, variables, images, sizes, method):
        counts.append(len(images))
        return encode.encode_images(model, variables, images, sizes, method)

    monkeypatch.setattr(feature_cache, "encode_images", encode_images)
    return counts


def open_cache(folder, variables, part="trunk", **key):
    return FeatureCache(MODEL, variables, part, folder, key, COUNT, VIEWS, "host")


@pytest.mark.parametrize(("part", "atol"), [("trunk", 4e-3), ("embedding", 1e-6)])
def test_features_are_those_of_the_images(tmp_path, variables, loader, part, atol):
    cache = open_cache(tmp_path, variables, part)
    method = {"trunk": "encode_trunk", "embedding": "encode"}[part]
    for step in range(2):
        batch, _ = loader.batch(step)
        expected = encode.encode_images(MODEL, variables, batch.image, batch.size, method)
        for _ in range(2):  # computed, and then read
            found = cache(batch)
            assert found.image is None
            np.testing.assert_allclose(getattr(found, part), expected, atol=atol, rtol=2e-3)


def test_a_second_run_reads_what_the_first_one_computed(tmp_path, variables, loader, encoded):
    batch, _ = loader.batch(0)
    first = open_cache(tmp_path, variables)(batch)
    second = open_cache(tmp_path, variables)(batch)
    assert sum(encoded) == 4
    np.testing.assert_array_equal(first.trunk, second.trunk)


@pytest.mark.parametrize(("batch_size", "num_new", "expected"), [(4, 1, [1]), (32, 5, [4, 4])])
def test_only_new_images_are_encoded_in_chunks_of_one_size(
    tmp_path, variables, loader, encoded, batch_size, num_new, expected
):
    batch, _ = dataclasses.replace(loader, batch_size=batch_size).batch(0)
    cache = open_cache(tmp_path, variables)
    features = np.array(cache(batch).trunk)
    row = batch.image_id * VIEWS + batch.view
    cache.is_known[row[-num_new:]] = False
    cache.features[row[-num_new:]] = 0
    encoded.clear()
    np.testing.assert_array_equal(cache(batch).trunk, features)
    assert encoded == expected


def test_other_weights_views_or_settings_have_other_features(tmp_path, variables, loader, encoded):
    batch, _ = loader.batch(0)
    open_cache(tmp_path, variables)(batch)
    open_cache(tmp_path, init_variables(MODEL, 1))(batch)
    open_cache(tmp_path, variables, flips=True)(batch)
    assert sum(encoded) == 12
    open_cache(tmp_path, variables)(dataclasses.replace(batch, view=1 - batch.view))
    assert sum(encoded) == 16


def test_the_neck_does_not_change_features_of_the_trunk(tmp_path, variables, loader, encoded):
    batch, _ = loader.batch(0)
    open_cache(tmp_path, variables)(batch)
    encoder = variables["params"]["image_encoder"]
    neck = jax.tree.map(lambda x: x + 1, encoder["neck"])
    changed = {"params": {"image_encoder": encoder | {"neck": neck}}}
    open_cache(tmp_path, changed)(batch)
    assert sum(encoded) == 4


def test_a_row_that_was_being_written_is_computed_again(tmp_path, variables, loader, encoded):
    batch, _ = loader.batch(0)
    cache = open_cache(tmp_path, variables)
    expected = cache(batch).trunk
    cache.is_known[:] = False  # as after a kill between the two writes
    cache.features[:] = 7
    np.testing.assert_array_equal(open_cache(tmp_path, variables)(batch).trunk, expected)


def test_a_truncated_file_is_replaced(tmp_path, variables, loader):
    batch, _ = loader.batch(0)
    cache = open_cache(tmp_path, variables)
    expected = cache(batch).trunk
    with open(cache.path / "trunk_host.bin", "r+b") as file:
        file.truncate(400)
    np.testing.assert_array_equal(open_cache(tmp_path, variables)(batch).trunk, expected)


def test_two_runs_that_create_the_same_file_do_not_mix_their_rows(tmp_path, variables, loader):
    batch, _ = loader.batch(0)
    first = open_cache(tmp_path, variables)
    expected = first(batch).trunk
    feature_cache.create_file(
        first.path / "trunk_host.bin", first.is_known.size + first.features.nbytes
    )
    second = open_cache(tmp_path, variables)
    assert not second.is_known.any()
    np.testing.assert_array_equal(first(batch).trunk, expected)
    np.testing.assert_array_equal(second(batch).trunk, expected)


def test_the_fingerprint_depends_on_images_and_masks(tmp_path):
    def write(color, box):
        folder = tmp_path / f"{color}{box}"
        (folder / "images").mkdir(parents=True)
        Image.new("RGB", (20, 20), (color, 0, 0)).save(folder / "images" / "a.png")
        mask = np.zeros((20, 20), bool)
        mask[box : box + 5, 3:9] = True
        annotation = {"image_id": 1, "segmentation": rle.encode(mask)}
        image = {"id": 1, "file_name": "a.png", "height": 20, "width": 20}
        content = {"images": [image], "annotations": [annotation]}
        (folder / "instances.json").write_text(json.dumps(content))
        return feature_cache.fingerprint(open_source(f"coco:{folder}"))

    assert len({write(1, 2), write(2, 2), write(1, 3)}) == 3


def test_a_full_disk_is_an_error(tmp_path, variables, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match=r"feature_cache=.*needs 0 MiB.*fewer data\.views"):
        open_cache(tmp_path, variables)
