"""The temporal operators against the equations of the paper, written out frame by frame in float64."""

import copy
import pickle
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vc_vae_diffusers import winograd
from vc_vae_diffusers.tdc import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalConv3d,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
    apply_tdc,
    fold_tdc,
    remove_tdc,
    to_conv,
    to_tdc,
    unfold_tdc,
)

PADDINGS = ("replicate", "zeros")
EVALUATIONS = ("direct", "winograd")
EXACT = {"rtol": 0, "atol": 1e-11}  # float64


# The equations, literally -----------------------------------------------------------------------------------------------


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


# Helpers ----------------------------------------------------------------------------------------------------------------


def clip(frames: int, batch: int = 2, channels: int = 3, height: int = 5, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, channels, frames, height, width, generator=generator, dtype=torch.float64)


def build(
    layer_class: type[TemporalConv3d], padding: str = "replicate", evaluation: str = "direct", **settings
) -> TemporalConv3d:
    torch.manual_seed(1)
    layer = layer_class(3, 4, temporal_padding=padding, dtype=torch.float64, **settings)
    layer.evaluation = evaluation
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


def in_chunks(layer: TemporalConv3d, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    outputs, cache = [], None
    for chunk in x.split(sizes, dim=2):
        y, cache = layer(chunk, cache)
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


# Eq. 1, 2, 5, 6, 7: outputs and gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_class", [GroupCausalConv3d, GroupCausalTDC])
@pytest.mark.parametrize(("group", "count"), [(1, 4), (2, 3), (3, 2), (4, 3), (6, 2), (8, 2)])
def test_group_causal_equals_the_equation_for_every_split(layer_class, group, count, padding, evaluation):
    layer, x = build(layer_class, padding, evaluation, group_size=group), clip(group * count)
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


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_class", [GroupCausalConv3d, GroupCausalTDC])
@pytest.mark.parametrize(("sizes", "groups"), [([1], [1]), ([3], [3]), ([1, 4, 8], [1, 4, 4, 4]), ([2, 4, 1], [2, 4, 1])])
def test_a_chunk_of_fewer_frames_than_a_group_is_a_short_group(layer_class, sizes, groups, padding, evaluation):
    layer, x = build(layer_class, padding, evaluation, group_size=4), clip(sum(sizes))
    parameters = (layer.weight, layer.bias)
    tdc = layer_class is GroupCausalTDC
    expected = output_and_gradients(lambda x: group_causal(x, layer.weight, layer.bias, groups, padding, tdc), x, parameters)
    assert_all_close(output_and_gradients(lambda x: in_chunks(layer, x, sizes), x, parameters), expected)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_class", [CausalConv3d, CausalTDC])
def test_causal_equals_the_equation_for_every_split(layer_class, padding):
    layer, x = build(layer_class, padding), clip(5)
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
def test_temporal_interaction_equals_the_equation(layer_class, frames, kernel_size, padding):
    layer, x = build(layer_class, padding, kernel_size=kernel_size), clip(frames)
    parameters = (layer.weight, layer.bias)
    tdc = layer_class is TemporalInteractionTDC
    expected = output_and_gradients(lambda x: interaction(x, layer.weight, layer.bias, padding, tdc), x, parameters)
    assert expected[0].shape[2] == max(1, frames // 2)
    assert_all_close(output_and_gradients(layer, x, parameters), expected)


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
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)


@pytest.mark.parametrize("layer_class", [GroupCausalTDC, CausalTDC])
def test_memory_layout_of_the_input_does_not_matter(layer_class):
    layer = build(layer_class, **({"group_size": 4} if layer_class is GroupCausalTDC else {}))
    x = clip(8)
    expected, cache = layer(x)
    scattered = torch.stack([x, -x], dim=-1)[..., 0]
    assert not scattered.is_contiguous()
    for same in (
        x.contiguous(memory_format=torch.channels_last_3d),
        x.transpose(3, 4).contiguous().transpose(3, 4),
        scattered,
    ):
        y, other_cache = layer(same)
        torch.testing.assert_close(y, expected, **EXACT)
        torch.testing.assert_close(other_cache, cache, rtol=0, atol=0)


@pytest.mark.parametrize("layer_class", [GroupCausalTDC, CausalTDC])
def test_the_cache_is_a_small_copy(layer_class):
    layer = build(layer_class, **({"group_size": 4} if layer_class is GroupCausalTDC else {}))
    x = clip(8)
    _, cache = layer(x)
    kept = 1 if layer_class is GroupCausalTDC else 2
    torch.testing.assert_close(cache, x[:, :, -kept:], rtol=0, atol=0)
    assert cache.untyped_storage().nbytes() == cache.numel() * cache.element_size()  # not a view that keeps the clip alive
    before = cache.clone()
    x.zero_()
    layer(clip(4), cache)
    torch.testing.assert_close(cache, before, rtol=0, atol=0)


# Static clips -----------------------------------------------------------------------------------------------------------


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
    y = layer(frame.expand(-1, -1, frames, -1, -1))
    y = y if layer_class is TemporalInteractionTDC else y[0]
    expected = F.conv2d(frame[:, :, 0], layer.weight[:, :, anchor], layer.bias, padding=1)
    for t in range(y.shape[2]):
        torch.testing.assert_close(y[:, :, t], expected, **EXACT)


def test_a_static_stream_stays_static():
    layer, frame = build(GroupCausalTDC, group_size=4), clip(1)
    static, cache = layer(frame)
    later, _ = layer(frame.expand(-1, -1, 8, -1, -1), cache)
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
    layer, x = build(layer_class, group_size=group), clip(8)
    cache = x[:, :, -1:] if cached else None
    assert flops(lambda: layer(x, cache)) == share * plain_flops(x)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("evaluation", ["winograd", "auto"])
def test_other_evaluations_never_cost_more(group, evaluation):
    x = clip(8, height=32, width=32).float()
    direct, other = (build(GroupCausalTDC, evaluation=e, group_size=group).float() for e in ("direct", evaluation))
    assert 0 < flops(lambda: other(x)) <= flops(lambda: direct(x)) < plain_flops(x)


@pytest.mark.parametrize("layer_class", [CausalConv3d, CausalTDC])
def test_causal_layers_cost_one_plain_convolution(layer_class):
    layer, x = build(layer_class), clip(8)
    assert 0 < flops(lambda: layer(x)) <= plain_flops(x)


@pytest.mark.parametrize("layer_class", [TemporalInteractionConv3d, TemporalInteractionTDC])
def test_temporal_interaction_costs_one_plain_convolution(layer_class):
    layer, x = build(layer_class, kernel_size=3), clip(8)
    assert 0 < flops(lambda: layer(x)) <= plain_flops(x, stride=2)


@pytest.mark.parametrize(
    ("layer_class", "settings"),
    [(GroupCausalTDC, {"group_size": 4}), (CausalTDC, {}), (TemporalInteractionTDC, {"kernel_size": 3})],
)
def test_an_image_pays_one_tap_on_one_frame(layer_class, settings):
    layer, x = build(layer_class, **settings), clip(1)
    frame_conv = nn.Conv2d(3, 4, 3, padding=1, dtype=x.dtype)
    assert flops(lambda: layer(x)) == flops(lambda: frame_conv(x[:, :, 0])) > 0


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


# Conversion -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [0, 1, 2, -1])
def test_unfolding_inverts_folding(anchor):
    slices = torch.randn(4, 3, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = fold_tdc(slices, anchor)
    others = [k for k in range(3) if k != anchor % 3]
    torch.testing.assert_close(kernel[:, :, anchor], slices[:, :, anchor] - slices[:, :, others].sum(2), **EXACT)
    torch.testing.assert_close(unfold_tdc(kernel, anchor), slices, **EXACT)
    torch.testing.assert_close(fold_tdc(unfold_tdc(slices, anchor), anchor), slices, **EXACT)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("tdc_class", "conv_class", "settings"),
    [
        (GroupCausalTDC, GroupCausalConv3d, {"group_size": 4}),
        (GroupCausalTDC, GroupCausalConv3d, {"group_size": 1, "kernel_size": 1, "bias": True}),
        (CausalTDC, CausalConv3d, {}),
        (TemporalInteractionTDC, TemporalInteractionConv3d, {"kernel_size": 3}),
    ],
)
def test_conversion_keeps_the_outputs_and_inverts(tdc_class, conv_class, settings, padding):
    conv, x = build(conv_class, padding, **settings).eval(), clip(8)
    tdc = to_tdc(conv)
    back = to_conv(tdc)
    assert type(tdc) is tdc_class
    assert type(back) is conv_class
    assert not torch.allclose(tdc.weight, conv.weight)
    torch.testing.assert_close(back.weight, conv.weight, **EXACT)
    assert (tdc.temporal_padding, tdc.kernel_size, tdc.training) == (padding, conv.kernel_size, False)
    assert (tdc.evaluation, back.evaluation) == (conv.evaluation, conv.evaluation)
    for one, other in ((tdc, conv), (back, conv)):
        torch.testing.assert_close(one(x), other(x), **EXACT)
        torch.testing.assert_close(one(x[:, :, :1]), other(x[:, :, :1]), **EXACT)
    with torch.no_grad():
        tdc.bias.zero_()
    assert conv.bias.abs().sum() > 0  # the layer given is left alone


def test_conversion_keeps_dtype_bias_and_what_is_frozen():
    conv = CausalConv3d(3, 4, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    for layer in (to_tdc(conv), to_conv(to_tdc(conv))):
        assert layer.bias is None
        assert layer.weight.dtype == torch.bfloat16
        assert not layer.weight.requires_grad


def test_conversion_of_the_wrong_kind_says_what_to_do():
    with pytest.raises(ValueError, match=r"conv is a CausalTDC.*GroupCausalConv3d.*apply_tdc"):
        to_tdc(CausalTDC(3, 4))
    with pytest.raises(ValueError, match=r"tdc is a CausalConv3d.*GroupCausalTDC.*remove_tdc"):
        to_conv(CausalConv3d(3, 4))
    with pytest.raises(ValueError, match=r"Conv3d.*must be one of"):
        to_tdc(nn.Conv3d(3, 4, 3))


# Whole models -----------------------------------------------------------------------------------------------------------


def tiny_wan() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def tiny_cogvideox() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    downs, ups = ["CogVideoXDownBlock3D"] * 4, ["CogVideoXUpBlock3D"] * 4
    return AutoencoderKLCogVideoX(down_block_types=downs, up_block_types=ups, temporal_compression_ratio=4, **blocks)


@pytest.mark.parametrize("build_model", [tiny_wan, tiny_cogvideox])
def test_foreign_models_keep_their_outputs_and_learn_slices(build_model):
    model = build_model().eval()
    keys = set(model.state_dict())
    video = torch.randn(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))

    def run():
        moments = model.encode(video).latent_dist
        return torch.cat([moments.parameters.flatten(), model.decode(moments.mode()).sample.flatten()])

    before = run().detach()
    temporal = [n for n, m in model.named_modules() if isinstance(m, nn.Conv3d) and m.kernel_size[0] > 1]
    names = apply_tdc(model)
    assert names == temporal
    assert len(names) > 20
    after = run()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * before.abs().max().item())

    after.square().mean().backward()
    for name in names:
        slices = model.get_submodule(name).parametrizations.weight.original
        for k in range(slices.shape[2]):
            assert slices.grad[:, :, k].abs().max() > 0, f"no gradient reaches slice {k} of {name}"

    trained = [p for n, p in model.named_parameters() if "parametrizations" in n]
    torch.optim.SGD(trained, lr=1e-2).step()
    changed = run().detach()
    assert (changed - before).abs().max() > 1e-4 * before.abs().max()
    assert remove_tdc(model) == names
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(run().detach(), changed, rtol=0, atol=1e-5 * before.abs().max().item())


