"""Tests that damaged samples get their reasons, and that batches do not depend on the order."""

import jax
import numpy as np
import pytest

from sam_jax.data.loader import Loader
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.data.sources.coco import open_coco
from sam_jax.data.validate import check, summarize
from tests.sam_jax.data import damaged

BATCH = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Returns a source with damaged samples, and their reasons."""
    folder = tmp_path_factory.mktemp("corpus")
    bad, partial = damaged.write_corpus(folder)
    return open_coco(str(folder)), bad, partial


def load(source, **fields):
    transform = SegmentationTransform((24, 32), masks_per_image=2, flips=True)
    return Loader(source, np.arange(len(source)), transform, batch_size=BATCH, seed=0, **fields)


def test_every_damage_has_its_reason(corpus):
    source, bad, partial = corpus
    findings = {finding.index: finding for finding in check(source)}
    assert {i: f.reason for i, f in findings.items() if f.reason} == bad
    skipped = {i: f.skipped_masks for i, f in findings.items() if f.skipped_masks}
    assert skipped == {i: {reason: 1} for i, reason in partial.items()}
    assert "0x" not in str(findings)
    assert findings == {finding.index: finding for finding in check(source)}
    summary = summarize(findings.values())
    assert summary["usable"] == len(source) - len(bad)


def test_training_meets_every_damage_in_the_same_order(corpus):
    source, bad, partial = corpus
    steps = len(source) // BATCH  # an epoch
    expected = [load(source).batch(step) for step in range(steps)]
    skipped = [sample for _, samples in expected for sample in samples]
    found = {s.index: s.reason for s in skipped if not s.skipped_masks}
    assert found == bad
    found = {s.index: s.skipped_masks for s in skipped if s.skipped_masks}
    assert found == {i: {reason: 1} for i, reason in partial.items()}
    for prefetch in (0, 3):
        for (batch, samples), (right, in_order) in zip(
            load(source).batches(0, steps, prefetch=prefetch), expected, strict=True
        ):
            jax.tree.map(np.testing.assert_array_equal, batch, right)
            assert samples == in_order
    for step, (right, in_order) in enumerate(expected):
        hosts = [load(source, host=host, hosts=2).batch(step) for host in range(2)]
        np.testing.assert_array_equal(np.concatenate([b.image for b, _ in hosts]), right.image)
        assert [sample for _, samples in hosts for sample in samples] == in_order
