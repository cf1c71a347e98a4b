"""The temporal operators against the equations of the paper, written out frame by frame in float64."""

import pytest
import torch
import torch.nn.functional as F
from equations import (
    DEFINITION,
    EXACT,
    FEWER_PRODUCTS,
    PADDINGS,
    TAPS,
    WAYS,
    assert_all_close,
    build,
    causal,
    clip,
    group_causal,
    in_chunks,
    interaction,
    output_and_gradients,
    splits,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vc_vae_diffusers.operators.evaluation import TEMPORAL
from vc_vae_diffusers.operators.tdc import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
    stream,
)

# Eq. 1, 2, 5, 6, 7: outputs and gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_class", [GroupCausalConv3d, GroupCausalTDC])
@pytest.mark.parametrize(("group", "count"), [(1, 4), (2, 3), (3, 2), (4, 3), (6, 2), (8, 2)])
def test_group_causal_equals_the_equation_for_every_split(layer_class, group, count, padding, ways):
    layer, x = build(layer_class, padding, ways, group_size=group), clip(group * count)
    tdc = layer_class is GroupCausalTDC
    parameters = (layer.weight, layer.bias)
    expected = output_and_gradients(
        lambda x: group_causal(x, layer.weight, layer.bias, [group] * count, padding, tdc), x, parameters
    )
    ways = splits(count, group)
    assert len(ways) == 2 ** (count - 1)
    for sizes in ways:
        actual = output_and_gradients(lambda x, sizes=sizes: in_chunks(layer, x, sizes), x, parameters)
        assert_all_close(actual, expected)


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_class", [GroupCausalConv3d, GroupCausalTDC])
@pytest.mark.parametrize(("sizes", "groups"), [([1], [1]), ([3], [3]), ([1, 4, 8], [1, 4, 4, 4]), ([2, 4, 1], [2, 4, 1])])
def test_a_chunk_of_fewer_frames_than_a_group_is_a_short_group(layer_class, sizes, groups, padding, ways):
    layer, x = build(layer_class, padding, ways, group_size=4), clip(sum(sizes))
    parameters = (layer.weight, layer.bias)
    tdc = layer_class is GroupCausalTDC
    expected = output_and_gradients(lambda x: group_causal(x, layer.weight, layer.bias, groups, padding, tdc), x, parameters)
    assert_all_close(output_and_gradients(lambda x: in_chunks(layer, x, sizes), x, parameters), expected)