def test_gradients_of_foreign_slices_follow_the_chain_rule():
    plain = nn.Conv3d(3, 4, 3, padding=1, dtype=torch.float64)
    model, x = nn.Sequential(copy.deepcopy(plain)), clip(4)
    apply_tdc(model, causality="group")
    _, kernel_grad = output_and_gradients(plain, x, (plain.weight,))[1:]
    slices = model[0].parametrizations.weight.original
    _, slices_grad = output_and_gradients(model, x, (slices,))[1:]
    past, anchor, future = kernel_grad.unbind(2)
    torch.testing.assert_close(slices_grad, torch.stack([past - anchor, anchor, future - anchor], dim=2), **EXACT)


def test_apply_and_remove_on_our_own_operators():
    model = nn.ModuleDict({"a": build(GroupCausalConv3d, group_size=2), "b": nn.ModuleList([build(CausalConv3d)])})
    original, x = copy.deepcopy(model), clip(4)
    assert apply_tdc(model) == ["a", "b.0"]
    assert type(model["a"]) is GroupCausalTDC
    assert type(model["b"][0]) is CausalTDC
    torch.testing.assert_close(model["a"](x), original["a"](x), **EXACT)
    assert remove_tdc(model) == ["a", "b.0"]
    torch.testing.assert_close(model["b"][0].weight, original["b"][0].weight, **EXACT)


