"""What a training step will need, from one step on a small clip: said before the system kills a run that does not fit.

Not in the paper. Activations grow with the pixels of a micro-batch; weights, gradients and AdamW's moments do not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from ..autoencoder.memory_plan import available_memory
from ..autoencoder.memory_trace import MemoryTrace

logger = logging.getLogger(__name__)

# Convolution libraries work on copies that nobody sees: measured peaks are above the sum of the tensors (docs/training.md).
_OVERHEAD = 1.15


def activation_bytes(loss: Callable[[], torch.Tensor], leaf: torch.Tensor, known: Iterable[torch.Tensor]) -> int:
    """The most that tensors hold at once in a forward and a backward pass, gradients of weights apart.

    Args:
        loss: the forward pass, of ``leaf``.
        leaf: requires a gradient; the only one that is taken, so that no weight gets one.
        known: what is there already.
    """
    # Whatever is compiled would be compiled for this shape too.
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
        if leaf.device.type == "cuda":
            before = torch.cuda.memory_allocated(leaf.device)
            torch.cuda.reset_peak_memory_stats(leaf.device)
            torch.autograd.grad(loss(), leaf)
            return torch.cuda.max_memory_allocated(leaf.device) - before
        with MemoryTrace(known) as trace:
            torch.autograd.grad(loss(), leaf)
        return trace.peak()


def held_bytes(device: torch.device) -> int:
    """What this process holds on a device now."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss


def state_bytes(modules: Iterable[nn.Module]) -> int:
    """What the gradients and AdamW's two moments of all weights that learn will take."""
    weights = (p for module in modules for p in module.parameters() if p.requires_grad)
    return 3 * sum(p.numel() * p.element_size() for p in weights)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a process in a training step.

    Args:
        held: whatever is held besides activations.
        per_pixel: activations of a pixel of a frame.
    """

    held: int
    per_pixel: float

    def need(self, pixels: int) -> int:
        """Of a micro-batch with so many pixels in all its frames."""
        return int(self.held + _OVERHEAD * self.per_pixel * pixels)

    def warn(self, bucket: str, clips: int, pixels: int, device: torch.device) -> None:
        """Say if so many clips of so many pixels each will not fit, and what will."""
        # Processes on one machine's CPU share its memory; a GPU has one.
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        need, free = self.need(clips * pixels), available_memory(device) // sharing
        if need <= free:
            return
        fitting = max((n for n in range(1, clips) if clips % n == 0 and self.need(n * pixels) <= free), default=0)
        logger.warning(
            "bucket %s: %d clips at once need about %s, %s are there: the run is likely to be killed. %s",
            *(bucket, clips, gigabytes(need), gigabytes(free)),
            f"Give the bucket micro={fitting}: gradients are accumulated"
            if fitting
            else "Use --gradient_checkpointing true, shorter or smaller clips, or a smaller model",
        )


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB"
