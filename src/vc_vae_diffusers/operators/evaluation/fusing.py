"""Kernels that are computed once for inference, and again when the parameters they come from have changed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from .packing import FrameConv
from .way import Kernels, Way

# Values of a parameter that are compared to see whether it is what was fused.
_SAMPLES = 64
# Weights of other dtypes are stored in them and computed with in another one.
_COMPUTED_WITH = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class KernelLayer(nn.Module):
    """A layer whose ways of evaluation take kernels computed from its parameters, which can be fused: computed once.

    Attributes:
        ways: how it may be evaluated; the first one that serves is taken.
        fused: the fused kernels, by way.
        fused_for: device and dtype of the weight that was fused; None if none is.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    ways: Sequence[Way]
    fused: dict[Way, Any]
    fused_for: tuple[torch.device, torch.dtype] | None
    _fused_from: list["_State"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unfuse()

    def inference_ways(self) -> Sequence[Way]:
        """The ways that inference usually takes, when kernels are fused."""
        raise NotImplementedError

    def fuse(self) -> bool:
        """Compute kernels once for inference. The parameters stay: the state dict, and training, do not change.

        Kernels are computed again when parameters have changed: in place (the version counter tells), by others put in their
        place, or through `.data`, which no counter sees: on CPUs some values are compared. On other devices that would
        make the program wait; call `fuse` again there after a change through `.data` (`EMAModel.copy_to`, LoRA's merge).

        Returns:
            Whether there is something to fuse: not for weights that are elsewhere (`meta`, shards) or of a dtype for storage
            alone.
        """
        self.unfuse()
        sharded = hasattr(self.weight, "full_tensor")  # a `DTensor`, as FSDP makes it
        if sharded or self.weight.is_meta or self.weight.dtype not in _COMPUTED_WITH:
            return False
        self.fused_for = (self.weight.device, self.weight.dtype)
        with torch.no_grad():
            for way in self.inference_ways():
                self.kernels(way)
        return True

    def unfuse(self) -> None:
        """Forget the fused kernels: they are computed at every call again."""
        self.fused, self.fused_for, self._fused_from = {}, None, []

    @property
    def keeps_kernels(self) -> bool:
        """Whether fused kernels can be used now: packed ones know no gradients, no compiler and no autocast."""
        if self.fused_for != (self.weight.device, self.weight.dtype):
            return False  # not fused, or a hook that offloads or casts has changed the weight
        if self.weight.device.type == "cpu":
            return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        return not (torch.is_grad_enabled() and self.weight.requires_grad)

    def kernels(self, way: Way[Any, Kernels]) -> Kernels:
        """The kernels that a way takes: fused ones if they can serve, computed from the parameters otherwise."""
        if not self.keeps_kernels:
            return way.kernels(self)
        self._forget_stale()
        if way not in self.fused:
            with torch.no_grad(), torch.inference_mode(False):  # so that they serve outside of it as well
                self.fused[way] = tuple(k.pack() if isinstance(k, FrameConv) else _kept(k) for k in way.kernels(self))
        return self.fused[way]

    def fused_tensors(self) -> list[torch.Tensor]:
        """What the fused kernels consist of."""
        return [k.weight if isinstance(k, FrameConv) else k for kernels in self.fused.values() for k in kernels]

    def _forget_stale(self) -> None:
        """Drop kernels of parameters that have changed."""
        if torch.compiler.is_compiling() or is_fake(self.weight):
            return
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        if len(parameters) != len(self._fused_from) or not all(
            state.is_of(parameter) for state, parameter in zip(self._fused_from, parameters, strict=True)
        ):
            self.fused, self._fused_from = {}, [_State(parameter) for parameter in parameters]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.fused = {}
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.fused = {}
        super()._apply(*args, **kwargs)
        if self.fused_for is not None and self.fused_for[1] != self.weight.dtype:
            self.unfuse()  # casting is for good, where moving may be for a while
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "fused": {}, "_fused_from": []}


class _State:
    """What tells whether a parameter is still what it was."""

    def __init__(self, parameter: torch.Tensor):
        self.pointer, self.version = parameter.data_ptr(), _version(parameter)
        self.sample = _sample(parameter).clone() if parameter.device.type == "cpu" else None

    def is_of(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is in this state."""
        if parameter.data_ptr() != self.pointer or _version(parameter) != self.version:
            return False
        return self.sample is None or torch.equal(_sample(parameter), self.sample)


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version  # what inference mode makes has no counter


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Some of a parameter's values, from all over its memory."""
    values = parameter.detach()
    flat = values.view(-1) if values.is_contiguous() else values.flatten()
    return flat[:: max(1, len(flat) // _SAMPLES)]


def _kept(kernel: torch.Tensor) -> torch.Tensor:
    """Dense, in the layout that is fast on GPUs for kernels of clips; as it is if it is dense."""
    if kernel.device.type == "cuda" and kernel.ndim == 5:
        return kernel.detach().contiguous(memory_format=torch.channels_last_3d)
    if kernel.ndim == 4 and kernel.is_contiguous(memory_format=torch.channels_last):
        return kernel.detach()
    return kernel.detach().contiguous()
