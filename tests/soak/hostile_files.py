"""Mutated files of every kind that the package reads: each is read, or refused by one clear error of ours.

    python tests/soak/hostile_files.py --cases 500 --seconds 300

Each case is read in a forked process with limits on memory and time, so that crashes, hangs and floods are outcomes like
others. Prints a table with the outcomes by kind of file, and exits with 1 if there is one that must not
be.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile_settings import settings
from mutations import Kind, mutated_bytes, mutated_config, mutated_safetensors
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.coding.latent_file import LatentFile
from vc_vae_diffusers.coding.latents import check_fit, decode_file, encode_file
from vc_vae_diffusers.video import VideoReader, VideoReadError

MEMORY = 2 << 30  # more than the process has already
SECONDS = 60
BATCH = 50
FRAMES = 12

# What must not be. "read" and "refused" are well; "short", fewer frames without an error, is known of containers that do not
# say how long they are (docs/reliability.md): it is printed and counted, and fails nothing.
WRONG = ("foreign", "not finite", "crash", "hang")


def read_media(path: Path, frames: int) -> str:
    with VideoReader(path, threads=1, chunk_frames=4) as reader:
        found = sum(chunk.shape[1] for chunk in reader)
    return "read" if found >= frames else "short"


def read_latents(path: Path, vae: AutoencoderKLVCVAE) -> str:
    file = LatentFile(path)
    check_fit(vae, file)
    decode_file(vae, file, path.with_name("decoded.mkv"), settings={"codec": "lossless"})
    return "read"


def read_model(folder: Path) -> str:
    vae = AutoencoderKLVCVAE.from_pretrained(folder)
    x = torch.linspace(-1, 1, vae.config.in_channels * 5 * 16 * 16).view(1, -1, 5, 16, 16)
    with torch.no_grad():
        y = vae(x).sample
    return "read" if bool(y.isfinite().all()) else "not finite"


def originals(folder: Path) -> list[Kind]:
    """One good file of each kind."""
    frames = numbered_frames(FRAMES)
    videos = {
        "a.mp4": ("libx264", "yuv420p"),
        "a.mov": ("libx264", "yuv420p"),
        "a.mkv": ("libx264", "yuv420p"),
        "ffv1.mkv": ("ffv1", "yuv444p"),
        "a.webm": ("libvpx-vp9", "yuv420p"),
        "a.avi": ("mpeg4", "yuv420p"),
        "a.ts": ("mpeg2video", "yuv420p"),
        "a.flv": ("flv", "yuv420p"),
        "a.gif": ("gif", "rgb8"),
    }
    kinds = []
    for name, (codec, pix_fmt) in videos.items():
        path = encode(folder / name, frames, codec, pix_fmt)
        kinds.append(Kind(name, path, lambda p: read_media(p, FRAMES), mutated_bytes, (VideoReadError,)))
    for suffix in ("png", "jpg", "webp", "bmp", "tiff", "avif"):
        path = folder / f"a.{suffix}"
        Image.fromarray(frames[0]).save(path)
        kinds.append(Kind(path.name, path, lambda p: read_media(p, 1), mutated_bytes, (VideoReadError,)))
    vae = tiny_vae()
    model = folder / "model"
    vae.save_pretrained(model)
    latents = folder / "a.safetensors"
    with VideoReader(folder / "a.mkv", batch_dim=True) as reader:
        encode_file(vae, reader, latents, {"model": "bundled", "subfolder": ""})
    kinds.append(Kind("latents", latents, lambda p: read_latents(p, vae), mutated_safetensors, (ValueError,)))
    refusals = (ValueError, OSError)
    kinds.append(Kind("config.json", model / "config.json", lambda p: read_model(p.parent), mutated_config, refusals))
    weights = model / "diffusion_pytorch_model.safetensors"
    kinds.append(Kind("weights", weights, lambda p: read_model(p.parent), mutated_safetensors, refusals))
    return kinds + settings(folder, model)


def place(kind: Kind, seed: int, folder: Path) -> Path:
    """The mutated file of a seed, in a folder of its own with its neighbours."""
    shutil.rmtree(folder, ignore_errors=True)
    if kind.original.parent.name == "model":
        shutil.copytree(kind.original.parent, folder)
    else:
        folder.mkdir()
    path = folder / kind.original.name
    path.write_bytes(kind.mutate(kind.original.read_bytes(), random.Random(f"{kind.name} {seed}")))
    return path


def one(kind: Kind, path: Path) -> str:
    try:
        return kind.read(path)
    except kind.refusals:
        return "refused"
    except BaseException as error:
        return f"foreign {type(error).__name__}: {str(error)[:150]!r}"


def _child(kind: Kind, seeds: range, folder: Path, pipe: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    for seed in seeds:
        signal.alarm(SECONDS)  # ends the process
        path = place(kind, seed, folder)
        outcome = one(kind, path)
        os.write(pipe, f"{seed}\t{outcome}\n".replace("\n", " ").encode() + b"\n")
    os._exit(0)


def outcomes(kind: Kind, seeds: range, folder: Path) -> Iterator[tuple[int, str]]:
    """Seed and outcome of every case. After a process has died the next one goes on behind its case."""
    done = seeds.start
    while done < seeds.stop:
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _child(kind, range(done, min(done + BATCH, seeds.stop)), folder, sink)
            finally:
                os._exit(1)
        os.close(sink)
        status = None
        try:
            with os.fdopen(source) as lines:
                for line in lines:
                    seed, outcome = line.rstrip().split("\t", 1)
                    done = int(seed) + 1
                    yield int(seed), outcome
            _, status = os.waitpid(child, 0)
        finally:
            if status is None:  # whoever asked has enough
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError(f"the process that reads {kind.name} failed by itself at seed {done}")
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            yield done, "hang" if number == signal.SIGALRM else f"crash by {signal.Signals(number).name}"
            done += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="mutations of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=600, help="no more cases are begun after this time")
    parser.add_argument("--only", nargs="*", help="names of kinds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    av.logging.set_level(None)
    begin, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = [k for k in originals(Path(folder)) if not options.only or k.name in options.only]
        for number, kind in enumerate(kinds):
            until = time.monotonic() + (begin + options.seconds - time.monotonic()) / (len(kinds) - number)
            counts, started = collections.Counter(), time.monotonic()
            for seed, outcome in outcomes(kind, range(options.first, options.first + options.cases), Path(folder) / "case"):
                counts[outcome.split()[0] if not outcome.startswith("not") else "not finite"] += 1
                failed += outcome.startswith(WRONG)
                if outcome.startswith((*WRONG, "short")):
                    print(f"  {kind.name} seed {seed}: {outcome}", flush=True)
                if time.monotonic() > until:
                    break
            print(f"{kind.name}: {dict(counts)} in {time.monotonic() - started:.0f} s", flush=True)
    print(f"{failed} wrong outcomes in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
