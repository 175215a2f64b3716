"""Reads all of a source to see what in it cannot be used."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from sam_jax.data.example import BadSample, Source
from sam_jax.masks import rle


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one sample.

    Attributes:
      index, name: in the source; masks: how many can be used.
      reason, detail: of the `BadSample`; None and "" if it can be used.
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
    """Decodes every image and paints every mask, a sample at a time."""
    for index in range(len(source)):
        name = source.name(index)
        try:
            masks = source[index].masks
            for i, mask in enumerate(masks):
                _paint(i, mask)
        except BadSample as error:
            yield Finding(index, name, reason=error.reason, detail=error.detail)
        else:
            yield Finding(index, name, masks=len(masks))


def summarize(findings: Iterable[Finding]) -> dict[str, Any]:
    """Counts findings -> {"samples", "usable", "masks", "reasons", "bad"}, fit for JSON."""
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
    """A text with what could upset a terminal escaped: names are what strangers chose."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _paint(index, mask):
    try:
        rle.decode(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", f"mask {index}: {error}") from error