def test_a_layer_with_two_names_stays_one():
    ours, foreign = build(GroupCausalConv3d, group_size=4), nn.Conv3d(3, 3, 3, padding=1).double()
    model = nn.ModuleDict({"a": ours, "b": nn.Sequential(ours), "c": foreign, "d": nn.Sequential(foreign)})
    x = clip(4)
    expected = ours(x)[0], foreign(x)
    for convert in (lambda: apply_tdc(model, "group"), lambda: remove_tdc(model)):
        convert()
        assert model["a"] is model["b"][0] is not ours
        assert model["c"] is model["d"][0] is foreign
        assert_all_close((model["a"](x)[0], model["c"](x)), expected)


def test_apply_tdc_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"causality is 'both'.*'causal' or 'group'"):
        apply_tdc(nn.Conv3d(3, 4, 3), causality="both")
    with pytest.raises(ValueError, match=r"Sequential without a plain temporal convolution"):
        apply_tdc(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, (1, 3, 3))))
    twice = nn.Sequential(nn.Conv3d(3, 4, 3))
    apply_tdc(twice)
    with pytest.raises(ValueError, match=r"nothing to convert"):
        apply_tdc(twice)
    with pytest.raises(ValueError, match=r"itself a temporal operator.*to_tdc"):
        apply_tdc(CausalConv3d(3, 4))


