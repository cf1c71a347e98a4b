"""Command lines, mutated: each `vcvae` command and training program works, or refuses by one line that says what is wrong.

    python tests/soak/hostile_words.py --cases 2000 --seconds 300

Options get empty, negative, huge, undefined and foreign values, arguments become folders, sockets, pipes, devices, loops
and links of one another; words are repeated, dropped and put in. Each call runs in a forked process with limits on memory and
time. Wrong are crashes, hangs, tracebacks, refusals that do not name the option or value that was mutated, sources
that change, and outputs that stay when a call fails.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}  # nothing is downloaded
import torch
import typer
from commands import LATTE, TRAINING, VCVAE, finish, leftovers, run, start
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers.app import interface
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.exporting import programs
from vc_vae_diffusers.report import visualize, writer
from vc_vae_diffusers.training import image_vae

IMPORTED = (visualize, writer, image_vae)  # once, before processes are forked

MEMORY, SECONDS, DISK = 3 << 30, 60, 64 << 20
TEXTS = (
    *(
        "",
        " ",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "7",
        "1e-9",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 30,
        "9" * 5000,
        "2147483647",
        "2147483648",
    ),
    *(
        "abc",
        "8gb",
        "8 GB",
        "GB",
        "-8GB",
        "0B",
        "1e400GB",
        "٣",
        "é\u0301",
        "日本",
        "a\nb",
        "\x1b[31mred",
        "[bold]x[/bold]",
        "[/]",
    ),
    *(
        "%s",
        "{0}",
        "None",
        "true",
        "false",
        "no",
        "[]",
        "{}",
        '{"a": 1}',
        "null",
        "1,2,3",
        "0,0,0",
        "1x1",
        "16x",
        "x",
        "x" * 5000,
    ),
    *("@", "@nope", "@videos.txt:nope", "a=b", "=", "a=", "cpu", "cuda:99", "mode", "=x", ".", "*", "[", "%d", "\udcff"),
)
ZOO = (
    "folder",
    "empty",
    "fifo",
    "socket",
    "loop",
    "linked",
    "hard",
    "dangling",
    "nope/deep",
    "-x",
    "é\n.mp4",
    "x" * 300,
    "text.txt",
)
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7)}  # nodes of our own, which may be replaced
Words = list[list[str]]


@dataclasses.dataclass(frozen=True)
class Command:
    """A good call in groups of words, and what can be put into it: options by name, whether they take a value."""

    name: str
    words: Words
    options: dict[str, bool]
    places: tuple[int, ...] = ()  # of IN and OUT among the groups


def commands(folder: Path) -> list[Command]:
    """Good calls; paths are those of `prepare`, outputs go into `out/`."""
    f = {name: str(folder / name) for name in ("model", "videos", "video.mkv", "in.safetensors", "result.json", "out")}
    model, out = [["--model", f["model"]], ["--device", "cpu"]], f["out"]
    calls: dict[str, tuple[Words, tuple[int, ...]]] = {
        "reconstruct": ([[f["video.mkv"]], [f"{out}/a.mkv"], *model], (0, 1)),
        "encode": ([[f["video.mkv"]], [f"{out}/a.safetensors"], *model], (0, 1)),
        "decode": ([[f["in.safetensors"]], [f"{out}/a.mp4"], *model], (0, 1)),
        "info": ([[f["model"]]], (0,)),
        "plan": ([["--height", "32"], ["--width", "32"], *model], ()),
        "visualize": ([[f["video.mkv"]], [f"{out}/a.png"], ["--num-frames", "4"], *model], (0, 1)),
        "evaluate": (
            [
                ["--data", f["videos"]],
                ["--out", f"{out}/a.json"],
                ["--metrics", "psnr"],
                ["--size", "32"],
                ["--num-frames", "4"],
            ]
            + [["--model", f"tiny={f['model']}"], ["--device", "cpu"]],
            (),
        ),
        "report": ([[f["result.json"]], ["--out", f"{out}/page"]], (0,)),
        "stats": ([["--data", f["videos"]], ["--size", "16"], ["--num-frames", "4"], *model], ()),
        "demo": ([["--out", f"{out}/demo"], ["--num-frames", "4"], *model], ()),
        "fetch-weights": ([["lpips"], ["--to", f"{out}/weights"]], (0,)),
        "export": ([[f["model"]], [f"{out}/programs"], ["--format", "torch"]], (0, 1)),
        "app": ([["--no-browser"], *model], ()),
    }
    group: Any = typer.main.get_command(app)
    found = []
    for name, (words, places) in calls.items():
        params = [param for param in group.commands[name].params if param.param_type_name == "option"]
        options = {opt: not param.is_flag for param in params for opt in (*param.opts, *param.secondary_opts)}
        options.pop("--compile", None)  # takes minutes
        found.append(Command(name, words, options, places))
    for name, options, vae in (("vcvae", VCVAE, "--model"), ("latte", LATTE, "--vae"), ("image-vae", IMAGE_VAE, "")):
        (folder / f"{name}.yaml").write_text(TRAINING + options)
        config = importlib.import_module(f"vc_vae_diffusers.training.{name.replace('-', '_')}_options").Config
        fields = [part for field in dataclasses.fields(config) for part in dataclasses.fields(field.default_factory)]
        words = [
            ["train", name],
            ["--config", str(folder / f"{name}.yaml")],
            ["--data", f["videos"]],
            ["--output", f"{out}/run"],
        ]
        words += [["--steps", "1"], *([[vae, f["model"]]] if vae else [["--clips", str(folder / "clips.txt")]])]
        found.append(Command(f"train {name}", words, {f"--{field.name}": True for field in fields}))
    return found


IMAGE_VAE = """
channels: [8, 8, 8, 8]
norm_num_groups: 4
latent_channels: 4
sizes: [16]
batch_size: 2
validation_size: 16
cpu: true
"""


def prepare(folder: Path) -> None:
    """A tiny model, videos, latents and a result."""
    tiny_vae().save_pretrained(folder / "model")
    (folder / "videos").mkdir()
    for name in ("a.mkv", "b.mkv"):
        encode(folder / "videos" / name, numbered_frames(8), "ffv1", "yuv444p")
    shutil.copy(folder / "videos" / "a.mkv", folder / "video.mkv")
    (folder / "clips.txt").write_text("[train]\na.mkv\n[holdout]\nb.mkv\n")
    model = ["--model", str(folder / "model"), "--device", "cpu"]
    run(["encode", str(folder / "video.mkv"), str(folder / "in.safetensors"), *model])
    short = ["--metrics", "psnr", "--size", "32", "--num-frames", "4", "--device", "cpu"]
    run(["evaluate", "--model", "original", "--data", str(folder / "videos"), "--out", str(folder / "result.json"), *short])


def zoo(folder: Path, source: Path) -> list[str]:
    """Paths of every kind; `hard` and `linked` are the source by other names."""
    (folder / "folder").mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "text.txt").write_text("nope.mp4\n")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("gone")
    (folder / "linked").symlink_to(source)
    os.link(source, folder / "hard")
    suffixes = (".mp4", ".mkv", ".png", ".safetensors", ".json", "")
    named = [folder / f"{name}{suffix}" for name in ("fifo", "loop", "linked", "hard") for suffix in suffixes if suffix]
    for path in named:
        (os.link if path.stem == "hard" else lambda a, b: b.symlink_to(a))(folder / path.stem, path)
    for name, numbers in DEVICES.items():
        with contextlib.suppress(PermissionError):  # of who is not root
            os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(*numbers))
            named.append(folder / name)
    return [*(str(folder / name) for name in ZOO), *map(str, named), "/proc/self/mem", f"{source}/x", str(source)]


def mutate(command: Command, paths: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """The words of a call with one to three things wrong, and the words that were put in or left out."""
    words, put = [list(group) for group in command.words], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = rng.choice(paths) if rng.random() < 0.3 else rng.choice(TEXTS)
        how = rng.choice(("option",) * 6 + ("place",) * 2 * bool(command.places) + ("drop", "twice", "stray"))
        if how == "option":
            name = rng.choice(sorted(command.options))
            if rng.random() < 0.8:
                words = [group for group in words if group[0] != name]
            words.append([name] if not command.options[name] else rng.choice(([name, value], [f"{name}={value}"])))
            put.append(name)
        elif how == "place":
            words[rng.choice(command.places) % len(words)] = [value]
        elif how == "drop" and len(words) > 1:
            put += words.pop(rng.randrange(1, len(words)))
        elif how == "twice":
            words.append(list(rng.choice(words)))
        else:
            words.append([value])
        put.append(value)
    return [*(() if command.name.startswith("train") else (command.name,)), *sum(words, [])], put


def limit(folder: Path) -> Callable[[], None]:
    """What happens in the process of a call before it begins."""

    def before() -> None:
        os.chdir(folder)
        interface.serve = lambda *args, **kwargs: None  # a page that nobody visits
        programs.export_model = exported
        socket.socket.connect = no_network
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.alarm(SECONDS)

    return before


def exported(vae: Any, out: Path, kind: str, progress: Any) -> dict[str, Any]:
    """Programs that would take a minute."""
    (out / programs.DESCRIPTION).write_text("{}")
    return {"programs": {"all": {"file": programs.DESCRIPTION, "difference": 0.0}}}


def no_network(self: Any, address: Any) -> None:
    raise OSError(101, "Network is unreachable")


def state(folder: Path) -> dict[str, Any]:
    """Every file below a folder: what is in plain ones, the kind of others."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode):
            found[str(path.relative_to(folder))] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return found


