"""A profiler's trace of some steps."""

import jax.numpy as jnp
import pytest

from train.profiler import Profiler


@pytest.mark.parametrize(
    ("start", "stop", "traces"),
    [
        (1, 9, 1),  # an uninterrupted run
        (4, 9, 1),  # a run that was resumed among the steps of the trace
        (1, 5, 1),  # a run that ends among them
        (7, 9, 0),  # a run that was resumed after them
    ],
)
def test_a_trace_is_written_for_the_steps_of_a_run_that_belong_to_it(tmp_path, start, stop, traces):
    profiler = Profiler(tmp_path, (3, 6))
    for step in range(start, stop + 1):
        profiler.begin_step(step)
        profiler.end_step(step, {"loss": jnp.arange(step).sum()})
    profiler.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == traces


def test_a_run_without_a_trace_writes_nothing(tmp_path):
    profiler = Profiler(tmp_path, ())
    profiler.begin_step(1)
    profiler.end_step(1, {})
    profiler.close()
    assert not list(tmp_path.iterdir())
