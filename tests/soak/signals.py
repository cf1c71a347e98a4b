"""SIGINT and SIGTERM at random moments of every command: one line, the right exit code, nothing half, nothing left.

    python tests/soak/signals.py --seconds 300

A third of the interrupted ones are interrupted again within a tenth of a second. What stands in the output folder
afterwards must be whole, and a last run must make what an undisturbed one made.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from calls import Call, calls, prepare
from commands import contents, finish, leftovers, run, start
from program import main

from vc_vae_diffusers.app import interface
from vc_vae_diffusers.exporting import programs
from vc_vae_diffusers.report import visualize, writer
from vc_vae_diffusers.training import image_vae

IMPORTED = (programs, visualize, writer, image_vae)  # once, before processes are forked
COMPARED = (".safetensors", ".mp4", ".mkv", ".png", ".gif")
SAID = ("Error: interrupted", "Error: terminated by SIGTERM", "stopped at step")
LEFT_OUT = ("fetch-weights", "export")  # which need a network, and a minute


def kept(folder: Path) -> dict[str, bytes]:
    """What must be whole and equal in the end."""
    found = contents(folder) if folder.exists() else {}
    return {name: data for name, data in found.items() if name.endswith(COMPARED) and "checkpoints" not in name}


def serve(*args: object, **kwargs: object) -> None:
    """A page that nobody visits."""
    time.sleep(2)


def disturb(words: list[str], after: float, signals: list[signal.Signals], log: Path) -> int:
    """Run a command and send it signals, the later ones within a tenth of a second; returns its exit code."""
    process = start(words, log)
    for number in signals:
        time.sleep(0.02 + after)
        os.kill(process, number)
        after = random.uniform(0, 0.1)
    return finish(process)


class Trial:
    """A command that is stopped many times."""

    def __init__(self, call: Call, folder: Path):
        self.name, self.folder, self.out, self.log = call.name, folder, folder / "out", folder / "log"
        self.words = [word for group in call.words for word in group]
        if call.name.startswith("train"):
            self.words[self.words.index("--steps") + 1] = "4"
        self.empty()
        self.seconds = run(self.words)
        self.whole = kept(self.out)
        self.empty()

    def empty(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()

    def stop(self, rng: random.Random) -> list[str]:
        """Stop it once; returns what was wrong."""
        self.restart()
        signals = rng.choice(([signal.SIGTERM], [signal.SIGINT], [signal.SIGINT] * 2))
        code = disturb(self.words, rng.uniform(0, 1.05 * self.seconds), signals, self.log)
        said = self.log.read_text(errors="replace")
        wrong = []
        # It does not hear signals yet, or no more.
        early = code == -signals[0] or (code == 130 and (not said or kept(self.out) == self.whole))
        if code == 128 + signals[0]:
            lines = [line for line in said.splitlines() if any(text in line for text in SAID)]
            if len(lines) != 1 and not early:
                wrong.append(f"{len(lines)} lines say so")
        elif code != 0 and not early:
            wrong.append(f"exit {code}")
        if "Traceback" in said or "Exception ignored" in said:
            wrong.append("a traceback")
        if left := leftovers(self.folder):
            wrong.append(f"{left} stay")
        wrong += [f"{name} is half" for name, data in kept(self.out).items() if data != self.whole.get(name)]
        return [f"{self.name}, {[number.name for number in signals]}: {text}: {said[-400:]!r}" for text in wrong]

    def restart(self) -> None:
        if not self.name.startswith("train"):  # which goes on where it was
            self.empty()

    def finish(self) -> list[str]:
        self.restart()
        run(self.words)
        equal = kept(self.out) == self.whole
        self.empty()
        return [] if equal else [f"{self.name}: the last run differs from the undisturbed one"]


def soak(seconds: float, seed: int) -> tuple[dict[str, float], list[str]]:
    torch.set_num_threads(1)
    rng, faults, stopped = random.Random(seed), [], 0
    interface.serve = serve
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        prepare(folder)
        trials = [Trial(call, folder) for call in calls(folder) if call.name not in LEFT_OUT]
        begin = time.monotonic()
        for trial in itertools.cycle(trials):
            if time.monotonic() - begin > seconds:
                break
            for _ in range(4):
                faults += trial.stop(rng)
                stopped += 1
            faults += trial.finish()
    return {"stops": stopped, "commands": len(trials)}, faults


if __name__ == "__main__":
    sys.exit(main(__doc__, soak))
