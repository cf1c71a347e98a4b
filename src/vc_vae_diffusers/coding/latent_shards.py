"""The latents of a whole collection, as webdataset shards: what a diffusion model is trained on, encoded once.

A sample of a shard `latents-00000.tar` is `KEY.safetensors` (what `latent_file.py` reads), `KEY.json` (frames, fps, size,
source, and what a JSON file beside the video says) and every other file beside the video that has its name (`KEY.txt`,
`KEY.cls` …). Which samples a shard holds follows from the sorted collection alone, so that any number of processes write the
same shards, byte by byte. A sample is written whole or not at all, and so is a shard: a killed run goes on with the sample
it was at.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..files import scratch_folder, whole_file, write_json, write_whole
from ..video import VideoReadError, is_media_name

INDEX_NAME, SETTINGS_NAME = "index.json", "settings.json"
_WORK = ".samples"


@dataclass(frozen=True)
class Sample:
    """One video or image: its key in shards, where it lies, and the files beside it by their suffixes.

    Args:
        key: without dots, unique.
        source: a file, or a tar file that holds the member `member`.
        name: what the index calls it, relative to the collection.
        member: in a tar file.
        beside: files, or members of the same tar file.
    """

    key: str
    source: Path
    name: str
    member: str | None = None
    beside: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """A path that can be read."""
        if self.member is None:
            yield self.source
            return
        with scratch_folder(tempfile.gettempdir()) as folder, tarfile.open(self.source) as archive:
            path = folder / f"sample{Path(self.member).suffix}"
            with open(path, "wb") as file:
                _copy(archive, self.member, file)
            yield path

    def sidecars(self) -> dict[str, bytes]:
        """The contents of what lies beside it, by suffix without its dot."""
        if self.member is None:
            return {suffix: Path(path).read_bytes() for suffix, path in self.beside.items()}
        with tarfile.open(self.source) as archive:
            return {suffix: _content(archive, name) for suffix, name in self.beside.items()}


def samples_of_files(files: Sequence[str | Path], root: Path) -> list[Sample]:
    """Samples of single files, in the order of their names below `root`.

    Raises:
        ValueError: if two would have the same key.
    """
    paths = [Path(file) for file in files]
    named = sorted((path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path), path) for path in paths)
    beside = {folder: sorted(folder.iterdir()) for folder in {path.parent for _, path in named}}
    samples: dict[str, Sample] = {}
    for name, path in named:
        key = _key(name)
        if key in samples:
            raise ValueError(f"IN: {samples[key].name} and {name} would have the same key, {key}; rename one of them.")
        others = [other for other in beside[path.parent] if other.stem == path.stem and other.is_file()]
        sidecars = {other.suffix[1:]: str(other) for other in others if other.suffix and not is_media_name(other.name)}
        samples[key] = Sample(key, path, name, beside=sidecars)
    return list(samples.values())


def samples_of_tar(path: Path) -> list[Sample]:
    """Samples of a webdataset shard, in its order: members up to the first dot of their names belong together."""
    with tarfile.open(path) as archive:
        names = [member.name for member in archive if member.isfile()]
    by_key: dict[str, list[str]] = {}
    for name in names:
        folder, _, base = name.rpartition("/")
        by_key.setdefault(f"{folder}/{base.split('.')[0]}".lstrip("/"), []).append(name)
    samples = []
    for key, members in by_key.items():
        media = [name for name in members if is_media_name(name)]
        if media:
            beside = {name.rpartition("/")[2].partition(".")[2]: name for name in members if not is_media_name(name)}
            samples.append(Sample(_key(key), path, f"{path.name}/{media[0]}", media[0], beside))
    return samples


def _key(name: str) -> str:
    """A key that webdataset does not cut: no dots but the suffix's, which goes."""
    stem = name.rsplit(".", 1)[0] if is_media_name(name) else name
    return stem.replace(".", "_").lstrip("/")


@dataclass(frozen=True)
class Shard:
    """One output: its file name and its samples."""

    name: str
    samples: tuple[Sample, ...]


def _copy(archive: tarfile.TarFile, member: str | tarfile.TarInfo, target: IO[bytes]) -> None:
    """A file of an archive, piece by piece: a header may promise more than memory holds."""
    opened = archive.extractfile(member)
    if opened is None:
        raise ValueError(f"IN: {archive.name!r}: {member} is no file; pack the archive again.")
    with opened:
        shutil.copyfileobj(opened, target)


def _content(archive: tarfile.TarFile, member: str) -> bytes:
    content = io.BytesIO()
    _copy(archive, member, content)
    return content.getvalue()


