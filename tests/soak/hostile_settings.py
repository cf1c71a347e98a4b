"""Settings, results and shards, mutated: each command that reads one works or refuses it by one clear error."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import yaml
from commands import LATTE, TRAINING, VCVAE
from mutations import VALUES, Kind, mutated_bytes, mutated_config, mutated_json
from video_files import encode, numbered_frames

from vc_vae_diffusers.cli.app import app

LEAVING = ("../out.safetensors", "/tmp/vcvae-out.safetensors", "a/../../out.safetensors", "a\x00b.json", "." * 300)


def command(*words: str | Path) -> str:
    """The outcome of `vcvae WORDS`: exit codes 1 and 2 are for what a user can put right."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            app([str(word) for word in words])
    except SystemExit as done:
        if done.code in (0, None):
            return "read"
        if done.code in (1, 2) and "Traceback" not in said.getvalue():
            return "refused"
    return f"foreign {' '.join(said.getvalue().split())[-200:]!r}"


mutated_yaml = partial(mutated_config, load=yaml.safe_load, dump=yaml.safe_dump)


def mutated_result(data: bytes, rng: random.Random) -> bytes:
    """A field at any depth, of one of the models too."""
    if rng.random() < 0.1:
        return mutated_bytes(data, rng)
    result = json.loads(data)
    if rng.random() < 0.5:
        result["models"][0] = mutated_json(result["models"][0], rng, 4)
    else:
        result = mutated_json(result, rng, 4)
    return json.dumps(result).encode()


def mutated_shard(data: bytes, rng: random.Random) -> bytes:
    """A member of another name, kind, size or content."""
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=out, mode="w") as target:
        members = source.getmembers()
        chosen = rng.randrange(len(members))
        for number, member in enumerate(members):
            content = source.extractfile(member).read()
            if number == chosen:
                how = rng.choice(("name", "link", "size", "content", "twice"))
                if how == "name":
                    member.name = rng.choice(LEAVING)
                elif how == "link":
                    member.type, member.linkname, content = (
                        rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)),
                        "/etc/passwd",
                        b"",
                    )
                elif how == "content":
                    fields = member.name.endswith(".json")
                    content = json.dumps(rng.choice(VALUES)).encode() if fields else mutated_bytes(content, rng)
                elif how == "twice":
                    target.addfile(member, io.BytesIO(content))
                member.size = len(content)
                if how == "size":  # a header that promises more than there is
                    member.size = rng.choice((10**12, len(content) + 1))
                    out.write(member.tobuf() + content)
                    continue
            target.addfile(member, io.BytesIO(content))
    return out.getvalue()


def settings(folder: Path, model: Path) -> list[Kind]:
    """One good file of each kind, with the command that reads it."""
    videos = folder / "videos"
    videos.mkdir()
    for name in ("a.mkv", "b.mkv"):
        encode(videos / name, numbered_frames(24), "ffv1", "yuv444p")
    kinds = []

    def add(name: str, read: Callable[[Path], str], mutate: Callable[[bytes, random.Random], bytes]) -> None:
        kinds.append(Kind(name, folder / name, read, mutate, ()))

    short = {"num_frames": 8, "size": 32, "metrics": ["psnr", "ssim"], "frame_interval": 1, "without_first_frame": False}
    (folder / "protocol.yaml").write_text(yaml.safe_dump({"description": "short", "kind": "video", **short}))
    evaluate = ("evaluate", "--model", f"tiny={model}", "--data", videos, "--device", "cpu")
    result = command(*evaluate, "--protocol", folder / "protocol.yaml", "--out", folder / "result.json")
    if result != "read":  # it must be good as it is
        raise RuntimeError(result)
    add("protocol.yaml", lambda p: command(*evaluate, "--protocol", p, "--out", p.with_name("out.json")), mutated_yaml)
    add("result.json", lambda p: command("report", p, "--out", p.with_name("page")), mutated_result)
    for name, options, vae in (("vcvae", VCVAE, "--model"), ("latte", LATTE, "--vae")):
        (folder / f"{name}.yaml").write_text(TRAINING + options)
        words = ("--data", videos, vae, model, "--steps", "1")
        add(f"{name}.yaml", partial(_train, name, words), mutated_yaml)
    command("encode", videos, folder / "shards", "--shards", "2", "--model", model, "--device", "cpu")
    shard = next((folder / "shards").glob("*.tar"))
    shard.rename(folder / "shard.tar")
    add(
        "shard.tar",
        lambda p: command("decode", p, p.with_name("decoded"), "--model", model, "--device", "cpu"),
        mutated_shard,
    )
    return kinds


def _train(name: str, words: tuple[str | Path, ...], config: Path) -> str:
    return command("train", name, "--config", config, *words, "--output", config.with_name("run"))
