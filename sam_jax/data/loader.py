"""Loads batches by step. A batch is a pure function of (seed, step) and of nothing else.

Images are shuffled in every epoch. An unusable image is replaced by another one, which is sampled
by its position in the order. A batch is therefore the same for any number of hosts and workers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from sam_jax.data.example import BadSample, Example, Source, SourceError, count_reasons
from sam_jax.data.workers import Batches, SamplesInProgress, end_with_parent, reporting
from sam_jax.images.read import decoding_budget

MAX_ATTEMPTS = 100  # to find a usable image for one position, before loading fails


@dataclasses.dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used, or not all of whose masks could be used.

    Attributes:
      index: Its index in the source.
      name: Its name in the source.
      reason: The reason of its `BadSample`, or of that of its first unusable mask.
      detail: The detail of the same `BadSample`.
      skipped_masks: Number of its unusable masks by reason, if the sample is used without them.
        Empty if the sample was replaced by another one.
    """

    index: int
    name: str
    reason: str
    detail: str
    skipped_masks: dict[str, int] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Transform(Protocol):
    """Turns an example into a row of a batch, as `SegmentationTransform` does.

    Attributes:
      batch_type: The class of the batch. Its fields are the arrays, and image_id.
    """

    @property
    def batch_type(self) -> type:
        """The class of a batch."""
        ...

    def __call__(
        self,
        example: Example,
        rng: np.random.Generator,
        view_rng: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a row, without image_id and view.

        Args:
          example: The example.
          rng: The source of randomness.
          view_rng: The source of randomness of the changes to the image; `rng` by default.

        Raises:
          BadSample: If the example cannot be used.
        """
        ...


Row = dict[str, Any]  # arrays by field of the batch


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads batches from a source.

    Attributes:
      source: The examples.
      indices: Indices of the examples to load.
      transform: Turns an example into a row, with a separate random generator for each row.
      batch_size: Global batch size, over all hosts.
      seed: Seed of the order and of the transform.
      views: Number of fixed views of each image, of which the transform samples one. What is done
        to the image then depends on the view only, so that features of a view can be kept.
        0: every sample is new.
      host: Index of this host, which loads an equal, contiguous share of the rows.
      hosts: Number of hosts.
    """

    source: Source
    indices: Int[np.ndarray, " i"]
    transform: Transform
    batch_size: int
    seed: int
    views: int = 0
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          ValueError: If the hosts cannot share a batch equally.
        """
        if self.batch_size % self.hosts:
            raise ValueError(
                f"batch_size must be a multiple of the {self.hosts} hosts; got {self.batch_size}"
            )

    def batch(self, step: int) -> tuple[Any, list[SkippedSample]]:
        """Loads this host's rows of the batch of a step.

        Args:
          step: The step, from 0.

        Returns:
          The batch, and the samples that were skipped for it, entirely or in part.

        Raises:
          SourceError: If no usable image is found.
        """
        rows = self.batch_size // self.hosts
        positions = map(self.position, range(step * rows, (step + 1) * rows))
        return self.collate(list(map(self.sample, positions)))

    def batches(self, start: int, stop: int, workers: int = 0, prefetch: int = 2) -> Batches:
        """Loads the batches of several steps ahead of their use.

        Args:
          start: The first step.
          stop: The step after the last one.
          workers: Number of processes that load. 0 uses threads of this process.
          prefetch: Number of batches to load ahead. 0 loads each batch when it is asked for.

        Returns:
          An iterator over results of `batch`, which should be closed.
        """
        rows = self.batch_size // self.hosts
        ahead = rows * prefetch
        # While a sample is slow, its worker loads at most this number of later rows of its share.
        in_progress = SamplesInProgress(4 * max(1, ahead) * max(1, workers))
        if not prefetch:
            return Batches(map(self.batch, range(start, stop)), in_progress, self.source.name)
        samples = grain.MapDataset.range(start * rows, stop * rows)
        samples = samples.map(functools.partial(self._load, in_progress.path))
        options = grain.ReadOptions(num_threads=min(16, ahead), prefetch_buffer_size=ahead)
        stream = samples.to_iter_dataset(options)
        if workers:
            _mark_flags_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=end_with_parent
            )
        batches = iter(stream.batch(rows, batch_fn=self.collate))
        return Batches(batches, in_progress, self.source.name)

    def position(self, row: int) -> int:
        """Maps a row of this host to its position in the global sample order.

        Args:
          row: The number of the row among all rows that this host loads.

        Returns:
          The position.
        """
        rows = self.batch_size // self.hosts
        return row // rows * self.batch_size + self.host * rows + row % rows

    def sample(
        self, position: int, report: Callable[[int], None] = lambda index: None
    ) -> tuple[Row, list[SkippedSample]]:
        """Loads the sample at a position of the endless sample order.

        Args:
          position: The position.
          report: Is called with the index of each image before it is loaded.

        Returns:
          The row, the samples that it replaces, and the sample itself if masks were skipped.

        Raises:
          SourceError: If no usable image is found.
        """
        skipped: list[SkippedSample] = []
        for attempt in range(MAX_ATTEMPTS):
            index = self._index(position, attempt)
            report(index)
            rng = np.random.default_rng((self.seed, position // self.batch_size, index))
            view, view_rng = {}, None
            if self.views:
                view = {"view": np.int32(rng.integers(self.views))}
                view_rng = np.random.default_rng((index, int(view["view"])))
            try:
                with decoding_budget.hold():  # while the decoded image is in memory
                    example = self.source[index]
                    row, unusable = self.transform(example, rng, view_rng), example.skipped
                    del example
            except BadSample as error:
                name = self.source.name(index)
                skipped.append(SkippedSample(index, name, error.reason, error.detail))
                continue
            if unusable:
                name, first = self.source.name(index), unusable[0]
                counts = count_reasons(unusable)
                skipped.append(SkippedSample(index, name, first.reason, first.detail, counts))
            return row | {"image_id": np.int32(index)} | view, skipped
        raise SourceError(
            f"no usable image among {MAX_ATTEMPTS} of {len(self.indices)} drawn; the last was "
            f"{skipped[-1].name}: {skipped[-1].detail}"
        )

    def collate(
        self, samples: Sequence[tuple[Row, list[SkippedSample]]]
    ) -> tuple[Any, list[SkippedSample]]:
        """Stacks rows to a batch and concatenates their skipped samples.

        Args:
          samples: Results of `sample`.

        Returns:
          The batch, and the skipped samples.
        """
        rows, skipped = zip(*samples, strict=True)
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return self.transform.batch_type(**arrays), [s for of_row in skipped for s in of_row]

    def _load(self, path: str, row: int) -> tuple[Row, list[SkippedSample]]:
        """Loads the sample for a row of this host, and reports it in a `SamplesInProgress`."""
        with reporting(path, row) as report:
            return self.sample(self.position(row), report)

    def _index(self, position: int, attempt: int) -> int:
        if attempt == 0:
            return int(self.indices[_shuffled(len(self.indices), self.seed)[position]])
        rng = np.random.default_rng((self.seed, position, attempt))
        return int(self.indices[rng.integers(len(self.indices))])


@functools.lru_cache(maxsize=4)
def _shuffled(n: int, seed: int) -> grain.MapDataset:
    """Returns the indices 0 to n - 1 by position, shuffled differently in every epoch."""
    return grain.MapDataset.range(n).shuffle(seed).repeat()


def _mark_flags_as_parsed() -> None:
    """Marks absl flags as parsed. Workers of grain read them, and no program here parses them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
