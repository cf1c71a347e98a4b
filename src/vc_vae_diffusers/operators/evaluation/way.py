"""The contract of a way to evaluate a layer."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from .fusing import KernelLayer
    from .packing import FrameConv

Kernels = TypeVar("Kernels", bound="tuple[FrameConv | torch.Tensor, ...]")
Layer = TypeVar("Layer", bound="KernelLayer", contravariant=True)


class Way(ABC, Generic[Layer, Kernels]):
    """A way to evaluate the convolution of a layer: results differ from other ways' by rounding only.

    Ways have no state, and two of the same settings are equal: a layer keeps fused kernels by way. Arguments of all methods:

    - layer: what is evaluated. It says what is computed (`plain_kernel()`, `bias`, `neighbours`), never how.
    - x: a chunk, `(B, C, T, H, W)`; of 2-D layers a batch of frames, `(N, C, H, W)`.
    - past: the frames before the chunk, None at the start of a clip. Of no meaning to 2-D layers, as is
    - group: how many frames see each other.
    """

    @abstractmethod
    def serves(self, layer: Layer, x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        """Whether this way gives the layer's result for such an input, and is a good one. Reads no data of x."""

    @abstractmethod
    def kernels(self, layer: Layer) -> Kernels:
        """Compute the kernels that this way takes from the layer's parameters. Differentiable."""

    @abstractmethod
    def __call__(self, layer: Layer, x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> torch.Tensor:
        """The layer's output, `(B, C_out, T, H, W)` or `(N, C_out, H, W)`; its kernels are `layer.kernels(self)`."""
