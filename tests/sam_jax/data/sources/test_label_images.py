"""Tests of label maps and mask PNGs in both layouts."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import BadSample, SourceError, count_reasons
from sam_jax.data.sources import label_images
from sam_jax.data.sources.label_images import open_labels
from sam_jax.masks import rle

REAL = Path(__file__).parents[5] / "shared" / "realdata" / "dsb2018_dev"
SIZE = (14, 22)


def labels_of(seed, count=6, dtype=np.uint16):
    rng = np.random.default_rng(seed)
    numbers = np.concatenate([[0], rng.choice(np.arange(1, 256), count, replace=False)])
    return numbers[rng.integers(0, len(numbers), SIZE)].astype(dtype)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(folder, labels, index=None):
    """Writes an image and a PNG for each label map, and index.json."""
    entries = []
    for i, pixels in enumerate(labels):
        save(folder / "images" / f"{i}.png", np.full((*SIZE, 3), i, np.uint8))
        save(folder / "images" / f"{i}_label.png", pixels)
        entry = {"id": str(i), "image": f"images/{i}.png", "label": f"images/{i}_label.png"}
        entries.append(entry)
    (folder / "index.json").write_text(json.dumps(entries if index is None else index))
    return str(folder)


def write_folders(folder, labels, mode="L"):
    """Writes folders with one PNG per mask, named in the order of the labels."""
    for i, pixels in enumerate(labels):
        name = f"{9 - i}"
        save(folder / name / "images" / f"{name}.png", np.full((*SIZE, 3), i, np.uint8))
        for number in np.unique(pixels)[1:]:
            mask = Image.fromarray(np.where(pixels == number, 255, 0).astype(np.uint8))
            (folder / name / "masks").mkdir(exist_ok=True)
            mask.convert(mode).save(folder / name / "masks" / f"{number:05d}.png")
    return str(folder)


def assert_masks(example, labels):
    numbers = [number for number in np.unique(labels) if number]
    for mask, number in zip(example.masks, numbers, strict=True):
        assert np.array_equal(rle.decode(mask), labels == number)


def bad_sample(source, index=0):
    with pytest.raises(BadSample) as error:
        source[index]
    return error.value


def reason(source, index=0):
    return bad_sample(source, index).reason


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_are_sorted_by_label(tmp_path, dtype):
    labels = [labels_of(i, dtype=dtype) for i in range(3)]
    labels[1][labels[1] == labels[1].max()] = 255 if dtype == np.uint8 else 60_000
    source = open_labels(write(tmp_path, labels))
    assert len(source) == 3
    for i, pixels in enumerate(labels):
        assert_masks(source[i], pixels)
        assert source[i].image.tolist() == np.full((*SIZE, 3), i).tolist()
        assert source.name(i) == str(tmp_path / f"images/{i}.png")
    with pytest.raises(IndexError):
        source[3]


def test_arbitrary_label_maps(tmp_path):
    arrangements = [
        [[1]],
        [[0, 1]],
        [[1, 0]],
        [[1, 2], [2, 1]],
        [[3] * 5],
        [[3]] * 5,
        [[7, 7], [7, 0]],
    ]
    for pixels in map(np.uint8, arrangements):
        save(tmp_path / "i.png", np.zeros((*pixels.shape, 3), np.uint8))
        save(tmp_path / "l.png", pixels)
        (tmp_path / "index.json").write_text('[{"image": "i.png", "label": "l.png"}]')
        assert_masks(open_labels(str(tmp_path))[0], pixels)


def test_palettes_and_single_bits(tmp_path):
    pixels = labels_of(0, dtype=np.uint8)
    folder = write(tmp_path, [pixels, pixels])
    palette = Image.fromarray(pixels, mode=None).convert("P")
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(tmp_path / "images" / "0_label.png")
    Image.fromarray(pixels > 0).save(tmp_path / "images" / "1_label.png")
    source = open_labels(folder)
    assert_masks(source[0], pixels)
    assert_masks(source[1], pixels > 0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB", "1", "P", "LA"])
def test_folders_with_one_file_per_mask(tmp_path, mode):
    labels = [labels_of(i) for i in range(3)]
    source = open_labels(write_folders(tmp_path, labels, mode))
    assert [os.path.basename(source.name(i)) for i in range(3)] == ["7.png", "8.png", "9.png"]
    for i, pixels in enumerate(labels[::-1]):
        assert_masks(source[i], pixels)
        assert source[i].image[0, 0, 0] == 2 - i


def test_a_mask_of_sixteen_bits(tmp_path):
    pixels = labels_of(0, count=1)
    folder = write_folders(tmp_path, [pixels])
    save(
        next((tmp_path / "9" / "masks").iterdir()), np.where(pixels > 0, 65535, 0).astype(np.uint16)
    )
    assert_masks(open_labels(folder)[0], pixels)


def test_images_in_color_with_alpha(tmp_path):
    folder = write(tmp_path, [labels_of(0)])
    save(tmp_path / "images" / "0.png", np.full((*SIZE, 4), 77, np.uint8))
    assert (open_labels(folder)[0].image == 77).all()


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("0.png", b"", "broken image"),
        ("0.png", b"text", "broken image"),
        ("0.png", None, "missing file"),
        ("0.png", np.zeros((13, 22, 3), np.uint8), "size mismatch"),
        ("0_label.png", b"", "broken mask"),
        ("0_label.png", None, "missing file"),
        ("0_label.png", np.ones((14, 21), np.uint8), "size mismatch"),
        ("0_label.png", np.ones((*SIZE, 3), np.uint8), "broken mask"),
        ("0_label.png", np.zeros(SIZE, np.uint16), "no masks"),
    ],
)
def test_reasons_of_bad_files(tmp_path, file, content, expected):
    folder = write(tmp_path, [labels_of(0)])
    path = tmp_path / "images" / file
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    assert reason(open_labels(folder)) == expected


def test_a_truncated_file_is_a_bad_sample(tmp_path):
    folder = write(tmp_path, [labels_of(0)])
    for name, expected in (("0_label.png", "broken mask"), ("0.png", "broken image")):
        path = tmp_path / "images" / name
        data = path.read_bytes()
        path.write_bytes(data[:-30])
        assert reason(open_labels(folder)) == expected
        path.write_bytes(data)


def test_a_label_image_that_is_too_large_is_not_decoded(tmp_path):
    folder = write(tmp_path, [labels_of(0)])
    Image.new("1", (9000, 9000)).save(tmp_path / "images" / "0_label.png")
    with pytest.raises(BadSample, match="at most 67108864 pixels; got 9000 x 9000"):
        open_labels(folder)[0]


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        [],
        {},
        {"image": "images/0.png"},
        {"image": "images/0.png", "label": None},
        {"image": "images/0.png", "label": "../x.png"},
        {"image": "/images/0.png", "label": "images/0_label.png"},
    ],
)
def test_reasons_of_bad_entries(tmp_path, entry):
    source = open_labels(write(tmp_path, [labels_of(0)], [entry]))
    assert reason(source) == "broken json"
    assert str(tmp_path) in source.name(0)


def test_reasons_of_bad_masks(tmp_path):
    folder = write_folders(tmp_path, [labels_of(i) for i in range(4)])
    masks = [sorted((tmp_path / f"{9 - i}" / "masks").iterdir()) for i in range(4)]
    save(masks[0][1], np.ones((3, 3), np.uint8))
    save(masks[1][1], np.zeros(SIZE, np.uint8))
    masks[2][1].write_bytes(b"text")
    for path in masks[3]:
        path.unlink()
    source = open_labels(folder)
    for i, expected in enumerate(["size mismatch", "empty mask", "broken mask"]):
        example = source[3 - i]
        assert len(example.masks) == len(masks[i]) - 1
        assert count_reasons(example.skipped) == {expected: 1}
    assert example.skipped[0].detail == f"mask 1: {masks[2][1]} is not a PNG"
    assert reason(source, 0) == "no masks"
    masks[3][0].parent.rmdir()
    assert reason(source, 0) == "no masks"
    for path in masks[1]:
        save(path, np.zeros(SIZE, np.uint8))
    assert reason(source, 2) == "empty mask"


def test_the_size_of_most_masks_counts(tmp_path):
    folder = write_folders(tmp_path, [labels_of(0)])
    first, *others = sorted((tmp_path / "9" / "masks").iterdir())
    save(first, np.ones((3, 3), np.uint8))
    example = open_labels(folder)[0]
    assert len(example.masks) == len(others)
    assert example.skipped[0].detail == "mask 0: it is 3 x 3, most are 14 x 22"


@pytest.mark.parametrize("save_mode", ["RGBA", "LA", "P"])
def test_masks_in_the_alpha_channel(tmp_path, save_mode):
    folder = write_folders(tmp_path, [labels_of(0, count=1)])
    path = next((tmp_path / "9" / "masks").iterdir())
    alpha = np.zeros(SIZE, np.uint8)
    alpha[2:12, 5:15] = 255
    for color in (0, 255):
        pixels = np.full((*SIZE, 4), color, np.uint8)
        pixels[..., 3] = alpha
        image = Image.fromarray(pixels)
        image = image.quantize(4) if save_mode == "P" else image.convert(save_mode)
        image.save(path)
        assert rle.decode(open_labels(folder)[0].masks[0]).sum() == 100
    opaque = np.full((*SIZE, 4), 255, np.uint8)
    opaque[..., :3] = alpha[..., None]
    Image.fromarray(opaque).save(path)
    assert rle.area(open_labels(folder)[0].masks[0]) == 100


def test_a_broken_label_map_is_named(tmp_path):
    folder = write(tmp_path, [labels_of(0)])
    path = tmp_path / "images" / "0_label.png"
    content = path.read_bytes()
    for damaged in (b"text", content[:60], content[:-30]):
        path.write_bytes(damaged)
        details = {str(bad_sample(open_labels(folder))) for _ in range(2)}
        assert len(details) == 1
        assert str(path) in details.pop()
    noise = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint16)
    save(path, noise)
    assert len(open_labels(folder)[0].masks) == noise.size - 1


def test_a_label_map_of_too_many_runs_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(label_images, "MAX_RUNS", 10)
    assert "at most 10 runs" in str(bad_sample(open_labels(write(tmp_path, [labels_of(0)]))))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", r"labels: .*index\.json: Expecting property name"),
        ("{}", "must hold a list of images; got a dict of 0"),
        ("[]", "must hold a list of images; got a list of 0"),
        ("NaN", "must hold a list of images; got nan"),
    ],
)
def test_errors_of_opening(tmp_path, index, message):
    with pytest.raises(SourceError, match="there is no folder"):
        open_labels(str(tmp_path / "missing"))
    with pytest.raises(SourceError, match=r"must hold index.json, or folders ID/images"):
        open_labels(str(tmp_path))
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(SourceError, match=message):
        open_labels(str(tmp_path))


def test_sources_can_be_pickled(tmp_path):
    one = open_labels(write(tmp_path / "a", [labels_of(0)]))
    other = open_labels(write_folders(tmp_path / "b", [labels_of(0)]))
    for source in (one, other):
        assert pickle.loads(pickle.dumps(source))[0].masks == source[0].masks


def test_real_nuclei():
    if not REAL.is_dir():
        pytest.skip(f"no microscopy images in {REAL}")
    source = open_labels(str(REAL))
    index = json.loads((REAL / "index.json").read_text())
    assert len(source) == len(index) == 102
    total = 0
    for i, entry in enumerate(index):
        example = source[i]
        assert example.image.shape == (entry["height"], entry["width"], 3)
        assert len(example.masks) == entry["instances"]
        total += len(example.masks)
    assert total == 4572
