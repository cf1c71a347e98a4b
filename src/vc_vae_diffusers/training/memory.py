"""What a training step will need, from one step on a small clip: said before the system kills a run that does not fit.

Not in the paper. Activations grow with the pixels of a micro-batch; weights, gradients and AdamW's moments do not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
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
class Trial:
    """A step on one small sample, to be tried before a run.

    Args:
        loss: what the step computes, of ``leaf``.
        leaf: requires a gradient; the only tensor that gets one.
        pixels: in all frames of the sample.
        learning: modules whose weights will have gradients and AdamW's moments.
        frozen: modules that are there besides.
    """

    loss: Callable[[], torch.Tensor]
    leaf: torch.Tensor
    pixels: int
    learning: Sequence[nn.Module]
    frozen: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class Load:
    """A kind of micro-batch of a run.

    Args:
        name: for people.
        count: clips or pictures of a process at once.
        pixels: of one of them, in all its frames.
        fewer: the options that make a micro-batch of so many.
        otherwise: what helps where not even one fits.
    """

    name: str
    count: int
    pixels: int
    fewer: Callable[[int], str]
    otherwise: str


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

    def tell(self, load: Load) -> str:
        """What a micro-batch needs, in words."""
        return f"{load.name}: {load.count} at once in about {gigabytes(self.need(load.count * load.pixels))}"

    def warn(self, load: Load, device: torch.device) -> None:
        """Say if a micro-batch will not fit, and what will."""
        # Processes on one machine's CPU share its memory; a GPU has one.
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        free = available_memory(device) // sharing
        fits = [n for n in range(1, load.count + 1) if load.count % n == 0 and self.need(n * load.pixels) <= free]
        if load.count in fits:
            return
        remedy = load.fewer(max(fits)) if fits else load.otherwise
        there = f"{gigabytes(free)} are there: the run is likely to be killed. {remedy}"
        logger.warning("%s, but %s", self.tell(load), there)


def measure(trial: Trial, device: torch.device) -> StepMemory:
    """Try a step on one small sample, and tell what larger ones need."""
    held = held_bytes(device) + state_bytes(trial.learning)
    known = [tensor for part in (*trial.learning, *trial.frozen) for tensor in part.state_dict().values()]
    return StepMemory(held, activation_bytes(trial.loss, trial.leaf, known) / trial.pixels)


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB"
