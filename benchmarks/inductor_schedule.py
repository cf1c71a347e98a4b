"""The kernels that Inductor would start on a GPU, read from its schedule without one; for `gpu_estimate.py --compiled`.

A function is traced on fake CUDA tensors and lowered as `torch.compile` lowers it, up to the point where kernels would be
written: what is fused with what is decided then. Inductor asks the device for its properties on the way, and is told those
of an H100. The whole function is one graph, chunks one after the other; what a caller compiles chunk by chunk has the same
kernels within a chunk.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import _inductor as inductor
from torch._inductor import compile_fx, ir, scheduler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

_H100 = {"multi_processor_count": 132, "major": 9, "regs_per_multiprocessor": 65536, "warp_size": 32}
_H100 |= {"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}


@dataclass(frozen=True)
class Kernel:
    """One kernel of the schedule.

    Args:
        kind: `convolution`, `matrix`, `reduction` (norms, with what is fused to them), `pointwise`, or the name of a kernel
            that is not Inductor's.
        bytes: read and written.
        flops: of convolutions and matrix products.
        channels_last: of a convolution: whether its input is stored so.
        moved: bytes of its input and output.
    """

    kind: str
    bytes: int
    flops: float = 0.0
    channels_last: bool = True
    moved: int = 0


class _Scheduled(BaseException):  # no Exception, which Inductor would wrap
    """Ends the compilation where code would be written."""

    def __init__(self, kernels: list[Kernel]):
        self.kernels = kernels


def schedule(function: Callable[[torch.Tensor], Any], x: torch.Tensor, options: dict[str, Any]) -> list[Kernel]:
    """The kernels of a call, in order. Must run under the `FakeTensorMode` of `x`.

    Args:
        function: of one tensor on a fake GPU, without gradients.
        x: its argument.
        options: of Inductor, as `torch.compile` takes them.

    Raises:
        RuntimeError: if Inductor finds nothing to schedule.
    """
    with _pretended_gpu(), inductor.config.patch(options):
        pure = torch.func.functionalize(lambda x: tree_leaves(function(x)), remove="mutations")  # as torch.compile does
        graph = make_fx(pure, decomposition_table=select_decomp_table())(x)
        inputs = [*_lifted(graph), x]
        try:
            compile_fx.compile_fx_inner(graph, inputs)
        except _Scheduled as end:
            return end.kernels
    raise RuntimeError("Inductor compiled the function without a schedule of its own: it starts no kernel")


def _lifted(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
    """Make arguments of the weights that a trace holds, for these have no data to be folded; returns them in order."""
    values = []
    first = next(iter(graph.graph.nodes))
    for node in graph.graph.find_nodes(op="get_attr"):
        values.append(operator.attrgetter(node.target)(graph))
        with graph.graph.inserting_before(first):
            placeholder = graph.graph.placeholder(f"held_{len(values)}")
        placeholder.meta["val"] = values[-1]
        node.replace_all_uses_with(placeholder)
        graph.graph.erase_node(node)
    graph.recompile()
    return values


@contextlib.contextmanager
def _pretended_gpu() -> Iterator[None]:
    def stop(self: GraphLowering) -> None:
        self.init_wrapper_code()
        self._update_scheduler()
        raise _Scheduled([kernel for node in self.scheduler.nodes if (kernel := _kernel(node)) is not None])

    def layout(x: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
        """What cuDNN gives; without CUDA PyTorch takes another backend."""
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        chosen = x.ndim in (4, 5) and any(part.is_contiguous(memory_format=last) for part in (x, weight))
        return last if chosen else torch.contiguous_format

    properties = DeviceProperties(type="cuda", index=0, cc=90, **_H100)
    told = SimpleNamespace(name="NVIDIA H100", minor=0, total_memory=80 << 30, **_H100)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (DeviceProperties, "create", classmethod(lambda cls, device: properties)),
            (torch.compiler, "_is_compiling_flag", True),
            (torch.cuda, "get_device_properties", lambda device=None: told),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (torch._C, "_conv_determine_backend_memory_format", layout),
            (scheduler, "has_triton", lambda *device: True),
            (compile_fx, "_check_triton_bf16_support", lambda graph: None),
            (GraphLowering, "codegen", stop),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _kernel(node: Any) -> Kernel | None:
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return None
    size = node.get_read_write_buffers_sizes()
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return Kernel("reduction" if node.is_reduction() else "pointwise", size)
    extern = node.node
    if isinstance(extern, ir.FallbackKernel | ir.MultiOutput) and not size:
        return None
    name = str(getattr(extern, "python_kernel_name", "") or getattr(extern, "op_overload", "") or "")
    if "convolution" in name:
        frames, weight = extern.inputs[:2]
        out = prod(map(int, extern.get_size()))
        flops = 2.0 * out * prod(map(int, weight.get_size()[1:]))
        if extern.kwargs["transposed"]:
            flops = 2.0 * prod(map(int, frames.get_size())) * prod(map(int, weight.get_size()[1:]))
        moved = (out + prod(map(int, frames.get_size()))) * frames.get_dtype().itemsize
        return Kernel("convolution", size, flops, _channels_last(frames), moved)
    if any(word in name for word in ("mm", "addmm", "attention")):
        return Kernel("matrix", size, 2.0 * prod(map(int, extern.get_size())) * int(extern.inputs[-2].get_size()[-1]))
    return Kernel(name.split(".")[-2] if name.startswith("torch.ops.") else "other", size)


def _channels_last(buffer: Any) -> bool:
    strides = list(map(int, buffer.get_stride()))
    return len(strides) < 4 or strides[1] == 1
