"""Tests that threads and forked processes get no wrong predictions without a word."""

import concurrent.futures
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import sam_jax
from sam_jax.predict import fork

ROOT = Path(__file__).resolve().parents[3]
THREADS, ROUNDS = 8, 10
CLICK = dict(point_coords=np.array([[30.0, 20.0]]), point_labels=np.array([1]))


def photo(seed):
    return np.random.default_rng(seed).integers(0, 256, (48, 72, 3), dtype=np.uint8)


def predict(predictor, seed):
    predictor.set_image(photo(seed))
    return predictor.predict(**CLICK)[2]


@pytest.fixture(scope="module")
def expected(tiny):
    predictor = sam_jax.SamPredictor(*tiny)
    return [predict(predictor, seed) for seed in range(THREADS)]


def in_threads(work):
    """Returns the results of `work(seed, barrier)`, each of THREADS threads with its seed."""
    barrier = threading.Barrier(THREADS, timeout=120)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda seed: work(seed, barrier), range(THREADS)))


def test_a_thread_whose_image_was_replaced_gets_an_error(tiny, expected):
    """Checks that one thread has the right prediction if all set an image, and all others none."""
    predictor = sam_jax.SamPredictor(*tiny)

    def work(seed, barrier):
        outcomes = []
        for _ in range(ROUNDS):
            predictor.set_image(photo(seed))
            barrier.wait()
            try:
                outcomes.append(predictor.predict(**CLICK)[2])
            except RuntimeError as error:
                outcomes.append(str(error))
            barrier.wait()
        return outcomes

    for outcomes in zip(*in_threads(work), strict=True):
        errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert len(errors) == THREADS - 1
        assert all("was replaced by thread" in error for error in errors)
        for outcome, right in zip(outcomes, expected, strict=True):
            assert isinstance(outcome, str) or np.array_equal(outcome, right)


def test_threads_with_their_own_predictors_share_the_variables(tiny, expected):
    results = in_threads(lambda seed, _: predict(sam_jax.SamPredictor(*tiny), seed))
    np.testing.assert_array_equal(results, expected)


def test_threads_may_predict_on_one_image(tiny, expected):
    predictor = sam_jax.SamPredictor(*tiny)
    predictor.set_image(photo(0))
    results = in_threads(lambda *_: predictor.predict(**CLICK)[2])
    np.testing.assert_array_equal(results, expected[:1] * THREADS)


def test_the_error_names_both_threads(tiny):
    predictor = sam_jax.SamPredictor(*tiny)
    predictor.set_image(photo(0))
    other = threading.Thread(target=predictor.set_image, args=(photo(1),), name="web request 7")
    other.start()
    other.join()
    message = r"this thread \(MainThread\) set was replaced by thread web request 7"
    for use in (lambda: predictor.predict(**CLICK), predictor.get_image_embedding):
        with pytest.raises(RuntimeError, match=message):
            use()
    assert predictor.original_size == (48, 72)
    predictor.set_image(photo(2))
    predictor.predict(**CLICK)


def test_a_forked_process_is_warned_once(monkeypatch):
    monkeypatch.setattr(fork, "_used_by", 1)
    with pytest.warns(RuntimeWarning, match='forked.*multiprocessing.get_context."spawn"'):
        fork.warn_if_forked()
    fork.warn_if_forked()


def test_a_real_fork_is_warned():
    code = (
        "import os\n"
        "from sam_jax.predict.fork import warn_if_forked\n"
        "warn_if_forked()\n"
        "child = os.fork()\n"
        "warn_if_forked()\n"
        "if child: os.waitpid(child, 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert done.stderr.count("was forked from a process that had used a model") == 1
