"""Tests that threads share the budget of pixels, without overtaking and without deadlocks."""

import threading

import pytest

from sam_jax.images.budget import PixelBudget

SECONDS = 60  # after which a test fails; events come at once


def start(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def join(threads):
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_the_sum_never_exceeds_the_limit():
    budget, lock, peak, total = PixelBudget(10), threading.Lock(), [0], [0]

    def work(pixels):
        for _ in range(50):
            with budget.acquire(pixels):
                with lock:
                    total[0] += min(pixels, 10)
                    peak[0] = max(peak[0], total[0])
                with lock:
                    total[0] -= min(pixels, 10)

    join([start(lambda pixels=pixels: work(pixels)) for pixels in (1, 3, 4, 7, 10, 99)])
    assert 0 < peak[0] <= 10
    assert total == [0]


def test_a_large_request_is_not_overtaken():
    budget, order, waiting = PixelBudget(10), [], threading.Event()

    def large():
        waiting.set()
        with budget.acquire(10):
            order.append("large")

    def small():
        with budget.acquire(1):
            order.append("small")

    with budget.acquire(5):
        threads = [start(large)]
        assert waiting.wait(SECONDS)
        while not budget._turn.locked():  # until the large request waits for the pixels
            pass
        threads.append(start(small))
        assert not order
    join(threads)
    assert order == ["large", "small"]


def test_pixels_are_held_until_the_end_of_the_block():
    budget, done = PixelBudget(10), threading.Event()

    def other():
        with budget.acquire(10):
            done.set()

    with budget.hold():
        with budget.acquire(8):
            pass
        thread = start(other)
        with budget.hold(), budget.acquire(9):  # does not wait: it would wait for itself
            pass
        assert not done.is_set()
    join([thread])
    assert done.is_set()


def test_pixels_are_returned_after_an_error():
    budget = PixelBudget(10)
    for _ in range(3):
        with pytest.raises(KeyError), budget.hold(), budget.acquire(10):
            raise KeyError
    with budget.acquire(10):
        pass
