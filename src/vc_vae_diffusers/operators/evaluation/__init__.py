"""How the convolution of a layer is evaluated: a matter of speed, which changes results by rounding only.

Every way is a small class with the contract of `Way`. The last of each list is the definition, and all that a complete and
correct package needs: the others may be deleted here, and their modules with them.
"""

from collections.abc import Sequence

import torch

from .direct import Direct
from .fusing import KernelLayer
from .in_space import InSpace
from .on_gpu import BiasLast, Combined, LastOfGroup, TapsAsInputs, TapsAsOutputs, Transposed
from .pairs import Pairwise
from .taps import GroupEnds, Static, TwoTaps
from .upsampling import OfDifferences, OfFrames, Upsampled
from .way import Way
from .winograd import FourFrames

# In order of preference: of the temporal operators, of 2-D layers, of those that upsample.
TEMPORAL: Sequence[Way] = (
    Static(),
    TapsAsInputs(),
    TapsAsOutputs(),
    Combined(LastOfGroup()),
    Combined(Pairwise()),
    Combined(FourFrames()),
    TwoTaps(),
    InSpace(FourFrames()),
    InSpace(Pairwise()),
    FourFrames(),
    Pairwise(),
    GroupEnds(),
    Direct(),
)
FRAMES: Sequence[Way] = (BiasLast(), OfFrames())
UPSAMPLING: Sequence[Way] = (OfDifferences(), Transposed(), Upsampled())


def choose(layer: KernelLayer, x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> Way:
    """The first of the layer's ways that serves such an input. Arguments: see `Way`."""
    return next(way for way in layer.ways if way.serves(layer, x, past, group))


def evaluate(layer: KernelLayer, x: torch.Tensor, past: torch.Tensor | None = None, group: int = 1) -> torch.Tensor:
    """The layer's output for a chunk, `(B, C_out, T, H, W)`. Arguments: see `Way`."""
    return choose(layer, x, past, group)(layer, x, past, group)
