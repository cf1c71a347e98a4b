"""Conversion to TDC and back keeps outputs, what is saved, and the model if it fails."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from equations import EXACT, PADDINGS, assert_all_close, build, clip, output_and_gradients
from torch import nn
from torch.nn.utils import parametrize

from vc_vae_diffusers.operators import apply_tdc, remove_tdc, to_conv, to_tdc
from vc_vae_diffusers.operators.conversion import fold_tdc, unfold_tdc
from vc_vae_diffusers.operators.tdc import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
)

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
    assert tdc.neighbours == back.neighbours == conv.neighbours
    assert tdc.ways is back.ways is conv.ways
    for one, other in ((tdc, conv), (back, conv)):
        for frames in (x, x[:, :, :1]):
            torch.testing.assert_close(one.stream(frames)[0], other.stream(frames)[0], **EXACT)
    with torch.no_grad():
        tdc.bias.zero_()
    assert conv.bias.abs().sum() > 0  # the layer given is left alone


def test_conversion_keeps_dtype_bias_and_what_is_frozen():
    conv = CausalConv3d(3, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    for layer in (to_tdc(conv), to_conv(to_tdc(conv))):
        assert layer.bias is None
        assert layer.weight.dtype == torch.float64
        assert not layer.weight.requires_grad


def test_conversion_of_the_wrong_kind_says_what_to_do():
    with pytest.raises(ValueError, match=r"conv is a CausalTDC.*GroupCausalConv3d.*apply_tdc"):
        to_tdc(CausalTDC(3, 4))
    with pytest.raises(ValueError, match=r"tdc is a CausalConv3d.*GroupCausalTDC.*remove_tdc"):
        to_conv(CausalConv3d(3, 4))
    with pytest.raises(ValueError, match=r"Conv3d.*must be one of"):
        to_tdc(nn.Conv3d(3, 4, 3))
    with pytest.raises(ValueError, match=r"conv is in torch.bfloat16, it must be in float32 or float64.*\.float\(\)"):
        to_tdc(CausalConv3d(3, 4, dtype=torch.bfloat16))


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
    assert_all_close(model["a"].stream(x), original["a"].stream(x))
    assert remove_tdc(model) == ["a", "b.0"]
    torch.testing.assert_close(model["b"][0].weight, original["b"][0].weight, **EXACT)


def test_a_layer_with_two_names_stays_one():
    ours, foreign = build(GroupCausalConv3d, group_size=4), nn.Conv3d(3, 3, 3, padding=1).double()
    model = nn.ModuleDict({"a": ours, "b": nn.Sequential(ours), "c": foreign, "d": nn.Sequential(foreign)})
    x = clip(4)
    expected = ours.stream(x)[0], foreign(x)
    for convert in (lambda: apply_tdc(model, "group"), lambda: remove_tdc(model)):
        convert()
        assert model["a"] is model["b"][0] is not ours
        assert model["c"] is model["d"][0] is foreign
        assert_all_close((model["a"].stream(x)[0], model["c"](x)), expected)


def test_apply_tdc_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"causality is 'both'.*'causal' or 'group'"):
        apply_tdc(nn.Conv3d(3, 4, 3), causality="both")
    with pytest.raises(ValueError, match=r"Sequential without a plain temporal convolution"):
        apply_tdc(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, (1, 3, 3))))
    for layer in (nn.Conv3d(3, 4, 3), CausalConv3d(3, 4)):
        twice = nn.Sequential(layer)
        apply_tdc(twice)
        with pytest.raises(ValueError, match=r"Sequential whose temporal convolutions are TDC already.*remove_tdc"):
            apply_tdc(twice)
    with pytest.raises(ValueError, match=r"itself a temporal operator.*to_tdc"):
        apply_tdc(CausalConv3d(3, 4))


class Halving(nn.Module):
    """Somebody's parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def half_precision(model):
    model[-1].to(torch.bfloat16)


def parametrized(model):
    parametrize.register_parametrization(model[-1], "weight", Halving())


def without_data(model):
    model[-1].to("meta")
    model[-1].weight = nn.Parameter(torch.zeros(1, device="meta"))  # as a failure in the middle of it


