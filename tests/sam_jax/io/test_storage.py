"""Tests that sources in an object store equal those on a disk, and that failures are OSErrors."""

import json
import tarfile

import fsspec.core
import numpy as np
import pytest
from PIL import Image

from sam_jax.data.example import BadSample, SourceError
from sam_jax.data.open import open_source
from sam_jax.io import storage
from sam_jax.masks import rle
from tests import object_store

SIZE = (16, 24)


@pytest.fixture
def bucket(monkeypatch):
    return object_store.install(monkeypatch)


def draw_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    return Image.fromarray(pixels)


def draw_mask(seed):
    return np.random.default_rng(seed).integers(0, 2, SIZE, np.uint8) > 0


def write_sa1b(folder):
    for i in (3, 12, 7):
        draw_image(i).save(folder / f"sa_{i}.jpg")
        image = {"height": SIZE[0], "width": SIZE[1]}
        masks = [{"segmentation": rle.encode(draw_mask(10 * i + j))} for j in range(2)]
        (folder / f"sa_{i}.json").write_text(json.dumps({"image": image, "annotations": masks}))


def write_tars(folder):
    below = folder / "below"
    below.mkdir()
    write_sa1b(below)
    with tarfile.open(folder / "sa_000000.tar", "w") as archive:
        for path in sorted(below.glob("sa_3*")):
            archive.add(path, path.name)
            path.unlink()


def write_labels(folder):
    for i in range(2):
        (folder / f"a{i}" / "images").mkdir(parents=True)
        (folder / f"a{i}" / "masks").mkdir()
        draw_image(i).save(folder / f"a{i}" / "images" / f"a{i}.png")
        for j in range(2):
            mask = Image.fromarray(255 * draw_mask(10 * i + j).astype(np.uint8))
            mask.save(folder / f"a{i}" / "masks" / f"{j}.png")


def write_coco(folder):
    (folder / "images").mkdir()
    draw_image(0).save(folder / "images" / "a.jpg")
    image = {"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}
    annotation = {"image_id": 1, "segmentation": rle.encode(draw_mask(0))}
    content = {"images": [image], "annotations": [annotation]}
    (folder / "instances.json").write_text(json.dumps(content))


def upload(folder, address):
    for path in folder.rglob("*"):
        if path.is_file():
            (address / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("kind", "write"),
    [("sa1b", write_sa1b), ("sa1b", write_tars), ("labels", write_labels), ("coco", write_coco)],
)
def test_a_store_gives_the_examples_of_the_folder(bucket, tmp_path, kind, write):
    write(tmp_path)
    upload(tmp_path, bucket / "data")
    here, there = open_source(f"{kind}:{tmp_path}"), open_source(f"{kind}:gs://bucket/data")
    assert len(here) == len(there)
    for i in range(len(here)):
        assert there.name(i) == here.name(i).replace(str(tmp_path), "gs://bucket/data")
        np.testing.assert_array_equal(there[i].image, here[i].image)
        assert there[i].masks == here[i].masks


def test_a_tar_is_indexed_once_on_a_disk_or_in_a_store(bucket, tmp_path, monkeypatch):
    write_tars(tmp_path)
    upload(tmp_path, bucket / "first")
    tar, index = "first/sa_000000.tar", "sa_000000.tar.index.npz"
    made = open_source(f"sa1b:gs://bucket/{tar}")
    assert (bucket / "first" / index).exists()
    open_source(f"sa1b:{tmp_path}")  # leaves an index on the disk
    (bucket / "second" / index).write_bytes((tmp_path / index).read_bytes())
    (bucket / "second" / "sa_000000.tar").write_bytes((tmp_path / "sa_000000.tar").read_bytes())
    monkeypatch.delattr("sam_jax.io.tar_index.members")
    for location in (f"gs://bucket/{tar}", "gs://bucket/second/sa_000000.tar"):
        found = open_source(f"sa1b:{location}")
        assert found[0].masks == made[0].masks


def test_missing_files_folders_and_packages_are_reported(bucket, tmp_path, monkeypatch):
    for kind in ("sa1b", "labels", "coco"):
        with pytest.raises(SourceError, match=r"there is no .*gs://bucket/nothing"):
            open_source(f"{kind}:gs://bucket/nothing")
    write_coco(tmp_path)
    upload(tmp_path, bucket / "coco")
    source = open_source("coco:gs://bucket/coco")
    (bucket / "coco" / "images" / "a.jpg").unlink()
    with pytest.raises(BadSample, match=r"there is no file gs://bucket/coco/images/a\.jpg"):
        source[0]

    def missing(*_, **__):
        raise ImportError("Install gcsfs to access GCS")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(OSError, match=r"gs://bucket/coco cannot be reached: Install gcsfs"):
        storage.is_file("gs://bucket/coco")
    with pytest.raises(SourceError, match=r"Install gcsfs.*sam_jax\[gcs\]"):
        open_source("sa1b:gs://bucket/coco")


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *(("sa1b", call) for call in ("info", "walk", "cat_file")),
        *(("labels", call) for call in ("info", "ls", "cat_file")),
        *(("coco", call) for call in ("info", "cat_file")),
    ],
)
def test_errors_of_a_store_are_reported(bucket, tmp_path, monkeypatch, kind, call):
    {"sa1b": write_sa1b, "labels": write_labels, "coco": write_coco}[kind](tmp_path)
    upload(tmp_path, bucket / "data")

    def fail(*_, **__):
        raise RuntimeError("503")

    monkeypatch.setattr(object_store.ObjectStore, call, fail)
    with pytest.raises((SourceError, BadSample), match="503"):
        open_source(f"{kind}:gs://bucket/data")[0]


@pytest.mark.parametrize("url", ["unknown://bucket/a", "gs://bucket/missing"])
def test_failures_are_os_errors(bucket, url):
    with pytest.raises(OSError, match=r"unknown|missing"):
        storage.read_range(url)
    with pytest.raises(OSError, match=r"unknown|missing"):
        storage.stat(url)


def test_objects_are_uploaded_and_removed(bucket, tmp_path):
    storage.upload_bytes("gs://bucket/a/b", b"abcdef")
    assert storage.read_range("gs://bucket/a/b", 2, 3) == b"cde"
    (tmp_path / "c").write_bytes(b"file")
    storage.upload(str(tmp_path / "c"), "gs://bucket/a/c")
    assert sorted(storage.listdir("gs://bucket/a")) == ["b", "c"]
    storage.remove("gs://bucket/a/b")
    assert not storage.is_file("gs://bucket/a/b")
    assert storage.is_folder("gs://bucket/a")


def test_the_first_of_duplicate_paths_is_used_in_a_store(bucket, tmp_path):
    for number, name in enumerate(("a-b", "a/c")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        draw_image(number).save(folder / "sa_1.jpg", quality=100)
        image = {"height": SIZE[0], "width": SIZE[1]}
        masks = [{"segmentation": rle.encode(draw_mask(number))}]
        (folder / "sa_1.json").write_text(json.dumps({"image": image, "annotations": masks}))
    upload(tmp_path, bucket / "data")
    here, there = (open_source(f"sa1b:{location}") for location in (tmp_path, "gs://bucket/data"))
    assert there.name(0).endswith("/a/c/sa_1.jpg") == here.name(0).endswith("/a/c/sa_1.jpg")
    assert there[0].masks == here[0].masks
