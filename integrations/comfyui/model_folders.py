"""Which VC-VAEs ComfyUI can load: folders below `models/vcvae` and `models/diffusers`, and the one in the package."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths

from vc_vae_diffusers import bundled_model_path

FOLDER = "vcvae"
BUNDLED = "vcvae-tiny (bundled)"
CLASS_NAME = "AutoencoderKLVCVAE"

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def is_vcvae(folder: Path) -> bool:
    """Whether `save_pretrained` of a VC-VAE wrote this folder; one with a damaged configuration is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == CLASS_NAME


def model_folders() -> dict[str, Path]:
    """Folders with a VC-VAE by the names that the loader lists; of two with one name, the path that ComfyUI has first."""
    found = {BUNDLED: bundled_model_path()}
    for kind in (FOLDER, "diffusers"):
        for root in map(Path, folder_paths.get_folder_paths(kind)):
            # A model, or a pipeline with one in a folder of its own.
            for config in sorted({*root.glob("*/config.json"), *root.glob("*/*/config.json")}):
                if is_vcvae(config.parent):
                    found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return found


def model_folder(name: str) -> Path:
    """The folder that the loader lists as `name`.

    Raises:
        ValueError: if there is none (any more).
    """
    folders = model_folders()
    if name not in folders:
        raise ValueError(
            f"model is {name!r}, and there is no VC-VAE of that name in models/{FOLDER} ({sorted(folders)}): put the folder "
            "that save_pretrained wrote there, and refresh the page"
        )
    return folders[name]
