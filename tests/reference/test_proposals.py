"""Compares average recall with COCOeval of pycocotools, with all categories as one."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from sam_jax.evaluate import proposals
from sam_jax.masks import rle
from sam_jax.masks.polygons import rasterize
from tests.sam_jax.evaluate.toy_sources import ToySource

coco = pytest.importorskip("pycocotools.coco")
cocoeval = pytest.importorskip("pycocotools.cocoeval")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]

COCO_EVAL = Path(__file__).parents[3] / "shared" / "realdata" / "coco_eval"


@pytest.mark.parametrize("seed", range(8))
def test_random_masks(seed, monkeypatch):
    monkeypatch.setattr(proposals, "NUM_PROPOSALS", (1, 5, 12))
    rng = np.random.default_rng(seed)
    truths = [[_rectangle(rng) for _ in range(rng.integers(0, 8))] for _ in range(12)]
    proposed = [
        [_moved(rng, masks[rng.integers(len(masks))]) for _ in range(rng.integers(0, 20))]
        if masks
        else [_rectangle(rng)]
        for masks in truths
    ]
    _assert_same(
        [list(map(rle.encode, masks)) for masks in proposed],
        [list(map(rle.encode, masks)) for masks in truths],
    )


def test_real_objects_and_results():
    if not COCO_EVAL.is_dir():
        pytest.skip(f"no COCO results in {COCO_EVAL}")
    content = json.loads((COCO_EVAL / "instances_val2014_100.json").read_text())
    results = json.loads((COCO_EVAL / "instances_val2014_fakesegm100_results.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    truths = {image: [] for image in sizes}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            image = annotation["image_id"]
            truths[image].append(rasterize(annotation["segmentation"], sizes[image]))
    proposed = {image: [] for image in sizes}
    for result in sorted(results, key=lambda result: -result["score"]):
        proposed[result["image_id"]].append(result["segmentation"])
    _assert_same(list(proposed.values()), list(truths.values()))


def _assert_same(proposed, truths):
    """Compares recall for the proposals and objects of each image, both given as run lengths."""
    pairs = [(i, i) for i in range(len(truths))]
    scores = proposals.evaluate_proposals(ToySource(proposed), ToySource(truths), pairs)
    coco_recall = _coco_recall(proposed, truths)
    for name, recalls in zip(proposals.AREA_RANGES, coco_recall, strict=True):
        for top, expected in zip(proposals.NUM_PROPOSALS, recalls, strict=True):
            actual = scores["recall"][name][str(top)]
            assert (-1 if actual is None else actual) == pytest.approx(expected, abs=5.1e-5)
    assert 0 < scores["recall"]["all"][str(proposals.NUM_PROPOSALS[-1])] < 1


def _coco_recall(proposed, truths):
    """Returns the average recall 's t', which is -1 where there is no object of a size."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = coco.COCO()
        annotations.dataset = {
            "info": {},
            "images": [{"id": i, "height": 0, "width": 0} for i in range(len(truths))],  # unused
            "categories": [{"id": 1}],
            "annotations": [
                _annotation(image, mask) | {"area": rle.area(mask), "iscrowd": 0, "id": number}
                for number, (image, mask) in enumerate(_flat(truths), start=1)
            ],
        }
        annotations.createIndex()
        results = [
            _annotation(image, mask) | {"score": 1 / rank}
            for rank, (image, mask) in enumerate(_flat(proposed), start=1)
        ]
        evaluation = cocoeval.COCOeval(annotations, annotations.loadRes(results), "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(proposals.NUM_PROPOSALS)
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]  # thresholds, sizes, numbers of proposals
    return recall.mean(axis=0)


def _flat(masks_of_images):
    return [(image, mask) for image, masks in enumerate(masks_of_images) for mask in masks]


def _annotation(image, mask):
    return {"image_id": image, "category_id": 1, "segmentation": mask}


def _rectangle(rng):
    """Returns a mask of random size, often with the area where two size ranges meet."""
    mask = np.zeros((160, 130), bool)
    height, width = (32, 32) if rng.random() < 0.2 else rng.integers(1, 130, 2)
    top, left = rng.integers(0, 160 - height + 1), rng.integers(0, 130 - width + 1)
    mask[top : top + height, left : left + width] = True
    return mask


def _moved(rng, mask):
    return np.roll(mask, rng.integers(-4, 5, 2), axis=(0, 1))
