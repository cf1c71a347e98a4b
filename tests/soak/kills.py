"""SIGKILL at random moments of encode, decode, reconstruct and encoding into shards: nothing half is taken for a whole.

    python tests/soak/kills.py --kills 60 --seconds 300

A command runs in a forked process, which has imported everything, and is killed between its first and last moment. What then
stands under the final name must be the unbroken run's to the byte, or be absent; a last run must end as the unbroken one did
and leave no temporary file behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from commands import contents, leftovers, prepare, run, start


def trial(name: str, words: list[str], out: Path, kills: int, until: float) -> list[str]:
    """Kill a command that writes `out` many times, then let it end. Returns what was wrong."""
    run(words)
    whole = contents(out)
    duration = min(run([*words, *(() if out.is_dir() else ("--overwrite",))]) for _ in range(2))
    if out.is_dir():  # it went on where nothing was left to do: count the whole run
        shutil.rmtree(out)
        duration = run(words)
    rng, wrong, done, during, seen_partial = random.Random(name), [], 0, 0, 0
    while done < kills and time.monotonic() < until:
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        for _ in range(3 if name == "shards" else 1):  # shards go on where they were
            process = start(words)
            time.sleep(rng.uniform(0, 1.05 * duration))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            done, during = done + 1, during + os.WIFSIGNALED(status)
            seen_partial += bool(leftovers(out.parent))
            for path, data in contents(out).items():
                if whole.get(path) != data and path.endswith((".safetensors", ".mp4", ".tar")):
                    wrong.append(f"{name}: {path} is half after a kill")
    run([*words, *(("--overwrite",) if out.is_file() else ())])
    if contents(out) != whole:
        wrong.append(f"{name}: the last run differs from the unbroken one")
    if left := leftovers(out.parent):
        wrong.append(f"{name}: {left} stay")
    print(f"{name}: {done} kills, {during} before its end, {seen_partial} with a temporary file left, {len(wrong)} wrong")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="of each command")
    parser.add_argument("--seconds", type=float, default=300, help="no more kills after this time")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    begin, wrong = time.monotonic(), []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        commands = prepare(folder)
        for number, (name, (words, out, more)) in enumerate(commands.items()):
            place = folder / f"to-{name}"
            place.mkdir()
            until = time.monotonic() + (begin + options.seconds - time.monotonic()) / (len(commands) - number)
            wrong += trial(name, [*words, str(place / out), *more], place / out, options.kills, until)
    print("\n".join([*wrong, f"{len(wrong)} wrong in {time.monotonic() - begin:.0f} s"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
