"""Names that people give to models and files, and what errors say for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# What PyTorch, the system and oneDNN say on processors.
_WANTED = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_SHORT = re.compile(r"allocate memory|could not (create|execute) a (primitive|memory|stream)|std::bad_alloc")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_model_name(option: str, name: str) -> None:
    """Refuse what is neither here nor could be on the hub, before anyone is asked for it.

    Raises:
        ValueError: naming the option.
    """
    if not Path(name).exists() and not _HUB_ID.fullmatch(name):
        raise ValueError(f"{option}: {name} is neither a folder here nor a hub id (owner/name); check the path.")


def told(error: Exception) -> str:
    """What an error says, for people: the system's own come with a number and quotes."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        wrong_path = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return f"{error.filename}: {error.strerror}{'; check the path' * wrong_path}."
    return str(error)


def some(names: Sequence[str]) -> str:
    """The first of many names, for an error."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def memory_short(error: BaseException) -> str | None:
    """What to say of memory that ran out, of the machine or of a GPU; None for every other error."""
    text = str(error).partition("\n")[0].rstrip(". ")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return text or "out of memory"
    if wanted := _WANTED.search(text):
        return f"out of memory: there is no room for {int(wanted[1]) / 1e6:,.0f} MB more"
    return f"out of memory, as it seems: {text}" if _SHORT.search(text) else None
