"""Fused kernels serve where they can, are never those of other weights, and change neither results nor what is saved."""

import copy
import pickle

import pytest
import torch
from diffusers.training_utils import EMAModel
from equations import EXACT, WAYS, assert_all_close, assert_near, build, clip, frames_like, output_and_gradients
from torch import nn

from vc_vae_diffusers.operators.evaluation import Direct
from vc_vae_diffusers.operators.frame_conv import FrameConv2d, UpsampledConv2d
from vc_vae_diffusers.operators.tdc import CausalTDC, GroupCausalTDC, TemporalInteractionTDC

FUSIBLE = [
    (GroupCausalTDC, {"group_size": 4}),
    (GroupCausalTDC, {"group_size": 1}),
    (CausalTDC, {}),
    (TemporalInteractionTDC, {}),
]


def first_output(layer, x):
    return layer.stream(x)[0]


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("layer_class", "settings"), FUSIBLE)
def test_fusing_changes_neither_results_nor_what_is_saved(layer_class, settings, ways):
    layer, x = build(layer_class, ways=ways, **settings), clip(8)
    with torch.no_grad():
        expected, state = first_output(layer, x), copy.deepcopy(layer.state_dict())
        layer.fuse()
        torch.testing.assert_close(first_output(layer, x), expected, **EXACT)
        assert layer.state_dict().keys() == state.keys()


@pytest.mark.parametrize(("layer_class", "settings"), FUSIBLE)
def test_loading_weights_drops_fused_kernels(layer_class, settings):
    layer, other, x = build(layer_class, **settings), build(layer_class, **settings), clip(8)
    with torch.no_grad():
        other.weight.mul_(-3)
        layer.fuse()
        first_output(layer, x)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(first_output(layer, x), first_output(other, x), **EXACT)


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("layer_class", "settings"), FUSIBLE)
def test_a_fused_layer_still_trains(layer_class, settings, ways):
    layer, x = build(layer_class, ways=ways, **settings), clip(8)
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


# Never stale ------------------------------------------------------------------------------------------------------------


def by_an_optimizer(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()


def by_an_average(layer):
    """It writes through `.data`, which no version counter sees."""
    average = EMAModel(layer.parameters(), decay=0.5)
    average.shadow_params = [shadow * 2 + 0.1 for shadow in average.shadow_params]
    average.copy_to(layer.parameters())


def by_assigning_a_state(layer):
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()}, assign=True)


def by_loading_a_state(layer):
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def by_a_merge(layer):
    """As PEFT merges LoRA: in place and through `.data`."""
    layer.weight.data += torch.randn_like(layer.weight)
    layer.bias.data += 1


def by_another_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def of_the_bias_alone(layer):
    with torch.no_grad():
        layer.bias.add_(1)


CHANGES = [
    by_an_optimizer,
    by_an_average,
    by_assigning_a_state,
    by_loading_a_state,
    by_a_merge,
    by_another_parameter,
    of_the_bias_alone,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_kernels_of_changed_weights_are_computed_again(change, ways):
    layer, x = build(GroupCausalTDC, ways=ways, group_size=4), clip(8)
    layer.fuse()
    with torch.no_grad():
        before = first_output(layer, x)
    kernels = dict(layer.fused)
    change(layer)
    with torch.no_grad():
        y = first_output(layer, x)
        assert (y - before).abs().max() > 0.1
        assert layer.fused
        assert all(layer.fused[way] is not kernels[way] for way in layer.fused.keys() & kernels.keys())
        again = dict(layer.fused)
        torch.testing.assert_close(first_output(layer, x), y, **EXACT)
        assert all(layer.fused[way] is again[way] for way in again)  # kept: nothing has changed since
        layer.unfuse()
        torch.testing.assert_close(first_output(layer, x), y, **EXACT)


def test_kernels_of_parameters_without_a_version_counter():
    with torch.inference_mode():
        layer, x = build(GroupCausalTDC, ways=WAYS["taps"], group_size=4), clip(8)
        expected = first_output(layer, x)
        layer.fuse()
        torch.testing.assert_close(first_output(layer, x), expected, **EXACT)
        layer.weight.mul_(2)
        assert (first_output(layer, x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_are_only_stored_are_not_fused(dtype):
    layer = build(GroupCausalTDC, group_size=4)
    assert layer.fuse()
    assert not layer.to(dtype).fuse()
    assert not layer.fused
    assert not layer.to("meta").fuse()


# Where they serve -------------------------------------------------------------------------------------------------------

LAYERS = {
    "plain": (lambda: FrameConv2d(5, 6, 3, padding=1), lambda layer, x: layer(x[:, :, 0])),
    "stride 2": (lambda: FrameConv2d(5, 6, 3, stride=2), lambda layer, x: layer(x[:, :, 0])),
    "upsampled": (lambda: UpsampledConv2d(5, 5, 3, padding=1), lambda layer, x: layer(x[:, :, 0], upsampled=True)),
    "temporal": (lambda: GroupCausalTDC(5, 6, group_size=2), first_output),
}


@pytest.fixture(params=list(LAYERS))
def case(request):
    """A layer and how it is called with a clip of two frames."""
    torch.manual_seed(0)
    make, call = LAYERS[request.param]
    return make().eval(), call


def test_fused_layers_serve_while_they_can(case):
    layer, call = case
    x = frames_like(2, 5, 2, 8, 10)
    expected = call(layer, x).detach()
    layer.fuse()
    mark = layer.inference_ways()[0]
    with torch.no_grad():
        assert_near(call(layer, x), expected, torch.float32)
        layer.fused[mark] = tuple(None for _ in layer.fused[mark])  # whatever takes them fails
        with pytest.raises((TypeError, AttributeError)):
            call(layer, x)
        with torch.autocast("cpu", torch.bfloat16):  # which packed kernels do not know: computed anew
            y = call(layer, x)
            assert 0 < (y.float() - expected).abs().max() < 0.1 * expected.abs().max()
    torch.testing.assert_close(call(layer, x), expected, rtol=0, atol=1e-5)  # nor gradients
    x.requires_grad_()
    layer.requires_grad_(False)
    call(layer, x).sum().backward()  # not even of the frames alone
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.to(torch.bfloat16),
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.unfuse(),
    ],
    ids=["load", "cast", "copy", "pickle", "unfuse"],
)
def test_what_changes_weights_drops_fused_kernels(case, change):
    layer, _ = case
    layer.fuse()
    assert layer.fused_tensors()
    changed = change(layer)
    assert not (changed if isinstance(changed, type(layer)) else layer).fused


def test_a_weight_that_a_hook_moved_is_not_what_was_fused(case):
    layer, call = case
    x = frames_like(2, 5, 2, 8, 10)
    layer.fuse()
    assert layer.keeps_kernels != torch.is_grad_enabled()
    with torch.no_grad():
        assert layer.keeps_kernels
        weight = layer.weight
        for moved in (weight.to("meta"), weight.double()):  # as hooks that offload or cast weights do
            layer.weight = nn.Parameter(moved)
            assert not layer.keeps_kernels
        layer.weight = weight
        assert layer.keeps_kernels
        assert call(layer, x).isfinite().all()


def test_other_ways_than_those_expected_keep_their_kernels_too():
    layer, x = build(GroupCausalTDC, group_size=4), clip(8)
    layer.fuse()
    assert set(layer.fused) == {Direct()}
    layer.ways = WAYS["taps"]
    with torch.no_grad():
        expected = first_output(layer, x)
    assert len(layer.fused) == 2
    torch.testing.assert_close(first_output(layer, x), expected, **EXACT)
