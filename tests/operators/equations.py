"""The equations of the paper, written out frame by frame, and what the tests of operators share."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F

from vc_vae_diffusers.operators.evaluation import (
    Combined,
    Direct,
    FourFrames,
    GroupEnds,
    LastOfGroup,
    Pairwise,
    Static,
    TapsAsInputs,
    TapsAsOutputs,
    TwoTaps,
    Way,
)
from vc_vae_diffusers.operators.evaluation.stacked import Stacked
from vc_vae_diffusers.operators.tdc import TemporalConv3d

PADDINGS = ("replicate", "zeros")
EXACT = {"rtol": 0, "atol": 1e-11}  # float64
DEFINITION = (Direct(),)
TAPS = (Static(), TwoTaps(), GroupEnds(), Direct())
FEWER_PRODUCTS = (Static(), TwoTaps(), FourFrames(always=True), Pairwise(always=True), GroupEnds(), Direct())
STACKED = (Static(), Stacked(), TwoTaps(), Direct())
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
COMBINED = tuple(Combined(in_time, always=True) for in_time in (LastOfGroup(), Pairwise(), FourFrames()))
# By what they are called in the names of tests.
WAYS = {
    "definition": DEFINITION,
    "taps": TAPS,
    "fewer products": FEWER_PRODUCTS,
    "combined, as on GPUs": (Static(), *COMBINED, Direct()),
    "taps as inputs": (Static(), TapsAsInputs(always=True), Direct()),
    "taps as outputs": (Static(), TapsAsOutputs(always=True), Direct()),
    "stacked": STACKED,
}


def frame_conv(frame: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """2-D convolution of one frame with one temporal slice."""
    return F.conv2d(frame, weight, padding=weight.shape[-1] // 2)


def missing(existing: torch.Tensor, padding: str) -> torch.Tensor:
    return existing if padding == "replicate" else torch.zeros_like(existing)


def group_causal(x, weight, bias, groups, padding, tdc):
    """Eq. 2, or Eq. 5 with `tdc`: `groups` are the sizes of the groups, in order."""
    past_slice, current_slice, future_slice = weight.unbind(2)
    lasts = {sum(groups[: i + 1]) - 1 for i in range(len(groups))}
    assert sum(groups) == x.shape[2]
    outputs = []
    for t in range(x.shape[2]):
        current = x[:, :, t]
        past = x[:, :, t - 1] if t > 0 else missing(current, padding)
        future = missing(current, padding) if t in lasts else x[:, :, t + 1]
        y = frame_conv(current, current_slice)
        if tdc:
            y = y + frame_conv(past - current, past_slice) + frame_conv(future - current, future_slice)
        else:
            y = y + frame_conv(past, past_slice) + frame_conv(future, future_slice)
        outputs.append(y + bias[:, None, None])
    return torch.stack(outputs, dim=2)


def causal(x, weight, bias, padding, tdc):
    """Eq. 1, or Eq. 7 with `tdc`."""
    before_slice, past_slice, current_slice = weight.unbind(2)
    outputs = []
    for t in range(x.shape[2]):
        current = x[:, :, t]
        first = missing(x[:, :, 0], padding)
        past = x[:, :, t - 1] if t > 0 else first
        before = x[:, :, t - 2] if t > 1 else first
        y = frame_conv(current, current_slice)
        if tdc:
            y = y + frame_conv(past - current, past_slice) + frame_conv(before - current, before_slice)
        else:
            y = y + frame_conv(past, past_slice) + frame_conv(before, before_slice)
        outputs.append(y + bias[:, None, None])
    return torch.stack(outputs, dim=2)


def interaction(x, weight, bias, padding, tdc):
    """Pairs of frames, stride 2; Eq. 6 with `tdc`, the later frame being the anchor. A single frame is its own past."""
    past_slice, anchor_slice = weight.unbind(2)
    pairs = [(x[:, :, t], x[:, :, t + 1]) for t in range(0, x.shape[2] - 1, 2)]
    pairs = pairs or [(missing(x[:, :, 0], padding), x[:, :, 0])]
    outputs = []
    for past, anchor in pairs:
        y = frame_conv(anchor, anchor_slice) + frame_conv(past - anchor if tdc else past, past_slice)
        outputs.append(y + bias[:, None, None])
    return torch.stack(outputs, dim=2)


# What tests of operators share ------------------------------------------------------------------------------------------


def clip(frames: int, batch: int = 2, channels: int = 3, height: int = 5, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, channels, frames, height, width, generator=generator, dtype=torch.float64)


def build(
    layer_class: type[TemporalConv3d], padding: str = "replicate", ways: Sequence[Way] = DEFINITION, **settings
) -> TemporalConv3d:
    """A layer of 3 and 4 channels in float64 with nothing at its initial value."""
    torch.manual_seed(1)
    layer = layer_class(3, 4, temporal_padding=padding, dtype=torch.float64, **settings)
    layer.ways = ways
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


def in_chunks(layer: TemporalConv3d, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    outputs, cache = [], None
    for chunk in x.split(sizes, dim=2):
        y, cache = layer.stream(chunk, cache)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


def splits(parts: int, size: int) -> list[list[int]]:
    """Every way to cut `parts * size` frames into chunks of whole groups of `size`."""
    cuts = [c for n in range(parts) for c in combinations(range(1, parts), n)]
    return [[(b - a) * size for a, b in zip((0, *c), (*c, parts), strict=True)] for c in cuts]


def output_and_gradients(function, x, parameters):
    """The output, and the gradients of a fixed random projection of it to x and the parameters."""
    x = x.clone().requires_grad_()
    y = function(x)
    projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    return y, *torch.autograd.grad((y * projection).sum(), (x, *parameters))


def assert_all_close(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **EXACT)


def frames_like(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= ROUNDING[dtype] * expected.double().abs().max()
