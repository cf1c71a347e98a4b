"""A disk that fills up: at whatever byte it does, a command says so in one line and leaves what was there before.

    python tests/soak/disk.py --seconds 300

As root, outputs go to a file system in memory that has room for a random part of them. Otherwise files may
not grow beyond a random size, which any user can ask for. The target is absent or holds an older output by turns, which
must survive to the byte.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from commands import contents, finish, leftovers, prepare, run, start
from program import main

PAGE = os.sysconf("SC_PAGE_SIZE")
DISK = 16 << 20
Fault = Callable[[Path, int], Callable[[], None]]


def nothing() -> None:
    """Before a command: its disk is full as it is."""


def full(folder: Path, room: int) -> Callable[[], None]:
    """Leave so many bytes free on the folder's disk."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, free.f_bavail * free.f_frsize - room))
    return nothing


def limited(folder: Path, room: int) -> Callable[[], None]:
    """No file of the process may grow beyond so many bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error then, as with a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return limit


@contextmanager
def place(root: Path) -> Iterator[tuple[Path, Fault]]:
    """A folder for outputs, and how its disk is made full."""
    folder = root / "out"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder, full if mounted else limited
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def trial(
    name: str, words: list[str], out: Path, whole: dict[str, bytes], fault: Fault, rng: random.Random, log: Path
) -> list[str]:
    """One command that runs out of room; returns what was wrong. `whole` is its output with enough of it."""
    older = contents(out)
    size = sum(map(len, whole.values()))
    room = rng.randrange(size)
    code = finish(start([*words, *(["--overwrite"] if older else [])], log, fault(out.parent, room)))
    (out.parent / "filler").unlink(missing_ok=True)
    said = " ".join(log.read_text(errors="replace").split())
    where = f"{name}, room for {room} of {size} bytes{' over an older output' if older else ''}"
    wrong = []
    if code == 0:  # what is left out of an output counts as well: logs of shards, rounding to pages
        return [] if fault is full and contents(out) == whole else [f"{where}: ended well"]
    if code != 1 or "Traceback" in said or str(out.parent) not in said.replace(" ", ""):
        wrong.append(f"{where}: exit {code}, {said[-300:]!r}")
    if out.suffix and contents(out) != older:
        wrong.append(f"{where}: {'the older output changed' if older else 'half an output stays'}")
    if left := leftovers(out.parent):
        wrong.append(f"{where}: {left} stay")
    return wrong


def soak(seconds: float, seed: int) -> tuple[dict[str, float], list[str]]:
    torch.set_num_threads(1)
    rng, trials, faults = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "files").mkdir()
        commands = prepare(Path(root) / "files")
        with place(Path(root)) as (folder, fault):
            for suffix in ("webm", "gif", "mov"):
                commands[suffix] = replace(commands["decode"], out=f"out.{suffix}", more=commands["encode"].more)
            beside = ["--compare", str(folder / "beside.mkv")]
            commands["compare"] = replace(commands["reconstruct"], more=[*commands["reconstruct"].more, *beside])
            whole = {}
            for name, case in commands.items():
                run([*case.words, str(folder / case.out), *case.more])
                whole[name] = contents(folder / case.out)
                empty(folder)
            begin = time.monotonic()
            while time.monotonic() - begin < seconds:
                name, case = rng.choice(list(commands.items()))
                out = folder / case.out
                empty(folder)
                if out.suffix and rng.random() < 0.5:
                    out.write_bytes(b"older" * 10)
                faults += trial(name, [*case.words, str(out), *case.more], out, whole[name], fault, rng, Path(root) / "log")
                trials += 1
    return {f"commands without room ({fault.__name__})": trials}, faults


if __name__ == "__main__":
    sys.exit(main(__doc__, soak))
