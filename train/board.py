"""The event file that TensorBoard shows."""

import math
import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from sam_jax.io.atomic import append_bytes


class Board:
    """Writes scalars to an event file of its own.

    The file is created at the first write. It is not kept open, and a write that fails leaves it
    as it was.

    Attributes:
      path: The event file.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Chooses the name of the file.

        Args:
          folder: The folder, which is created at the first write.
          start: The number of steps done. TensorBoard drops events of later steps, which a killed
            run has left.
        """
        now = time.time()
        self.path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{start + 1}"
        self._first_events = [
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=start + 1, session_log=SessionLog(status=SessionLog.START)),
        ]

    def write(self, step: int, values: dict[str, object]) -> None:
        """Writes the finite floats among some values.

        Args:
          step: The number of steps done.
          values: Values by name.

        Raises:
          OSError: If they cannot be written. None of them is written then.
        """
        events = [
            Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            for name, value in values.items()
            if isinstance(value, float) and math.isfinite(value)
        ]
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            events = self._first_events + events
        append_bytes(self.path, b"".join(map(encode_record, events)))


def encode_record(event: Event) -> bytes:
    """Encodes an event as a record of a TFRecord file: its size and its bytes, with checksums."""
    data = event.SerializeToString()
    size = struct.pack("<Q", len(data))
    return b"".join((size, _checksum(size), data, _checksum(data)))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
