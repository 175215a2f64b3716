"""Real runs that are stopped by signals, by values that are not finite, or by a full disk."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.running import CONFIG, finish, losses, start_run
from train.rows import read_rows

pytestmark = pytest.mark.long

SECONDS = 240


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `python -m train` in a process, with a session of its own."""
    config = tmp_path_factory.mktemp("configs") / "small.py"
    config.write_text(CONFIG)
    return functools.partial(start_run, config)


def wait_for(condition, *processes):
    """Waits until a condition holds, while the processes run."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_rows(workdir, count, *processes):
    wait_for(lambda: len(read_rows(workdir / "metrics.jsonl")) >= count, *processes)


def children(pid):
    with contextlib.suppress(FileNotFoundError):
        return {
            int(child)
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        }
    return set()


def end(process, signum):
    """Returns the step at which a signal stopped a run, after checking how it ended."""
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signum, output
    assert "Traceback" not in output
    name = signal.Signals(signum).name
    (step,) = re.findall(rf"^train: stopped at step (\d+) by {name}; the same", output, re.M)
    return int(step)


def saved_steps(workdir):
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


def test_a_stopped_run_continues_as_if_it_had_not_been_stopped(start, tmp_path):
    settings = ("num_steps=40", "checkpoint_every=40")
    finish(start(tmp_path / "once", *settings))
    workdir = tmp_path / "stopped"

    process = start(workdir, *settings)
    wait_for_rows(workdir, 3, process)
    process.send_signal(signal.SIGTERM)
    step = end(process, signal.SIGTERM)
    assert saved_steps(workdir) == {step}
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == list(range(1, step + 1))

    # A terminal sends SIGINT to all processes of the run.
    process = start(workdir, *settings, "data.workers=2", new_session=True)
    wait_for_rows(workdir, step + 3, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)
    step = end(process, signal.SIGINT)
    assert step in saved_steps(workdir)
    wait_for(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))

    finish(start(workdir, *settings, f"profile=({step - 1},{step + 2})"))
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert losses(workdir) == losses(tmp_path / "once")
    weights = "weights/weights.safetensors"
    assert (workdir / weights).read_bytes() == (tmp_path / "once" / weights).read_bytes()


def test_signals_before_and_after_training_leave_nothing_half_written(start, tmp_path):
    settings = ("num_steps=2", "data.held_out=::200")
    process = start(tmp_path / "run", *settings)
    wait_for((tmp_path / "run" / "config.json").exists, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 143
    assert "Traceback" not in output
    assert re.search(r"^train: stopped .*by SIGTERM; the same command resumes$", output, re.M)

    process = start(tmp_path / "run", *settings)
    wait_for((tmp_path / "run" / "weights").exists, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.endswith("train: stopped by SIGINT; the same command resumes\n")
    names = {path.name for path in (tmp_path / "run").iterdir()} - {"tensorboard"}
    assert names == {"config.json", "summary.json", "metrics.jsonl", "checkpoints", "weights"}


def test_a_signal_to_one_host_stops_both_after_the_same_step(start, tmp_path):
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"

    def start_hosts(*settings):
        return [
            start(
                tmp_path / "two",
                *("batch_size=8", "checkpoint_every=1000", *settings),
                devices=4,
                hosts=["--coordinator", address, "--processes", "2", "--process", str(i)],
            )
            for i in range(2)
        ]

    hosts = start_hosts("num_steps=1000")
    wait_for_rows(tmp_path / "two", 2, *hosts)
    hosts[1].send_signal(signal.SIGTERM)
    steps = {end(host, signal.SIGTERM) for host in hosts}
    assert saved_steps(tmp_path / "two") == steps
    (step,) = steps
    for host in start_hosts(f"num_steps={step + 2}"):
        finish(host)
    rows = read_rows(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, step + 3))


def test_a_diverged_run_keeps_its_last_finite_checkpoint(start, tmp_path):
    # A learning rate like this lets the parameters overflow after a few steps.
    settings = ("optimizer.peak_lr=1e12", "num_steps=60", "max_bad_steps=5", "checkpoint_every=1")
    process = start(tmp_path / "run", *settings)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert re.search(r"^train: the run diverged: .* optimizer.peak_lr", output, re.M)
    assert re.search(r"^step \d+.* changed nothing: the loss or the gradient", output, re.M)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["loss"] is None]
    assert rows
    assert not (tmp_path / "run" / "weights").exists()
    assert saved_steps(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path):
    """Fills a disk with a file."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_a_run_on_a_full_disk_ends_clearly_and_goes_on_when_there_is_room(start, small_disk):
    workdir, filler = small_disk / "run", small_disk / "filler"
    process = start(workdir, "num_steps=1000")
    wait_for((workdir / "checkpoints" / "4").exists, process)
    fill(filler)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert output.count("metrics cannot be written, the run goes on: [Errno 28]") == 1
    assert re.search(r"^train: the last \d checkpoints could not be saved", output, re.M)
    last = losses(workdir)[-1][0]
    assert len(saved_steps(workdir)) == 2

    filler.unlink()
    finish(start(workdir, f"num_steps={last + 4}"))
    steps = [step for step, *_ in losses(workdir)]
    assert steps[-1] == last + 4
    assert len({*steps}) == len(steps)
    assert (workdir / "weights").is_dir()


def test_a_run_whose_workdir_cannot_be_written_is_rejected(start, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = start(small_disk / "run")
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert re.search(r"^train: .*Read-only file system: .*run", output, re.M)


def test_a_run_whose_workdir_is_removed_ends_clearly(start, tmp_path):
    process = start(tmp_path / "run", "num_steps=1000")
    wait_for_rows(tmp_path / "run", 3, process)
    # Under another name, as the files of a save in progress could appear while they are removed.
    (tmp_path / "run").rename(tmp_path / "moved")
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert re.search(r"^train: .*/run was removed while the run went on", output, re.M)
