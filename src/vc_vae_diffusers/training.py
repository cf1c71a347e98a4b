"""Parts of a training run that no model depends on: an adapter for any video VAE, checkpoints, stop signals, the log.

The loop itself is ``examples/train_vcvae.py``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import diffusers
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLHunyuanVideo, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .autoencoder_kl_vcvae import AutoencoderKLVCVAE
from .files import follow_umask, write_whole

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
STATE_NAME = "trainer.json"

# Modules of the parts that can be trained apart; a VAE has the quant convolutions or not.
PARTS = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}

# Edge in pixels of the clips that find out which lengths a VAE returns unchanged, and how far the search goes.
_PROBE_SIZE = 64
_PROBE_REACH = 16


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite. The weights are still those of the step before."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The previous one is untouched."""


# ---------------------------------------------------------------------------------------------------------- any VAE


def load_vae(path: str, subfolder: str | None = None) -> ModelMixin:
    """Load a VC-VAE or any diffusers VAE, in float32; its class is the one that its ``config.json`` names.

    Raises:
        ValueError: if neither this package nor diffusers has that class.
    """
    name = str(AutoencoderKLVCVAE.load_config(path, subfolder=subfolder)["_class_name"])
    vae_class = AutoencoderKLVCVAE if name == AutoencoderKLVCVAE.__name__ else getattr(diffusers, name, None)
    if vae_class is None:
        raise ValueError(f"model={path!r}: its config.json names the class {name!r}, which diffusers does not have")
    return vae_class.from_pretrained(path, subfolder=subfolder, torch_dtype=torch.float32)


def select_parts(vae: ModelMixin, parts: Sequence[str]) -> None:
    """Freeze every parameter of ``vae`` outside ``parts`` ("encoder", "decoder").

    Raises:
        ValueError: for another part, or if nothing is left to train.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"train={list(parts)}: unknown parts {unknown}; choose from {sorted(PARTS)}")
    trained = {module for part in parts for module in PARTS[part]}
    vae.requires_grad_(False)
    for name, module in vae.named_children():
        if name in trained:
            module.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in vae.parameters()):
        raise ValueError(f"train={list(parts)}: {type(vae).__name__} has no parameters there; name encoder or decoder")


class TrainableVAE(nn.Module):
    """One ``forward`` for encoding, sampling and decoding, so that DDP, FSDP and DeepSpeed see the whole pass.

    Calling ``encode`` and ``decode`` of a model inside DDP bypasses its hooks: gradients are then not averaged.
    Works for VC-VAE and for every diffusers video VAE whose posterior is a diagonal Gaussian.
    """

    def __init__(self, vae: ModelMixin, num_frames: Sequence[int]):
        """Wrap ``vae`` for clips of the given lengths; the lengths it can return are found by trying, on tiny clips."""
        super().__init__()
        if isinstance(vae, AutoencoderKLHunyuanVideo):
            # Its default cuts clips of more than 16 frames into overlapping tiles in time and blends them.
            vae.use_framewise_encoding = vae.use_framewise_decoding = False
        self.vae = vae
        self.padded_frames = {frames: returned_length(vae, frames) for frames in sorted(set(num_frames))}
        self.padded_frames |= {frames: frames for frames in self.padded_frames.values()}  # an image comes as such a clip

    def forward(self, video: torch.Tensor, noise_seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruct clips from samples of the posterior, or from its mode.

        Args:
            video: (B, C, T, H, W) in [-1, 1].
            noise_seeds: one seed a clip, so that a clip's noise does not depend on its place in a batch; None decodes
                the posterior's mode.

        Returns:
            the reconstruction (B, C, T, H, W), and the posterior's mean and log-variance (B, c, t, h, w) in float32.
        """
        frames = video.shape[2]
        posterior = self.vae.encode(pad_frames(video, self.padded_frames[frames])).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean
        if noise_seeds is not None:
            noise = torch.cat([_noise(mean[:1], seed) for seed in noise_seeds])
            latents = mean + torch.exp(0.5 * logvar) * noise
        reconstruction = self.vae.decode(latents.to(posterior.mean.dtype)).sample[:, :, :frames]
        if reconstruction.shape != video.shape:
            raise ValueError(
                f"{type(self.vae).__name__} returned {tuple(reconstruction.shape)} for clips {tuple(video.shape)}; "
                "choose a size that its spatial compression divides"
            )
        return reconstruction, mean, logvar


