"""What a TDC layer sees: static content in the anchor's term, motion in those of the differences (Sec. 4.4, Fig. 5)."""

from dataclasses import dataclass
from typing import cast

import torch
from PIL import Image, ImageDraw

from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from ..operators.tdc import GroupCausalTDC
from ..video import to_uint8

# Dark violet to yellow, by way of red: (position, RGB).
_COLOURS = ((0.0, (8, 6, 32)), (0.35, (110, 20, 110)), (0.7, (235, 90, 50)), (1.0, (250, 250, 170)))
_LABEL = 18


@dataclass(frozen=True)
class TDCComponents:
    """The activity of the terms of Eq. 5 in one layer, for one clip.

    Args:
        layer: name of the layer.
        frames: the clip, `(3, T, H, W)` in [-1, 1].
        maps: mean absolute value over channels by term, and of their sum as `output`, `(T, h, w)`.
    """

    layer: str
    frames: torch.Tensor
    maps: dict[str, torch.Tensor]

    def motion_share(self) -> float:
        """The part of all activity that the differences carry, 0 for a static clip."""
        motion = (self.maps["past"] + self.maps["future"]).sum()
        return (motion / (motion + self.maps["anchor"].sum())).item()


def tdc_layers(vae: AutoencoderKLVCVAE) -> list[str]:
    """The names of the layers that can be looked at."""
    return [name for name, module in vae.named_modules() if isinstance(module, GroupCausalTDC)]


@torch.no_grad()
def tdc_components(vae: AutoencoderKLVCVAE, video: torch.Tensor, layer: str) -> TDCComponents:
    """Run a clip through the model and take one layer apart.

    Args:
        vae: with `temporal_operator="tdc"` and `temporal_causality="group"`.
        video: `(1, 3, T, H, W)` in [-1, 1], T a multiple of the temporal compression.
        layer: one of `tdc_layers(vae)`.

    Raises:
        ValueError: for an unknown layer, or a clip that is not whole groups.
    """
    if layer not in tdc_layers(vae):
        some = ", ".join(tdc_layers(vae)[:4]) or "none: the model has no group causal TDC"
        raise ValueError(f"layer is {layer!r}, it must name a group causal TDC of the model, for example {some}")
    ratio = vae.temporal_compression_ratio
    if video.shape[0] != 1 or video.shape[2] % ratio != 0:
        raise ValueError(f"video has shape {tuple(video.shape)}: pass one clip of a multiple of {ratio} frames")
    module = cast(GroupCausalTDC, vae.get_submodule(layer))
    chunks: list[dict[str, torch.Tensor]] = []

    def take_apart(_module: torch.nn.Module, args: tuple) -> None:
        terms = module.components(*args)
        past, anchor, future = terms.values()
        terms["output"] = past + anchor + future
        chunks.append({name: term[0].abs().mean(0).float().cpu() for name, term in terms.items()})

    hook = module.register_forward_pre_hook(take_apart)
    try:
        vae(video)
    finally:
        hook.remove()
    maps = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return TDCComponents(layer, video[0].float().cpu(), maps)


def draw_components(components: TDCComponents, frames: list[int], height: int = 144) -> Image.Image:
    """Draw Fig. 5: a row a frame; the frame, the anchor's term, the two of the differences, and the output.

    Every map has one scale over all frames: that of the output for `anchor` and `output`, that of the larger difference
    for `past` and `future`, as the labels say.

    Args:
        components: from `tdc_components`.
        frames: indices of the frames to draw.
        height: of a picture, in pixels.
    """
    _, total, source_height, source_width = components.frames.shape
    if any(not 0 <= index < total for index in frames) or not frames:
        raise ValueError(f"frames is {frames}, the clip has {total}: pass indices from 0 to {total - 1}")
    width = round(source_width * height / source_height)
    content = max(components.maps[name].max().item() for name in ("anchor", "output"))
    motion = max(components.maps[name].max().item() for name in ("past", "future"))
    columns = {"anchor": content, "past": motion, "future": motion, "output": content}
    sheet = Image.new("RGB", ((len(columns) + 1) * (width + 2), len(frames) * (height + 2) + _LABEL), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(["frame", *(f"{name} (0 to {limit:.3g})" for name, limit in columns.items())]):
        draw.text((column * (width + 2) + 3, 3), label, fill="black")
    for row, index in enumerate(frames):
        top = _LABEL + row * (height + 2)
        picture = Image.fromarray(to_uint8(components.frames[:, index : index + 1])[:, 0].permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (0, top))
        for column, (name, limit) in enumerate(columns.items(), start=1):
            heat = _coloured(components.maps[name][index] / max(limit, 1e-12))
            sheet.paste(heat.resize((width, height), Image.Resampling.NEAREST), (column * (width + 2), top))
    return sheet


def draw_latents(latents: torch.Tensor, cell: int = 72) -> Image.Image:
    """Draw latents as pictures: a row a latent frame, a column a channel, each channel over its own range.

    Args:
        latents: `(C, T, h, w)`.
        cell: longer side of a picture, in pixels.
    """
    channels, count, height, width = latents.shape
    scale = cell / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    low, high = (f(latents.flatten(1), dim=1).values for f in (torch.min, torch.max))
    sheet = Image.new("RGB", (channels * (size[0] + 2), count * (size[1] + 2) + _LABEL), "white")
    draw = ImageDraw.Draw(sheet)
    for channel in range(channels):
        left = channel * (size[0] + 2)
        draw.text((left + 3, 3), str(channel), fill="black")
        for row in range(count):
            shown = (latents[channel, row] - low[channel]) / (high[channel] - low[channel]).clamp(min=1e-12)
            picture = Image.fromarray((shown * 255).round().to(torch.uint8).numpy())
            sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (left, _LABEL + row * (size[1] + 2)))
    return sheet


def heat(values: torch.Tensor) -> torch.Tensor:
    """Colour values in [0, 1], of any shape, from dark violet to yellow: `(..., 3)` in [0, 1]."""
    positions = torch.tensor([position for position, _ in _COLOURS])
    colours = torch.tensor([colour for _, colour in _COLOURS], dtype=torch.float32) / 255
    values = values.float().clamp(0, 1)
    index = torch.searchsorted(positions, values.contiguous(), right=True).clamp(1, len(_COLOURS) - 1)
    weight = ((values - positions[index - 1]) / (positions[index] - positions[index - 1]))[..., None]
    return torch.lerp(colours[index - 1], colours[index], weight)


def _coloured(values: torch.Tensor) -> Image.Image:
    """A map of values in [0, 1] as a picture."""
    return Image.fromarray((heat(values) * 255).round().to(torch.uint8).numpy())
