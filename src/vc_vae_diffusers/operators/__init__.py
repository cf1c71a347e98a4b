"""The temporal operators of the paper (Eq. 1, 2, 5, 6, 7), usable on their own: they need PyTorch and nothing else."""

from .conversion import apply_tdc, remove_tdc, to_conv, to_tdc
from .tdc import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
)

__all__ = [
    "CausalConv3d",
    "CausalTDC",
    "GroupCausalConv3d",
    "GroupCausalTDC",
    "TemporalInteractionConv3d",
    "TemporalInteractionTDC",
    "apply_tdc",
    "remove_tdc",
    "to_conv",
    "to_tdc",
]