def pad_frames(video: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Repeat the last frame of (B, C, T, H, W) up to ``num_frames``."""
    missing = num_frames - video.shape[2]
    if missing == 0:
        return video
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def _noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    # Drawn on the CPU: the same on every device.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)


@torch.no_grad()
def returned_length(vae: ModelMixin, num_frames: int) -> int:
    """Return the smallest length >= ``num_frames`` that ``vae`` decodes to as many frames as it encoded.

    That is T itself for VC-VAE at multiples of 4, 1 + 4k for Wan, Hunyuan and others, 1 + 6k for Mochi, 1 + 8k for LTX.
    """
    device = next(vae.parameters()).device
    for length in range(num_frames, num_frames + _PROBE_REACH + 1):
        clip = torch.zeros(1, vae.config.in_channels, length, _PROBE_SIZE, _PROBE_SIZE, device=device)
        posterior = vae.encode(clip).latent_dist
        if not isinstance(posterior, DiagonalGaussianDistribution):
            raise ValueError(f"{type(vae).__name__} has no Gaussian posterior; the recipe needs one for its KL term")
        if vae.decode(posterior.mode()).sample.shape[2] == length:
            return length
    raise ValueError(
        f"{type(vae).__name__} returns no clip of {num_frames} to {num_frames + _PROBE_REACH} frames at its own length"
    )


def last_layer(vae: ModelMixin) -> nn.Parameter:
    """Return the kernel of the decoder's last convolution, against which the adaptive GAN weight is measured."""
    return [parameter for parameter in vae.decoder.parameters() if parameter.ndim >= 4][-1]


def pad_time_explicitly(module: nn.Module) -> None:
    """Make every `Conv3d` of ``module`` pad time by an operation of its own; values and state-dict keys stay.

    Not in the paper: a way round oneDNN (torch 2.15, AVX-512 BF16 processors), whose bfloat16 weight gradient reads
    memory that nothing wrote where a kernel never fits between its temporal padding: 3 taps and padding 1 on 2 frames.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv3d) and not isinstance(convolution.padding, str) and convolution.padding[0]:
            frames, *space = convolution.padding
            convolution.padding = (0, *space)
            convolution.register_forward_pre_hook(lambda _, args, n=frames: (_zero_frames(args[0], n),))


def _zero_frames(x: torch.Tensor, count: int) -> torch.Tensor:
    zeros = x.new_zeros(*x.shape[:2], count, *x.shape[3:])
    return torch.cat([zeros, x, zeros], dim=2)


def clip_gradients(accelerator: Accelerator, module: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients of ``module`` down to ``max_norm`` and return the norm that they had, a plain scalar."""
    norm = accelerator.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


# ------------------------------------------------------------------------------------------------------ checkpoints


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints ``step-*`` under ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_NAME).is_file())


def save_checkpoint(
    accelerator: Accelerator, model: nn.Module, ema: EMAModel | None, state: dict, folder: Path, keep: int
) -> Path:
    """Write ``folder/step-XXXXXXXX`` and delete all but the last ``keep`` checkpoints. To be called by every process.

    Everything goes to a hidden folder first, is flushed to the disk and renamed: a kill or a full disk at any moment
    leaves the previous checkpoint as it was. ``ema/`` inside is a model that ``from_pretrained`` loads.

    Args:
        state: JSON-able; ``state["step"]`` names the checkpoint.

    Raises:
        CheckpointError: naming the reason, the free space and the last good checkpoint.
    """
    target = folder / f"step-{state['step']:08d}"
    partial = folder / f".partial-{target.name}"
    if accelerator.is_main_process:
        for stale in folder.glob(".partial-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()

    def write() -> None:
        accelerator.save_state(str(partial))
        if ema is not None:
            with ema_weights(ema, model):
                save_vae(accelerator, model, partial / "ema")

    def publish() -> None:
        if accelerator.is_main_process:
            complete = state if ema is None else {**state, "ema_step": ema.optimization_step}
            (partial / STATE_NAME).write_text(json.dumps(complete, indent=1))
            follow_umask(*partial.rglob("*.safetensors"))
            _flush_tree(partial)
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
            _flush(folder)

    for action in (write, publish):
        error: Exception | None = None
        try:
            action()
        except (OSError, RuntimeError, SafetensorError) as caught:
            if not _is_write_failure(caught):
                raise
            error = caught
        # Also the barrier between the two: nothing is renamed before every process has written its part.
        if any_process(accelerator, error is not None):
            free = shutil.disk_usage(folder).free / 2**20
            good = list_checkpoints(folder)
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"could not write {target}: {error or 'another process failed'}; {free:.0f} MiB were free there; "
                f"the last good checkpoint is {good[-1] if good else 'none'}"
            ) from error
    if accelerator.is_main_process:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def _is_write_failure(error: Exception) -> bool:
    # torch.save reports a full disk as a RuntimeError of its archive writer.
    return isinstance(error, OSError | SafetensorError) or "inline_container" in str(error)


def load_checkpoint(accelerator: Accelerator, model: nn.Module, ema: EMAModel | None, checkpoint: Path) -> dict:
    """Restore everything that :func:`save_checkpoint` wrote and return its ``state``."""
    accelerator.load_state(str(checkpoint))
    state = json.loads((checkpoint / STATE_NAME).read_text())
    if ema is not None:
        weights = load_file(checkpoint / "ema" / WEIGHTS_NAME)
        named = accelerator.unwrap_model(model).vae.named_parameters()
        for (name, parameter), shadow in zip(named, ema.shadow_params, strict=True):
            shadow.copy_(_like(weights[name], parameter))
        ema.optimization_step = state["ema_step"]
    return state


def save_vae(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    """Write the wrapped VAE of ``model`` as a diffusers folder, float32. To be called by every process."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "vae."
        weights = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        follow_umask(folder / WEIGHTS_NAME)
        config = json.loads(accelerator.unwrap_model(model).vae.to_json_string())
        config.pop("_name_or_path", None)  # a path of this machine
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def ema_weights(ema: EMAModel | None, model: nn.Module) -> Iterator[None]:
    """Put the averaged weights into ``model`` for a while; without ``ema``, do nothing."""
    if ema is None:
        yield
        return
    parameters = list(model.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------- signals and the log


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether ``flag`` holds on any process. To be called by every process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


class StopSignal:
    """Turns SIGINT and SIGTERM into a request to save and stop; a later SIGINT interrupts at once.

    Launchers pass a Ctrl-C on to processes that the terminal has told already: what follows within seconds is the same.
    """

    _ECHO_SECONDS = 3.0

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
            logger.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._first > self._ECHO_SECONDS:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class JsonlLog:
    """One JSON object a line. Opening it at ``step`` drops later rows: those steps are about to be trained again."""

    def __init__(self, path: Path, step: int):
        rows = []
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
            rows = [line for line in rows if json.loads(line)["step"] <= step]
        write_whole(path, "".join(row + "\n" for row in rows))
        self._path = path

    def write(self, row: dict) -> None:
        """Append ``row``, which has a key ``step``."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