@pytest.mark.parametrize("ways", [DEFINITION, TAPS], ids=["definition", "taps"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_class", [CausalConv3d, CausalTDC])
def test_causal_equals_the_equation_for_every_split(layer_class, padding, ways):
    layer, x = build(layer_class, padding, ways), clip(5)
    parameters = (layer.weight, layer.bias)
    expected = output_and_gradients(
        lambda x: causal(x, layer.weight, layer.bias, padding, layer_class is CausalTDC), x, parameters
    )
    for sizes in splits(5, 1):
        actual = output_and_gradients(lambda x, sizes=sizes: in_chunks(layer, x, sizes), x, parameters)
        assert_all_close(actual, expected)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("layer_class", [TemporalInteractionConv3d, TemporalInteractionTDC])
@pytest.mark.parametrize("frames", [1, 2, 6])
@pytest.mark.parametrize("ways", [DEFINITION, TAPS], ids=["definition", "taps"])
def test_temporal_interaction_equals_the_equation(layer_class, frames, kernel_size, padding, ways):
    layer, x = build(layer_class, padding, ways, kernel_size=kernel_size), clip(frames)
    parameters = (layer.weight, layer.bias)
    tdc = layer_class is TemporalInteractionTDC
    expected = output_and_gradients(lambda x: interaction(x, layer.weight, layer.bias, padding, tdc), x, parameters)
    assert expected[0].shape[2] == max(1, frames // 2)
    assert_all_close(output_and_gradients(lambda x: layer.stream(x)[0], x, parameters), expected)


@pytest.mark.parametrize("layer_class", [GroupCausalTDC, CausalTDC])
@pytest.mark.parametrize("kernel_size", [1, 5])
def test_other_spatial_sizes_and_no_bias(layer_class, kernel_size):
    settings = {"group_size": 2} if layer_class is GroupCausalTDC else {}
    layer = layer_class(3, 4, kernel_size, bias=False, dtype=torch.float64, **settings)
    x, bias = clip(4, height=7, width=6), torch.zeros(4, dtype=torch.float64)
    if layer_class is GroupCausalTDC:
        expected = group_causal(x, layer.weight, bias, [2, 2], "replicate", tdc=True)
    else:
        expected = causal(x, layer.weight, bias, "replicate", tdc=True)
    torch.testing.assert_close(layer.stream(x)[0], expected, **EXACT)


@pytest.mark.parametrize("layer_class", [GroupCausalTDC, CausalTDC])
def test_memory_layout_of_the_input_does_not_matter(layer_class):
    layer = build(layer_class, **({"group_size": 4} if layer_class is GroupCausalTDC else {}))
    x = clip(8)
    expected, cache = layer.stream(x)
    scattered = torch.stack([x, -x], dim=-1)[..., 0]
    assert not scattered.is_contiguous()
    for same in (
        x.contiguous(memory_format=torch.channels_last_3d),
        x.transpose(3, 4).contiguous().transpose(3, 4),
        scattered,
    ):
        y, other_cache = layer.stream(same)
        torch.testing.assert_close(y, expected, **EXACT)
        torch.testing.assert_close(other_cache, cache, rtol=0, atol=0)


@pytest.mark.parametrize("layer_class", [GroupCausalTDC, CausalTDC])
def test_the_cache_is_a_small_copy(layer_class):
    layer = build(layer_class, **({"group_size": 4} if layer_class is GroupCausalTDC else {}))
    x = clip(8)
    _, cache = layer.stream(x)
    kept = 1 if layer_class is GroupCausalTDC else 2
    torch.testing.assert_close(cache, x[:, :, -kept:], rtol=0, atol=0)
    assert cache.untyped_storage().nbytes() == cache.numel() * cache.element_size()  # not a view that keeps the clip alive
    before = cache.clone()
    x.zero_()
    layer.stream(clip(4), cache)
    torch.testing.assert_close(cache, before, rtol=0, atol=0)


# Static clips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_class", [GroupCausalTDC, CausalTDC])
def test_a_new_layer_of_differences_is_the_anchor_drawn_as_a_2d_convolution(layer_class):
    torch.manual_seed(0)
    layer = layer_class(32, 32)
    anchor = layer.weight[:, :, layer.anchor]
    bound = (32 * 3 * 3) ** -0.5  # of nn.Conv2d: uniform within one over the root of a kernel's numbers
    assert 0.999 * bound < anchor.abs().max() <= bound
    assert anchor.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    others = [slices for k, slices in enumerate(layer.weight.unbind(2)) if k != layer.anchor]
    assert len(others) == 2
    assert all(not slices.any() for slices in others)


@pytest.mark.parametrize(
    ("layer_class", "anchor", "settings"),
    [
        *((GroupCausalTDC, 1, {"group_size": g}) for g in (1, 2, 4)),
        (CausalTDC, 2, {}),
        (TemporalInteractionTDC, 1, {"kernel_size": 3}),
    ],
)
@pytest.mark.parametrize("frames", [1, 4, 8])
def test_a_static_clip_equals_the_2d_convolution_of_the_anchor_slice(layer_class, anchor, settings, frames):
    layer, frame = build(layer_class, **settings), clip(1)
    y, _ = layer.stream(frame.expand(-1, -1, frames, -1, -1))
    expected = F.conv2d(frame[:, :, 0], layer.weight[:, :, anchor], layer.bias, padding=1)
    for t in range(y.shape[2]):
        torch.testing.assert_close(y[:, :, t], expected, **EXACT)


def test_a_static_stream_stays_static():
    layer, frame = build(GroupCausalTDC, group_size=4), clip(1)
    static, cache = layer.stream(frame)
    later, _ = layer.stream(frame.expand(-1, -1, 8, -1, -1), cache)
    torch.testing.assert_close(later, static.expand_as(later), **EXACT)


# Cost -------------------------------------------------------------------------------------------------------------------


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def plain_flops(x: torch.Tensor, stride: int = 1) -> int:
    taps, padding = (3, 1) if stride == 1 else (2, 0)
    plain = nn.Conv3d(3, 4, (taps, 3, 3), (stride, 1, 1), padding=(padding, 1, 1), dtype=x.dtype)
    return flops(lambda: plain(x))


@pytest.mark.parametrize(
    ("group", "share"), [(1, 2 / 3), (2, 5 / 6), (4, 11 / 12)], ids=["group of 1", "group of 2", "group of 4"]
)
@pytest.mark.parametrize("layer_class", [GroupCausalConv3d, GroupCausalTDC])
@pytest.mark.parametrize("cached", [False, True])
def test_group_ends_save_their_third_tap(layer_class, group, share, cached):
    layer, x = build(layer_class, ways=TAPS, group_size=group), clip(8)
    cache = x[:, :, -1:] if cached else None
    assert flops(lambda: layer.stream(x, cache)) == share * plain_flops(x)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("ways", [FEWER_PRODUCTS, TEMPORAL], ids=["fewer products", "default"])
def test_other_ways_never_cost_more(group, ways):
    x = clip(8, height=32, width=32).float()
    taps, other = (build(GroupCausalTDC, ways=w, group_size=group).float() for w in (TAPS, ways))
    assert 0 < flops(lambda: other.stream(x)) <= flops(lambda: taps.stream(x)) < plain_flops(x)


@pytest.mark.parametrize("layer_class", [CausalConv3d, CausalTDC])
def test_causal_layers_cost_one_plain_convolution(layer_class):
    layer, x = build(layer_class), clip(8)
    assert 0 < flops(lambda: layer.stream(x)) <= plain_flops(x)


@pytest.mark.parametrize("layer_class", [TemporalInteractionConv3d, TemporalInteractionTDC])
def test_temporal_interaction_costs_one_plain_convolution(layer_class):
    layer, x = build(layer_class, kernel_size=3), clip(8)
    assert 0 < flops(lambda: layer.stream(x)) <= plain_flops(x, stride=2)


@pytest.mark.parametrize(
    ("layer_class", "settings"),
    [(GroupCausalTDC, {"group_size": 4}), (CausalTDC, {}), (TemporalInteractionTDC, {"kernel_size": 3})],
)
def test_an_image_pays_one_tap_on_one_frame(layer_class, settings):
    layer, x = build(layer_class, ways=TAPS, **settings), clip(1)
    frame_conv = nn.Conv2d(3, 4, 3, padding=1, dtype=x.dtype)
    assert flops(lambda: layer.stream(x)) == flops(lambda: frame_conv(x[:, :, 0])) > 0


@pytest.mark.parametrize(
    ("tdc_class", "conv_class", "settings"),
    [
        (GroupCausalTDC, GroupCausalConv3d, {"group_size": 4}),
        (CausalTDC, CausalConv3d, {}),
        (TemporalInteractionTDC, TemporalInteractionConv3d, {}),
    ],
)
def test_no_parameter_more_than_the_plain_layer(tdc_class, conv_class, settings):
    tdc, conv = build(tdc_class, **settings), build(conv_class, **settings)
    plain = nn.Conv3d(3, 4, conv.kernel_size)
    shapes = {name: p.shape for name, p in plain.state_dict().items()}
    assert {name: p.shape for name, p in tdc.state_dict().items()} == shapes
    assert {name: p.shape for name, p in conv.state_dict().items()} == shapes
    assert isinstance(tdc, nn.Conv3d)  # a unit of layerwise casting and offloading in diffusers


# The contract of nn.Conv3d ----------------------------------------------------------------------------------------------

OPERATORS = [
    (CausalConv3d, {}),
    (CausalTDC, {}),
    (GroupCausalConv3d, {"group_size": 4}),
    (GroupCausalTDC, {"group_size": 4}),
    (TemporalInteractionConv3d, {"kernel_size": 3}),
    (TemporalInteractionTDC, {"kernel_size": 3}),
]


@pytest.mark.parametrize(("layer_class", "settings"), OPERATORS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_layer_is_the_plain_convolution_of_clips_that_hold_their_neighbours(layer_class, settings, padding):
    layer, x = build(layer_class, padding, TAPS, **settings), clip(8)
    plain = nn.Conv3d(3, 4, layer.kernel_size, layer.stride, layer.padding, dtype=x.dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.plain_kernel())
        plain.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), plain(x), **EXACT)
    past = None
    for chunk in (x[:, :, :4], x[:, :, 4:], x[:, :, :1]):
        expected = layer.stream(chunk, past)
        y, past = stream(plain, layer.neighbours, chunk, past)  # another layer in the operator's place
        torch.testing.assert_close(y, expected[0], **EXACT)
        torch.testing.assert_close(past, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize(("layer_class", "settings"), OPERATORS)
def test_a_layer_is_built_as_libraries_build_one_of_its_class(layer_class, settings):
    """As PEFT does for LoRA: the same kernel to few channels, and one tap of one pixel back."""
    layer, x = build(layer_class, **settings).float(), clip(8).float()
    narrow = layer_class(3, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
    back = layer_class(2, 4, (1, 1, 1), (1, 1, 1), groups=1, bias=False)
    assert back.weight.shape == (4, 2, 1, 1, 1)
    with torch.no_grad():
        narrow.weight.normal_()
        back.weight.normal_()
        expected = F.conv3d(F.conv3d(x, narrow.plain_kernel(), None, layer.stride, layer.padding), back.weight)
        torch.testing.assert_close(back(narrow(x)), expected)
        # What LoRA adds when it is merged into the slices is what it adds beside them.
        merged = torch.einsum("or,rithw->oithw", back.weight.flatten(1), narrow.weight)
        narrow.weight, narrow.bias = nn.Parameter(merged), None
        torch.testing.assert_close(narrow(x), expected, rtol=1e-5, atol=1e-4)


# Errors -----------------------------------------------------------------------------------------------------------------


def test_errors_name_argument_value_and_remedy():
    with pytest.raises(ValueError, match=r"kernel_size is 2, it must be odd.*pass 1, 3"):
        CausalTDC(3, 4, 2)
    with pytest.raises(ValueError, match=r"temporal_padding is 'reflect': pass 'replicate' or 'zeros'"):
        CausalTDC(3, 4, temporal_padding="reflect")
    with pytest.raises(ValueError, match=r"kernel_size is \(2, 3, 3\), CausalTDC has 3 taps, or 1"):
        CausalTDC(3, 4, (2, 3, 3))
    with pytest.raises(ValueError, match=r"stride is 2, CausalTDC has \(1, 1, 1\): leave it out"):
        CausalTDC(3, 4, 3, 2)
    with pytest.raises(ValueError, match=r"padding is 1, GroupCausalTDC has \(0, 1, 1\)"):
        GroupCausalTDC(3, 4, padding=1)
    with pytest.raises(ValueError, match=r"groups is 2, CausalTDC convolves all channels at once"):
        CausalTDC(4, 4, groups=2)
    with pytest.raises(ValueError, match=r"group_size is 0, it must be at least 1"):
        GroupCausalTDC(3, 4, group_size=0)
    with pytest.raises(ValueError, match=r"x has 6 frames, not a multiple of group_size 4: pass whole groups"):
        GroupCausalTDC(3, 4, group_size=4).stream(torch.zeros(1, 3, 6, 4, 4))
    with pytest.raises(ValueError, match=r"x has 3 frames, it must be an even number \(or 1\)"):
        TemporalInteractionTDC(3, 4).stream(torch.zeros(1, 3, 3, 4, 4))


def test_inference_mode_and_autocast():
    layer, x = build(GroupCausalTDC, group_size=4).float(), clip(8).float()
    with torch.no_grad():
        expected = layer.stream(x)[0]
    with torch.inference_mode():
        y, cache = layer.stream(x[:, :, :4])
        y = torch.cat([y, layer.stream(x[:, :, 4:], cache)[0]], dim=2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = in_chunks(layer, x, [4, 4])
    assert y.dtype == torch.bfloat16
    assert 0 < (y.float() - expected).abs().max() < 0.02 * expected.abs().max()
