"""Checkpoints that are whole or not there, and the models inside of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import follow_umask, whole_file, write_json

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
STATE_NAME = "trainer.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The previous one is untouched."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints ``step-*`` under ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_NAME).is_file())


def checkpoint_to_resume(folder: Path, resume: bool) -> Path | None:
    """Return the last checkpoint under ``folder``, None if there is none.

    Raises:
        ValueError: if there are some and ``resume`` is false: a new run among them would be pruned by their numbers, and
            the run after it would go on from the old weights.
    """
    found = list_checkpoints(folder)
    if found and not resume:
        raise ValueError(
            f"--resume false, but {folder} holds checkpoints of another run, the last {found[-1].name}: name another "
            f"--output, or delete {folder.parent} first"
        )
    return found[-1] if found else None


def save_checkpoint(accelerator: Accelerator, model: nn.Module, ema: EMAModel, state: dict, folder: Path, keep: int) -> Path:
    """Write ``folder/step-XXXXXXXX`` and delete all but the last ``keep`` checkpoints. To be called by every process.

    Everything goes to a hidden folder first, is flushed to the disk and renamed: a kill or a full disk at any moment
    leaves the previous checkpoint as it was. ``ema/`` inside is a model that ``from_pretrained`` loads.

    Args:
        state: JSON-able; ``state["step"]`` names the checkpoint.
        keep: at least 1.

    Raises:
        CheckpointError: naming the reason, the free space and the last good checkpoint.
    """
    target = folder / f"step-{state['step']:08d}"
    partial = folder / f".partial-{target.name}"
    if accelerator.is_main_process:
        _clear(folder)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()

    def write() -> None:
        accelerator.save_state(str(partial))
        with ema_weights(ema, model):
            save_model(accelerator, model, partial / "ema")

    def publish() -> None:
        if accelerator.is_main_process:
            _publish({**state, "ema_step": ema.optimization_step}, partial, target)

    try:
        for action in (write, publish):
            error = _write_failure(action)
            # Also the barrier between the two: nothing is renamed before every process has written its part.
            if any_process(accelerator, error is not None):
                raise CheckpointError(_what_is_left(target, error)) from error
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
    if accelerator.is_main_process:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def _clear(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale)


def _publish(state: dict, partial: Path, target: Path) -> None:
    """Complete a checkpoint, see it onto the disk, and give it its name."""
    (partial / STATE_NAME).write_text(json.dumps(state, indent=1))
    follow_umask(*partial.rglob("*.safetensors"))
    _flush_tree(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    _flush(target.parent)


def _write_failure(action: Callable[[], None]) -> Exception | None:
    """Do it, and return the error of a disk that did not take it. torch.save reports that as one of its archive writer."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError | SafetensorError) or "inline_container" in str(error):
            return error
        raise
    return None


def _what_is_left(target: Path, error: Exception | None) -> str:
    free = shutil.disk_usage(target.parent).free / 2**20
    good = list_checkpoints(target.parent)
    return (
        f"could not write {target}: {error or 'another process failed'}; {free:.0f} MiB were free there; "
        f"the last good checkpoint is {good[-1] if good else 'none'}"
    )


def load_checkpoint(
    accelerator: Accelerator, model: nn.Module, ema: EMAModel, checkpoint: Path, parts: Iterable[str] = ()
) -> dict:
    """Restore everything that :func:`save_checkpoint` wrote and return its ``state``.

    Raises:
        ValueError: if ``state["parts"]`` has other names than ``parts``: it is a checkpoint of another kind of run.
    """
    state = json.loads((checkpoint / STATE_NAME).read_text())
    found, wanted = sorted(state.get("parts", {})), sorted(parts)
    if found != wanted:
        raise ValueError(
            f"{checkpoint} has the states of {found}, this run needs those of {wanted}: go on with the options that the run "
            "began with (gan_weight among them), or name another --output"
        )
    accelerator.load_state(str(checkpoint))
    weights = load_file(checkpoint / "ema" / WEIGHTS_NAME)
    inner, _ = inner_model(accelerator.unwrap_model(model))
    for (name, parameter), shadow in zip(inner.named_parameters(), ema.shadow_params, strict=True):
        shadow.copy_(_like(weights[name], parameter))
    ema.optimization_step = state["ema_step"]
    return state


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def inner_model(module: nn.Module) -> tuple[ModelMixin, str]:
    """The diffusers model of a trained module and the prefix of its weights there: the module itself, or its ``vae``."""
    return (module, "") if isinstance(module, ModelMixin) else (module.vae, "vae.")


def save_model(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    """Write the diffusers model inside ``model`` as a folder, float32. To be called by every process."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        inner, prefix = inner_model(accelerator.unwrap_model(model))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in weights.items()}
        with whole_file(folder / WEIGHTS_NAME) as file:
            save_file(weights, file, metadata={"format": "pt"})
        config = json.loads(inner.to_json_string())
        config.pop("_name_or_path", None)  # a path of this machine
        write_json(folder / "config.json", config, sort_keys=True)


@contextmanager
def ema_weights(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """Put the averaged weights into ``model`` for a while."""
    parameters = list(model.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether ``flag`` holds on any process. To be called by every process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
