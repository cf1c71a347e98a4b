"""Names that people give to models and files, and what is said when nothing has them."""

from __future__ import annotations

import re
from pathlib import Path

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
