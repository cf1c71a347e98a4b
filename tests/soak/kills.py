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

import av
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers import coding
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.coding import latent_shards, latents, reconstruction

IMPORTED = (coding, latent_shards, latents, reconstruction, av)


def start(words: list[str]) -> int:
    """`vcvae WORDS` in a forked process; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        app(words, standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


def run(words: list[str]) -> float:
    """Run it to its end; returns its seconds."""
    begin = time.monotonic()
    _, status = os.waitpid(start(words), 0)
    if status:
        raise RuntimeError(f"vcvae {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - begin


def contents(path: Path) -> dict[str, bytes]:
    """What stands under a final name, file or folder; hidden files are temporary."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name[0] != "."}


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob(".*.part*"))


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
        tiny_vae().save_pretrained(folder / "model")
        (folder / "videos").mkdir()
        for name in ("a.mkv", "b.mkv", "c.mkv"):
            video = encode(folder / "videos" / name, numbered_frames(24), "ffv1", "yuv444p")
        latents_file = folder / "in.safetensors"
        model = ["--model", str(folder / "model"), "--device", "cpu"]
        run(["encode", str(video), str(latents_file), *model])
        commands = {
            "encode": (["encode", str(video)], "out.safetensors", []),
            "decode": (["decode", str(latents_file)], "out.mp4", ["--lossless"]),
            "reconstruct": (["reconstruct", str(video)], "out.mp4", ["--lossless"]),
            "shards": (["encode", str(folder / "videos")], "out", ["--shards", "1"]),
        }
        for number, (name, (words, out, more)) in enumerate(commands.items()):
            place = folder / f"to-{name}"
            place.mkdir()
            until = time.monotonic() + (begin + options.seconds - time.monotonic()) / (len(commands) - number)
            wrong += trial(name, [*words, str(place / out), *more, *model], place / out, options.kills, until)
    print("\n".join([*wrong, f"{len(wrong)} wrong in {time.monotonic() - begin:.0f} s"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
