"""Files that change under a command: sources that vanish, shrink or grow, targets that go away or are closed.

    python tests/soak/moving_files.py --seconds 300

At a random moment of a command one thing happens to its source, to a source among many, or to its output folder. The command
works, with the undisturbed result unless the source has another content, or says in one line what is wrong; it leaves no
temporary file where it may still remove one.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from calls import calls
from commands import contents, finish, leftovers, run, start
from program import main
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

COMPARED = (".safetensors", ".mp4", ".png", ".tar")
Fault = Callable[[Path, Path, random.Random], None]


def cut(source: Path, out: Path, rng: random.Random) -> None:
    os.truncate(source, rng.randrange(source.stat().st_size))


def grow(source: Path, out: Path, rng: random.Random) -> None:
    with source.open("ab") as file:
        file.write(rng.randbytes(10_000))


def overwrite(source: Path, out: Path, rng: random.Random) -> None:
    """In its place, from somewhere on."""
    with source.open("r+b") as file:
        file.seek(rng.randrange(source.stat().st_size))
        file.write(bytes(5_000))


def replace(source: Path, out: Path, rng: random.Random) -> None:
    """By what is no video."""
    other = source.with_name(f".{source.name}")
    other.write_bytes(rng.randbytes(5_000))
    os.replace(other, source)


FAULTS: dict[str, Fault] = {
    "source vanishes": lambda source, out, rng: source.unlink(),
    "source is cut": cut,
    "source grows": grow,
    "source is overwritten": overwrite,
    "source is replaced": replace,
    "source is closed": lambda source, out, rng: source.chmod(0),
    "source is of next year": lambda source, out, rng: os.utime(source, (time.time() + 3e7,) * 2),
    "target vanishes": lambda source, out, rng: shutil.rmtree(out, ignore_errors=True),
    "target is closed": lambda source, out, rng: out.chmod(0o555),
}
HARMLESS = ("source is of next year",)


def bound() -> None:
    """Before a command: root is bound by permissions as all are (capset(2), without CAP_DAC_OVERRIDE and _READ_SEARCH)."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(header, sets)
    sets[0] &= ~0b110
    if libc.capset(header, sets):
        raise OSError("capset failed")


def prepare(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """Commands and their sources, by name; `keep` holds what is put back after every fault."""
    keep = folder / "keep"
    tiny_vae().save_pretrained(folder / "model")
    (keep / "videos").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4"):
        encode(keep / "videos" / name, numbered_frames(96, 64, 64), "libx264", "yuv444p")
    shutil.copytree(keep, folder / "in")
    (folder / "out").mkdir()
    model = ["--model", str(folder / "model"), "--device", "cpu"]
    run(["encode", str(keep / "videos" / "a.mp4"), str(keep / "a.safetensors"), *model])
    video, latents, videos, out = (
        str(folder / name) for name in ("in/videos/a.mp4", "in/a.safetensors", "in/videos", "out")
    )
    trainers = {call.name: [word for group in call.words for word in group] for call in calls(folder)}
    commands = {
        "reconstruct": ["reconstruct", video, f"{out}/a.mp4", *model],
        "encode": ["encode", video, f"{out}/a.safetensors", *model],
        "decode": ["decode", latents, f"{out}/a.mp4", *model],
        "shards": ["encode", videos, f"{out}/shards", "--shards", "1", *model],
        "visualize": ["visualize", video, f"{out}/a.png", "--num-frames", "96", *model],
        "evaluate": [
            "evaluate",
            "--data",
            videos,
            "--out",
            f"{out}/a.json",
            "--metrics",
            "psnr",
            *model[:1],
            f"t={model[1]}",
        ],
        "stats": ["stats", "--data", videos, "--size", "32", "--num-frames", "96", *model],
    }
    for name in ("train vcvae", "train latte"):
        words = [word.replace(f"{folder}/videos", videos) for word in trainers[name]]
        words[words.index("--steps") + 1] = "4"
        words += ["--holdout", "b.mp4"] * (name == "train vcvae")
        commands[name] = words
    return {name: (words, Path(latents if name == "decode" else video)) for name, words in commands.items()}


def reset(folder: Path) -> None:
    """Sources as they were, and no output."""
    for name in ("in", "out"):
        if (folder / name).exists():
            (folder / name).chmod(0o755)
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(folder / "keep", folder / "in")
    (folder / "out").mkdir()
    for path in (folder / "out", *(folder / "in").rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)


def trial(
    name: str, words: list[str], source: Path, whole: dict[str, bytes], seconds: float, rng: random.Random
) -> list[str]:
    """Disturb a command once; returns what was wrong."""
    folder, what = source.parents[len(source.parts) - source.parts.index("in") - 1], rng.choice(list(FAULTS))
    reset(folder)
    log, out = folder / "log", folder / "out"
    process = start(words, log, bound)
    time.sleep(rng.uniform(0, seconds))
    FAULTS[what](source, out, rng)
    code, said = finish(process), log.read_text(errors="replace")
    found = {path: data for path, data in contents(out).items() if path.endswith(COMPARED)} if out.exists() else {}
    wrong = []
    if code not in (0, 1) or "Traceback" in said:
        wrong.append(f"exit {code}")
    if code == 1 and "Error" not in said and "unreadable" not in said:
        wrong.append("silent")
    if code == 0 and found != whole and what in HARMLESS:
        wrong.append("another result")
    if code == 1 and found and "shards" not in name and "train" not in name:
        wrong.append(f"{sorted(found)} stays")
    if out.exists() and what != "target is closed" and (left := leftovers(out)):
        wrong.append(f"{left} stay")
    end = " ".join(said.split())[-300:]
    print(f"{name}, {what}: exit {code}, {'equal' if found == whole else 'other'}: {end}", file=sys.stderr)
    return [f"{name}, {what}: {text}: {end!r}" for text in wrong]


def soak(seconds: float, seed: int) -> tuple[dict[str, float], list[str]]:
    torch.set_num_threads(1)
    rng, faults, trials = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        folder.chmod(0o755)
        commands = prepare(folder)
        undisturbed = {}
        for name, (words, _) in commands.items():
            reset(folder)
            duration = run(words)
            undisturbed[name] = (
                {path: data for path, data in contents(folder / "out").items() if path.endswith(COMPARED)},
                duration,
            )
        begin = time.monotonic()
        for name, (words, source) in itertools.cycle(commands.items()):
            if time.monotonic() - begin > seconds:
                break
            faults += trial(name, words, source, *undisturbed[name], rng)
            trials += 1
        reset(folder)
    return {"trials": trials}, faults


if __name__ == "__main__":
    sys.exit(main(__doc__, soak))
