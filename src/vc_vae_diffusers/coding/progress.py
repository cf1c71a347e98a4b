"""How work on many frames tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with the frames done and the frames in all, None while they are not known. What it raises ends the work.
Progress = Callable[[int, int | None], None]


def silent(done: int, total: int | None) -> None:
    """Nobody listens."""
