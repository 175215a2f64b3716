"""Training on a corpus of which one percent is damaged in each of many ways."""

import json

import pytest

from sam_jax.data.sources.coco import open_coco
from tests.sam_jax.data import damaged
from tests.train.running import CONFIG, finish, losses, start_run

HELD_OUT = 30


@pytest.mark.long
def test_a_run_lists_all_damage_and_is_repeatable(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # the names of the images are not
    config, corpus = tmp_path / "small.py", tmp_path / "corpus"
    config.write_text(CONFIG)
    corpus.mkdir()
    bad, partial = damaged.write_corpus(corpus)
    count = len(open_coco(str(corpus)))
    settings = [f"data.source=coco:{corpus}", f"data.held_out={count - HELD_OUT}:"]
    settings += ["batch_size=15", f"num_steps={(count - HELD_OUT) // 15}", "checkpoint_every=99"]

    runs = [tmp_path / "first", tmp_path / "second"]
    for workdir in runs:
        finish(start_run(config, workdir, *settings, "data.max_bad=0.5", devices=1))
    assert losses(runs[0]) == losses(runs[1])
    listed = [(workdir / "bad_samples.jsonl").read_bytes() for workdir in runs]
    assert listed[0] == listed[1]
    rows = [json.loads(row) for row in listed[0].splitlines()]
    found = {row["index"]: row["reason"] for row in rows if not row["skipped_masks"]}
    assert found == {i: reason for i, reason in bad.items() if i < count - HELD_OUT}
    found = {row["index"]: row["skipped_masks"] for row in rows if row["skipped_masks"]}
    assert found == {i: {reason: 1} for i, reason in partial.items() if i < count - HELD_OUT}

    process = start_run(config, tmp_path / "strict", *settings, devices=1)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "images are unusable, more than data.max_bad=0.001 allows" in output
    assert "Traceback" not in output
