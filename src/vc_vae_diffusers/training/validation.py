"""Validation of a video VAE in training: PSNR, SSIM and videos of held-out clips."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ..metrics import frame
from ..video import VideoReadError, VideoWriter, to_uint8
from .checkpoints import ema_weights
from .data import distinct_names, validation_clip
from .trainer import Trainer

logger = logging.getLogger(__name__)


def psnr(reconstruction: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """PSNR of every frame, (B, T), of a reconstruction clamped to the range of pixels."""
    return frame.psnr(reconstruction.detach().float().clamp(-1, 1), video, data_range=(-1.0, 1.0))


@torch.no_grad()
def mean_quality(trainer: Trainer, files: Sequence[str]) -> dict[str, float]:
    """PSNR and SSIM of the averaged weights on held-out clips: posterior mode, mean over frames, then clips.

    Returns nothing if no clip can be read, which is logged and costs the run nothing else.
    """
    run: Any = trainer.config.run  # of a program that validates
    accelerator = trainer.accelerator
    sums = torch.zeros(3, dtype=torch.float64)
    names = distinct_names(files)
    with ema_weights(trainer.ema, trainer.model):
        trainer.model.eval()
        # Every process runs the same number of passes, as FSDP needs; those without a clip count for nothing.
        for first in range(0, len(files), accelerator.num_processes):
            index = first + accelerator.process_index
            clip = read_clip_or_none(files, index, run.validation_frames, run.validation_size)
            empty = torch.zeros(3, run.validation_frames, run.validation_size, run.validation_size)
            video = trainer.to_device((empty if clip is None else clip)[None])
            reconstruction = trainer.model(video, None)[0].float().clamp(-1, 1)
            if clip is None:
                continue
            ssim = frame.ssim(reconstruction, video, data_range=(-1.0, 1.0)).mean()
            sums += torch.tensor([1.0, psnr(reconstruction, video).mean().item(), ssim.item()], dtype=torch.float64)
            if index < run.validation_videos:
                save_video(trainer, names[index], torch.cat([video, reconstruction], dim=-1)[0].cpu())
        trainer.model.train()
    count, total_psnr, total_ssim = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
    if count == 0:
        logger.error("none of the %d held-out files can be read: there is no validation; training goes on", len(files))
        return {}
    return {"validation_psnr": total_psnr / count, "validation_ssim": total_ssim / count}


def read_clip_or_none(files: Sequence[str], index: int, num_frames: int, size: int) -> torch.Tensor | None:
    """The held-out clip number ``index``; None past the end, or if it cannot be read, which is logged."""
    if index >= len(files):
        return None
    try:
        return validation_clip(files[index], num_frames, size)
    except VideoReadError as error:
        logger.warning("validation skips %s", error)
        return None


def save_video(trainer: Trainer, name: str, clip: torch.Tensor) -> None:
    """Write source and reconstruction side by side, (3, T, H, W) in [-1, 1], and hand the file to the tracker."""
    path = trainer.output / "validation" / f"{name}-step-{trainer.step:08d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=24) as writer:
        writer.write(clip)
    show_video(trainer.accelerator, trainer.config.run.tracker, f"validation/{name}", path, clip, trainer.step)


def show_video(accelerator: Accelerator, tracker: str, key: str, path: Path, clip: torch.Tensor, step: int) -> None:
    """Show a clip (3, T, H, W) in [-1, 1] in the tracker."""
    if not accelerator.is_main_process or tracker == "none":
        return
    if tracker == "tensorboard":
        # add_video would need moviepy; what it writes is this: a GIF in an image summary.
        from tensorboard.compat.proto.summary_pb2 import Summary

        frames = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in to_uint8(clip).unbind(1)]
        buffer = io.BytesIO()
        frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=42, loop=0)
        picture = Summary.Image(height=clip.shape[2], width=clip.shape[3], encoded_image_string=buffer.getvalue())
        writer = accelerator.get_tracker("tensorboard", unwrap=True)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=key, image=picture)]), step)
    elif tracker == "wandb":
        import wandb

        accelerator.get_tracker("wandb", unwrap=True).log({key: wandb.Video(str(path))}, step=step)
    else:
        import trackio

        accelerator.get_tracker("trackio", unwrap=True).log({key: trackio.Video(str(path))}, step=step)
