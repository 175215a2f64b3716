"""TensorFlow Datasets `segment_anything` and `lvis`, and `imagenet2012`, without TensorFlow.

The records of a dataset built in ArrayRecord are read by `tfds.data_source` as they are, and their
`tf.train.Example` is taken apart here: tensorflow_datasets 4.9 cannot leave images in a sequence
undecoded, nor decode them smaller, without TensorFlow. To build a dataset takes TensorFlow and a
lot of time: `tfds build segment_anything --file_format=array_record`.

Source: `datasets/segment_anything` and `datasets/lvis` in tensorflow/datasets, whose features these
are, and `datasets/imagenet2012`, whose images come without masks and whose labels are not read.
Deliberate difference: LVIS has images without annotations; they cannot be used.
"""

import dataclasses
import os
import re
from typing import Any

import numpy as np

from sam_jax.data import decode
from sam_jax.data.example import BadSample, Example, SourceError, check_index
from sam_jax.masks import rle

NAMES = ("imagenet2012", "lvis", "segment_anything")
_NAME = re.compile(r"(?P<name>\w+)(?P<version>:[0-9.]+)?(?:/(?P<split>\w+))?(?:@(?P<folder>.+))?")


@dataclasses.dataclass(frozen=True, eq=False)
class Tfds:
    """The records of a split. Worker processes must be spawned: readers do not survive a fork.

    Attributes:
      dataset: one of NAMES; split: its split.
      records: what `tfds.data_source` gave, bytes by index.
      reduce_to: see `read_image`.
    """

    dataset: str
    split: str
    records: Any
    reduce_to: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        if self.dataset == "imagenet2012":
            return Example(image=self.image(index), masks=[])
        features = _features(self.records, index)
        if self.dataset == "lvis":
            return _lvis(features, self.reduce_to)
        return _segment_anything(features, self.reduce_to)

    def image(self, index: int) -> np.ndarray:
        return decode.decode_image(self.encoded(index), None, self.reduce_to)

    def encoded(self, index: int) -> bytes:
        check_index(index, len(self))
        name = "image/content" if self.dataset == "segment_anything" else "image"
        return _one(_features(self.records, index), name, bytes)

    def name(self, index: int) -> str:
        return f"{self.dataset}/{self.split} record {index}"


def open_tfds(name: str, reduce_to: tuple[int, int] | None = None) -> Tfds:
    """Opens a dataset that has been built.

    Args:
      name: `DATASET[:VERSION][/SPLIT][@FOLDER]`, such as `lvis/validation@/data/tfds`; the split is
        `train` and the folder that of tensorflow_datasets, if they are not given.
      reduce_to: see `read_image`.
    Raises:
      SourceError: if there is no such dataset, split or folder, or not in ArrayRecord.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["name"] not in NAMES:
        raise SourceError(
            f"tfds: {name!r} must be DATASET[:VERSION][/SPLIT][@FOLDER], and the dataset one of "
            f"{', '.join(NAMES)}; for example lvis/validation@/data/tfds"
        )
    dataset, split = match["name"], match["split"] or "train"
    folder = match["folder"] and os.path.expanduser(match["folder"])
    splits = _open(dataset + (match["version"] or ""), folder)
    if split not in splits:
        raise SourceError(f"tfds: {dataset} has the splits {', '.join(splits)}; got {split!r}")
    return Tfds(dataset, split, splits[split], reduce_to)


def _open(name: str, folder: str | None) -> dict[str, Any]:
    """The records of every split."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SourceError(f'tfds: {error}; pip install "sam_jax[train]"') from error
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        splits = tfds.data_source(name, data_dir=folder, download=False, deserialize_method=raw)
    except NotImplementedError as error:
        raise SourceError(_how_to_build(name, folder, "it is not there in ArrayRecord")) from error
    except Exception as error:  # of many kinds, and with pages of text
        raise SourceError(_how_to_build(name, folder, str(error).split("\n")[0])) from error
    if not splits:
        raise SourceError(_how_to_build(name, folder, "it is not there"))
    return splits


def _how_to_build(name: str, folder: str | None, why: str) -> str:
    where = folder or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return (
        f"tfds: {name} cannot be opened in {where}: {why}. Build it with `tfds build {name} "
        "--file_format=array_record`, or name its folder after an @"
    )


def _features(records: Any, index: int) -> Any:
    """The features of a record, by name."""
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return tf_example_pb2.Example.FromString(records[index]).features.feature
    except Exception as error:  # of array_record, which has only RuntimeError, and of protobuf
        gone = "No such file" in str(error)
        raise BadSample("missing file" if gone else "broken record", str(error)) from error


def _segment_anything(features: Any, reduce_to: tuple[int, int] | None) -> Example:
    size = decode.check_size(
        _one(features, "image/height", int), _one(features, "image/width", int)
    )
    counts = _all(features, "annotations/segmentation/counts", bytes)
    sizes = _all(features, "annotations/segmentation/size", int)
    if len(sizes) != 2 * len(counts):
        raise BadSample(
            "broken record", f"{len(counts)} masks, {len(sizes)} numbers of their sizes"
        )
    masks = [
        {"size": sizes[2 * i : 2 * i + 2], "counts": text.decode("ascii", "replace")}
        for i, text in enumerate(counts)
    ]
    checked = decode.check_masks(masks, size)
    image = decode.decode_image(_one(features, "image/content", bytes), size, reduce_to)
    return Example(image=image, masks=checked)


def _lvis(features: Any, reduce_to: tuple[int, int] | None) -> Example:
    content = _one(features, "image", bytes)
    masks = [decode.decode_mask(data) for data in _all(features, "objects/segmentation", bytes)]
    if not masks:
        raise BadSample("no masks", "the image has no annotations")
    size = masks[0].shape
    image = decode.decode_image(content, size, reduce_to)
    return Example(
        image=image, masks=decode.check_masks([rle.encode(mask) for mask in masks], size)
    )


def _one(features: Any, name: str, kind: type) -> Any:
    values = _all(features, name, kind)
    if len(values) != 1:
        raise BadSample("broken record", f"{name} must be one value; got {len(values)}")
    return values[0]


def _all(features: Any, name: str, kind: type) -> list[Any]:
    """The ints or bytes of a feature; none if it is of another kind or not there."""
    feature = features[name]
    return list(feature.bytes_list.value if kind is bytes else feature.int64_list.value)
