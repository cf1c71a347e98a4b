"""Files that are whole or not there, with the permissions that the user's umask asks for."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a name beside `path` to write to. The file takes its place when the block ends, and goes if the block raises."""
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield partial
        follow_umask(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace a small file as a whole, so that a crash leaves the old one; text is written as UTF-8."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def follow_umask(*paths: Path) -> None:
    """Give files the permissions of plainly created ones: safetensors 0.8 makes its own readable by their owner alone.

    The umask is read off a file made for it, because asking the system for it changes it for every thread.
    """
    for path in paths:
        probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        probe.touch()
        try:
            path.chmod(probe.stat().st_mode & 0o777)
        finally:
            probe.unlink()
