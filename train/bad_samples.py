"""The images of a run that could not be used."""

import dataclasses
import logging
from pathlib import Path

from sam_jax.data.loader import SkippedSample
from sam_jax.io.atomic import write_json_lines
from train.config import ConfigError
from train.rows import append_row, read_rows

log = logging.getLogger("train")


class BadSamples:
    """Counts images that could not be used, lists them in a file, and stops a run with too many.

    Images that are used without some of their masks are listed, but do not count as unusable.

    A resumed run adds to the list. Images that were listed before count again if they still cannot
    be used.

    Attributes:
      path: A JSON lines file with one image per line. It exists if there is any such image.
      limit: The fraction of the images that may be unusable.
      count: The number of all images.
      unusable: The unusable images that this process has met, by index.
      listed: The (index, reason) of each image in the file.
    """

    def __init__(self, path: Path, limit: float, count: int) -> None:
        self.path, self.limit, self.count = path, limit, count
        self.unusable: dict[int, SkippedSample] = {}
        rows = read_rows(path)
        self.listed = {(row["index"], row["reason"]) for row in rows}
        if rows:
            write_json_lines(path, rows)  # without a line that was not written to the end
        else:
            path.unlink(missing_ok=True)

    def add(self, skipped: list[SkippedSample]) -> None:
        """Adds the samples that were skipped in a step.

        Args:
          skipped: The samples; see `Loader.batch`.

        Raises:
          ConfigError: If too many images are unusable.
        """
        for sample in skipped:
            if not sample.skipped_masks:
                self.unusable[sample.index] = sample
            if (sample.index, sample.reason) not in self.listed:
                self.listed.add((sample.index, sample.reason))
                self._write(sample)
        if len(self.unusable) > self.limit * self.count:
            last = list(self.unusable.values())[-1]
            raise ConfigError(
                f"{len(self.unusable)} of {self.count} images are unusable, more than data.max_bad="
                f"{self.limit} allows; the last was {last.name}: {last.reason}: {last.detail}. "
                f"{self.path} lists all of them; `sam-jax dataset check` finds them beforehand"
            )

    def _write(self, sample: SkippedSample) -> None:
        """Adds a line to the file, or logs why it cannot be added."""
        try:
            append_row(self.path, dataclasses.asdict(sample))
        except OSError as error:
            log.warning("%s is unusable, and cannot be listed: %s", sample.name, error)
