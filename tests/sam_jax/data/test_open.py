"""Sources by name, and parts of them."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import REASONS, BadSample, SourceError
from sam_jax.data.open import (
    ImagesOnly,
    Subset,
    exclude,
    open_image_source,
    open_source,
    parse_slice,
    select,
)
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.masks import rle


def write_coco(folder, size=(160, 240)):
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", size[::-1]).save(folder / "images" / "a.jpg")
    image = {"id": 1, "file_name": "a.jpg", "height": size[0], "width": size[1]}
    annotation = {"image_id": 1, "segmentation": rle.encode(np.ones(size, bool))}
    content = {"images": [image], "annotations": [annotation]}
    (folder / "instances.json").write_text(json.dumps(content))


def write_labels(folder, size=(160, 240)):
    for name, pixels in (("images", np.zeros((*size, 3))), ("masks", np.ones(size))):
        (folder / "a" / name).mkdir(parents=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "a" / name / "a.png")


def write_sa1b(folder, size=(160, 240)):
    folder.mkdir()
    Image.new("RGB", size[::-1]).save(folder / "sa_1.jpg")
    image = {"height": size[0], "width": size[1]}
    annotation = {"segmentation": rle.encode(np.ones(size, bool))}
    (folder / "sa_1.json").write_text(json.dumps({"image": image, "annotations": [annotation]}))


@pytest.mark.parametrize(
    ("kind", "write", "reduced"),
    [
        ("coco", write_coco, (40, 60, 3)),
        ("labels", write_labels, (160, 240, 3)),  # a PNG
        ("sa1b", write_sa1b, (40, 60, 3)),
    ],
)
def test_a_folder_by_its_kind(tmp_path, monkeypatch, kind, write, reduced):
    write(tmp_path / "it")
    source = open_source(f"{kind}:{tmp_path}/it")
    assert (len(source), source[0].image.shape) == (1, (160, 240, 3))
    (path,) = (path for path in (tmp_path / "it").rglob("*.*g") if "masks" not in path.parts)
    for images in (source, ImagesOnly(source), select(source, ":")):
        assert images.encoded(0) == path.read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    source = open_source(f"{kind}:~/it", decode_size=(32, 32))
    assert source[0].image.shape == reduced
    assert [mask["size"] for mask in source[0].masks] == [[160, 240]]


def test_scenes():
    assert open_source("scenes") == SyntheticScenes()
    assert open_source("scenes:96x128", decode_size=(8, 8)) == SyntheticScenes(size=(96, 128))
    assert open_source("scenes:96x128")[3].image.shape == (96, 128, 3)
    assert open_source("scenes").encoded(3) is None


def test_pictures_are_a_file_a_folder_or_those_of_a_source(tmp_path, monkeypatch):
    write_sa1b(tmp_path / "it")
    Image.new("RGB", (20, 10)).save(tmp_path / "it" / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, expected in [
        ("it/a.png", ["it/a.png"]),
        ("~/it", [f"{tmp_path}/it/a.png", f"{tmp_path}/it/sa_1.jpg"]),
        ("sa1b:it", ["it/sa_1.jpg"]),
        ("images:it", ["it/a.png", "it/sa_1.jpg"]),
    ]:
        source = open_image_source(name)
        assert [source.name(i) for i in range(len(source))] == expected
        assert source[0].masks == []
    monkeypatch.chdir(tmp_path / "it")
    assert open_image_source("a.png").image(0).shape == (10, 20, 3)
    assert open_image_source("scenes:16x16").image(0).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photo.jpg", "there is no file and no folder photo.jpg; it must be one, or sa1b:PATH"),
        ("image:x", r"of no known kind \(did you mean images\?\)"),
        ("sa1b", "names no location"),
    ],
)
def test_pictures_that_are_not_there(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message):
        open_image_source(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "source '' is of no known kind; it must be sa1b:PATH, tfds:DATASET"),
        ("pictures/", "source 'pictures/' is of no known kind; it must be"),
        ("sa1:images", r"source 'sa1:images' is of no known kind \(did you mean sa1b\?\)"),
        ("label:x", r"\(did you mean labels\?\)"),
        ("SCENES", "is of no known kind"),
        ("sa1b", "source 'sa1b' names no location; it must be sa1b:PATH"),
        ("coco:", "names no location; it must be coco:FOLDER"),
        ("sa1b:missing", "sa1b: there is no folder and no tar missing"),
        ("coco:missing", "coco: there is no missing/instances.json"),
        ("labels:missing", "labels: there is no folder missing"),
        ("tfds:coco", "tfds: 'coco' must be DATASET"),
        ("scenes:96", "scenes:96 must be scenes:HEIGHTxWIDTH of 16 to 4096 pixels, for example"),
        ("scenes:96x0", "scenes:96x0 must be"),
        ("scenes:9999x9999", "scenes:9999x9999 must be"),
    ],
)
def test_a_wrong_name_says_what_is_right(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message) as error:
        open_source(name)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


SLICES = ["0::5", "::2", "3:10", "7", "-1", "-3:", ":", "::", ":4", "2:9:3", "-9:-2:2", "0", "11"]


@pytest.mark.parametrize("text", SLICES)
def test_a_slice_is_what_python_takes(text):
    numbers = list(range(12))
    parts = [int(part) if part else None for part in text.split(":")]
    expected = numbers[slice(*parts)] if ":" in text else [numbers[int(text)]]
    assert numbers[parse_slice(text)] == expected

    source = SyntheticScenes(size=(32, 48), count=12)
    selected = select(source, text)
    assert selected.indices.tolist() == expected
    rest = [n for n in numbers if n not in expected]
    if rest:
        assert exclude(source, text).indices.tolist() == rest
    else:
        with pytest.raises(SourceError, match="leaves none to be used"):
            exclude(source, text)


def test_a_selection_reads_its_examples_and_knows_their_indices():
    source = SyntheticScenes(size=(32, 48), count=20)
    selected = select(source, "1::5")
    assert selected.indices.dtype == np.int64
    assert [selected.name(i) for i in range(len(selected))] == [
        f"scene {n}" for n in (1, 6, 11, 16)
    ]
    for i, index in enumerate(selected.indices):
        assert np.array_equal(selected[i].image, source[int(index)].image)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            selected[index]
    again = select(exclude(source, "::2"), "1::3")
    assert again.source is source
    assert again.indices.tolist() == [3, 9, 15]
    assert isinstance(pickle.loads(pickle.dumps(again)), Subset)


@pytest.mark.parametrize("text", ["", "a", "1:2:3:4", "1.5", "1:x", " 1", "::0", "::-1", "1" * 20])
def test_what_is_no_slice(text):
    with pytest.raises(SourceError) as error:
        parse_slice(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["12", "-13", "12:", "5:5", "9:3", "100::5"])
def test_a_slice_of_nothing(text):
    with pytest.raises(SourceError, match=f"the slice '{text}' of 12 examples leaves none"):
        select(SyntheticScenes(count=12), text)


@pytest.mark.parametrize("reason", REASONS)
def test_a_bad_sample_can_be_sent_from_a_worker(reason):
    error = pickle.loads(pickle.dumps(BadSample(reason, "why")))
    assert (error.reason, error.detail, str(error)) == (reason, "why", f"{reason}: why")
