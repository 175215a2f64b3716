"""Reads all examples of a source to find those that cannot be used."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from sam_jax.data.example import BadSample, Source
from sam_jax.masks import rle


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of checking one sample.

    Attributes:
      index: Its index in the source.
      name: Its name in the source.
      masks: Number of usable masks.
      reason: The reason of its `BadSample`; None if it can be used.
      detail: The detail of its `BadSample`; empty if it can be used.
    """

    index: int
    name: str
    masks: int = 0
    reason: str | None = None
    detail: str = ""

    def __str__(self) -> str:
        return printable(
            f"{self.name}: {self.reason or 'usable'}: {self.detail or f'{self.masks} masks'}"
        )


def check(source: Source) -> Iterator[Finding]:
    """Decodes every image and every mask.

    Args:
      source: The source.

    Yields:
      One finding a sample.
    """
    for index in range(len(source)):
        name = source.name(index)
        try:
            masks = source[index].masks
            for i, mask in enumerate(masks):
                _check_mask(i, mask)
        except BadSample as error:
            yield Finding(index, name, reason=error.reason, detail=error.detail)
        else:
            yield Finding(index, name, masks=len(masks))


def summarize(findings: Iterable[Finding]) -> dict[str, Any]:
    """Counts findings.

    Args:
      findings: One finding a sample.

    Returns:
      {"samples", "usable", "masks", "reasons", "bad"}, ready for JSON. "reasons" are counts by
      reason, most frequent first. "bad" lists the samples that cannot be used.
    """
    samples = masks = 0
    bad = []
    for finding in findings:
        samples += 1
        masks += finding.masks
        if finding.reason is not None:
            bad.append(
                {name: getattr(finding, name) for name in ("index", "name", "reason", "detail")}
            )
    reasons = collections.Counter(entry["reason"] for entry in bad)
    return {
        "samples": samples,
        "usable": samples - len(bad),
        "masks": masks,
        "reasons": dict(reasons.most_common()),
        "bad": bad,
    }


def printable(text: str) -> str:
    """Escapes what could upset a terminal; the names of files may be anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _check_mask(index: int, mask: Any) -> None:
    try:
        rle.decode(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", f"mask {index}: {error}") from error
