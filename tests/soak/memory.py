"""Memory that runs out: at whatever allocation it does, a command says so in one line and leaves nothing half written.

    python tests/soak/memory.py --seconds 300

The address space of a command's process may grow by a random part of what the command needs.
"""

from __future__ import annotations

import collections
import itertools
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from calls import IMAGE_VAE, calls
from commands import LATTE, TRAINING, VCVAE, contents, finish, leftovers, start
from program import main
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers.training import image_vae

IMPORTED = (image_vae,)  # once, before processes are forked
COMPARED = (".safetensors", ".mp4", ".png", ".json", ".tar")
LEAST, MOST = 32 << 20, 400 << 20
SIZES = {"size=32": "size=256", "resolution: 32": "resolution: 128", "sizes: [16]": "sizes: [256]"}


def limited(room: int) -> Callable[[], None]:
    """Before a command: it may take so many bytes more."""

    def limit() -> None:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))

    return limit


def prepare(folder: Path) -> dict[str, list[str]]:
    """Commands on frames of 384x384, by name."""
    tiny_vae().save_pretrained(folder / "model")
    (folder / "videos").mkdir()
    for name in ("a.mkv", "b.mkv"):
        encode(folder / "videos" / name, numbered_frames(24, 384, 384), "ffv1", "yuv444p")
    shutil.copy(folder / "videos" / "a.mkv", folder / "video.mkv")
    (folder / "clips.txt").write_text("[train]\na.mkv\n[holdout]\nb.mkv\n")
    commands = {call.name: [word for group in call.words for word in group] for call in calls(folder)}
    for name, options in (("vcvae", VCVAE), ("latte", LATTE), ("image-vae", IMAGE_VAE)):
        text = TRAINING + options
        for small, large in SIZES.items():
            text = text.replace(small, large)
        (folder / f"{name}.yaml").write_text(text)
    if finish(start(commands["encode"])):
        raise RuntimeError("encoding failed with enough memory")
    shutil.move(folder / "out" / "a.safetensors", folder / "in.safetensors")
    wanted = (
        "reconstruct",
        "encode",
        "decode",
        "visualize",
        "evaluate",
        "stats",
        *(n for n in commands if n.startswith("train")),
    )
    return {name: commands[name] for name in wanted}


def trial(name: str, words: list[str], folder: Path, room: int) -> tuple[int, list[str]]:
    """One command with little memory: its exit code, and what was wrong."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    code = finish(start(words, folder / "log", limited(room)))
    said = " ".join((folder / "log").read_text(errors="replace").split())
    wrong = []
    if code == -signal.SIGSEGV:  # in FFmpeg's or oneDNN's own code, which no Python can answer
        return code, []
    if code not in (0, 1) or "Traceback" in said:
        wrong.append(f"exit {code}")
    if code == 1 and (not re.search("emory|external library", said) or said.count("Error") != 1):
        wrong.append("another error")
    found = [path for path in contents(folder / "out") if path.endswith(COMPARED) and ".json.partial" not in path]
    if code and found and not name.startswith("train"):
        wrong.append(f"{found} stays")
    if left := leftovers(folder):
        wrong.append(f"{left} stay")
    return code, [f"{name}, {room >> 20} MiB more: {text}: {said[-500:]!r}" for text in wrong]


def soak(seconds: float, seed: int) -> tuple[dict[str, float], list[str]]:
    torch.set_num_threads(1)
    rng, faults, codes = random.Random(seed), [], collections.Counter()
    with tempfile.TemporaryDirectory() as root:
        commands = prepare(Path(root))
        begin = time.monotonic()
        for name, words in itertools.cycle(commands.items()):
            if time.monotonic() - begin > seconds:
                break
            code, wrong = trial(name, words, Path(root), rng.randrange(LEAST, MOST))
            codes[code] += 1
            faults += wrong
    counts = {"trials": codes.total(), "of them short of memory": codes[1], "ended by SIGSEGV": codes[-signal.SIGSEGV]}
    return counts, faults


if __name__ == "__main__":
    sys.exit(main(__doc__, soak))
