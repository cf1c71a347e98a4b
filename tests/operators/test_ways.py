"""The choice of a way, how accurate ways are, and that one of them is enough."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equations import DEFINITION, FEWER_PRODUCTS, build, clip
from torch import nn

import vc_vae_diffusers
from vc_vae_diffusers.operators.evaluation import (
    FRAMES,
    TEMPORAL,
    UPSAMPLING,
    Direct,
    FourFrames,
    GroupEnds,
    InSpace,
    Pairwise,
    Static,
    TwoTaps,
    choose,
    in_space,
)
from vc_vae_diffusers.operators.tdc import CausalTDC, GroupCausalTDC, TemporalInteractionTDC


@pytest.mark.parametrize(
    ("layer_class", "settings", "frames", "size", "way"),
    [
        (GroupCausalTDC, {"group_size": 1}, 3, 64, TwoTaps()),
        (GroupCausalTDC, {"group_size": 2}, 4, 64, Pairwise()),
        (GroupCausalTDC, {"group_size": 2}, 4, 16, GroupEnds()),  # few pixels
        (GroupCausalTDC, {"group_size": 2, "padding": "zeros"}, 4, 64, GroupEnds()),
        (GroupCausalTDC, {"group_size": 3}, 3, 64, GroupEnds()),
        (GroupCausalTDC, {"group_size": 4}, 4, 64, FourFrames()),
        (GroupCausalTDC, {"group_size": 8, "padding": "zeros"}, 8, 64, FourFrames()),
        (GroupCausalTDC, {"group_size": 4}, 2, 64, Pairwise()),  # a short group
        (CausalTDC, {}, 4, 64, Direct()),
        (TemporalInteractionTDC, {}, 4, 64, TwoTaps()),
    ],
)
def test_the_way_that_is_chosen_on_a_cpu(layer_class, settings, frames, size, way):
    layer, x = build(layer_class, **settings), clip(frames, height=size, width=size)
    layer.ways = TEMPORAL
    past, group = layer.neighbours.before(x, None), layer.neighbours.group(x)
    assert choose(layer, x, past, group) == way
    assert choose(layer, x[:, :, :1], None, 1) == Static()
    layer.fuse()
    with torch.no_grad():
        if way == GroupEnds() and settings == {"group_size": 2}:
            way = Pairwise()  # its kernels need not be computed
        assert choose(layer, x, past, group) == way
    assert choose(layer, x.to("meta"), past, group) not in (FourFrames(), Pairwise())  # measured on CPUs alone


def test_space_is_chosen_for_fused_kernels_and_even_sizes(monkeypatch):
    monkeypatch.setattr(in_space, "pays", lambda weight: True)
    layer, x = build(GroupCausalTDC, group_size=4), clip(4, height=64, width=64)
    layer.ways = TEMPORAL
    past = x[:, :, :1]
    with torch.no_grad():
        assert choose(layer, x, past, 4) == FourFrames()
        layer.fuse()
        assert choose(layer, x, past, 4) == InSpace(FourFrames())
        assert choose(layer, x[:, :, :2], past, 2) == InSpace(Pairwise())
        assert choose(layer, x[..., 1:], past, 4) == FourFrames()
    assert choose(layer, x, past, 4) == FourFrames()  # with gradients


def test_ways_of_the_same_settings_are_the_same():
    for way in (*TEMPORAL, *FRAMES, *UPSAMPLING):
        assert copy.deepcopy(way) == way
        assert hash(copy.deepcopy(way)) == hash(way)
    assert len({*TEMPORAL, *FRAMES, *UPSAMPLING}) == len(TEMPORAL) + len(FRAMES) + len(UPSAMPLING)
    assert FourFrames(always=True) != FourFrames()


# One way is enough ------------------------------------------------------------------------------------------------------


RUN_THE_MODEL = """
import sys, torch
import vc_vae_diffusers.operators.evaluation as evaluation
from vc_vae_diffusers import AutoencoderKLVCVAE
expected = torch.load(sys.argv[1])
vae = AutoencoderKLVCVAE(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, temporal_downsample=(True,))
vae.load_state_dict(expected["state"])
for fused in (False, True):
    with torch.no_grad():
        out = vae.eval()(expected["video"])
    torch.testing.assert_close(out.sample, expected["sample"], rtol=0, atol=1e-5)
    vae.fuse_tdc()