# Folding once -----------------------------------------------------------------------------------------------------------

FUSIBLE = [
    (GroupCausalTDC, {"group_size": 4}),
    (GroupCausalTDC, {"group_size": 1}),
    (CausalTDC, {}),
    (TemporalInteractionTDC, {}),
]


def first_output(layer, x):
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize(("layer_class", "settings"), FUSIBLE)
def test_fusing_changes_neither_results_nor_what_is_saved(layer_class, settings, evaluation):
    layer, x = build(layer_class, evaluation=evaluation, **settings), clip(8)
    with torch.no_grad():
        expected, state = first_output(layer, x), copy.deepcopy(layer.state_dict())
        layer.fuse()
        torch.testing.assert_close(first_output(layer, x), expected, **EXACT)
        assert layer.state_dict().keys() == state.keys()
        # The folded kernel is really what is used: a change of the slices goes unnoticed until `unfuse`.
        layer.weight.mul_(2)
        torch.testing.assert_close(first_output(layer, x), expected, **EXACT)
        layer.unfuse()
        assert (first_output(layer, x) - expected).abs().max() > 0.1


@pytest.mark.parametrize(("layer_class", "settings"), FUSIBLE)
def test_loading_weights_drops_fused_kernels(layer_class, settings):
    layer, other, x = build(layer_class, **settings), build(layer_class, **settings), clip(8)
    with torch.no_grad():
        other.weight.mul_(-3)
        layer.fuse()
        first_output(layer, x)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(first_output(layer, x), first_output(other, x), **EXACT)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize(("layer_class", "settings"), FUSIBLE)