@pytest.mark.parametrize(
    ("hinder", "error", "message"),
    [
        (half_precision, ValueError, r"3 is in torch.bfloat16, it must be in float32.*call .float\(\) first"),
        (parametrized, ValueError, r"the weight of 3 has a parametrization already: remove it before"),
        (without_data, IndexError, "Dimension"),  # PyTorch words it in two ways
    ],
)
def test_a_failure_leaves_the_model_as_it_was(hinder, error, message):
    model = nn.Sequential(nn.Conv3d(3, 3, 3), CausalConv3d(3, 3), nn.Conv2d(3, 3, 1), nn.Conv3d(3, 3, 3))
    hinder(model)
    layers, state = list(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        apply_tdc(model)
    assert all(one is other for one, other in zip(model, layers, strict=True))
    assert not parametrize.is_parametrized(model[0])
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if not value.is_meta)


# In half precision ------------------------------------------------------------------------------------------------------


def with_a_weak_tap(seed: int = 0) -> nn.Sequential:
    """Layers whose anchor is a fiftieth of the sum of taps, which is its slice."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 4, (3, 1, 1), bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight[:, :, -1] *= 0.02
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_goes_to_half_precision_is_rounded_as_without_tdc(dtype):
    model = with_a_weak_tap()
    kernels = [layer.weight.detach().clone() for layer in model]
    apply_tdc(model)
    model.to(dtype)
    for layer, kernel in zip(model, kernels, strict=True):
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(layer.weight.float(), kernel.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert layer.parametrizations.weight.original.dtype == torch.float32
    assert all(value.dtype == dtype for value in model.state_dict().values())
    model(torch.randn(1, 3, 5, 8, 8, dtype=dtype)).sum().backward()
    assert model[0].parametrizations.weight.original.grad.dtype == torch.float32

    model.to("meta" if dtype is torch.float16 else "cpu")  # another device, not another dtype
    assert model[0].weight.dtype == dtype
    assert model[0].parametrizations.weight.original.dtype == torch.float32


def test_half_precision_takes_nothing_from_slices():
    model = with_a_weak_tap()
    apply_tdc(model)
    before = copy.deepcopy(model)
    model.half().float()
    torch.testing.assert_close(model[0].weight, before[0].weight, rtol=0, atol=0)
    assert model.double()[0].weight.dtype == torch.float64
    assert model.float()[0].parametrizations.weight.original.dtype == torch.float32


def test_half_precision_is_loaded_and_removed():
    model, other = with_a_weak_tap(), with_a_weak_tap(1)
    for each in (model, other):
        apply_tdc(each)
        each.to(torch.bfloat16)
    model.load_state_dict(other.state_dict())
    expected = [layer.weight.detach().clone() for layer in other]
    assert all(torch.equal(layer.weight, kernel) for layer, kernel in zip(model, expected, strict=True))
    parameter = copy.deepcopy(model)
    parameter[0].weight = expected[0] * 2
    assert torch.equal(parameter[0].weight, expected[0] * 2)

    remove_tdc(model)
    assert all(type(layer.weight) is nn.Parameter for layer in model)
    assert all(torch.equal(layer.weight, kernel) for layer, kernel in zip(model, expected, strict=True))


@pytest.mark.parametrize(("before", "given"), [("float32", "float16"), ("float16", "float32"), ("float32", "float64")])
def test_a_state_that_is_assigned_brings_its_dtype(before, given):
    before, given = getattr(torch, before), getattr(torch, given)
    model, other = with_a_weak_tap(), with_a_weak_tap(1).to(given)
    apply_tdc(model)
    model.to(before).load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(1, 3, 5, 8, 8, dtype=given)
    torch.testing.assert_close(model(x), other(x), rtol=1e-2, atol=1e-3)


def test_slices_in_double_go_to_half_precision_as_float32():
    model = with_a_weak_tap().double()
    apply_tdc(model)
    assert model.half()[0].parametrizations.weight.original.dtype == torch.float32


def test_gradients_do_not_outlive_what_they_are_of():
    model = with_a_weak_tap()
    for convert in (apply_tdc, remove_tdc):
        model(torch.randn(1, 3, 5, 8, 8)).sum().backward()
        convert(model)
        assert all(parameter.grad is None for name, parameter in model.named_parameters() if "bias" not in name)


# Saved and loaded -------------------------------------------------------------------------------------------------------


def test_a_foreign_model_is_saved_as_it_was_and_goes_on_after_loading(tmp_path):
    model, video = tiny_wan(), torch.randn(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    keys = list(model.state_dict())
    names = apply_tdc(model)
    with torch.no_grad():
        for name in names:
            slices = model.get_submodule(name).parametrizations.weight.original
            slices.add_(torch.randn_like(slices), alpha=0.02)
        expected = model.encode(video).latent_dist.mode()
    model.save_pretrained(tmp_path)

    loaded = AutoencoderKLWan.from_pretrained(tmp_path)
    assert sorted(loaded.state_dict()) == sorted(keys)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(video).latent_dist.mode(), expected, rtol=0, atol=1e-4)
        assert apply_tdc(loaded) == names
        torch.testing.assert_close(loaded.encode(video).latent_dist.mode(), expected, rtol=0, atol=1e-4)
    for name in names:
        of_both = [m.get_submodule(name).parametrizations.weight.original for m in (loaded, model)]
        torch.testing.assert_close(*of_both, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("saved", "loaded"), [(GroupCausalTDC, GroupCausalConv3d), (CausalConv3d, CausalTDC), (GroupCausalTDC, CausalTDC)]
)
def test_slices_of_another_operator_are_not_loaded(tmp_path, saved, loaded):
    given, model = nn.Sequential(saved(3, 3)), nn.Sequential(loaded(3, 3))
    torch.save(given.state_dict(), tmp_path / "weights.pt")
    for state in (given.state_dict(), torch.load(tmp_path / "weights.pt", weights_only=True)):
        with pytest.raises(
            RuntimeError, match=f"0.weight is of a {saved.__name__}, this layer is a {loaded.__name__}: load"
        ):
            model.load_state_dict(state, strict=False)
    assert not torch.equal(model[0].weight, given[0].weight)
    del state["0.weight"]
    model.load_state_dict(state, strict=False)  # a bias is a bias
    nn.Sequential(loaded(3, 3, (1, 3, 3))).load_state_dict(
        nn.Sequential(saved(3, 3, (1, 3, 3))).state_dict()
    )  # one tap is one
    model.load_state_dict(dict(given.state_dict()))  # nothing says what they are


def test_a_class_derived_from_an_operator_is_that_operator():
    class Derived(CausalTDC):
        pass  # as FSDP and parametrizations do

    Derived(3, 3).load_state_dict(CausalTDC(3, 3).state_dict())
    CausalTDC(3, 3).load_state_dict(Derived(3, 3).state_dict())
    with pytest.raises(RuntimeError, match="of a CausalTDC, this layer is a CausalConv3d"):
        CausalConv3d(3, 3).load_state_dict(Derived(3, 3).state_dict())


def test_states_go_both_ways_between_a_model_and_itself_with_tdc():
    torch.manual_seed(0)
    plain, tdc = (nn.Sequential(nn.Conv3d(3, 4, 3), nn.Conv3d(4, 4, 1)).double() for _ in range(2))
    x = clip(4)
    apply_tdc(tdc)
    assert not torch.allclose(tdc(x), plain(x))
    tdc.load_state_dict(plain.state_dict())
    torch.testing.assert_close(tdc(x), plain(x), **EXACT)
    apply_to_copy = copy.deepcopy(tdc)
    with torch.no_grad():
        apply_to_copy[0].parametrizations.weight.original.mul_(2)
    plain.load_state_dict(apply_to_copy.state_dict())
    torch.testing.assert_close(plain(x), apply_to_copy(x), **EXACT)
    assert not torch.allclose(tdc(x), plain(x))
    remove_tdc(apply_to_copy)
    apply_to_copy.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(x), apply_to_copy(x), **EXACT)


def test_the_configuration_of_our_own_model_changes_with_its_weights(make_vae, make_video, tmp_path):
    vae, video = make_vae(), make_video(5)
    with torch.no_grad():
        expected = vae(video).sample
        remove_tdc(vae)
        assert vae.config.temporal_operator == "conv"
        for change, operator in ((apply_tdc, "conv"), (None, "tdc")):
            vae.save_pretrained(tmp_path)
            loaded = type(vae).from_pretrained(tmp_path)
            assert loaded.config.temporal_operator == operator
            torch.testing.assert_close(loaded(video).sample, expected, rtol=0, atol=1e-4)
            if change is not None:
                change(vae)
