"""Tests of opening sources by name, and of subsets."""

import importlib
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import REASONS, BadSample, SourceError
from sam_jax.data.open import (
    SOURCES,
    ImagesOnly,
    Subset,
    exclude,
    open_image_source,
    open_source,
    parse_slice,
    select,
    source_usage,
    with_full_size,
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
    ("kind", "write", "small_shape"),
    [
        ("coco", write_coco, (40, 60, 3)),
        ("labels", write_labels, (160, 240, 3)),  # a PNG
        ("sa1b", write_sa1b, (40, 60, 3)),
    ],
)
def test_folders_are_opened_by_their_kind(tmp_path, monkeypatch, kind, write, small_shape):
    write(tmp_path / "folder")
    source = open_source(f"{kind}:{tmp_path}/folder")
    assert (len(source), source[0].image.shape) == (1, (160, 240, 3))
    (path,) = (path for path in (tmp_path / "folder").rglob("*.*g") if "masks" not in path.parts)
    for images in (source, ImagesOnly(source), select(source, ":")):
        assert images.encoded(0) == path.read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    source = open_source(f"{kind}:~/folder", decode_size=(32, 32))
    assert source[0].image.shape == small_shape
    assert [mask["size"] for mask in source[0].masks] == [[160, 240]]


def write_images(folder, size=(160, 240)):
    folder.mkdir()
    Image.new("RGB", size[::-1]).save(folder / "a.jpg")


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("coco", write_coco),
        ("labels", write_labels),
        ("sa1b", write_sa1b),
        ("images", write_images),
    ],
)
def test_a_source_can_be_decoded_in_full_size_without_reopening(tmp_path, monkeypatch, kind, write):
    write(tmp_path / "folder")
    small = open_source(f"{kind}:{tmp_path}/folder", decode_size=(32, 32))
    in_full = open_source(f"{kind}:{tmp_path}/folder")
    sources = [small, ImagesOnly(small), select(small, ":"), ImagesOnly(select(small, ":"))]

    with monkeypatch.context() as patch:
        for name in ("is_file", "is_folder", "listdir", "walk", "stat", "read_range"):
            patch.delattr(f"sam_jax.io.storage.{name}")  # no file is accessed again
        full_sizes = [with_full_size(source) for source in sources]
    for source, full_size in zip(sources, full_sizes, strict=True):
        assert type(full_size) is type(source)
        assert full_size.image(0).shape == full_size[0].image.shape == (160, 240, 3)
        np.testing.assert_array_equal(full_size.image(0), in_full.image(0))
        assert full_size[0].masks == source[0].masks
        assert full_size.name(0) == source.name(0)
    assert small.decode_size == (32, 32), "the source itself is unchanged"
    assert with_full_size(in_full).decode_size is None


def test_a_source_that_always_decodes_in_full_is_its_full_size():
    source = open_source("scenes:32x40", decode_size=(8, 8))
    assert with_full_size(source) is source
    subset = with_full_size(select(source, "3:7"))
    assert subset.source is source
    assert subset.indices.tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_has_a_usage_and_an_opener(kind):
    usage, help, opener = SOURCES[kind]
    assert usage.removeprefix(kind)[0] in ":["
    assert f"{usage} ({help})" in source_usage()
    module, function = opener.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_only_scenes_need_no_location():
    assert [kind for kind in SOURCES if not SOURCES[kind].needs_location] == ["scenes"]


def test_scenes_are_opened_by_their_size():
    assert open_source("scenes") == SyntheticScenes()
    assert open_source("scenes:96x128", decode_size=(8, 8)) == SyntheticScenes(size=(96, 128))
    assert open_source("scenes:96x128")[3].image.shape == (96, 128, 3)
    assert open_source("scenes").encoded(3) is None


def test_an_image_source_is_a_file_a_folder_or_a_source(tmp_path, monkeypatch):
    write_sa1b(tmp_path / "folder")
    Image.new("RGB", (20, 10)).save(tmp_path / "folder" / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, expected in [
        ("folder/a.png", ["folder/a.png"]),
        ("~/folder", [f"{tmp_path}/folder/a.png", f"{tmp_path}/folder/sa_1.jpg"]),
        ("sa1b:folder", ["folder/sa_1.jpg"]),
        ("images:folder", ["folder/a.png", "folder/sa_1.jpg"]),
    ]:
        source = open_image_source(name)
        assert [source.name(i) for i in range(len(source))] == expected
        assert source[0].masks == []
    monkeypatch.chdir(tmp_path / "folder")
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
def test_missing_image_sources(tmp_path, monkeypatch, name, message):
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
def test_errors_of_wrong_names_list_the_valid_ones(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message) as error:
        open_source(name)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


SLICES = ["0::5", "::2", "3:10", "7", "-1", "-3:", ":", "::", ":4", "2:9:3", "-9:-2:2", "0", "11"]


@pytest.mark.parametrize("text", SLICES)
def test_slices_are_those_of_python(text):
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


def test_a_subset_reads_its_examples_and_knows_their_indices():
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
def test_invalid_slices(text):
    with pytest.raises(SourceError) as error:
        parse_slice(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["12", "-13", "12:", "5:5", "9:3", "100::5"])
def test_a_slice_must_not_be_empty(text):
    with pytest.raises(SourceError, match=f"the slice '{text}' of 12 examples leaves none"):
        select(SyntheticScenes(count=12), text)


@pytest.mark.parametrize("reason", REASONS)
def test_a_bad_sample_can_be_pickled(reason):
    error = pickle.loads(pickle.dumps(BadSample(reason, "why")))
    assert (error.reason, error.detail, str(error)) == (reason, "why", f"{reason}: why")
