"""Muon for the kernels of small VAEs, with Adam for what is no kernel. Not in the paper, which trains by Adam."""

import math
from collections.abc import Sequence

import torch
from torch import nn


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest half-orthogonal matrices, roughly: five steps of Newton-Schulz in bfloat16 on `(N, rows, columns)`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class MuonAdam:
    """Muon (Jordan et al., 2024) for kernels, Adam for the rest, with everything on the device so that graphs hold it.

    The kernel of a frame, or a temporal slice of one, is a matrix `(out, in * k * k)`. Its update has the size that Adam's
    typically has (0.2 a weight), so that both go by one learning rate.

    Args:
        parameters: that learn.
        muon: False leaves all to Adam.
        learning_rate: a scalar tensor, read at every step.
        max_norm: gradients are clipped to.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], muon: bool, learning_rate: torch.Tensor, max_norm: float = 1.0):
        self.parameters, self.learning_rate, self.max_norm = list(parameters), learning_rate, max_norm
        self.is_kernel = [muon and p.ndim >= 2 and min(p.shape[:2]) >= 16 for p in self.parameters]
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p, kernel in zip(self.parameters, self.is_kernel, strict=True) if not kernel]
        self.count = torch.zeros((), device=learning_rate.device)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Take a step and return the norm of the gradients before clipping."""
        gradients = [torch.nan_to_num(g.float(), nan=0.0, posinf=0.0, neginf=0.0) for g in gradients]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.count += 1
        split: list[tuple[list, list, list]] = [([], [], []), ([], [], [])]
        for kernel, *values in zip(self.is_kernel, self.parameters, gradients, self.first, strict=True):
            for target, value in zip(split[kernel], values, strict=True):
                target.append(value)
        self._adam(*split[False])
        if split[True][0]:
            self._muon(*split[True])
        return norm

    def _adam(self, parameters: list, gradients: list, first: list) -> None:
        beta1, beta2 = 0.9, 0.99
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_div_(scale, (1 - beta2**self.count).sqrt())
        torch._foreach_add_(scale, 1e-8)
        updates = torch._foreach_div(first, scale)
        torch._foreach_mul_(updates, -self.learning_rate / (1 - beta1**self.count))
        torch._foreach_add_(parameters, updates)

    def _muon(self, parameters: list, gradients: list, first: list) -> None:
        torch._foreach_lerp_(first, gradients, 0.05)
        ahead = torch._foreach_lerp(gradients, first, 0.95)
        # Slices of time are matrices of their own; those of one shape go through Newton-Schulz together.
        slices = [update.unbind(2) if update.ndim == 5 else (update,) for update in ahead]
        groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for piece in (piece.flatten(1) for pieces in slices for piece in pieces):
            groups.setdefault(tuple(piece.shape), []).append(piece)
        done = {
            shape: iter(orthogonalised(torch.stack(pieces)) * (0.2 * math.sqrt(max(shape))))
            for shape, pieces in groups.items()
        }
        updates = []
        for update in slices:
            pieces = [next(done[tuple(piece.flatten(1).shape)]).view(piece.shape) for piece in update]
            updates.append(torch.stack(pieces, dim=2) if len(pieces) > 1 else pieces[0])
        torch._foreach_mul_(updates, -self.learning_rate)
        torch._foreach_add_(parameters, [update.view_as(p) for update, p in zip(updates, parameters, strict=True)])
