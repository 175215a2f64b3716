"""Batches by step: a pure function of (seed, step), whoever computes them and in whatever order.

Images come in an order shuffled anew every epoch. An unusable one is replaced by another, drawn by
its place in the order; so a batch is the same on any number of hosts, with any number of workers.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.struct
import grain
import numpy as np

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.masks import rle
from sam_jax.predict.transforms import image_to_frame

MAX_AREA = 0.9  # of the image; larger masks are left out. Kirillov et al. 2023, appendix A
MAX_REPLACEMENTS = 100  # of one sample, before the source is taken to have no usable image


@flax.struct.dataclass
class Batch:
    """Images in the model's frame, with n masks each.

    Attributes:
      image: 'b h w 3' uint8 RGB, zero outside the image.
      size: 'b 2' int32, (height, width) of the image in the frame.
      image_id: 'b' int32, its index in the source; keys randomness.
      masks: 'b n h (w/8)' uint8, eight pixels a byte, the leftmost in the highest bit.
      mask_id: 'b n' int32, index of the mask in its image's annotations; keys randomness.
      valid: 'b n' bool, the masks that are not fillers.
      embedding: 'b gh gw c' of the images, where it is known already.
    """

    image: Any
    size: Any
    image_id: Any
    masks: Any
    mask_id: Any
    valid: Any
    embedding: Any = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A sample that could not be used, and why."""

    index: int
    name: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Loader:
    """Draws batches from a source.

    Attributes:
      source: the examples; indices: 'i', those that are drawn from.
      frame: (height, width) of the model.
      batch_size: images of all hosts together.
      masks_per_image: n of a batch; more masks are drawn from at random, fewer filled up.
      seed: of the order, of which masks are taken, of flips and turns.
      flips, turns: mirror images left to right, turn them by multiples of 90 degrees, at random.
      host, hosts: which rows of a batch are read here: the host's share, in order.
    """

    source: Source
    indices: np.ndarray
    frame: tuple[int, int]
    batch_size: int
    masks_per_image: int
    seed: int
    flips: bool = False
    turns: bool = False
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.hosts:
            raise ValueError(
                f"batch_size must be a multiple of the {self.hosts} hosts; got {self.batch_size}"
            )

    def batch(self, step: int) -> tuple[Batch, list[Problem]]:
        """This host's rows of a step's batch, and what could not be used for it."""
        rows = self.batch_size // self.hosts
        places = map(self.place, range(step * rows, (step + 1) * rows))
        return collate(list(map(self.sample, places)))

    def batches(
        self, start: int, stop: int, workers: int = 0, prefetch: int = 2
    ) -> Iterator[tuple[Batch, list[Problem]]]:
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
        yield from stream.batch(rows, batch_fn=collate)

    def place(self, row: int) -> int:
        """The place, in the order of all hosts' samples, of this host's row of all its batches."""
        rows = self.batch_size // self.hosts
        return row // rows * self.batch_size + self.host * rows + row % rows

    def sample(self, place: int) -> tuple[dict[str, Any], list[Problem]]:
        """The sample at a place in the endless order of samples, and those it replaces."""
        problems = []
        for attempt in range(MAX_REPLACEMENTS):
            index = self._index(place, attempt)
            rng = np.random.default_rng((self.seed, place // self.batch_size, index))
            try:
                arrays = prepare(
                    self.source[index],
                    self.frame,
                    self.masks_per_image,
                    self.flips,
                    self.turns,
                    rng,
                )
            except BadSample as error:
                name = self.source.name(index)
                problems.append(Problem(index, name, error.reason, error.detail))
            else:
                return arrays | {"image_id": np.int32(index)}, problems
        raise ValueError(
            f"no usable image among {MAX_REPLACEMENTS} of {len(self.indices)} drawn; the last was "
            f"{problems[-1].name}: {problems[-1].detail}"
        )

    def _index(self, place: int, attempt: int) -> int:
        if attempt == 0:
            return int(self.indices[_order(len(self.indices), self.seed)[place]])
        rng = np.random.default_rng((self.seed, place, attempt))
        return int(self.indices[rng.integers(len(self.indices))])


def collate(samples) -> tuple[Batch, list[Problem]]:
    """Stacks samples into a batch, and joins their problems."""
    arrays, problems = zip(*samples, strict=True)
    stacked = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
    return Batch(**stacked), [problem for some in problems for problem in some]


def prepare(
    example: Example,
    frame: tuple[int, int],
    masks_per_image: int,
    flips: bool,
    turns: bool,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Brings an example into the frame, with up to `masks_per_image` of its masks.

    Returns:
      The arrays of a row of a `Batch`, without image_id.
    Raises:
      BadSample: if a mask is broken, or none can be used.
    """
    quarter_turns = int(rng.integers(4)) if turns else 0
    flip = bool(rng.integers(2)) if flips else False
    move = functools.partial(_flip_and_turn, flip=flip, quarter_turns=quarter_turns)
    image, size = image_to_frame(move(example.image), frame)
    size_before = size[::-1] if quarter_turns % 2 else size

    masks = np.zeros((masks_per_image, frame[0], -(-frame[1] // 8)), np.uint8)
    mask_id = np.zeros(masks_per_image, np.int32)
    count = 0
    for i in rng.permutation(len(example.masks)):
        if count == masks_per_image:
            break
        mask = _paint(example.masks[i], size_before)
        if mask is not None:
            _pack(move(mask), masks[count])
            mask_id[count] = i
            count += 1
    if not count:
        raise BadSample("no masks", f"none of {len(example.masks)} masks can be used")
    return {
        "image": image,
        "size": np.array(size, np.int32),
        "masks": masks,
        "mask_id": mask_id,
        "valid": np.arange(masks_per_image) < count,
    }


def _paint(mask, size):
    """A mask 'h w' bool in the frame, or None if it is too large, or too small to be seen there."""
    try:
        lengths = rle.runs(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", str(error)) from error
    height, width = mask["size"]
    if lengths[1::2].sum() > MAX_AREA * height * width:
        return None
    painted = rle.paint_resized(lengths, mask["size"], size)
    return painted if painted.any() else None


def _pack(mask, bits):
    """Sets the pixels of a mask 'h w' among bits that are zero, looking at its own box alone."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left = columns[0] // 8
    packed = np.packbits(mask[rows[0] : rows[-1] + 1, 8 * left : columns[-1] + 1], axis=-1)
    bits[rows[0] : rows[-1] + 1, left : left + packed.shape[1]] = packed


def _flip_and_turn(x, *, flip, quarter_turns):
    return np.rot90(x[:, ::-1] if flip else x, quarter_turns)


@functools.lru_cache(maxsize=4)
def _order(n, seed):
    """Indices 0 to n - 1 by place, shuffled anew every n places."""
    return grain.MapDataset.range(n).shuffle(seed).repeat()


def _parse_grain_flags():
    """Grain's workers read absl flags, which nobody parses here."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
