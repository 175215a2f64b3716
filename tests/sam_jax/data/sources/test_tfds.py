"""Tests of TensorFlow Datasets in ArrayRecord, written and read without TensorFlow."""

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.decode import decode_image
from sam_jax.data.example import BadSample, SourceError
from sam_jax.data.sources.tfds import open_tfds
from sam_jax.masks import rle

tfds = pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")

SIZE = (20, 30)
VERSIONS = {"imagenet2012": "5.1.0", "lvis": "1.4.0", "segment_anything": "1.0.0"}


def encode(pixels, format):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def jpeg(seed, size=SIZE):
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return encode(np.asarray(Image.fromarray(small).resize(size[::-1])), "JPEG")


def masks_of(seed, count=3, size=SIZE):
    rng = np.random.default_rng(seed)
    masks = rng.random((count, *size)) < 0.3
    return list(masks)


def segment_anything(seed, masks=None, sizes=None, **image):
    box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
    masks = masks_of(seed) if masks is None else masks
    fields = {"content": jpeg(seed), "file_name": f"sa_{seed}.jpg", "image_id": seed}
    fields |= {"height": SIZE[0], "width": SIZE[1], **image}
    encoded = [mask if isinstance(mask, dict) else rle.encode(mask) for mask in masks]
    annotations = [
        {
            "id": i,
            "area": 1,
            "bbox": box,
            "crop_box": box,
            "point_coords": [[1.0, 2.0]],
            "predicted_iou": 0.9,
            "stability_score": 0.9,
            "segmentation": segmentation,
        }
        for i, segmentation in enumerate(encoded)
    ]
    return {"image": fields, "annotations": annotations}


def lvis(seed, masks=None, image=None):
    masks = masks_of(seed) if masks is None else masks
    encoded = [
        mask if isinstance(mask, bytes) else encode(mask.astype(np.uint8) * 255, "PNG")
        for mask in masks
    ]
    objects = [
        {"id": i, "area": 1, "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "label": 5}
        | {"segmentation": segmentation}
        for i, segmentation in enumerate(encoded)
    ]
    return {
        "image": jpeg(seed) if image is None else image,
        "image/id": seed,
        "neg_category_ids": [1],
        "not_exhaustive_category_ids": [],
        "objects": objects,
    }


def write(folder, name, splits, shards=2):
    """Writes the features, the info and the shards of a dataset, as `tfds build` does."""
    version = VERSIONS[name]
    builder = tfds.builder(name, data_dir=folder / "unused", file_format="array_record")
    version_folder = folder / name / version
    version_folder.mkdir(parents=True)
    (version_folder / "features.json").write_text(json.dumps(builder.info.features.to_json()))
    infos = []
    for split, examples in splits.items():
        records = [e if isinstance(e, bytes) else serialize(builder, e) for e in examples]
        parts = np.array_split(np.arange(len(records)), shards)
        for i, part in enumerate(parts):
            path = version_folder / f"{name}-{split}.array_record-{i:05d}-of-{shards:05d}"
            writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
            for index in part:
                writer.write(records[index])
            writer.close()
        lengths = [str(len(part)) for part in parts]
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info = {"name": split, "shardLengths": lengths, "numBytes": "1"}
        infos.append(info | {"filepathTemplate": template})
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": infos}
    (version_folder / "dataset_info.json").write_text(json.dumps(info))
    return version_folder


def serialize(builder, example):
    return builder.info.features.serialize_example(example)


def reason(source, index=0):
    with pytest.raises(BadSample) as error:
        source[index]
    return error.value.reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write(folder, "segment_anything", {"train": [segment_anything(i) for i in range(5)]})
    splits = {"train": range(10, 13), "validation": range(20, 24)}
    write(folder, "lvis", {split: map(lvis, seeds) for split, seeds in splits.items()})
    return folder


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("segment_anything", range(5)),
        ("segment_anything/train", range(5)),
        ("segment_anything:1.0.0/train", range(5)),
        ("lvis", range(10, 13)),
        ("lvis/validation", range(20, 24)),
        ("lvis:1.4.0/validation", range(20, 24)),
    ],
)
def test_examples_are_read_in_any_order(folder, name, seeds):
    source = open_tfds(f"{name}@{folder}")
    assert len(source) == len(seeds)
    for index in [*range(len(seeds)), *reversed(range(len(seeds)))]:
        example = source[index]
        image = np.asarray(Image.open(io.BytesIO(jpeg(seeds[index]))))
        assert np.array_equal(example.image, image)
        for mask, expected in zip(example.masks, masks_of(seeds[index]), strict=True):
            assert np.array_equal(rle.decode(mask), expected)
    dataset, _, split = name.partition("/")
    expected = f"{dataset.split(':')[0]}/{split or 'train'} record 1"
    assert source.name(1) == expected
    with pytest.raises(IndexError):
        source[len(seeds)]


def test_imagenet_has_images_without_masks(tmp_path):
    examples = [{"image": jpeg(i), "label": i, "file_name": f"{i}.JPEG"} for i in range(3)]
    write(tmp_path, "imagenet2012", {"train": [*examples, examples[0] | {"image": b"text"}]})
    source = open_tfds(f"imagenet2012@{tmp_path}")
    for i in range(3):
        image = np.asarray(Image.open(io.BytesIO(jpeg(i))))
        np.testing.assert_array_equal(source[i].image, image)
        assert source[i].masks == []
    assert reason(source, 3) == "broken image"


