"""Command lines, mutated: each `vcvae` command and training program works, or refuses by one line that says what is wrong.

    python tests/soak/hostile_words.py --cases 2000 --seconds 300

Options get empty, negative, huge, undefined and foreign values, arguments become folders, sockets, pipes, devices, loops
and links of one another; words are repeated, dropped and put in. Each call runs in a forked process with limits on memory
and time. Wrong are crashes, hangs, tracebacks, refusals that do not name the option or value that was mutated, sources
that change, and outputs that stay when a call fails.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
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
from calls import Call, calls, prepare
from commands import finish, leftovers, start

from vc_vae_diffusers.app import interface
from vc_vae_diffusers.exporting import programs
from vc_vae_diffusers.report import visualize, writer
from vc_vae_diffusers.training import image_vae

IMPORTED = (visualize, writer, image_vae)  # once, before processes are forked

MEMORY, SECONDS, DISK = 3 << 30, 60, 64 << 20
WORDS = """
    - -- -1 0 1 7 1e-9 0.5 nan inf -inf 1e999 2147483647 2147483648 abc 8gb GB -8GB 0B 1e400GB ٣ é 日本 [bold]x[/bold] [/] %s
    %d {0} None true false no [] {} null 1,2,3 0,0,0 1x1 16x x @ @nope @videos.txt:nope a=b = a= =x cpu cuda:99 mode . * [
"""
TEXTS = ["", " ", "a\nb", "\x1b[31mred", "8 GB", '{"a": 1}', "\udcff", "9" * 30, "9" * 5000, "x" * 5000, *WORDS.split()]
ZOO = ["folder", "empty", "socket", "dangling", "nope/deep", "-x", "é\n.mp4", "x" * 300, "text.txt"]
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7)}  # nodes of our own, which may be replaced
LINKS = {"fifo": os.symlink, "loop": os.symlink, "linked": os.symlink, "hard": os.link}
STAY = {"out/run/config.yaml", "out/run/log.jsonl"}  # of a training that began


def zoo(folder: Path, source: Path) -> list[str]:
    """Paths of every kind; `hard` and `linked` are the source by other names."""
    (folder / "folder").mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "text.txt").write_text("nope.mp4\n")
    (folder / "dangling").symlink_to("gone")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
    os.mkfifo(folder / "pipe")
    suffixed = [folder / f"{name}{suffix}" for name in LINKS for suffix in ("", ".mp4", ".png", ".safetensors", ".json")]
    for path in suffixed:
        kind, target = LINKS[path.stem], {"loop": path, "fifo": folder / "pipe"}.get(path.stem, source)
        kind(target, path)
    devices = [folder / name for name in DEVICES]
    with contextlib.suppress(PermissionError):  # of who is not root
        for path in devices:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(*DEVICES[path.name]))
    return [
        *(str(folder / name) for name in ZOO),
        *map(str, suffixed + devices),
        "/proc/self/mem",
        f"{source}/x",
        str(source),
    ]


def mutate(call: Call, paths: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """The words of a call with one to three things wrong, and the words that were put in or left out."""
    words, put = [list(group) for group in call.words], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = rng.choice(paths) if rng.random() < 0.3 else rng.choice(TEXTS)
        how = rng.choice(("option",) * 6 + ("place",) * 2 * bool(call.places) + ("drop", "twice", "stray"))
        if how == "option":
            name = rng.choice(sorted(call.options))
            if rng.random() < 0.8:
                words = [group for group in words if group[0] != name]
            words.append([name] if not call.options[name] else rng.choice(([name, value], [f"{name}={value}"])))
            put.append(name)
        elif how == "place":
            words[rng.choice(call.places) % len(words)] = [value]
        elif how == "drop" and len(words) > call.needed:
            put += words.pop(rng.randrange(call.needed, len(words)))
        elif how == "twice":
            words.append(list(rng.choice(words[1:] or [[""]])))
        else:
            words.append([value])
        put.append(value)
    return [word for group in words for word in group], put


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
    flat = "".join(said.replace("│", " ").replace("\\x0a", " ").split())
    named = ["".join(word.split()).split("=")[0][:40].rstrip("-") or word for word in (*words, *put)] + [
        word[:2] for word in put
    ]
    if not any(name in flat for name in named if name) and not re.search(
        r"\b(IN|OUT|MODEL|RESULT|LABEL|Missing|is no option|names has|out of memory)\b", said
    ):
        return "unnamed"
    return "refused"


def one(call: Call, folder: Path, seed: int) -> tuple[str, list[str], str]:
    """One mutated call: what it came to, its words, what it said."""
    case, log, rng = folder / "case", folder / "log", random.Random(f"{call.name} {seed}")
    subprocess.run(["rm", "-rf", str(case)], check=True)
    (folder / "out").mkdir(exist_ok=True)
    case.mkdir()
    source = Path(call.words[call.places[0]][0]) if call.places else folder / "video.mkv"
    source = Path(shutil.copy(source if source.is_file() else folder / "video.mkv", case))
    os.chdir(case)
    words, put = mutate(call, zoo(case / "zoo", source), rng)
    before = state(case)
    code = finish(start(words, log, limit(case)))
    said = log.read_text(errors="replace")
    outcome = verdict(code, said, words, put, folder)
    after = state(case) | {f"out/{name}": data for name, data in state(folder / "out").items()}
    if changed := [name for name in before if before[name] != after.get(name)]:
        outcome = f"changed {changed}"
    elif outcome == "refused" and (made := sorted(set(after) - set(before) - STAY)):
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
        chosen = [call for call in calls(folder) if not options.only or call.name in options.only]
        for number, call in enumerate(chosen):
            until = time.monotonic() + (begin + options.seconds - time.monotonic()) / (len(chosen) - number)
            counts: collections.Counter[str] = collections.Counter()
            for seed in range(options.first, options.first + options.cases):
                outcome, words, said = one(call, folder, seed)
                counts[outcome if outcome in ("worked", "refused") else "wrong"] += 1
                if outcome not in ("worked", "refused") or options.show:
                    print(
                        f"{call.name} seed {seed}: {outcome}: {[word[:80] for word in words]}\n    {said.strip()[-600:]}",
                        flush=True,
                    )
                if time.monotonic() > until:
                    break
            failed += counts["wrong"]
            print(f"{call.name}: {dict(counts)}", flush=True)
        os.chdir("/")
    print(f"{failed} wrong outcomes in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
