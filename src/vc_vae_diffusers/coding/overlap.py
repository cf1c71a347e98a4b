"""Two things at a time: the next item of a stream is made while this one is used."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import torch

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Iterate over `items` on a thread of its own, without gradients, one item ahead.

    What is raised there is raised here, in its turn. Closing the iterator waits for the item being made.
    """
    iterator = iter(items)
    # The mode of gradients belongs to a thread.
    with ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=(False,)) as thread:
        pending = thread.submit(next, iterator, _END)
        while (item := pending.result()) is not _END:
            pending = thread.submit(next, iterator, _END)
            yield cast(T, item)
