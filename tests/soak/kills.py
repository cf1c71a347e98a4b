"""SIGKILL at random moments: nothing half is taken for a whole, and what was stopped goes on to the same result.

    python tests/soak/kills.py --kills 60 --seconds 300             # encode, decode, reconstruct, encoding into shards
    python tests/soak/kills.py --kills 60 --seconds 300 --long      # training of both kinds, evaluation

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
from typing import Any

import torch
from commands import Case, contents, finish, leftovers, prepare, prepare_long, run, start


class Trial:
    """A command that is killed many times.

    Attributes:
        kills, during, partial: how often it was killed, before its end, and with a temporary file left.
        wrong: what was, in words.
    """

    def __init__(self, name: str, case: Case, folder: Path):
        self.name, self.case, self.out = name, case, folder / case.out
        self.words = [*case.words, str(self.out), *case.more]
        self.kills = self.during = self.partial = 0
        self.wrong: list[str] = []

    def results(self) -> dict[str, Any]:
        """What must be equal in the end."""
        found = contents(self.out / self.case.result)
        return {path: self.case.compared(data) for path, data in found.items()}

    def empty(self) -> None:
        shutil.rmtree(self.out) if self.out.is_dir() else self.out.unlink(missing_ok=True)

    def unbroken(self) -> float:
        """Run it to its end twice; the seconds of the second time. `whole` is what it made."""
        run(self.words)
        self.whole = self.results()
        self.empty()
        return run(self.words)

    def kill(self, after: float) -> None:
        process = start(self.words)
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
        self.kills, self.during = self.kills + 1, self.during + (finish(process) == -signal.SIGKILL)
        self.partial += bool(leftovers(self.out.parent))
        for path, data in self.results().items():
            if self.whole.get(path) != data and path.endswith((".safetensors", ".mp4", ".tar", ".json")):
                self.wrong.append(f"{self.name}: {path} is half after a kill")

    def run(self, kills: int, seconds: float) -> None:
        begin, duration, rng = time.monotonic(), self.unbroken(), random.Random(self.name)
        while self.kills < kills and time.monotonic() - begin < seconds:
            self.empty()
            for _ in range(3 if self.case.resumes else 1):
                self.kill(rng.uniform(0, 1.05 * duration))
            if self.case.resumes:
                self.finish()
        if not self.case.resumes:
            self.finish()
        print(
            f"{self.name}: {self.kills} kills, {self.during} before its end, {self.partial} with a temporary file left, "
            f"{len(self.wrong)} wrong",
            flush=True,
        )

    def finish(self) -> None:
        """The last run must end as the unbroken one did."""
        run([*self.words, *(("--overwrite",) if self.out.is_file() and not self.case.resumes else ())])
        if self.results() != self.whole:
            self.wrong.append(f"{self.name}: the last run differs from the unbroken one")
        if left := leftovers(self.out.parent):
            self.wrong.append(f"{self.name}: {left} stay")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="of each command")
    parser.add_argument("--seconds", type=float, default=300, help="no more kills after this time")
    parser.add_argument("--long", action="store_true", help="training and evaluation instead of the quick commands")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    begin, wrong = time.monotonic(), []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        commands = prepare(folder)
        if options.long:
            commands = prepare_long(folder)
        for number, (name, case) in enumerate(commands.items()):
            place = folder / f"to-{name.replace(' ', '-')}"
            place.mkdir()
            trial = Trial(name, case, place)
            trial.run(options.kills, (begin + options.seconds - time.monotonic()) / (len(commands) - number))
            wrong += trial.wrong
    print("\n".join([*wrong, f"{len(wrong)} wrong in {time.monotonic() - begin:.0f} s"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
