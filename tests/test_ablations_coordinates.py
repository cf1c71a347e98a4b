"""Why TDC trains differently (examples/ablations/coordinates.py): the same functions in other coordinates, in float64."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "ablations"))

from coordinates import SliceCoordinates, dct_matrix, mix, slice_gradients, tdc_matrix

from vc_vae_diffusers import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
)

EXACT = 1e-10
KINDS = {
    "group": (lambda kind: kind(4, 4, group_size=4), GroupCausalConv3d, GroupCausalTDC),
    "causal": (lambda kind: kind(4, 4), CausalConv3d, CausalTDC),
    "interaction": (lambda kind: kind(4, 4), TemporalInteractionConv3d, TemporalInteractionTDC),
}


def pair(kind: str) -> tuple[nn.Conv3d, nn.Conv3d]:
    """A plain layer and a layer of differences that are one function, float64."""
    make, plain_class, tdc_class = KINDS[kind]
    torch.manual_seed(0)
    plain, tdc = make(plain_class).double(), make(tdc_class).double()
    with torch.no_grad():
        tdc.weight.normal_(std=0.2)
        tdc.bias.normal_(std=0.2)
        plain.weight.copy_(mix(tdc_matrix(tdc.weight.shape[2], tdc.anchor), tdc.weight))
        plain.bias.copy_(tdc.bias)
    return plain, tdc


def train(layer: nn.Conv3d, optimizer, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(2, 4, 8, 6, 6, generator=generator, dtype=torch.float64)
        target = torch.randn(2, 4, 8, 6, 6, generator=generator, dtype=torch.float64)
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        (y - target[:, :, : y.shape[2]]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def gap(plain: nn.Conv3d, tdc: nn.Conv3d) -> float:
    return (plain.weight - tdc.plain_kernel()).abs().max().item()


def makers() -> dict[str, Callable]:
    return {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", makers())
def test_plain_kernels_in_tdc_coordinates_do_what_tdc_does(kind, optimizer):
    make = makers()[optimizer]
    plain, tdc = pair(kind)
    assert gap(plain, tdc) < EXACT
    train(tdc, make(list(tdc.parameters())))
    train(plain, SliceCoordinates([plain], [plain.bias], "tdc", make))
    assert gap(plain, tdc) < EXACT
    assert (plain.bias - tdc.bias).abs().max() < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_without_them_plain_kernels_do_something_else(kind):
    for make in makers().values():
        plain, tdc = pair(kind)
        train(tdc, make(list(tdc.parameters())))
        train(plain, make(list(plain.parameters())))
        assert gap(plain, tdc) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_tdc_under_sgd_is_plain_sgd_preconditioned_by_m_mt(kind):
    rate = 0.3
    plain, tdc = pair(kind)
    train(tdc, torch.optim.SGD(tdc.parameters(), lr=rate))
    matrix = tdc_matrix(plain.weight.shape[2], plain.anchor)

    class Preconditioned:
        @torch.no_grad()
        def step(self) -> None:
            plain.weight -= rate * mix(matrix @ matrix.T, plain.weight.grad)
            plain.bias -= rate * plain.bias.grad

        def zero_grad(self) -> None:
            plain.zero_grad()

    train(plain, Preconditioned())
    assert gap(plain, tdc) < EXACT


def test_what_the_preconditioner_does():
    """It slows the mean of the slices, which static content trains, and speeds their bend: 2 - sqrt 3, 1, 2 + sqrt 3."""
    matrix = tdc_matrix(3, 1)
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    expected = torch.tensor([2 - 3**0.5, 1.0, 2 + 3**0.5], dtype=torch.float64)
    assert (values - expected).abs().max() < EXACT
    assert vectors[:, 0].prod().sign() == vectors[:, 0].sum().sign()  # all of one sign: a mean
    assert (torch.sign(vectors[:, 2]) * torch.sign(vectors[1, 2])).tolist() == [-1, 1, -1]


def test_no_rates_by_slice_make_plain_adam_do_what_tdc_does():
    """Adam's first step is the sign of the gradient: two gradients of one sign pattern need steps of opposite sign."""
    matrix = tdc_matrix(3, 1)
    steps = {}
    for name, gradient in {"past larger": [2.0, 1.0, 1.5], "current larger": [1.0, 2.0, 1.5]}.items():
        gradient = torch.tensor(gradient, dtype=torch.float64).view(1, 1, 3, 1, 1)
        steps[name] = (-gradient.sign(), -mix(matrix, mix(matrix.T, gradient).sign()))
    (plain_a, tdc_a), (plain_b, tdc_b) = steps.values()
    assert torch.equal(plain_a, plain_b)  # whatever positive rates multiply its slices
    assert tdc_a[0, 0, 0].item() == -tdc_b[0, 0, 0].item() != 0


def test_weight_decay_is_the_same_in_both_coordinates():
    """k = M w is linear: shrinking w shrinks k alike, so decay tells nothing apart."""
    plain, tdc = pair("group")
    for layer in (plain, tdc):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(5):
            optimizer.step()
    assert gap(plain, tdc) < EXACT
    plain, tdc = pair("group")  # and an L2 term under SGD
    for layer in (plain, tdc):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(5):
            (0.5 * layer.weight.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert gap(plain, tdc) < EXACT


def test_static_clips_move_only_the_anchor_of_tdc_and_all_plain_slices():
    plain, tdc = pair("group")
    x = torch.randn(1, 4, 1, 6, 6, dtype=torch.float64).expand(-1, -1, 8, -1, -1).contiguous()
    for layer in (plain, tdc):
        layer(x)[0].square().mean().backward()
    of_slices = tdc.weight.grad.square().sum(dim=(0, 1, 3, 4))
    assert of_slices[1] > 1e-3
    assert of_slices[[0, 2]].max() < 1e-20
    # At a group's last frame the current frame stands for the future one: all plain slices see the same frame.
    of_plain = plain.weight.grad.unbind(2)
    assert all((gradient - of_plain[0]).abs().max() < EXACT and gradient.abs().max() > 1e-3 for gradient in of_plain)


def test_gradients_are_looked_at_in_both_coordinates():
    plain, tdc = pair("group")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 6, 6, generator=generator, dtype=torch.float64)
    for layer in (plain, tdc):
        layer(x)[0].square().mean().backward()
    rows = [slice_gradients(plain, differences=False), slice_gradients(tdc, differences=True)]
    assert rows[0].keys() == rows[1].keys()
    assert all(rows[0][key] == pytest.approx(rows[1][key], abs=EXACT) for key in rows[0])
    gradient = plain.weight.grad
    assert rows[0]["tdc_0"] == pytest.approx((gradient[:, :, 0] - gradient[:, :, 1]).norm().item(), abs=EXACT)
    assert rows[0]["tdc_1"] == pytest.approx(gradient[:, :, 1].norm().item(), abs=EXACT)


def test_orthogonal_coordinates_are_invisible_to_sgd_and_not_to_adam():
    for slices in (2, 3):
        matrix = dct_matrix(slices, 1)
        assert (matrix @ matrix.T - torch.eye(slices)).abs().max() < EXACT
        assert (matrix[:, 0] - slices**-0.5).abs().max() < EXACT
    for name, same in {"sgd": True, "adam": False}.items():
        plain, _ = pair("group")
        other, _ = pair("group")
        make = makers()[name]
        train(plain, make(list(plain.parameters())))
        train(other, SliceCoordinates([other], [other.bias], "dct", make))
        difference = (plain.weight - other.weight).abs().max().item()
        assert difference < EXACT if same else difference > 1e-3
