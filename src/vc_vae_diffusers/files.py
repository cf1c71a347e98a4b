"""Files that are whole or not there, with the permissions that the user's umask asks for."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# `.NAME.HOST-PID-RANDOM.partSUFFIX`: who writes it, so that the leftovers of a killed process can be told.
_PARTIAL = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.part(\.[^.]*)?")

_UNFINISHED: set[Path] = set()  # what this process is writing and will remove or rename

# What a disk says that takes no more: writing raises these without a name, and safetensors errors of its own.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def check_plain(path: Path) -> None:
    """Raises ValueError for pipes, devices and sockets: reading one may never end, or give something else later."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a device, a pipe or a socket; pass a file")


def read_text(path: Path) -> str:
    """What a text file says.

    Raises:
        ValueError: for one that holds something else.
    """
    check_plain(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:  # while reading it comes without a name
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: for one that holds something else.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def partial_path(path: str | os.PathLike) -> Path:
    """A hidden name beside `path`, of the same suffix, for a file that is to take its place when it is whole.

    Removes what processes of this machine left beside it that were killed while they wrote.
    """
    remove_stale(Path(path).parent)
    return _partial_name(Path(path))


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part{path.suffix}")


def remove_stale(folder: Path) -> None:
    """Remove partial files and folders whose process is no longer there. Those of other machines are left alone."""
    import psutil

    for left in folder.glob(".*.part*"):
        found = _PARTIAL.fullmatch(left.name)
        if found and found["host"] == _host() and not psutil.pid_exists(int(found["pid"])):
            with contextlib.suppress(OSError):  # another process was faster, or the folder may only be read
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


@contextmanager
def scratch_folder(parent: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder in `parent`, until the block ends. That of a process that was killed goes with the next one's."""
    folder = partial_path(Path(parent) / "vcvae")
    folder.mkdir(mode=0o700)
    _UNFINISHED.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _UNFINISHED.discard(folder)


def remove_unfinished() -> None:
    """Remove what `whole_file` and `scratch_folder` have begun, for a process that ends at once."""
    for path in _UNFINISHED:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of a disk that is full name what could not be written to it."""
    try:
        yield
    except Exception as error:
        # By its name: importing safetensors would make every `--help` wait for NumPy.
        found = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _NO_ROOM or getattr(error, "filename", None):
            raise
        raise OSError(number, f"{os.strerror(number)}, free some or write elsewhere", os.fspath(path)) from error


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a name beside `path` to write to. The file takes its place when the block ends, and goes if the block raises."""
    partial = partial_path(path)
    _UNFINISHED.add(partial)
    try:
        with naming(path):
            yield partial
            follow_umask(partial)
            os.replace(partial, path)
    except OSError as error:
        if error.filename is None or not _PARTIAL.fullmatch(Path(os.fsdecode(error.filename)).name):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # which is the name that was asked for
    finally:
        with contextlib.suppress(OSError):  # gone or closed with its folder, as the error on its way says
            partial.unlink()
        _UNFINISHED.discard(partial)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace a small file as a whole, so that a crash leaves the old one; text is written as UTF-8."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, content: Any, *, indent: int = 2, sort_keys: bool = False) -> None:
    """Write a JSON file as a whole.

    Raises:
        ValueError: for infinite and undefined numbers, which JSON does not have.
    """
    write_whole(path, json.dumps(content, indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n")


def file_digest(path: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def follow_umask(*paths: Path) -> None:
    """Give files the permissions of plainly created ones: safetensors 0.8 makes its own readable by their owner alone.

    The umask is read off a file made for it, because asking the system for it changes it for every thread.
    """
    for path in paths:
        probe = _partial_name(path)
        probe.touch()
        try:
            path.chmod(probe.stat().st_mode & 0o777)
        finally:
            probe.unlink()
