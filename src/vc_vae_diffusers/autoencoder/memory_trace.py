"""What one chunk takes of memory while it goes through a network: recorded once, without data, and read at any size.

The network runs on tensors that have shapes, strides and devices but no data (`FakeTensorMode`). No formula has to know how
a layer is evaluated, and none goes out of date when that changes. Every tensor that comes and goes is noted. Activations are
proportional to the area of a frame and to the groups of a chunk, caches to the area, kernels to neither: so that one run
tells the peak of every tile and every length of chunks. Not in the paper.

On the CPU the peak is not the plain sum of live bytes. glibc takes tensors under 32 MiB from a heap that it seldom gives
back and returns larger ones at once, so that a process holds the *highest* sum of small tensors so far, times
`HEAP_FACTOR`, plus the large tensors of the moment. The factor is for holes: an aligned block asks for a little more than it
keeps, so that the hole a tensor leaves is just too small for the next one of its size. On CUDA the sum of live bytes is what
`torch.cuda.max_memory_allocated` reports.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..operators.frame_conv import KernelLayer

# Highest sum of small tensors to the size of the heap that held them.
HEAP_FACTOR = 1.4
# Tensors from this size on are mapped one by one and given back at once (glibc's M_MMAP_THRESHOLD at its maximum).
MAPPED_BYTES = 32 * 2**20


@dataclass
class Allocation:
    """A tensor that was made: its bytes, and whether they grow with the area of a frame and the frames of a chunk."""

    size: int
    with_area: bool = True
    with_frames: bool = True

    def at(self, area: float, groups: float) -> int:
        """Its bytes at `area` times the area and `groups` times the frames."""
        return round(self.size * (area if self.with_area else 1) * (groups if self.with_frames else 1))


class MemoryTrace(TorchDispatchMode):
    """Notes the tensors that operations make and that are let go, in order.

    Args:
        known: tensors that do not count: weights, from which kernels are computed that grow with nothing.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.allocations: list[Allocation] = []
        # By index: made, or (as the complement) let go.
        self.events: list[int] = []
        self.caches: list[Allocation] = []
        self._constant = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, Any] = dict.fromkeys(self._constant)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in _tensors(result) if _key(tensor) not in self._live]
        if made:
            inputs = _tensors((args, kwargs))
            constant = bool(inputs) and all(_key(tensor) in self._constant for tensor in inputs)
            for tensor in made:
                self._add(tensor.untyped_storage(), constant)
        return result

    def _add(self, storage: torch.UntypedStorage, constant: bool) -> None:
        key, index = storage._cdata, len(self.allocations)
        if key in self._live:  # two results that share their memory
            return
        self.allocations.append(Allocation(storage.nbytes(), not constant, not constant))
        self.events.append(index)
        self._live[key] = index
        if constant:
            self._constant.add(key)
        weakref.finalize(storage, self._free, key, index)

    def _free(self, key: int, index: int) -> None:
        self.events.append(~index)
        self._constant.discard(key)
        del self._live[key]

    def keep(self, cache: object) -> None:
        """Say which tensors are the caches that the next chunk takes; they hold one frame, whatever the chunk."""
        for key in {_key(tensor) for tensor in _tensors(cache)}:
            allocation = self.allocations[self._live[key]]
            allocation.with_frames = False
            self.caches.append(allocation)

    def cache(self, area: float = 1.0) -> int:
        """Bytes of the caches."""
        return sum(allocation.at(area, 1) for allocation in self.caches)

    def peak(
        self,
        area: float = 1.0,
        groups: float = 1.0,
        goes_on: bool = False,
        mapped_bytes: int | None = None,
        heap_factor: float = 1.0,
    ) -> int:
        """The most bytes at once.

        Args:
            area, groups: by how much frames are larger and the chunk is longer than those that were recorded.
            goes_on: whether the caches of a chunk before are there as well; each goes once the next one is made.
            mapped_bytes: tensors below this size count as a heap does, which keeps its highest size; None counts all alike.
            heap_factor: for the heap's holes.
        """
        sizes = [allocation.at(area, groups) for allocation in self.allocations]
        limit = 0 if mapped_bytes is None else mapped_bytes
        before = {id(allocation): allocation.at(area, 1) for allocation in self.caches} if goes_on else {}
        small = heap = sum(size for size in before.values() if size < limit)
        large = sum(size for size in before.values() if size >= limit)
        most = heap * heap_factor + large
        for event in self.events:
            made = sizes[event] if event >= 0 else -sizes[~event]
            replaced = before.get(id(self.allocations[event]), 0) if event >= 0 else 0
            for size in (made, -replaced):
                if abs(size) < limit:
                    small += size
                    heap = max(heap, small)
                else:
                    large += size
                most = max(most, heap * heap_factor + large)
        return int(most)


def _tensors(tree: object) -> list[torch.Tensor]:
    """The tensors of nested arguments and results, without packed kernels, which have no storage to ask."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class ModelWithoutData:
    """A model as its configuration describes it, evaluated as a given one is, whose tensors have no data.

    What wraps the given one (hooks that offload or cast, quantised or low-rank layers) is not there: it is built anew.

    Args:
        vae: the given model.
        device, dtype: of the tensors; the device need not be there.
    """

    def __init__(self, vae: ModelMixin, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._mode = FakeTensorMode()
        with torch.device("meta"):
            # How clips are cut does not matter here: chunks are whole groups.
            self.vae = type(vae).from_config(dict(vae.config), first_frame="in_sequence", frame_convention="4k").eval()
        given = dict(vae.named_modules())
        with self._mode, torch.no_grad():
            for name, module in self.vae.named_modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                        module._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
                if isinstance(module, KernelLayer) and isinstance(given.get(name), KernelLayer):
                    module.ways = given[name].ways
            if _is_fused(vae):
                self.vae.fuse_tdc()
        fused = [t for m in self.vae.modules() if isinstance(m, KernelLayer) for t in m.fused_tensors()]
        self._tensors = [*self.vae.parameters(), *fused]
        self.fused_bytes = sum(tensor.numel() * tensor.itemsize for tensor in fused)

    def trace(self, encodes: bool, batch: int, height: int, width: int, frames: int) -> MemoryTrace:
        """Record the first chunk of a stream.

        Args:
            encodes: or else decodes.
            batch: clips at once.
            height, width: of the frames in pixels.
            frames: of the one chunk, or latent frames.
        """
        ratio = self.vae.spatial_compression_ratio
        channels = self.vae.config.in_channels if encodes else self.vae.config.latent_channels
        size = (height, width) if encodes else (height // ratio, width // ratio)
        run = self.vae._encode_frames if encodes else self.vae._decode_frames
        self.vae.groups_per_chunk = frames  # as many as there can be
        trace = MemoryTrace(self._tensors)
        with self._mode, torch.no_grad():
            x = torch.empty((batch, channels, frames, *size), device=self.device, dtype=self.dtype)
            with trace:
                result = run(x)
        trace.keep(result[1])
        return trace


def _is_fused(vae: ModelMixin) -> bool:
    """Whether a model has fused kernels, or, without weights of its own (and not because they are offloaded), would have."""
    if any(isinstance(module, KernelLayer) and module.fused_for for module in vae.modules()):
        return True
    return vae.device.type == "meta" and not any(hasattr(module, "_hf_hook") for module in vae.modules())
