"""Output of libtpu on machines without a TPU."""

import os

from sam_jax.io import tpu


def test_variables_that_are_set_are_not_changed(monkeypatch):
    monkeypatch.setattr(tpu, "has_tpu", lambda: False)
    for name in tpu.ENVIRONMENT_WITHOUT_TPU:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_MIN_LOG_LEVEL", "0")
    tpu.silence_libtpu()
    assert os.environ["TPU_MIN_LOG_LEVEL"] == "0"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    for name in tpu.ENVIRONMENT_WITHOUT_TPU:
        monkeypatch.delenv(name)


def test_nothing_is_changed_on_a_machine_with_a_tpu(monkeypatch):
    monkeypatch.setattr(tpu, "has_tpu", lambda: True)
    before = dict(os.environ)
    tpu.silence_libtpu()
    assert dict(os.environ) == before
