"""Groups of two frames by four 2-D convolutions where the taps are five."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..neighbours import Group
from .packing import FrameConv
from .taps import frame_kernels, two_taps
from .tiles import Algorithm, Tiles, few_pixels
from .way import Way

if TYPE_CHECKING:
    from ..tdc import GroupCausalConv3d, TemporalConv3d


PAIR = Algorithm(
    frames=((0.0, 0.0, 1.0), (0.0, 1.0, -1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    kernel=((0.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
    products=((1.0, 1.0, 1.0, 0.0), (1.0, 0.0, 0.0, 1.0)),
)


@dataclass(frozen=True)
class Pairwise(Way["GroupCausalConv3d", tuple[FrameConv, FrameConv, FrameConv]]):
    """Both frames of a group, the last of which stands for the one after it.

    The sum of the kernels of current and future frame is then applied to the last frame in both outputs:
    `P*X_0 + C*X_1 + F*X_2 = P*X_0 + C*(X_1 - X_2) + (C + F)*X_2`, and `P*X_1 + (C + F)*X_2`.

    Args:
        always: also for few pixels and on other devices than CPUs, where it was measured to be faster.
    """

    always: bool = False

    def algorithm(self, layer: "TemporalConv3d", group: int) -> Algorithm:
        """The same as sums of products."""
        return PAIR

    def fits(self, layer: "TemporalConv3d", group: int) -> bool:
        """Whether the groups are of two and the identity above holds."""
        return isinstance(layer.neighbours, Group) and group == 2 and layer.temporal_padding == "replicate"

    def serves(self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> bool:
        return self.fits(layer, group) and (self.always or not few_pixels(layer, x, group))

    def kernels(self, layer: "GroupCausalConv3d") -> tuple[FrameConv, FrameConv, FrameConv]:
        past, last = two_taps(layer)
        current = layer.plain_kernel()[:, :, layer.anchor]
        past, current, last = frame_kernels(torch.stack([past, current, last], dim=2))
        padding = layer.padding[1]
        return (
            FrameConv(past, padding=padding),
            FrameConv(current, padding=padding),
            FrameConv(last, layer.bias, padding=padding),
        )

    def __call__(
        self, layer: "GroupCausalConv3d", x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1
    ) -> torch.Tensor:
        of_past, of_current, of_last = layer.kernels(self)
        tiles = Tiles.cut(layer.neighbours, x, past, group, size=2)
        before, (first, last) = tiles.before, tiles.frames
        shared = of_last(last)
        y = torch.stack([shared, shared])
        y_first, y_last = of_current.add_to(y[0], first - last), y[1]
        y_first, y_last = of_past.add_to(y_first, before), of_past.add_to(y_last, first)
        # Without gradients they are in y.
        return tiles.join(torch.stack([y_first, y_last]) if torch.is_grad_enabled() else y)
