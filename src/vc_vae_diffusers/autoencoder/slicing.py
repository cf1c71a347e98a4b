"""One clip of a batch at a time, as `enable_slicing` asks for: memory of one clip, whatever the batch. Not in the paper."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .blocks import Cache

Step = Callable[[torch.Tensor, Cache], tuple[torch.Tensor, Cache]]


def by_clip(step: Step, x: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
    """Apply `step(clip, cache)` to every clip of a batch and join the results, and the caches, as the batch's.

    A cache is the same with and without slicing, so that a stream may go on after the switch was turned.
    """
    batch = x.shape[0]
    joined: Any = None
    for i, clip in enumerate(x.split(1)):
        outputs = step(clip, tree_map(lambda tensor, i=i: _clip(tensor, i), cache))
        if joined is None:
            joined = tree_map(lambda tensor: _room_for(tensor, batch), outputs)
        tree_map(lambda whole, part, i=i: None if part is None else whole[i : i + 1].copy_(part), joined, outputs)
        del outputs
    return joined


def _clip(tensor: torch.Tensor | None, i: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[i : i + 1]


def _room_for(tensor: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    dense = torch.channels_last_3d if tensor.is_contiguous(memory_format=torch.channels_last_3d) else torch.contiguous_format
    return torch.empty((batch, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device, memory_format=dense)
