"""TensorFlow Datasets `segment_anything`, `lvis` and `imagenet2012`, without TensorFlow.

`tfds.data_source` reads the raw records of a dataset that was built in ArrayRecord, and their
`tf.train.Example` is parsed here: without TensorFlow, tensorflow_datasets 4.9 can neither leave
images in a sequence encoded nor decode them smaller. Building a dataset needs TensorFlow and a lot
of time: `tfds build segment_anything --file_format=array_record`.

Source: `datasets/segment_anything`, `datasets/lvis` and `datasets/imagenet2012` in
tensorflow/datasets, which define the features.

Differences: Images of LVIS without annotations cannot be used. Labels of ImageNet are not read.
"""

import dataclasses
import os
import re
from typing import Any

from sam_jax.data import decode
from sam_jax.data.decode_masks import Masks, check_masks, decode_mask
from sam_jax.data.example import RLE, BadSample, Example, SourceError, check_index
from sam_jax.data.sources.base import FileSource
from sam_jax.io.extras import install_hint
from sam_jax.masks import rle

DATASETS = ("imagenet2012", "lvis", "segment_anything")
LOCATION = re.compile(
    r"(?P<dataset>\w+)(?P<version>:[0-9.]+)?(?:/(?P<split>\w+))?(?:@(?P<folder>.+))?"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tfds(FileSource):
    """The records of a split.

    Worker processes must be spawned, because the readers of ArrayRecord do not survive a fork.

    Attributes:
      dataset: One of DATASETS.
      split: Name of its split.
      records: Serialized examples by index, as returned by `tfds.data_source`.
    """

    dataset: str
    split: str
    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def image_path(self, index: int) -> str:
        """Returns the name of a record; its image is in no file."""
        return f"{self.dataset}/{self.split} record {index}"

    def __getitem__(self, index: int) -> Example:
        """Reads an example, parsing its record once."""
        features = self._features(index)
        masks = self._masks(features)
        return self.make_example(self._encoded(features), masks)

    def encoded(self, index: int) -> bytes:
        """Reads the file of an image in a record."""
        return self._encoded(self._features(index))

    def read_masks(self, index: int) -> Masks:
        """Reads the masks in a record."""
        return self._masks(self._features(index))

    def _features(self, index: int) -> Any:
        """Returns the features of a record by name."""
        from tensorflow_datasets.proto import tf_example_pb2

        check_index(index, len(self))
        try:
            return tf_example_pb2.Example.FromString(self.records[index]).features.feature
        except Exception as error:  # array_record raises RuntimeError, protobuf others
            is_missing = "No such file" in str(error)
            reason = "missing file" if is_missing else "broken record"
            raise BadSample(reason, str(error)) from error

    def _encoded(self, features: Any) -> bytes:
        name = "image/content" if self.dataset == "segment_anything" else "image"
        return _value(features, name, bytes)

    def _masks(self, features: Any) -> Masks:
        if self.dataset == "segment_anything":
            return _segment_anything_masks(features)
        if self.dataset == "lvis":
            return _lvis_masks(features)
        return Masks([], [])


def open_tfds(location: str, decode_size: tuple[int, int] | None = None) -> Tfds:
    """Opens a dataset that has been built.

    Args:
      location: `DATASET[:VERSION][/SPLIT][@FOLDER]`, such as `lvis/validation@/data/tfds`. The
        default split is `train`; the default folder is that of tensorflow_datasets.
      decode_size: See `FileSource`.

    Returns:
      The records of the split.

    Raises:
      SourceError: If there is no such dataset, split or folder, or it is not in ArrayRecord.
    """
    match = LOCATION.fullmatch(location)
    if match is None or match["dataset"] not in DATASETS:
        raise SourceError(
            f"tfds: {location!r} must be DATASET[:VERSION][/SPLIT][@FOLDER], and the dataset one "
            f"of {', '.join(DATASETS)}; for example lvis/validation@/data/tfds"
        )
    dataset, split = match["dataset"], match["split"] or "train"
    folder = match["folder"] and os.path.expanduser(match["folder"])
    splits = _open_splits(dataset + (match["version"] or ""), folder)
    if split not in splits:
        raise SourceError(f"tfds: {dataset} has the splits {', '.join(splits)}; got {split!r}")
    return Tfds(dataset, split, splits[split], decode_size=decode_size)


def _open_splits(name: str, folder: str | None) -> dict[str, Any]:
    """Returns the records of every split."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SourceError(f"tfds: {error}; {install_hint('train')}") from error
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        splits = tfds.data_source(name, data_dir=folder, download=False, deserialize_method=raw)
    except NotImplementedError as error:
        raise SourceError(_how_to_build(name, folder, "it is not there in ArrayRecord")) from error
    except Exception as error:  # of many types, with pages of text
        raise SourceError(_how_to_build(name, folder, str(error).split("\n")[0])) from error
    if not splits:
        raise SourceError(_how_to_build(name, folder, "it is not there"))
    return splits


def _how_to_build(name: str, folder: str | None, problem: str) -> str:
    searched = folder or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return (
        f"tfds: {name} cannot be opened in {searched}: {problem}. Build it with `tfds build {name} "
        "--file_format=array_record`, or name its folder after an @"
    )


def _segment_anything_masks(features: Any) -> Masks:
    size = decode.check_size(
        _value(features, "image/height", int), _value(features, "image/width", int)
    )
    counts = _values(features, "annotations/segmentation/counts", bytes)
    sizes = _values(features, "annotations/segmentation/size", int)
    if len(sizes) != 2 * len(counts):
        raise BadSample(
            "broken record", f"{len(counts)} masks, {len(sizes)} numbers of their sizes"
        )
    masks = [
        {"size": sizes[2 * i : 2 * i + 2], "counts": text.decode("ascii", "replace")}
        for i, text in enumerate(counts)
    ]
    return check_masks(masks, size)


def _lvis_masks(features: Any) -> Masks:
    _value(features, "image", bytes)  # a record without an image is broken, with or without masks
    files = _values(features, "objects/segmentation", bytes)
    if not files:
        raise BadSample("no masks", "the image has no annotations")
    return check_masks(files, None, _read_mask)


def _read_mask(data: bytes) -> RLE:
    return rle.encode(decode_mask(data, "the file"))


def _value(features: Any, name: str, kind: type) -> Any:
    """Returns the only value of a feature."""
    values = _values(features, name, kind)
    if len(values) != 1:
        raise BadSample("broken record", f"{name} must be one value; got {len(values)}")
    return values[0]


def _values(features: Any, name: str, kind: type) -> list[Any]:
    """Returns the ints or bytes of a feature; none if it is missing or of another kind."""
    feature = features[name]
    return list(feature.bytes_list.value if kind is bytes else feature.int64_list.value)
