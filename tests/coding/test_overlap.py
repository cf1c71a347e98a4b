"""One item ahead, on another thread: order, errors, and an end."""

import threading
from contextlib import closing

import pytest
import torch

from vc_vae_diffusers.coding.overlap import ahead


def test_items_come_in_order_and_the_next_one_is_made_meanwhile():
    made, used = [threading.Event() for _ in range(5)], []

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number, threading.get_ident(), torch.is_grad_enabled()

    for number, thread, gradients in ahead(items()):
        if number + 1 < len(made):
            assert made[number + 1].wait(timeout=60)  # without its being asked for
        assert number + 2 >= len(made) or not made[number + 2].is_set()  # and no more than one
        assert thread != threading.get_ident()
        assert not gradients
        used.append(number)
    assert used == [0, 1, 2, 3, 4]
    assert torch.is_grad_enabled()
    assert list(ahead([])) == []


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise OSError("no more")

    got = []
    with pytest.raises(OSError, match="no more"):
        got.extend(ahead(items()))
    assert got == [1, 2]


def test_whoever_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    with closing(ahead(iter(range(1000)))) as stream:
        assert next(stream) == 0
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