ways = {type(way).__name__ for layer in vae.modules() for way in getattr(layer, "fused", ())}
assert ways == {"Direct", "OfFrames", "Upsampled"}, ways
print(evaluation.__file__)
"""


def test_a_package_whose_only_way_is_the_definition_is_complete_and_correct(tmp_path, make_vae, make_video):
    """Delete the other ways, and their names where they are listed: the model computes the same."""
    package = Path(shutil.copytree(Path(vc_vae_diffusers.__file__).parent, tmp_path / "vc_vae_diffusers"))
    evaluation = package / "operators" / "evaluation"
    others = ("taps", "pairs", "tiles", "winograd", "in_space", "on_gpu")
    for name in others:
        (evaluation / f"{name}.py").unlink()
    kept = []
    for line in (evaluation / "__init__.py").read_text().splitlines():
        if any(line.startswith(f"from .{name} import") for name in others):
            continue
        kept.append(line)
    source = "\n".join(kept)
    start, end = source.index("TEMPORAL: "), source.index("\nFRAMES")
    source = source[:start] + "TEMPORAL: Sequence[Way] = (Direct(),)" + source[end:]
    source = source.replace("(OfDifferences(), Transposed(), Upsampled())", "(Upsampled(),)")
    source = source.replace("(BiasLast(), OfFrames())", "(OfFrames(),)")
    (evaluation / "__init__.py").write_text(source)

    torch.manual_seed(0)
    vae = make_vae(block_out_channels=(8, 8), latent_channels=16, temporal_downsample=(True,))
    video = make_video(5)
    with torch.no_grad():
        torch.save({"state": vae.state_dict(), "video": video, "sample": vae(video).sample}, tmp_path / "expected.pt")
    command = [sys.executable, "-c", RUN_THE_MODEL, str(tmp_path / "expected.pt")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


# Accuracy ---------------------------------------------------------------------------------------------------------------


def relative_error(ways, dtype: torch.dtype, group: int = 4) -> float:
    """The worst output frame's error, in root mean square over that of the frame, against the definition in float64."""
    torch.manual_seed(0)
    layer = GroupCausalTDC(64, 64, group_size=group).to(dtype)
    layer.ways = ways
    nn.init.normal_(layer.weight, std=(3 * 9 * 64) ** -0.5)
    x = F.silu(torch.randn(1, 64, group, 16, 16)).to(dtype)
    with torch.no_grad():
        expected = Direct()(copy.deepcopy(layer).double(), x.double(), None, group)
        error = layer.stream(x)[0].double() - expected
    return (error.square().mean((0, 1, 3, 4)) / expected.square().mean((0, 1, 3, 4))).sqrt().max().item()


def test_winograd_is_accurate_enough_for_half_precision():
    assert relative_error(DEFINITION, torch.bfloat16) < 0.005
    assert relative_error(FEWER_PRODUCTS, torch.bfloat16) < 0.012
    assert relative_error(FEWER_PRODUCTS, torch.bfloat16, group=2) < 0.012
    assert relative_error(FEWER_PRODUCTS, torch.float16) < 0.0015
    assert relative_error(FEWER_PRODUCTS, torch.float32) < 2e-6


def test_the_usual_points_of_interpolation_would_be_worse():

    class Usual(FourFrames):
        points = staticmethod(lambda: (0.0, 1.0, -1.0, 2.0, -2.0))

    usual = Usual(always=True)
    assert relative_error((usual,), torch.float32) < 1e-5  # right, but
    assert relative_error((usual,), torch.bfloat16) > 1.3 * relative_error(FEWER_PRODUCTS, torch.bfloat16)
