"""Pseudorandom valid and invalid compressed run lengths for tests."""

from collections.abc import Iterator

import numpy as np

from sam_jax.masks import rle


def fuzzed(count: int) -> Iterator[dict]:
    """Generates RLEs of small sizes, as str and as bytes. At least a fifth of them are valid.

    Yields:
      RLEs of five kinds in turn: random bytes; random valid characters; a valid string with a
      character replaced; a valid string with a part removed or repeated; a valid string with empty
      runs and redundant groups of bits, which encoders do not write.
    """
    rng = np.random.default_rng(0)
    sizes = [[int(side) for side in rng.integers(1, 20, 2)] for _ in range(100)]
    strings = [rle.encode(rng.random(size) < rng.random())["counts"].encode() for size in sizes]
    noise = rng.integers(0, 256, (count, 20), np.uint8)
    characters = rng.integers(48, 112, (count, 20), np.uint8)
    ends = rng.integers(0, 21, count)
    fractions = rng.random((count, 20))
    for i in range(count):
        size, string = sizes[i // 5 % 100], strings[i // 5 % 100]
        first, second = (int(fraction * len(string)) for fraction in fractions[i, :2])
        if i % 5 == 0:
            counts = noise[i, : ends[i]].tobytes()
        elif i % 5 == 1:
            counts = characters[i, : ends[i]].tobytes()
        elif i % 5 == 2:
            counts = string[:first] + characters[i, :1].tobytes() + string[first + 1 :]
        elif i % 5 == 3:
            counts = string[:first] + string[second:]
        else:
            pixels = size[0] * size[1]
            bounds = np.sort(fractions[i, : ends[i]] * (pixels + 1)).astype(int)
            counts = _write(np.diff(bounds[:pixels], prepend=0, append=pixels).tolist(), i % 3)
        yield {"size": size, "counts": counts if i % 2 else counts.decode("latin-1")}


def _write(lengths: list[int], padding: int) -> bytes:
    """Encodes run lengths as a string, with `padding` redundant groups of bits per number."""
    codes = []
    for i, length in enumerate(lengths):
        value = length - lengths[i - 2] if i > 2 else length
        groups = [value >> 5 * group & 31 for group in range(3 + padding)]
        codes += [group + 32 for group in groups[:-1]] + groups[-1:]
    return bytes(code + 48 for code in codes)
