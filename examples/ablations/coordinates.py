"""Why TDC trains differently: an optimizer that works on other coordinates of a kernel's temporal slices.

TDC is a linear change of variables of the plain kernel. By Eq. 5 the plain slices `k = (past, current, future)` are
`k = M w` of TDC's slices `w = (past, anchor, future)`, with the gradients `g_w = M^T g_k`:

    M = [ 1  0  0]      g_past   = g_p - g_c
        [-1  1 -1]      g_anchor = g_c
        [ 0  0  1]      g_future = g_f - g_c

Both can represent the same functions; only training differs. `SliceCoordinates` trains plain kernels as if they were M w:
the gradient is taken over to w, any optimizer steps there, and k = M w is written back. With SGD that is
`k -= rate * M M^T g_k`, a fixed preconditioner; with Adam no rates by slice give it, see `docs/ablations.md`.

Not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


def tdc_matrix(slices: int, anchor: int) -> torch.Tensor:
    """M of Eq. 5, 6 and 7: the anchor's plain slice is the anchor's less all others."""
    matrix = torch.eye(slices, dtype=torch.float64)
    matrix[anchor] = -1
    matrix[anchor, anchor] = 1
    return matrix


def dct_matrix(slices: int, anchor: int) -> torch.Tensor:
    """Orthonormal coordinates: mean, slope and bend of the slices. SGD does not see them, Adam does."""
    place, order = torch.arange(slices, dtype=torch.float64)[:, None], torch.arange(slices, dtype=torch.float64)
    matrix = torch.cos(math.pi * order * (place + 0.5) / slices) * math.sqrt(2 / slices)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


MATRICES = {"tdc": tdc_matrix, "dct": dct_matrix}


def mix(matrix: torch.Tensor, slices: torch.Tensor) -> torch.Tensor:
    """`matrix` applied to the slices of `(out, in, slices, k, k)`."""
    return torch.einsum("st,oithw->oishw", matrix.to(slices), slices)


class SliceCoordinates:
    """An optimizer of plain kernels that steps in coordinates w, `kernel = M w`.

    Use it as an optimizer: `step()` after `backward()`, `zero_grad()`, `state_dict()`, `load_state_dict()`.

    Args:
        layers: convolutions of plain slices, `weight` is `(out, in, slices, k, k)`, that know their `anchor`.
        others: the parameters that are trained as they are.
        coordinates: `"tdc"` or `"dct"`.
        make: from a list of parameters to the optimizer that steps.
    """

    def __init__(self, layers: Iterable[nn.Conv3d], others: Iterable[nn.Parameter], coordinates: str, make: Callable):
        layers = list(layers)
        self.kernels = [layer.weight for layer in layers]
        self.matrices = [MATRICES[coordinates](layer.weight.shape[2], layer.anchor) for layer in layers]
        start = zip(self.matrices, self.kernels, strict=True)
        self.slices = [nn.Parameter(mix(torch.linalg.inv(matrix), kernel.detach())) for matrix, kernel in start]
        self.optimizer = make([*self.slices, *others])

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        layers = list(zip(self.matrices, self.slices, self.kernels, strict=True))
        for matrix, slices, kernel in layers:
            slices.grad = None if kernel.grad is None else mix(matrix.T, kernel.grad)
        self.optimizer.step()
        for matrix, slices, kernel in layers:
            kernel.copy_(mix(matrix, slices))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        for kernel in self.kernels:
            kernel.grad = None

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "slices": [slices.detach() for slices in self.slices]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for slices, saved in zip(self.slices, state["slices"], strict=True):
            slices.copy_(saved)


def slice_gradients(layer: nn.Conv3d, differences: bool) -> dict[str, float]:
    """Norms of a layer's gradient in both coordinates, and how alike the plain slices' gradients are.

    Args:
        layer: of three slices, with a gradient.
        differences: whether its slices are TDC's, w, and not plain, k.

    Returns:
        norms `plain_0..2` and `tdc_0..2` by slice, the cosine of the plain gradients of the first two slices, and the norm
        of the slices beside the anchor's over that of the anchor, in TDC's coordinates.
    """
    anchor = layer.anchor
    matrix = tdc_matrix(3, anchor)
    inverse = torch.linalg.inv(matrix)
    gradient, weight = layer.weight.grad.detach().double(), layer.weight.detach().double()
    tdc = gradient if differences else mix(matrix.T, gradient)
    plain = mix(inverse.T, gradient) if differences else gradient
    slices = weight if differences else mix(inverse, weight)
    row = {f"plain_{s}": plain[:, :, s].norm().item() for s in range(3)}
    row |= {f"tdc_{s}": tdc[:, :, s].norm().item() for s in range(3)}
    beside = math.sqrt(sum(slices[:, :, s].square().sum().item() for s in range(3) if s != anchor))
    cosine = nn.functional.cosine_similarity(plain[:, :, 0].flatten(), plain[:, :, anchor].flatten(), dim=0).item()
    return row | {"cosine": cosine, "beside_anchor": beside / slices[:, :, anchor].norm().item()}