def shards_of(samples: Sequence[Sample], per_shard: int) -> list[Shard]:
    """Samples of single files in shards of `per_shard`; those of a tar file stay together, in a shard of its name."""
    tars: dict[Path, list[Sample]] = {sample.source: [] for sample in samples if sample.member is not None}
    for sample in samples:
        if sample.member is not None:
            tars[sample.source].append(sample)
    shards = [Shard(path.name, tuple(of_tar)) for path, of_tar in tars.items()]
    single = [sample for sample in samples if sample.member is None]
    for number, start in enumerate(range(0, len(single), per_shard)):
        shards.append(Shard(f"latents-{number:05d}.tar", tuple(single[start : start + per_shard])))
    return shards


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder for these settings, or check that what is there was made with the same.

    Raises:
        ValueError: naming what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_NAME
    if not path.exists():
        write_json(path, settings)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
    if differing:
        changes = ", ".join(f"{name} was {there.get(name)!r}, is {settings.get(name)!r}" for name in differing)
        raise ValueError(f"OUT: {folder} holds latents made with other settings ({changes}); name another folder.")


def write_shard(
    shard: Shard, folder: Path, encode: Callable[[Path, Path], dict[str, Any]], done: Callable[[Sample], None]
) -> None:
    """Encode the samples of a shard that are not there yet, and put them together.

    Args:
        shard: what is to be written.
        folder: the output.
        encode: writes a file of latents for a video and returns its facts.
        done: told of each sample, readable or not.
    """
    if (folder / shard.name).exists():
        for sample in shard.samples:
            done(sample)
        return
    work = folder / _WORK / shard.name.removesuffix(".tar")
    work.mkdir(parents=True, exist_ok=True)
    for sample in shard.samples:
        _write_sample(sample, work / hashlib.sha256(sample.key.encode()).hexdigest()[:20], encode)
        done(sample)
    with whole_file(folder / shard.name) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        unreadable = {}
        for sample in shard.samples:
            place = work / hashlib.sha256(sample.key.encode()).hexdigest()[:20]
            report = json.loads((place / "report.json").read_text(encoding="utf-8"))
            if "error" in report:
                unreadable[sample.name] = report["error"]
                continue
            _add(archive, f"{sample.key}.json", json.dumps(report["facts"], indent=1, sort_keys=True).encode() + b"\n")
            _add(archive, f"{sample.key}.safetensors", (place / "latents.safetensors").read_bytes())
            for suffix, content in sorted(sample.sidecars().items()):
                if suffix not in ("json", "safetensors"):
                    _add(archive, f"{sample.key}.{suffix}", content)
        write_json(folder / f".{shard.name}.unreadable.json", unreadable)
    shutil.rmtree(work)


def _write_sample(sample: Sample, place: Path, encode: Callable[[Path, Path], dict[str, Any]]) -> None:
    """Encode one sample; `report.json` comes last and says that it is done, or why it cannot be."""
    if (place / "report.json").exists():
        return
    place.mkdir(exist_ok=True)
    try:
        with sample.opened() as path:
            facts = encode(path, place / "latents.safetensors")
        own = json.loads(sample.sidecars().get("json", b"{}"))
        told = own if isinstance(own, dict) else {"json": own}
        report: dict[str, Any] = {"facts": {**told, **facts, "source": sample.name}}
    except (VideoReadError, ValueError) as error:
        report = {"error": str(error).replace(str(sample.source), sample.name)}
    write_whole(place / "report.json", json.dumps(report))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member that says nothing of when, where and by whom it was written."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))


def write_index(folder: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """Say what the shards hold: `shards` by name with their samples' number, and what could not be read and why."""
    unreadable: dict[str, str] = {}
    counts = {}
    for shard in shards:
        told = json.loads((folder / f".{shard.name}.unreadable.json").read_text(encoding="utf-8"))
        unreadable |= told
        counts[shard.name] = len(shard.samples) - len(told)
    index = {"samples": sum(counts.values()), "shards": counts, "unreadable": unreadable}
    write_json(folder / INDEX_NAME, index)
    if (folder / _WORK).exists():
        shutil.rmtree(folder / _WORK)
    return index


@contextmanager
def unpacked(shard: Path) -> Iterator[Path]:
    """A folder with the files of latents of a shard, while the block lasts; folders in keys become part of the names.

    Raises:
        ValueError: if it is no tar file, or holds none.
    """
    with scratch_folder(tempfile.gettempdir()) as folder:
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(".safetensors"):
                        with open(folder / member.name.replace("/", "__"), "wb") as file:
                            _copy(archive, member, file)
        except tarfile.TarError as error:
            raise ValueError(f"IN: {shard} is no readable tar file ({error}); encode it again.") from error
        if not any(folder.iterdir()):
            raise ValueError(f"IN: {shard} holds no .safetensors; write it with `vcvae encode --shards`.")
        yield folder
