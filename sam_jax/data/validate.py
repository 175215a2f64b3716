"""Reads all examples of a source to find those that cannot be used."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from sam_jax.data.example import BadSample, Source, count_reasons
from sam_jax.masks import rle


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of checking one sample.

    Attributes:
      index: Its index in the source.
      name: Its name in the source.
      masks: Number of usable masks.
      reason: The reason of its `BadSample`; None if it can be used.
      detail: The detail of its `BadSample`, or of that of the first mask that cannot be used; empty
        if there is none.
      skipped_masks: Number of masks that cannot be used by reason, if the sample can be used
        without them.
    """

    index: int
    name: str
    masks: int = 0
    reason: str | None = None
    detail: str = ""
    skipped_masks: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if self.reason is not None:
            return printable(f"{self.name}: {self.reason}: {self.detail}")
        text = f"{self.name}: usable: {self.masks} masks"
        if self.skipped_masks:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.skipped_masks.items())
            text += f" without {counts}: {self.detail}"
        return printable(text)


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
            example = source[index]
            for i, mask in enumerate(example.masks):
                _check_mask(i, mask)
        except BadSample as error:
            yield Finding(index, name, reason=error.reason, detail=error.detail)
        else:
            skipped = example.skipped
            yield Finding(
                index,
                name,
                masks=len(example.masks),
                detail=skipped[0].detail if skipped else "",
                skipped_masks=count_reasons(skipped),
            )


def summarize(findings: Iterable[Finding]) -> dict[str, Any]:
    """Counts findings.

    Args:
      findings: One finding a sample.

    Returns:
      {"samples", "usable", "masks", "reasons", "bad", "skipped_masks", "used_in_part"}, ready for
      JSON. "reasons" are counts of samples by reason, most frequent first, and "skipped_masks"
      those of masks of usable samples. "bad" lists the samples that cannot be used, "used_in_part"
      those that can be used without some of their masks.
    """
    samples = masks = 0
    bad, used_in_part = [], []
    skipped_masks: collections.Counter[str] = collections.Counter()
    for finding in findings:
        samples += 1
        masks += finding.masks
        if finding.reason is not None:
            bad.append(
                {name: getattr(finding, name) for name in ("index", "name", "reason", "detail")}
            )
        elif finding.skipped_masks:
            skipped_masks.update(finding.skipped_masks)
            fields = ("index", "name", "skipped_masks", "detail")
            used_in_part.append({name: getattr(finding, name) for name in fields})
    reasons = collections.Counter(entry["reason"] for entry in bad)
    return {
        "samples": samples,
        "usable": samples - len(bad),
        "masks": masks,
        "reasons": dict(reasons.most_common()),
        "bad": bad,
        "skipped_masks": dict(skipped_masks.most_common()),
        "used_in_part": used_in_part,
    }


def printable(text: str) -> str:
    """Escapes what could upset a terminal; the names of files may be anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _check_mask(index: int, mask: Any) -> None:
    try:
        rle.decode(mask)
    except rle.RLEError as error:
        raise BadSample("broken mask", f"mask {index}: {error}") from error
