"""The cost of a kernel call, which compilers do not estimate.

A kernel's file measures or bounds its cost once, in units that do not depend on the chip.
`train/aot/hlo_cost.py` turns it into seconds.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Shapes = Sequence[Sequence[int]]


class Cost(NamedTuple):
    """The resources of one kernel call; the scarcest of them determines the time.

    Attributes:
      cycles: Bundles that the compiler schedules on v5e, of one cycle each
        (`--xla_jf_dump_llo_text`).
      bytes: Memory traffic.
      attention_flops: Matrix products of splash attention, which reaches a known share of the peak.
    """

    cycles: float = 0.0
    bytes: float = 0.0
    attention_flops: float = 0.0


# Maps the shapes of the floating-point operands, and the bytes of all operands and results, to the
# cost of the call; or to None if this size has not been measured.
CostFunction = Callable[[Shapes, int], Cost | None]
