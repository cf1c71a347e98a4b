"""The processes that a launcher (torchrun, `accelerate launch`) has started for one piece of work. Not in the paper."""

import torch
from accelerate import PartialState


def processes(device: torch.device | str | None = None) -> PartialState:
    """All processes of this run and this one's place among them; alone, one of one.

    `PartialState()` takes the CPU ranks of torchrun for so many runs of their own, unless it is told that they are on CPUs.

    Args:
        device: where the work is done; None is an accelerator if there is one.
    """
    cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    return PartialState(cpu=True) if cpu else PartialState()
