"""Facts about TPU chips.

Source: `jax/_src/tpu_info.py`, and the data sheets of the chips.
"""

import dataclasses

from train.flops import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
      peak_flops: FLOP/s in bfloat16.
      hbm_bytes: Size of its memory.
      hbm_bandwidth: Bytes/s of its memory.
      flops_per_cycle: FLOPs of one cycle at the peak.
      splash_efficiency: Share of the peak that splash attention reaches in its matrix products.
    """

    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    flops_per_cycle: int
    splash_efficiency: float

    @property
    def cycles_per_second(self) -> float:
        """The clock rate."""
        return self.peak_flops / self.flops_per_cycle


# By the first part of a topology's name.
CHIPS = {
    "v4": Chip(PEAK_FLOPS["TPU v4"], 32 * GIB, 1.23e12, 262144, splash_efficiency=0.7),
    "v5e": Chip(PEAK_FLOPS["TPU v5 lite"], 16 * GIB, 0.82e12, 131072, splash_efficiency=0.7),
    "v5p": Chip(PEAK_FLOPS["TPU v5"], 95 * GIB, 2.76e12, 262144, splash_efficiency=0.7),
    "v6e": Chip(PEAK_FLOPS["TPU v6 lite"], 32 * GIB, 1.64e12, 524288, splash_efficiency=0.4),
}
