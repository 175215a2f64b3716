"""Tests of COCO annotations: masks, skipped images, and the reasons of bad samples."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import BadSample, SourceError, count_reasons
from sam_jax.data.sources.coco import open_coco
from sam_jax.masks import rle

REAL = Path(__file__).parents[5] / "shared" / "realdata" / "coco_tiny_train"
SIZE = (20, 30)
BOX = [[2, 3, 12, 3, 12, 9, 2, 9]]  # 10 by 6 pixels


def mask_of_box():
    mask = np.zeros(SIZE, bool)
    mask[3:9, 2:12] = True
    return mask


def image(number, **fields):
    entry = {"id": number, "file_name": f"{number}.jpg", "height": SIZE[0], "width": SIZE[1]}
    return entry | fields


def annotation(number, segmentation=BOX, **fields):
    return {"id": 1, "image_id": number, "segmentation": segmentation, "iscrowd": 0} | fields


def write(folder, images, annotations, **others):
    content = {"images": images, "annotations": annotations, **others}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "images").mkdir(exist_ok=True)
    for entry in images:
        name = entry.get("file_name")
        if isinstance(name, str) and name.endswith(".jpg") and "/" not in name:
            save(folder / "images" / name)
    return str(folder)


def save(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (10, 200, 90)).save(path)


def reason(source, index=0):
    with pytest.raises(BadSample) as error:
        source[index]
    return error.value.reason


def test_polygons_and_both_kinds_of_run_lengths(tmp_path):
    mask = mask_of_box()
    compressed = rle.encode(mask)
    plain = {"size": list(SIZE), "counts": rle.runs(compressed).tolist()}
    segmentations = [BOX, compressed, plain, [*BOX, [20, 15, 25, 15, 25, 18]]]
    source = open_coco(write(tmp_path, [image(1)], [annotation(1, s) for s in segmentations]))
    example = source[0]
    assert example.image.shape == (*SIZE, 3)
    masks = [rle.decode(m) for m in example.masks]
    assert all(np.array_equal(m, mask) for m in masks[:3])
    assert masks[3][mask].all()
    assert masks[3].sum() > mask.sum()


def test_images_are_in_the_order_of_the_file(tmp_path):
    images = [image(5), image(3), image(4)]
    annotations = [annotation(n) for n in (3, 5, 4, 3)]
    source = open_coco(write(tmp_path, images, annotations))
    names = [os.path.relpath(source.name(i), tmp_path) for i in range(3)]
    assert names == ["images/5.jpg", "images/3.jpg", "images/4.jpg"]
    assert [len(source[i].masks) for i in (2, 1, 0, 1)] == [1, 2, 1, 2]
    with pytest.raises(IndexError):
        source[3]


def test_crowds_and_images_with_crowds_only_are_skipped(tmp_path):
    images = [image(1), image(2), image(3)]
    crowd = annotation(2, iscrowd=1)
    folder = write(tmp_path, images, [annotation(1), annotation(1, iscrowd=1), crowd])
    source = open_coco(folder)
    assert len(source) == 1
    assert len(source[0].masks) == 1
    with pytest.raises(SourceError, match=r"no image in .* has an annotation that is not a crowd"):
        open_coco(write(tmp_path, images, [crowd]))


def test_images_are_found_in_the_public_layouts(tmp_path):
    images = [image(n, file_name=f"train2017/{n}.jpg") for n in (1, 2)]
    source = open_coco(write(tmp_path, images, [annotation(1), annotation(2)]))
    save(tmp_path / "train2017" / "1.jpg")
    save(tmp_path / "images" / "train2017" / "2.jpg")
    assert [os.path.relpath(source.name(i), tmp_path) for i in range(2)] == [
        "train2017/1.jpg",
        "images/train2017/2.jpg",
    ]
    assert all(source[i].masks for i in range(2))


def test_masks_keep_their_size_when_images_are_decoded_smaller(tmp_path):
    folder = write(tmp_path, [image(1, height=400, width=600)], [annotation(1)])
    save(tmp_path / "images" / "1.jpg", (400, 600))
    example = open_coco(folder, decode_size=(64, 64))[0]
    assert example.image.shape == (50, 75, 3)
    assert example.masks[0]["size"] == [400, 600]


EMPTY = rle.encode(np.zeros(SIZE, bool))


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        (None, "empty mask"),
        (7, "broken mask"),
        ("polygon", "broken mask"),
        ([], "empty mask"),
        ([[]], "broken mask"),
        ([[1, 2, 3, 4]], "broken mask"),
        ([[1, 2, 3, 4, 5, None]], "broken mask"),
        ([[1, 2, 3, 4, 5, 1e300]], "broken mask"),
        ([[1, 2, 3, 4, 5, float("nan")]], "broken mask"),
        ([*BOX, [1, 2, 3, 4]], "broken mask"),
        ([[1, 2, 9, 2, 5, 2]], "empty mask"),
        ({}, "broken mask"),
        ({"size": list(SIZE), "counts": [601]}, "broken mask"),
        ({"size": list(SIZE), "counts": ["600"]}, "broken mask"),
        ({"size": list(SIZE), "counts": "~"}, "broken mask"),
        (rle.encode(np.ones((3, 4), bool)), "size mismatch"),
        (EMPTY, "empty mask"),
        ([[50, 50, 60, 50, 60, 60]], "empty mask"),
    ],
)
def test_a_bad_segmentation_is_skipped_and_the_other_masks_are_used(
    tmp_path, segmentation, expected
):
    annotations = [annotation(1, segmentation), annotation(1), annotation(1, segmentation)]
    example = open_coco(write(tmp_path, [image(1)], annotations))[0]
    assert [np.array_equal(rle.decode(mask), mask_of_box()) for mask in example.masks] == [True]
    assert count_reasons(example.skipped) == {expected: 2}
    assert example.skipped[1].detail.startswith("mask 2: ")
    assert reason(open_coco(write(tmp_path, [image(1)], annotations[:1]))) == expected


def test_an_annotation_without_a_segmentation_is_skipped(tmp_path):
    annotations = [annotation(1), annotation(1)]
    del annotations[0]["segmentation"]
    example = open_coco(write(tmp_path, [image(1)], annotations))[0]
    assert len(example.masks) == 1
    assert [str(problem) for problem in example.skipped] == [
        "empty mask: mask 0: it has no segmentation"
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"file_name": None}, "broken json"),
        ({"file_name": ["1.jpg"]}, "broken json"),
        ({"file_name": "../1.jpg"}, "broken json"),
        ({"file_name": "a/../../1.jpg"}, "broken json"),
        ({"file_name": "/etc/passwd"}, "broken json"),
        ({"file_name": "..\\1.jpg"}, "broken json"),
        ({"file_name": "\\etc\\passwd"}, "broken json"),
        ({"file_name": "c:\\images\\1.jpg"}, "broken json"),
        ({"file_name": "a\0.jpg"}, "missing file"),
        ({"file_name": "\ud800.jpg"}, "missing file"),
        ({"file_name": "other.png"}, "missing file"),
        ({"file_name": "."}, "missing file"),
        ({"height": None}, "broken json"),
        ({"height": "20"}, "broken json"),
        ({"height": 20.5}, "broken json"),
        ({"height": float("nan")}, "broken json"),
        ({"height": float("inf")}, "broken json"),
        ({"height": 0.0}, "broken json"),
        ({"height": 10**7, "width": 10**7}, "broken image"),
        ({"height": 21}, "size mismatch"),
    ],
)
def test_reasons_of_bad_images(tmp_path, fields, expected):
    if fields.get("file_name") == "\ud800.jpg":  # no file can have this name
        folder = write(tmp_path, [image(1)], [annotation(1)])
        content = (tmp_path / "instances.json").read_text()
        (tmp_path / "instances.json").write_text(content.replace("1.jpg", "\\ud800.jpg"))
    else:
        folder = str(tmp_path)
        content = {"images": [image(1, **fields)], "annotations": [annotation(1)]}
        (tmp_path / "instances.json").write_text(json.dumps(content))
        save(tmp_path / "images" / "1.jpg")
    source = open_coco(folder)
    assert reason(source) == expected
    assert source.name(0).startswith(folder)


def test_honest_oddities_are_read(tmp_path):
    """Backslashes, sizes as floats, and NaN where nobody reads it."""
    fields = {"file_name": "train\\a\\1.jpg", "height": 20.0, "width": 30.0, "score": float("nan")}
    images, annotations = [image(1, **fields)], [annotation(1, area=float("nan"))]
    source = open_coco(write(tmp_path, images, annotations, info={"year": float("inf")}))
    save(tmp_path / "images" / "train" / "a" / "1.jpg")
    assert source.name(0) == str(tmp_path / "images" / "train" / "a" / "1.jpg")
    assert len(source[0].masks) == 1


def test_a_broken_image_is_a_bad_sample(tmp_path):
    source = open_coco(write(tmp_path, [image(1)], [annotation(1)]))
    data = (tmp_path / "images" / "1.jpg").read_bytes()
    (tmp_path / "images" / "1.jpg").write_bytes(data[: len(data) // 2])
    assert reason(source) == "broken image"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"coco: .*instances\.json: Expecting property name"),
        ('{"annotations": NaN}', "must hold a dict with a list 'annotations'"),
        ('{"annotations": [{"image_id": NaN}]}', r"annotations\[0\] in .* must be a dict"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "must hold a dict with a list 'annotations'"),
        ('{"annotations": []}', "must hold a dict with a list 'images'"),
        ('{"annotations": 3, "images": []}', "must hold a dict with a list 'annotations'"),
        ('{"annotations": [3], "images": []}', r"annotations\[0\] in .* must be a dict"),
        ('{"annotations": [{"image_id": []}], "images": []}', r"annotations\[0\]"),
        (
            '{"annotations": [], "images": [{}]}',
            r"images\[0\] in .* must be a dict with an int 'id'",
        ),
        ('{"annotations": [], "images": []}', "no image"),
    ],
)
def test_errors_of_opening(tmp_path, content, message):
    (tmp_path / "instances.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        open_coco(str(tmp_path))


def test_the_error_of_a_missing_folder_describes_the_layout(tmp_path):
    with pytest.raises(
        SourceError, match=r"no .*instances.json; the folder must hold the images and"
    ):
        open_coco(str(tmp_path / "missing"))


def test_deep_nesting_is_an_error_or_a_bad_sample(tmp_path):
    for depth in range(900, 1000, 7):
        deep = "[" * depth + "]" * depth
        content = json.dumps({"images": [image(1)], "annotations": [annotation(1, "deep")]})
        (tmp_path / "instances.json").write_text(content.replace('"deep"', deep))
        try:
            source = open_coco(str(tmp_path))
        except SourceError:
            continue
        assert reason(source) == "broken mask"


def test_a_source_can_be_pickled(tmp_path):
    source = open_coco(write(tmp_path, [image(1)], [annotation(1)]))
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert again[0].masks == source[0].masks


def test_real_photographs():
    if not REAL.is_dir():
        pytest.skip(f"no photographs in {REAL}")
    source = open_coco(str(REAL))
    examples = [source[i] for i in range(len(source))]
    assert sum(len(example.masks) for example in examples) == 470 - 5
    for example in examples:
        assert all(tuple(mask["size"]) == example.image.shape[:2] for mask in example.masks)
    areas = [rle.area(mask) for example in examples for mask in example.masks]
    content = json.loads((REAL / "instances.json").read_text())
    expected = [a["area"] for a in content["annotations"] if not a["iscrowd"]]
    assert sum(areas) == pytest.approx(sum(expected), rel=0.01)
