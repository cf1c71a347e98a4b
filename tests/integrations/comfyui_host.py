"""What the node pack imports of ComfyUI, as far as it does: the modules' names and contracts, on the CPU, without a server.

docs/comfyui.md says in which ComfyUI the pack was tried itself.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"


class InterruptProcessingException(BaseException):
    """No `Exception` in ComfyUI either, so that nodes do not catch it by accident."""


class ModelPatcher:
    """Writes attributes to the model that it manages, as ComfyUI's does."""

    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device):
        self.model, self.load_device = model, load_device
        model.device, model.model_loaded_weight_memory = offload_device, 0


class Host:
    """A ComfyUI with folders below `root`; it notes what is asked of it, and can be told to interrupt."""

    def __init__(self, root: Path):
        self.root = root
        self.progress: list[tuple[int, int]] = []
        self.reserved: list[int] = []
        self.interrupt_at: int | None = None
        self.model_paths: dict[str, list[str]] = {"diffusers": [str(root / "models" / "diffusers")]}
        for folder in ("input", "output", "models/vcvae", "models/diffusers"):
            (root / folder).mkdir(parents=True)

    def load_models_gpu(self, patchers, memory_required: int, force_full_load: bool) -> None:
        assert force_full_load, "layers of diffusers cannot be loaded in part"
        self.reserved.append(memory_required)
        for patcher in patchers:
            patcher.model.to(patcher.load_device)
            patcher.model.device = patcher.load_device

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.interrupt_at is not None and self.progress and self.progress[-1][0] >= self.interrupt_at:
            raise InterruptProcessingException

    def save_path(self, prefix: str, output: str, width: int, height: int) -> tuple[str, str, int, str, str]:
        folder = Path(output) / Path(prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        counter = 1 + len(list(folder.glob(f"{Path(prefix).name}_*")))
        return str(folder), Path(prefix).name, counter, str(Path(prefix).parent), prefix

    def modules(self) -> dict[str, ModuleType]:
        """By the names under which nodes import them."""
        host, cpu = self, torch.device("cpu")

        class ProgressBar:
            def __init__(self, total: int):
                self.done, self.total = 0, total

            def update(self, value: int) -> None:
                self.done += value
                host.progress.append((self.done, self.total))

        management = {
            **dict.fromkeys(("vae_device", "vae_offload_device", "intermediate_device"), lambda: cpu),
            "vae_dtype": lambda device, allowed: torch.float32,
            "OOM_EXCEPTION": torch.cuda.OutOfMemoryError,
            "soft_empty_cache": lambda: None,
            "load_models_gpu": self.load_models_gpu,
            "throw_exception_if_processing_interrupted": self.throw_exception_if_processing_interrupted,
        }
        paths = {
            "models_dir": str(self.root / "models"),
            "add_model_folder_path": lambda kind, path: self.model_paths.setdefault(kind, []).append(path),
            "get_folder_paths": lambda kind: self.model_paths[kind],
            "get_input_directory": lambda: str(self.root / "input"),
            "get_output_directory": lambda: str(self.root / "output"),
            "get_annotated_filepath": lambda name: str(self.root / "input" / name),
            "exists_annotated_filepath": lambda name: (self.root / "input" / name).is_file(),
            "get_save_image_path": self.save_path,
        }
        contents = {
            "comfy.model_management": management,
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "folder_paths": paths,
        }
        modules = {"comfy": ModuleType("comfy")}
        for name, values in contents.items():
            modules[name] = ModuleType(name)
            vars(modules[name]).update(values)
            if name.startswith("comfy."):
                setattr(modules["comfy"], name.removeprefix("comfy."), modules[name])
        return modules

    def load_pack(self) -> SimpleNamespace:
        """The pack's modules, imported as ComfyUI imports a custom node; `modules()` must be in `sys.modules`."""
        spec = importlib.util.spec_from_file_location(
            "vcvae_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        package = importlib.util.module_from_spec(spec)
        sys.modules["vcvae_pack"] = package
        spec.loader.exec_module(package)
        names = ("nodes", "video_vae", "model_folders")
        return SimpleNamespace(
            nodes_by_name=package.NODE_CLASS_MAPPINGS,
            titles=package.NODE_DISPLAY_NAME_MAPPINGS,
            **{name: sys.modules[f"vcvae_pack.{name}"] for name in names},
        )
