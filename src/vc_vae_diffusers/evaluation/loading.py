"""From a name on the command line to a model: published baselines, folders, hub ids, users' files."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from .. import bundled_model_path
from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from ..names import BUNDLED as BUNDLED_NAME
from ..names import hub_problem
from .baselines import UserVAE, wrap_model
from .reconstructor import Original, Reconstructor

# Where the baselines of the paper and their peers are published in diffusers' layout.
PUBLISHED = {
    "cogvideox": ("THUDM/CogVideoX-2b", "vae"),
    "wan2.1": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae"),
    "hunyuanvideo": ("hunyuanvideo-community/HunyuanVideo", "vae"),
    "ltx": ("Lightricks/LTX-Video", "vae"),
    "mochi": ("genmo/mochi-1-preview", "vae"),
    "cosmos": ("nvidia/Cosmos-1.0-Tokenizer-CV8x8x8", "vae"),
    "flux": ("black-forest-labs/FLUX.1-schnell", "vae"),
    "sd3.5": ("stabilityai/stable-diffusion-3.5-large", "vae"),
}
# Published, but not in diffusers' layout: only a converted local folder can be read.
UNCONVERTED = {"vidtok": "microsoft/VidTok"}
BUNDLED = "vcvae-tiny"
ORIGINAL = "original"
INFLATE = "inflate:"
SAMPLES = "samples:"


@dataclass(frozen=True)
class ModelSpec:
    """A model to evaluate, as named on the command line: `LABEL=SOURCE` or `SOURCE`.

    `SOURCE` is a published name (`wan2.1`), a local folder or file, a hub id (`org/repo` or `org/repo/subfolder`),
    `inflate:SOURCE` for an untrained VC-VAE made of an image VAE, `vcvae-tiny` for the bundled model, `original`,
    `samples:FOLDER` for generated videos, or a Python file (`adapter.py` or `adapter.py:CHECKPOINT`).
    """

    label: str
    source: str

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Split `LABEL=SOURCE`; without a label the source's last part is the label."""
        label, separator, source = text.partition("=")
        if not separator:
            source = text
            plain = source.removeprefix(INFLATE).removeprefix(SAMPLES)
            label = source if not Path(plain).exists() else Path(plain).resolve().name
        if not label or not source:
            raise ValueError(f"model is {text!r}, but it must be SOURCE or LABEL=SOURCE; give both parts")
        return cls(label, source)


def load_model(
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    posterior: str = "mode",
    token: str | None = None,
) -> Reconstructor:
    """Read a model and wrap it.

    Args:
        spec: which one.
        device, dtype: where and how it runs.
        posterior: `"mode"` or `"sample"`.
        token: for gated repositories.

    Raises:
        ValueError: for a model that is unknown or that this evaluation cannot run, saying what can be done.
        OSError: if it cannot be read.
    """
    device = torch.device(device)
    if spec.source == ORIGINAL:
        return Original()
    adapter_file, _, checkpoint = spec.source.partition(".py:")
    if spec.source.endswith(".py") or checkpoint:
        path = Path(adapter_file if adapter_file.endswith(".py") else f"{adapter_file}.py")
        return load_user_model(path, checkpoint or None, device, dtype)
    source, subfolder = _locate(spec.source.removeprefix(INFLATE))
    try:
        if spec.source.startswith(INFLATE):
            module = AutoencoderKLVCVAE.from_image_vae(source, subfolder=subfolder, token=token)
            module = module if dtype == module.dtype else module.to(dtype)
        else:
            module = _read_module(source, subfolder, dtype, token)
    except OSError as error:
        if Path(source).exists():
            raise
        why = hub_problem(source, error, access="pass a token that may read it (--token)") or str(error).splitlines()[0]
        raise OSError(
            f"model {spec.label!r}: {source} is no folder here and could not be had from the hub ({why}); "
            f"download it, and give its folder if need be: {spec.label}=FOLDER"
        ) from error
    module = module.eval().requires_grad_(False).to(device)
    return wrap_model(module, posterior=posterior)


def _locate(source: str) -> tuple[str, str | None]:
    """The folder or repository, and the subfolder of it, that a source means."""
    if source in (BUNDLED, BUNDLED_NAME) and not Path(source).exists():
        return str(bundled_model_path()), None
    if source in PUBLISHED:
        return PUBLISHED[source]
    if source in UNCONVERTED:
        raise ValueError(
            f"model {source!r} is published ({UNCONVERTED[source]}) but not in diffusers' layout; convert it and give the "
            f"folder: {source}=FOLDER"
        )
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        return source, "vae"
    if folder.is_file():
        raise ValueError(
            f"model is {source!r}, which is a file; give the folder that save_pretrained wrote, or an adapter.py"
        )
    if folder.exists():
        return source, None
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or not 2 <= len(parts) <= 3:
        raise ValueError(
            f"model is {source!r}, which is neither a folder here, nor a hub id (org/repo), nor one of "
            f"{', '.join([BUNDLED, ORIGINAL, *PUBLISHED, *UNCONVERTED])}; correct it"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _read_module(source: str, subfolder: str | None, dtype: torch.dtype, token: str | None) -> torch.nn.Module:
    config = AutoencoderKLVCVAE.load_config(source, subfolder=subfolder, token=token)
    class_name = config.get("_class_name")
    if class_name == AutoencoderKLVCVAE.__name__:
        return AutoencoderKLVCVAE.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype, token=token)
    if class_name is None:
        raise ValueError(
            f"{source} has no _class_name in its config.json, so diffusers cannot read it; see docs/evaluation.md"
        )
    return diffusers.AutoModel.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype, token=token)


def load_user_model(path: Path, checkpoint: str | None, device: torch.device, dtype: torch.dtype) -> UserVAE:
    """Run a user's adapter file and wrap what its `load(checkpoint, device=..., dtype=...)` returns.

    Raises:
        ValueError: if the file is missing or has no `load`.
    """
    if not path.is_file():
        raise ValueError(f"model is {path}, but there is no such file; give the path of the adapter")
    specification = importlib.util.spec_from_file_location(f"vcvae_user_model_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise ValueError(f"model is {path}, which Python cannot import; give a file whose name ends in .py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    load = getattr(module, "load", None)
    if load is None:
        raise ValueError(f"{path} has no function load(checkpoint, *, device, dtype); see docs/evaluation.md")
    return UserVAE(load(checkpoint, device=device, dtype=dtype), path)
