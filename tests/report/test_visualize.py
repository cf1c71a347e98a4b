"""Fig. 5: the terms of TDC apart."""

import pytest
import torch

from vc_vae_diffusers import AutoencoderKLVCVAE, GroupCausalTDC
from vc_vae_diffusers.report.visualize import draw_components, tdc_components, tdc_layers

LAYER = "encoder.down_blocks.1.resnets.0.conv1"


@pytest.fixture
def vae() -> AutoencoderKLVCVAE:
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    vae = AutoencoderKLVCVAE(**config).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 5:  # slices of differences start at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.2 * parameter.std().item())
    return vae


def moving_square(frames: int) -> torch.Tensor:
    """A bright square that moves over a still, patterned background, (1, 3, frames, 32, 32)."""
    torch.manual_seed(1)
    video = (torch.rand(3, 1, 32, 32) * 0.5 - 0.5).repeat(1, frames, 1, 1)
    for t in range(frames):
        video[:, t, 4:12, 2 + 2 * t : 10 + 2 * t] = 1.0
    return video[None]


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("padding", ["replicate", "zeros"])
@pytest.mark.parametrize("with_cache", [False, True])
def test_the_terms_sum_to_the_output(group, padding, with_cache):
    torch.manual_seed(0)
    layer = GroupCausalTDC(5, 7, group_size=group, temporal_padding=padding).double()
    x = torch.randn(2, 5, 8, 6, 9, dtype=torch.float64)
    cache = torch.randn(2, 5, 1, 6, 9, dtype=torch.float64) if with_cache else None
    terms = layer.components(x, cache)
    assert list(terms) == ["past", "anchor", "future"]
    total = sum(terms.values()) + layer.bias.view(-1, 1, 1, 1)
    assert (total - layer.stream(x, cache)[0]).abs().max() < 1e-12


def test_static_content_is_all_in_the_anchor(vae):
    video = moving_square(1).repeat(1, 1, 8, 1, 1)
    components = tdc_components(vae, video, LAYER)
    assert components.maps["anchor"].max() > 0.01
    assert components.maps["past"].max() < 1e-5
    assert components.maps["future"].max() < 1e-5
    assert components.motion_share() < 1e-4


def test_motion_shows_where_things_move(vae):
    components = tdc_components(vae, moving_square(8), "encoder.conv_in")
    past = components.maps["past"]
    assert past.shape == (8, 32, 32)
    assert past[0].max() == 0  # the first frame has no past
    assert past[5, 3:13, 8:22].mean() > 1e-3
    assert past[5, 20:].max() == 0  # the background below does not move
    assert components.maps["future"][3].max() == 0  # the last frame of a group has no future
    assert components.motion_share() > 0.01


def test_chunks_do_not_matter(vae):
    one = tdc_components(vae, moving_square(8), LAYER)
    vae.groups_per_chunk = 2
    two = tdc_components(vae, moving_square(8), LAYER)
    for name, values in one.maps.items():
        assert (values - two.maps[name]).abs().max() < 1e-5


def test_the_drawing_has_a_row_a_frame(vae):
    components = tdc_components(vae, moving_square(8), LAYER)
    one = draw_components(components, [2], height=40)
    three = draw_components(components, [2, 5, 6], height=40)
    assert one.width == three.width == 5 * 42
    assert three.height - one.height == 2 * 42
    frame = one.crop((0, 18, 40, 58)).convert("L").getextrema()
    assert frame[1] > 200  # the bright square
    past = one.crop((2 * 42, 18, 2 * 42 + 40, 58)).convert("L").getextrema()
    assert past[0] < 30 < 60 < past[1]  # still background, moving square


def test_wrong_arguments_name_the_remedy(vae):
    with pytest.raises(ValueError, match=r"layer is 'encoder\.nothing'.*for example encoder\.conv_in"):
        tdc_components(vae, moving_square(8), "encoder.nothing")
    with pytest.raises(ValueError, match="multiple of 4 frames"):
        tdc_components(vae, moving_square(7), LAYER)
    with pytest.raises(ValueError, match="indices from 0 to 7"):
        draw_components(tdc_components(vae, moving_square(8), LAYER), [8])
    assert "decoder.conv_out" in tdc_layers(vae)
    assert tdc_layers(AutoencoderKLVCVAE(**{**vae.config, "temporal_operator": "conv"})) == []
