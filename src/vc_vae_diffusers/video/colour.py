"""Colours of one decoded frame: its matrix, range, depth and alpha, to RGB; and RGB to what encoders take. Not in the paper.

FFmpeg's scaler decides what it decides exactly; the matrix of deep frames is applied here (`_deep_rgb` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import torch
from av.filter import Graph
from av.video.frame import supported_np_pix_fmts
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, Interpolation, VideoReformatter

# Accurate rounding and full chroma interpolation: off, swscale is 1.2/255 away from the exact conversion on average.
SCALER_FLAGS = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_UNSPECIFIED_MATRIX = (2, 3)  # AVCOL_SPC_UNSPECIFIED, AVCOL_SPC_RESERVED
_BT709, _BT601 = 1, 6  # AVCOL_SPC_BT709, AVCOL_SPC_SMPTE170M
# (Kr, Kb) by AVColorSpace, ITU-T H.273 table 4.
_LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}


def color_matrix(frame: av.VideoFrame) -> int:
    """The frame's AVColorSpace; untagged frames by size, as players do."""
    if frame.colorspace not in _UNSPECIFIED_MATRIX:
        return frame.colorspace
    return _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601


def full_range(frame: av.VideoFrame) -> bool:
    """As tagged; what is untagged is full for `yuvj*` and grey (pictures, scientific cameras), limited for all others."""
    if frame.color_range in (ColorRange.JPEG, ColorRange.MPEG):
        return frame.color_range == ColorRange.JPEG
    colours = [component for component in frame.format.components if not component.is_alpha]
    return frame.format.name.startswith("yuvj") or len(colours) == 1


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether frames of this format can be transparent; palettes can."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def bit_depth(frame: av.VideoFrame) -> int:
    """Bits of the deepest component."""
    return max(component.bits for component in frame.format.components)


def _planes(frame: av.VideoFrame) -> torch.Tensor:
    """The planes of a 4:4:4 frame of 9 to 16 bits as float32 (planes, H, W)."""
    rows = [np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _deep_rgb(frame: av.VideoFrame, scaler: VideoReformatter, threads: int) -> torch.Tensor | None:
    """A frame of 9 to 16 bits as float32 (3 or 4, H, W) in [0, 1]; None for layouts that only swscale knows.

    swscale's way to 16-bit RGB is off by up to 1/255 (it scales by 256 where 257 is due), so it only brings the chroma
    to full size here, at unchanged depth, and the matrix is applied below (ITU-T H.273 section 8.3).
    """
    name, bits = frame.format.name, bit_depth(frame)
    if frame.format.is_rgb:
        known = name.startswith(("gbrp", "gbrap", "rgb48", "rgba64")) and name in supported_np_pix_fmts
        if not known:
            return None
        return torch.from_numpy(frame.to_ndarray().astype(np.float32)).movedim(-1, 0) / (2**bits - 1)
    unit = 2.0 ** (bits - 8)
    full = full_range(frame)
    black, luma_span, chroma_span = (0.0, 2.0**bits - 1, 2.0**bits - 1) if full else (16 * unit, 219 * unit, 224 * unit)
    if len(frame.format.components) == 1 and name in supported_np_pix_fmts:
        luma = torch.from_numpy(frame.to_ndarray().astype(np.float32))
        return ((luma - black) / luma_span).clamp_(0, 1).expand(3, -1, -1)
    if len(frame.format.components) < 3 or bits not in (9, 10, 12, 16) or color_matrix(frame) not in _LUMA_WEIGHTS:
        return None
    alpha = has_alpha(frame)
    frame.color_range = ColorRange.MPEG  # both sides alike, or swscale stretches full range between equal depths
    planes = _planes(
        scaler.reformat(
            frame,
            format=f"yuv{'a' if alpha else ''}444p{bits}le",
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALER_FLAGS,
            threads=threads,
        )
    )
    kr, kb = _LUMA_WEIGHTS[color_matrix(frame)]
    y = (planes[0] - black) / luma_span
    cb, cr = ((planes[1:3] - 128 * unit) / chroma_span).unbind()
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    channels = [red, green, blue] + ([planes[3] / (2**bits - 1)] if alpha else [])
    return torch.stack(channels).clamp_(0, 1)


def frame_to_rgb(frame: av.VideoFrame, scaler: VideoReformatter, threads: int = 1) -> torch.Tensor:
    """One decoded frame as (3, H, W), or (4, H, W) with straight alpha: uint8, or float32 in [0, 255] for deep colour."""
    deep = _deep_rgb(frame, scaler, threads) if 8 < bit_depth(frame) <= 16 else None
    if deep is not None:
        return deep * 255
    if not frame.format.is_rgb and not frame.format.has_palette:
        full = full_range(frame)
        frame.colorspace = color_matrix(frame)
        frame.color_range = ColorRange.JPEG if full else ColorRange.MPEG
    layout = "rgba" if has_alpha(frame) else "rgb24"
    frame = scaler.reformat(frame, format=layout, interpolation=SCALER_FLAGS, threads=threads)
    return torch.from_numpy(frame.to_ndarray()).movedim(-1, 0)


class EncoderColours:
    """RGB frames as an encoder takes them: BT.709, limited range, tagged so.

    Args:
        height, width: of the frames, pixels.
        pix_fmt: what the encoder takes, such as "yuv420p".
        time_base: of the frames' `pts`, which must increase.
        left: where subsampled chroma lies. H.264 has it at the left of its two luma columns unless told otherwise, and
            decoders read it so; FFmpeg's scaler puts it between them, half a pixel off. VP9 does not say:
            FFmpeg reads it there.
        threads: of the scaler; 0 lets it choose.
    """

    def __init__(self, height: int, width: int, pix_fmt: str, time_base: Fraction, left: bool, threads: int = 0):
        self._graph = graph = Graph()
        graph.threads = threads
        source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=time_base)
        place = ":out_h_chr_pos=0:out_v_chr_pos=128" if left and pix_fmt == "yuv420p" else ""
        scale = graph.add("scale", f"flags={int(SCALER_FLAGS)}:out_color_matrix=bt709:out_range=tv{place}")
        graph.link_nodes(source, scale, graph.add("format", pix_fmt), graph.add("buffersink")).configure()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """One frame of `rgb24`; its `pts` stays."""
        self._graph.vpush(frame)
        frame = self._graph.vpull()
        frame.color_primaries, frame.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        return frame


def composite(rgb: torch.Tensor, background: Sequence[int]) -> torch.Tensor:
    """Straight alpha (4, H, W) in [0, 255] over a background colour; (3, H, W) passes untouched."""
    if rgb.shape[0] == 3:
        return rgb
    rgb = rgb.to(torch.float32)
    alpha = rgb[3:] / 255
    return rgb[:3] * alpha + torch.tensor(background, dtype=torch.float32).view(3, 1, 1) * (1 - alpha)


def orient(rgb: torch.Tensor, rotation: int, mirrored: bool) -> torch.Tensor:
    """Mirror left to right if asked, then rotate by degrees counter-clockwise."""
    if mirrored:
        rgb = rgb.flip(-1)
    return torch.rot90(rgb, rotation // 90, dims=(-2, -1)) if rotation else rgb
