"""Checkpoints that are damaged, unreadable, of other runs, or of other meshes."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from configs.sam_tiny import config as tiny
from tests import object_store
from train import checkpoints as module
from train.checkpoint_reading import CheckpointError
from train.checkpoints import Checkpoints
from train.config import ConfigError
from train.sharding import init_sharded, make_mesh
from train.state import init_state

DATA = {"train": {"images": 86, "names": "0123456789abcdef"}}
RNG = np.random.default_rng(0)
VARIABLES = {
    "params": {
        "kernel": RNG.standard_normal((64, 96), np.float32),
        "bias": np.linspace(0, 1, 40).astype(jnp.bfloat16),
    },
    "constants": {
        "flags": np.arange(5) % 2 == 0,
        "noise": RNG.integers(0, 256, 2**16, np.uint8),  # cannot be compressed
    },
}


def make_state(mesh, step=0, variables=VARIABLES):
    """Returns a state with values of its own at each step."""
    optimizer = optax.adam(1e-3)

    def init(variables, step):
        params = variables["params"]
        scaled = variables | {"params": jax.tree.map(lambda x: x + step.astype(x.dtype), params)}
        return dataclasses.replace(init_state(scaled, optimizer), step=step.astype(jnp.int32))

    return init_sharded(mesh, init, variables, np.float32(step))


def open_checkpoints(folder, mesh, config=tiny, data=DATA):
    return Checkpoints(folder, mesh, config, data)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(8)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = open_checkpoints(folder, mesh)
    for step in (2, 4):
        checkpoints.save(step, make_state(mesh, step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, mesh, **settings):
    checkpoints = open_checkpoints(folder, mesh, **settings)
    try:
        return checkpoints.restore(lambda step: make_state(mesh))
    finally:
        checkpoints.close()


def assert_equal(state, expected):
    """Compares all bits."""
    for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def truncate(step):
    """Truncates the files with the arrays of a checkpoint."""
    for path in (step / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def hashes(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_empty_folder_starts_at_the_beginning(mesh, tmp_path):
    assert restore(tmp_path / "checkpoints", mesh) is None


def test_the_newest_checkpoint_is_restored(mesh, folder, caplog):
    assert_equal(restore(folder, mesh), make_state(mesh, 4))
    assert caplog.messages == []


def test_a_damaged_checkpoint_is_kept_under_a_name_that_says_so(mesh, folder, caplog):
    noise = VARIABLES["constants"]["noise"].tobytes()[:64]
    for path in (folder / "4" / "state").rglob("d/*"):
        if noise in path.read_bytes():
            flip(path, 8 * path.read_bytes().index(noise) + 100)
    before = {path.relative_to(folder / "4"): x for path, x in hashes(folder / "4").items()}
    assert_equal(restore(folder, mesh), make_state(mesh, 2))
    (message,) = caplog.messages
    assert "checkpoint 4 is damaged: wrong checksum of constants/noise" in message
    assert message.endswith("it is kept as 4.damaged")
    aside = folder / "4.damaged"
    reason = (aside / "reason.txt").read_text().strip()
    assert reason in message
    (aside / "reason.txt").unlink()
    assert {path.relative_to(aside): x for path, x in hashes(aside).items()} == before
    assert not (folder / "4").exists()

    # The step is saved again, is damaged again, and gets another name.
    checkpoints = open_checkpoints(folder, mesh)
    assert_equal(checkpoints.restore(lambda step: make_state(mesh)), make_state(mesh, 2))
    checkpoints.save(4, make_state(mesh, 4))
    checkpoints.close()
    assert_equal(restore(folder, mesh), make_state(mesh, 4))
    shutil.rmtree(folder / "4" / "state" / "d")
    assert_equal(restore(folder, mesh), make_state(mesh, 2))
    assert {path.name for path in folder.iterdir()} == {"2", "4.damaged", "4.damaged_2"}


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA", "record/metadata"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "missing"])
def test_every_file_may_be_damaged(mesh, folder, name, damage):
    path = folder / "4" / name
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    elif damage == "zeros":
        path.write_bytes(bytes(size))
    else:
        os.truncate(path, size // 2 if damage == "truncated" else 0)
    assert_equal(restore(folder, mesh), make_state(mesh, 2))
    assert (folder / "4.damaged" / "reason.txt").read_text().strip()


def test_a_run_without_an_intact_checkpoint_stops(mesh, folder):
    for step in ("2", "4"):
        truncate(folder / step)
    for _ in range(2):  # also when it is started again
        with pytest.raises(CheckpointError, match=r"no checkpoint .* 2.damaged, 4.damaged. To sta"):
            restore(folder, mesh)
    assert {path.name for path in folder.iterdir()} == {"2.damaged", "4.damaged"}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "No")])
def test_files_that_cannot_be_read_stop_the_run(mesh, folder, monkeypatch, error):
    """The reasons may be of the machine, so nothing is renamed."""

    def fail(*_, **__):
        raise error

    before = hashes(folder)
    for name in ("read_record", "storage.read_range"):
        with monkeypatch.context() as patch:
            if name == "storage.read_range":
                patch.setattr(module.ocp.StandardCheckpointHandler, "restore", fail)
            patch.setattr(f"train.checkpoint_reading.{name}", fail)
            with pytest.raises(CheckpointError, match=r"4 cannot be read: .*Nothing was changed"):
                restore(folder, mesh)
    assert hashes(folder) == before


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 9 GB")])
def test_too_little_memory_stops_the_run(mesh, folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module.ocp.StandardCheckpointHandler, "restore", fail)
    before = hashes(folder)
    with pytest.raises(CheckpointError, match="4 needs more memory than there is"):
        restore(folder, mesh)
    assert hashes(folder) == before


def test_an_error_that_passes_is_no_damage(mesh, folder, monkeypatch):
    read = module.ocp.StandardCheckpointHandler.restore
    failures = [RuntimeError("UNAVAILABLE")]

    def fail_once(*args, **kwargs):
        if failures:
            raise failures.pop()
        return read(*args, **kwargs)

    monkeypatch.setattr(module.ocp.StandardCheckpointHandler, "restore", fail_once)
    assert_equal(restore(folder, mesh), make_state(mesh, 4))


def test_other_arrays_stop_the_run(mesh, folder):
    params = VARIABLES["params"]
    others = {
        "/more was None, is 'float32.3.'": {"more": np.zeros(3, np.float32)},
        "/bias was 'bfloat16.40.', is 'float32.40.'": {"bias": np.zeros(40, np.float32)},
        "/kernel was 'float32.64, 96.', is 'float": {"kernel": np.ones((8, 96), np.float32)},
    }
    before = hashes(folder)
    for message, changed in others.items():
        other = make_state(mesh, variables=VARIABLES | {"params": params | changed})
        checkpoints = open_checkpoints(folder, mesh)
        with pytest.raises(CheckpointError, match=f"holds other arrays .*{message}"):
            checkpoints.restore(lambda step, other=other: other)
        checkpoints.close()
    assert hashes(folder) == before


def test_checkpoints_of_another_run_are_rejected(mesh, folder):
    before = hashes(folder)
    with pytest.raises(ConfigError, match="another config or other images: seed was 0, is 1"):
        restore(folder, mesh, config=dataclasses.replace(tiny, seed=1))
    with pytest.raises(ConfigError, match=r"data.train.images was 86, is 87\. Choose"):
        restore(folder, mesh, data={"train": DATA["train"] | {"images": 87}})
    assert hashes(folder) == before
    longer = dataclasses.replace(tiny, num_steps=2 * tiny.num_steps)
    assert_equal(restore(folder, mesh, config=longer), make_state(mesh, 4))


def test_newer_formats_and_other_steps_stop_the_run(mesh, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoints.FORMAT", 0)
        with pytest.raises(CheckpointError, match="a newer version with another format"):
            restore(folder, mesh)
    (folder / "4").rename(folder / "6")
    with pytest.raises(CheckpointError, match="6 holds step 4"):
        restore(folder, mesh)


def test_other_versions_are_named_but_accepted(mesh, folder, monkeypatch, caplog):
    now = module.versions() | {"optax": "9.9", "orbax-checkpoint": "9.9"}
    for reader in ("checkpoints", "checkpoint_reading"):
        monkeypatch.setattr(f"train.{reader}.versions", lambda: now)
    assert_equal(restore(folder, mesh), make_state(mesh, 4))
    (message,) = caplog.messages
    assert message.startswith("since checkpoint 4 was written: ")
    assert "optax was" in message
    # An error may now be due to the versions.
    truncate(folder / "4")
    with pytest.raises(CheckpointError, match=r"4 cannot be restored.*orbax-checkpoint was"):
        restore(folder, mesh)


def test_a_checkpoint_without_a_record_is_accepted_with_a_note(mesh, folder, caplog):
    shutil.rmtree(folder / "4" / "record")
    assert_equal(restore(folder, mesh), make_state(mesh, 4))
    (message,) = caplog.messages
    assert message.startswith("checkpoint 4 holds no checksums, because an older version wrote it")
    truncate(folder / "4")
    with pytest.raises(CheckpointError, match=r"rename it to 4\.damaged"):
        restore(folder, mesh)


def test_the_record_says_what_the_checkpoint_is(folder):
    record = json.loads((folder / "4" / "record" / "metadata").read_text())
    assert record["step"] == 4
    assert record["config"]["batch_size"] == tiny.batch_size
    assert record["data"] == DATA
    assert {"sam_jax", "revision", "python", "jax", "orbax-checkpoint"} <= set(record["versions"])
    kernel = record["arrays"]["params/kernel"]
    assert (kernel["dtype"], kernel["shape"]) == ("float32", [64, 96])
    assert len(kernel["checksum"]) == 16


@pytest.mark.parametrize("shape", [(4, 2), (2, 2), (1, 1)])
def test_a_checkpoint_moves_to_another_mesh_and_back(mesh, folder, tmp_path, monkeypatch, shape):
    monkeypatch.setattr("train.sharding.MIN_SHARD_SIZE", 1)
    monkeypatch.setattr("train.checksum.MIN_SHARD_SIZE", 1)  # as for large arrays
    data, fsdp = shape
    other = make_mesh(8, fsdp, jax.devices()[: data * fsdp])
    state = restore(folder, other)
    expected = PartitionSpec("fsdp") if fsdp > 1 else PartitionSpec()
    assert state.params["kernel"].sharding.spec == expected
    assert state.params["kernel"].sharding.mesh.devices.size == data * fsdp
    assert_equal(state, make_state(mesh, 4))
    back = open_checkpoints(tmp_path / "back", other)
    back.save(4, state)
    back.close()
    assert_equal(restore(tmp_path / "back", mesh), make_state(mesh, 4))
    records = [
        json.loads((f / "4" / "record" / "metadata").read_text()) for f in (folder, back.folder)
    ]
    assert records[0]["arrays"] == records[1]["arrays"]


def test_a_damaged_checkpoint_in_a_store_is_renamed(mesh, folder, monkeypatch):
    """Orbax cannot write to the store of the tests, so only the renaming is done in it."""
    bucket = object_store.install(monkeypatch)
    object_store.ObjectStore().put(str(folder), "gs://bucket/run/checkpoints", recursive=True)
    checkpoints = open_checkpoints(folder, mesh)
    checkpoints.folder = bucket / "run" / "checkpoints"
    checkpoints._set_aside(4, "a reason")
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["2", "4.damaged"]
    assert (checkpoints.folder / "4.damaged" / "reason.txt").read_text() == "a reason\n"
    copied = {
        path.relative_to(folder / "4"): content for path, content in hashes(folder / "4").items()
    }
    for path, content in copied.items():
        assert (checkpoints.folder / "4.damaged" / path).read_bytes() == content


def test_failed_saves_are_reported_and_survived(mesh, folder, caplog):
    checkpoints = open_checkpoints(folder, mesh)
    moved = folder.with_name("away")

    def break_folder():
        folder.rename(moved)
        folder.write_text("no folder")

    def mend_folder():
        folder.unlink()
        moved.rename(folder)

    break_folder()
    for step in (6, 8):
        checkpoints.save(step, make_state(mesh, step))
    mend_folder()
    checkpoints.save(10, make_state(mesh, 10))
    checkpoints.close()
    assert [message.split(":")[0] for message in caplog.messages] == [
        "checkpoint 6 could not be saved",
        "checkpoint 8 could not be saved",
    ]
    assert all(m.endswith("the ones before it are kept") and "\n" not in m for m in caplog.messages)
    assert_equal(restore(folder, mesh), make_state(mesh, 10))
    assert {path.name for path in folder.iterdir()} == {"4", "10"}

    checkpoints = open_checkpoints(folder, mesh)
    break_folder()
    for step in (12, 14):
        checkpoints.save(step, make_state(mesh, step))
    with pytest.raises(CheckpointError, match="the last 3 checkpoints could not be saved"):
        checkpoints.save(16, make_state(mesh, 16))
    checkpoints.close()
    mend_folder()
    assert_equal(restore(folder, mesh), make_state(mesh, 10))


@pytest.mark.slow
def test_no_damage_is_restored(mesh, saved, tmp_path):
    """200 flipped bits and 20 truncated files or zeroed blocks, over all files by their sizes."""
    rng = np.random.default_rng(1)
    states = {step: make_state(mesh, step) for step in (2, 4)}
    files = [path.relative_to(saved) for path in sorted((saved / "4").rglob("*")) if path.is_file()]
    sizes = np.array([(saved / path).stat().st_size for path in files])
    fallbacks = 0
    for i in range(220):
        folder = shutil.copytree(saved, tmp_path / str(i))
        path = folder / files[rng.choice(len(files), p=sizes / sizes.sum())]
        position = int(rng.integers(path.stat().st_size))
        if i < 200:
            flip(path, 8 * position + int(rng.integers(8)))
        elif i % 2:
            os.truncate(path, position)
        else:
            content = bytearray(path.read_bytes())
            content[position : position + 4096] = bytes(len(content[position : position + 4096]))
            path.write_bytes(content)
        before = {p.relative_to(folder / "4"): x for p, x in hashes(folder / "4").items()}
        state = restore(folder, mesh)
        step = int(state.step)
        assert_equal(state, states[step])
        assert (folder / "4.damaged").exists() == (step == 2)
        if step == 2:  # the evidence is kept
            fallbacks += 1
            (folder / "4.damaged" / "reason.txt").unlink()
            after = {
                p.relative_to(folder / "4.damaged"): x
                for p, x in hashes(folder / "4.damaged").items()
            }
            assert after == before
        shutil.rmtree(folder)
    assert fallbacks >= 150  # the others hit bytes that nothing depends on