def test_a_fused_layer_still_trains(layer_class, settings, evaluation):
    layer, x = build(layer_class, evaluation=evaluation, **settings), clip(8)
    expected = output_and_gradients(lambda x: first_output(layer, x), x, (layer.weight,))
    layer.fuse()
    assert_all_close(output_and_gradients(lambda x: first_output(layer, x), x, (layer.weight,)), expected)


@pytest.mark.parametrize(("layer_class", "settings"), FUSIBLE)
def test_fused_layers_can_be_copied_pickled_and_cast(layer_class, settings):
    layer, x = build(layer_class, **settings), clip(8)
    layer.fuse()
    with torch.no_grad():
        expected = first_output(layer, x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(first_output(twin, x), expected, **EXACT)
            single = first_output(twin.float(), x.float())
            assert single.dtype == torch.float32
            torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-4)


# Errors -----------------------------------------------------------------------------------------------------------------


def test_errors_name_argument_value_and_remedy():
    with pytest.raises(ValueError, match=r"kernel_size is 2, it must be odd.*pass 1, 3"):
        CausalTDC(3, 4, 2)
    with pytest.raises(ValueError, match=r"temporal_padding is 'reflect': pass 'replicate' or 'zeros'"):
        CausalTDC(3, 4, temporal_padding="reflect")
    with pytest.raises(ValueError, match=r"group_size is 0, it must be at least 1"):
        GroupCausalTDC(3, 4, group_size=0)
    with pytest.raises(ValueError, match=r"x has 6 frames, not a multiple of group_size 4: pass whole groups"):
        GroupCausalTDC(3, 4, group_size=4)(torch.zeros(1, 3, 6, 4, 4))
    with pytest.raises(ValueError, match=r"x has 3 frames, it must be an even number \(or 1\)"):
        TemporalInteractionTDC(3, 4)(torch.zeros(1, 3, 3, 4, 4))


def test_inference_mode_and_autocast():
    layer, x = build(GroupCausalTDC, group_size=4).float(), clip(8).float()
    with torch.no_grad():
        expected = layer(x)[0]
    with torch.inference_mode():
        y, cache = layer(x[:, :, :4])
        y = torch.cat([y, layer(x[:, :, 4:], cache)[0]], dim=2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = in_chunks(layer, x, [4, 4])
    assert y.dtype == torch.bfloat16
    assert 0 < (y.float() - expected).abs().max() < 0.02 * expected.abs().max()


def relative_error(evaluation: str, dtype: torch.dtype, group: int = 4) -> float:
    """The worst output frame's error, in root mean square over that of the frame, against float64."""
    layer = GroupCausalTDC(64, 64, group_size=group).to(dtype)
    layer.evaluation = evaluation
    nn.init.normal_(layer.weight, std=(3 * 9 * 64) ** -0.5)
    x = F.silu(torch.randn(1, 64, group, 16, 16)).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(x.double())[0]
        error = layer(x)[0].double() - expected
    return (error.square().mean((0, 1, 3, 4)) / expected.square().mean((0, 1, 3, 4))).sqrt().max().item()


def test_winograd_is_accurate_enough_for_half_precision():
    torch.manual_seed(0)
    assert relative_error("direct", torch.bfloat16) < 0.005
    assert relative_error("winograd", torch.bfloat16) < 0.012
    assert relative_error("winograd", torch.bfloat16, group=2) < 0.012
    assert relative_error("winograd", torch.float16) < 0.0015
    assert relative_error("winograd", torch.float32) < 2e-6


def test_the_usual_points_of_interpolation_would_be_worse(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "POINTS", (0.0, 1.0, -1.0, 2.0, -2.0))
    assert relative_error("winograd", torch.bfloat16) > 0.015
