"""The timing metrics in the log of a run."""

import time

import pytest

from train.metrics import Metrics, read_rows

VALUES = {"loss": 1.0, "miou": 0.5}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_time_spent_waiting_for_data_is_logged(tmp_path):
    metrics = Metrics(tmp_path, start=0, stop=4)
    metrics.begin_stage(batch_size=3, peak_step_seconds=0.01)

    def slow_loader():
        for i in range(4):
            time.sleep(0.06)
            yield i

    for done, batch in enumerate(metrics.timed(slow_loader()), start=1):
        assert batch == done - 1
        time.sleep(0.02)
        if done % 2 == 0:
            metrics.log(done, VALUES)
    metrics.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        # Sleeps are never shorter than asked for.
        assert row["step_seconds"] >= 0.08
        assert 0.3 < row["waiting_for_data"] < 1
        assert row["images_per_second"] == pytest.approx(3 / row["step_seconds"], rel=0.01)
        assert row["mfu"] == pytest.approx(0.01 / row["step_seconds"], abs=1e-3)


def test_mfu_is_not_logged_without_a_known_peak(tmp_path):
    metrics = Metrics(tmp_path, start=0, stop=1)
    metrics.log(1, VALUES)
    metrics.close()
    assert "mfu" not in read_rows(tmp_path / "metrics.jsonl")[0]
