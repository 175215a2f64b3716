"""Batches by step: a pure function of (seed, step), whoever computes them and in whatever order.

Images come in an order shuffled anew every epoch. An unusable one is replaced by another, drawn by
its place in the order; so a batch is the same on any number of hosts, with any number of workers.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from sam_jax.data.example import BadSample, Example, Source

MAX_REPLACEMENTS = 100  # of one sample, before the source is taken to have no usable image


@dataclasses.dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used, and why."""

    index: int
    name: str
    reason: str
    detail: str


class Transform(Protocol):
    """Makes an example a row of a batch: `SegmentationTransform` and `RandomResizedCrop` do.

    Attributes:
      batch: the class of the batch; its fields are the arrays, and image_id.
    """

    batch: Any

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        """The arrays of the row.

        Raises:
          BadSample: if the example is unusable.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Loader:
    """Draws batches from a source.

    Attributes:
      source: the examples; indices: 'i', those that are drawn from.
      prepare: what makes an example a row, with random numbers of its own.
      batch_size: images of all hosts together.
      seed: of the order, and of what `transform` draws.
      host, hosts: which rows of a batch are read here: the host's share, in order.
    """

    source: Source
    indices: np.ndarray
    transform: Transform
    batch_size: int
    seed: int
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.hosts:
            raise ValueError(
                f"batch_size must be a multiple of the {self.hosts} hosts; got {self.batch_size}"
            )

    def batch(self, step: int) -> tuple[Any, list[SkippedSample]]:
        """This host's rows of a step's batch, and what could not be used for it."""
        rows = self.batch_size // self.hosts
        places = map(self.place, range(step * rows, (step + 1) * rows))
        return self.collate(list(map(self.sample, places)))

    def batches(
        self, start: int, stop: int, workers: int = 0, prefetch: int = 2
    ) -> Iterator[tuple[Any, list[SkippedSample]]]:
        """`batch` of the steps from start to stop, read ahead.

        Args:
          start, stop: steps.
          workers: processes that read; 0 for threads of this one.
          prefetch: batches to be ahead of who takes them; 0 reads each when it is asked for.
        """
        if not prefetch:
            yield from map(self.batch, range(start, stop))
            return
        rows = self.batch_size // self.hosts
        samples = grain.MapDataset.range(start * rows, stop * rows)
        samples = samples.map(self.place).map(self.sample)
        ahead = rows * prefetch
        options = grain.ReadOptions(num_threads=min(16, ahead), prefetch_buffer_size=ahead)
        stream = samples.to_iter_dataset(options)
        if workers:
            _parse_grain_flags()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        yield from stream.batch(rows, batch_fn=self.collate)

    def place(self, row: int) -> int:
        """The place, in the order of all hosts' samples, of this host's row of all its batches."""
        rows = self.batch_size // self.hosts
        return row // rows * self.batch_size + self.host * rows + row % rows

    def sample(self, place: int) -> tuple[dict[str, Any], list[SkippedSample]]:
        """The sample at a place in the endless order of samples, and those it replaces."""
        problems = []
        for attempt in range(MAX_REPLACEMENTS):
            index = self._index(place, attempt)
            rng = np.random.default_rng((self.seed, place // self.batch_size, index))
            try:
                arrays = self.transform(self.source[index], rng)
            except BadSample as error:
                name = self.source.name(index)
                problems.append(SkippedSample(index, name, error.reason, error.detail))
            else:
                return arrays | {"image_id": np.int32(index)}, problems
        raise ValueError(
            f"no usable image among {MAX_REPLACEMENTS} of {len(self.indices)} drawn; the last was "
            f"{problems[-1].name}: {problems[-1].detail}"
        )

    def collate(self, samples: Any) -> tuple[Any, list[SkippedSample]]:
        """Stacks samples into a batch, and joins their problems."""
        arrays, problems = zip(*samples, strict=True)
        stacked = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
        return self.transform.batch(**stacked), [problem for some in problems for problem in some]

    def _index(self, place: int, attempt: int) -> int:
        if attempt == 0:
            return int(self.indices[_order(len(self.indices), self.seed)[place]])
        rng = np.random.default_rng((self.seed, place, attempt))
        return int(self.indices[rng.integers(len(self.indices))])


@functools.lru_cache(maxsize=4)
def _order(n, seed):
    """Indices 0 to n - 1 by place, shuffled anew every n places."""
    return grain.MapDataset.range(n).shuffle(seed).repeat()


def _parse_grain_flags():
    """Grain's workers read absl flags, which nobody parses here."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
