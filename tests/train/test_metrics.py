"""The log of a run: its timing metrics, and how it handles damage and a full disk."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.train.running import ROOT
from train.metrics import Metrics
from train.rows import read_rows

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


def test_values_that_are_not_finite_are_null(tmp_path):
    metrics = Metrics(tmp_path, start=0, stop=1)
    metrics.log(1, {"loss": float("nan"), "miou_of_rounds": [0.5, float("inf")], "bad_steps": 1})
    metrics.log_evaluation(1, {"loss": float("inf"), "clicks": {"1": float("nan")}})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert (row["loss"], row["miou_of_rounds"], row["bad_steps"]) == (None, [0.5, None], 1)
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": None, "clicks": {"1": None}}


def test_damaged_rows_are_reported_and_a_row_half_written_is_dropped(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": NaN}', b'{"step": 2, "los', b"\0\0\xff", b"[]", b'{"step": 5}']
    path.write_bytes(b"\n".join([*lines, b'{"step": 6}', b'{"step": 7, "loss": 0.']))
    Metrics(tmp_path, start=5, stop=9).close()
    assert path.read_text() == '{"step": 1, "loss": null}\n{"step": 5}\n'
    assert [message.split("metrics.jsonl: ")[1] for message in caplog.messages] == [
        'line 2 is damaged and left out: b\'{"step": 2, "los\'',
        "line 3 is damaged and left out: b'\\x00\\x00\\xff'",
        "line 4 is damaged and left out: b'[]'",
    ]


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    Metrics(tmp_path, start=5, stop=9).close()
    assert not (tmp_path / "metrics.jsonl").exists()


# Limits the size of files, so that a write fails in the middle as on a full disk.
FULL_DISK = """
import json, logging, resource, signal, sys
from pathlib import Path
from train.metrics import Metrics

logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Path(sys.argv[1])
run.mkdir()
metrics = Metrics(run, start=0, stop=9)
for step in range(1, 7):
    limit = 200 if step in (2, 3, 5) else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    metrics.log(step, {"loss": float(step), "more": "x" * 100})
metrics.close()
"""


def test_metrics_that_cannot_be_written_do_not_end_a_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK)
    process = subprocess.run(
        [sys.executable, script, tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("metrics cannot be written, the run goes on: [Errno 27]") == 2
    assert "Traceback" not in process.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 4, 6]
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert [step for step, name in read_events(events) if name == "loss"] == [1, 4, 6]


def read_events(path):
    """Yields the step and the name of every value in an event file, up to a damaged one."""
    data = path.read_bytes()
    while len(data) >= 8 and len(data) >= 16 + (size := struct.unpack("<Q", data[:8])[0]):
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        yield from ((event.step, value.tag) for value in event.summary.value)