@pytest.mark.parametrize("name", ["segment_anything", "lvis/validation"])
def test_images_can_be_read_without_masks(folder, name):
    source = open_tfds(f"{name}@{folder}")
    np.testing.assert_array_equal(source.image(1), source[1].image)
    np.testing.assert_array_equal(decode_image(source.encoded(1), None), source.image(1))


def test_tensorflow_is_not_imported(folder):
    code = f"""
import sys
from sam_jax.data.open import open_source
for name in ("segment_anything", "lvis/validation"):
    source = open_source("tfds:" + name + "@{folder}", decode_size=(8, 8))
    print(source[1].image.shape, len(source[1].masks))
print(sorted(m for m in sys.modules if m.split(".")[0] in ("tensorflow", "jax", "grain", "orbax")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["(10, 15, 3) 3", "(10, 15, 3) 3", "[]"]


def test_a_source_can_be_pickled_before_and_after_reading(folder):
    source = open_tfds(f"lvis@{folder}")
    for _ in range(2):
        again = pickle.loads(pickle.dumps(source))
        assert again[2].masks == source[2].masks


EMPTY = np.zeros(SIZE, bool)
OTHER = np.ones((6, 7), bool)


def test_reasons_of_bad_segment_anything_records(tmp_path):
    examples = {
        "no masks": segment_anything(1, masks=[]),
        "empty mask": segment_anything(1, masks=[EMPTY]),
        "broken mask": segment_anything(1, masks=[{"size": SIZE, "counts": "é"}]),
        "size mismatch": segment_anything(1, masks=[OTHER]),
        "broken image": segment_anything(1, content=b"text"),
        "broken json": segment_anything(1, height=0),
        "broken record": b"no protobuf",
    }
    write(tmp_path, "segment_anything", {"train": examples.values()})
    source = open_tfds(f"segment_anything@{tmp_path}")
    assert [reason(source, i) for i in range(len(source))] == list(examples)


def test_reasons_of_bad_lvis_records(tmp_path):
    examples = {
        "no masks": lvis(1, masks=[]),
        "empty mask": lvis(1, masks=[EMPTY]),
        "broken mask": lvis(1, masks=[b"text"]),
        "size mismatch": lvis(1, masks=[OTHER]),
        "broken image": lvis(1, image=jpeg(1)[:300]),
        "broken record": b"",
    }
    write(tmp_path, "lvis", {"train": examples.values()})
    source = open_tfds(f"lvis@{tmp_path}")
    assert [reason(source, i) for i in range(len(source))] == list(examples)


def test_features_of_other_kinds_are_bad_records(tmp_path):
    from tensorflow_datasets.proto import tf_example_pb2

    minimal = tf_example_pb2.Example()
    minimal.features.feature["image"].bytes_list.value.append(b"x")
    builder = tfds.builder("segment_anything", data_dir=tmp_path / "unused")
    good = serialize(builder, segment_anything(1))
    records = [minimal.SerializeToString()]
    for name in ("image/height", "image/content", "annotations/segmentation/size"):
        example = tf_example_pb2.Example.FromString(good)
        example.features.feature[name].float_list.value.append(1.0)
        records.append(example.SerializeToString())
    write(tmp_path, "segment_anything", {"train": records})
    source = open_tfds(f"segment_anything@{tmp_path}")
    assert {reason(source, i) for i in range(len(source))} == {"broken record"}


def test_damaged_and_missing_shards(tmp_path):
    version_folder = write(
        tmp_path, "segment_anything", {"train": [segment_anything(i) for i in range(4)]}, 4
    )
    shards = sorted(version_folder.glob("*.array_record-*"))
    shards[0].unlink()
    shards[1].write_bytes(b"")
    data = bytearray(shards[2].read_bytes())
    data[65536:65600] = bytes(64)
    shards[2].write_bytes(data)
    source = open_tfds(f"segment_anything@{tmp_path}")
    assert [reason(source, i) for i in range(3)] == ["missing file", *["broken record"] * 2]
    assert source[3].masks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must be DATASET"),
        ("coco", "the dataset one of imagenet2012, lvis, segment_anything"),
        ("lvis/a/b", "must be DATASET"),
        ("lvis/test@{}", "lvis has the splits train, validation; got 'test'"),
        ("lvis/train[:10]@{}", "must be DATASET"),
        ("lvis:1.2.0@{}", r"cannot be opened in .*1\.2\.0.* Build it with `tfds build lvis"),
        ("lvis@{}/missing", "it is not there in ArrayRecord. Build it with .* after an @"),
    ],
)
def test_errors_of_opening(folder, name, message):
    with pytest.raises(SourceError, match=message) as error:
        open_tfds(name.format(folder))
    assert "\n" not in str(error.value)


def test_the_default_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(SourceError, match=f"lvis cannot be opened in {tmp_path}"):
        open_tfds("lvis")
    (tmp_path / "link").symlink_to(folder)
    assert len(open_tfds("lvis@~/link")) == 3
    assert not Path(tmp_path / "lvis").exists()
