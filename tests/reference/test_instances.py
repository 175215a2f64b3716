"""Compares the annotations that pycocotools reads from `instances.json` with their RLEs."""

import numpy as np
import pytest

from sam_jax.data.open import open_source
from sam_jax.engine.automatic import label_images
from sam_jax.engine.instances import write_instances
from sam_jax.masks import rle
from tests.sam_jax.engine.bright import generate

coco = pytest.importorskip("pycocotools.coco")
mask = pytest.importorskip("pycocotools.mask")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]


def test_masks_boxes_and_areas_equal_those_of_pycocotools(tmp_path):
    scenes = open_source("scenes:40x60")
    found = list(label_images(scenes, [2, 5, 8], [generate], tmp_path))
    write_instances(tmp_path, [2, 5, 8])
    read = coco.COCO(str(tmp_path / "instances.json"))
    assert read.getImgIds() == [2, 5, 8]
    annotations = read.loadAnns(read.getAnnIds(catIds=[1]))
    assert len(annotations) == sum(finding.masks for finding in found) > 0
    for annotation in annotations:
        segmentation = annotation["segmentation"]
        np.testing.assert_array_equal(read.annToMask(annotation), rle.decode(segmentation))
        assert mask.toBbox(segmentation).tolist() == annotation["bbox"]
        assert mask.area(segmentation) == annotation["area"]