def verdict(code: int, said: str, words: list[str], put: list[str], case: Path) -> str:
    """What a call came to: "worked", "refused", or what must not be, in words."""
    if code < 0:
        return "hang" if code == -signal.SIGALRM else f"crash by {signal.Signals(-code).name}"
    if left := leftovers(case):
        return f"left {left}"
    if code == 0:
        return "worked"
    if code not in (1, 2) or "Traceback" in said:
        return f"exit {code}"
    if "Error" not in said and '"error"' not in said:
        return "silent"
    if said.startswith("{"):
        said = json.loads(said)["error"]["message"]
    flat = "".join(said.split()).strip("│")
    named = ["".join(word.split("=")[-1].split())[:40] for word in (*words, *put)] + [word.split("=")[0] for word in put]
    if not any(name in flat for name in named if name) and not re.search(r"\b(IN|OUT|MODEL|RESULT|Missing)\b", said):
        return "unnamed"
    return "refused"


def one(command: Command, folder: Path, seed: int) -> tuple[str, list[str], str]:
    """One mutated call: what it came to, its words, what it said."""
    case, log, rng = folder / "case", folder / "log", random.Random(f"{command.name} {seed}")
    subprocess.run(["rm", "-rf", str(case)], check=True)
    (folder / "out").mkdir(exist_ok=True)
    case.mkdir()
    source = Path(command.words[command.places[0]][0]) if command.places else folder / "video.mkv"
    source = shutil.copy(source, case) if source.is_file() else source
    os.chdir(case)
    words, put = mutate(command, zoo(case / "zoo", Path(source) if Path(source).is_file() else folder / "video.mkv"), rng)
    before = state(case)
    code = finish(start(words, log, limit(case)))
    said = log.read_text(errors="replace")
    outcome = verdict(code, said, words, put, folder)
    after = state(case) | {f"out/{name}": data for name, data in state(folder / "out").items()}
    if changed := [name for name in before if before[name] != after.get(name)]:
        outcome = f"changed {changed}"
    elif outcome == "refused" and (made := sorted(set(after) - set(before))):
        outcome = f"stays {made}"
    shutil.rmtree(folder / "out")
    return outcome, words, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="of each command")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=300, help="no more cases are begun after this time")
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument("--show", action="store_true", help="print what every call said")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        prepare(folder)
        chosen = [command for command in commands(folder) if not options.only or command.name in options.only]
        for number, command in enumerate(chosen):
            until = time.monotonic() + (begin + options.seconds - time.monotonic()) / (len(chosen) - number)
            counts: collections.Counter[str] = collections.Counter()
            for seed in range(options.first, options.first + options.cases):
                outcome, words, said = one(command, folder, seed)
                counts[outcome if outcome in ("worked", "refused") else "wrong"] += 1
                if outcome not in ("worked", "refused") or options.show:
                    print(
                        f"{command.name} seed {seed}: {outcome}: {[word[:80] for word in words]}\n    {said.strip()[-600:]}",
                        flush=True,
                    )
                if time.monotonic() > until:
                    break
            failed += counts["wrong"]
            print(f"{command.name}: {dict(counts)}", flush=True)
        os.chdir("/")
    print(f"{failed} wrong outcomes in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
