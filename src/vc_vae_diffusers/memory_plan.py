"""How much memory encoding and decoding take, and which chunk length and tiles fit into a budget. Not in the paper.

The estimate follows the model's own code. Two chunks go through a copy of the model whose tensors have shapes, strides and
devices but no data (`FakeTensorMode`), and the bytes that are alive at the worst moment are added up: the activations of
the largest layer with whatever its evaluation keeps beside them, and the caches of the chunk before and after. No formula
has to know how a layer is evaluated, and none goes out of date when that changes. What a chunk does not show is exact
arithmetic. All in bytes:

    peak = runtime + weights + video + cache + activations

| term | what it is |
| --- | --- |
| runtime | the process with its libraries and whatever else it holds now without the model, and `FIRST_USE_BYTES` on CPUs |
| weights | parameters and fused kernels |
| video | whole clips: the clip, its posterior or its frames. Streams: a few chunks of them |
| cache | the caches of tiles other than the one at work. A stream keeps one a tile, a whole clip none |
| activations | the traced peak of a chunk of `groups_per_chunk` groups at the size of a tile, its caches included |

On the CPU the traced peak is not the plain sum of live bytes. glibc takes tensors under 32 MiB from a heap that it seldom
gives back and returns larger ones at once, so that a process holds the *highest* sum of small tensors so far, times
`HEAP_FACTOR`, plus the large tensors of the moment. The factor is for holes: an aligned block asks for a little more than it
keeps, so that the hole a tensor leaves is just too small for the next one of its size. The model's layers allocate nothing
else that counts.

`HEAP_FACTOR` and `FIRST_USE_BYTES` are the two calibrated numbers: `python benchmarks/vae_memory.py --calibrate` measures
both over a grid of small sizes. On CUDA the sum of live bytes is what `torch.cuda.max_memory_allocated` reports.

Inference only: training keeps every activation, which `benchmarks/train_step.py` measures.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.models.modeling_utils import ModelMixin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .frame_conv import KernelLayer
from .tiling import TileGrid

# Highest sum of small tensors to the size of the heap that held them.
HEAP_FACTOR = 1.4
# What the first encoding or decoding adds to a process for good: code of the libraries, kernels made for this processor.
FIRST_USE_BYTES = 24 * 2**20
# Tensors from this size on are mapped one by one and given back at once (glibc's M_MMAP_THRESHOLD at its maximum).
MAPPED_BYTES = 32 * 2**20
# What a CUDA context takes beside torch's allocator, where none exists yet to ask. Assumed: 0.3 to 0.6 GB are usual.
CUDA_CONTEXT_BYTES = 512 * 2**20
# A plan keeps this share of the budget free, which is how far off an estimate may be.
MARGIN = 0.15
# More groups at once than this gain nothing.
MAX_GROUPS = 8
# Smaller tiles than this, in pixels, see too little of the frame around them.
MIN_TILE = 128

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OPERATIONS = ("encode", "decode")


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of one operation by its parts, in bytes: see the table of this module."""

    operation: str
    runtime: int
    weights: int
    video: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.runtime + self.weights + self.video + self.cache + self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """Settings for one size of video, and what they take.

    Args:
        height, width: of the video in pixels, multiples of the spatial compression.
        num_frames: of the clip; None for a stream.
        batch_size: clips at once.
        streamed: whether this is about `encode_stream` and `decode_stream`, not `encode` and `decode`.
        groups_per_chunk: for the model's attribute of this name.
        tile: height and width of tiles in pixels for `enable_tiling`, whose default strides go with it; None for no tiles.
        tiles: how many of them a frame has.
        memory: the budget in bytes.
        estimates: of the operations that were asked for.
    """

    height: int
    width: int
    num_frames: int | None
    batch_size: int
    streamed: bool
    groups_per_chunk: int
    tile: tuple[int, int] | None
    tiles: int
    memory: int
    estimates: tuple[MemoryEstimate, ...]

    @property
    def peak(self) -> int:
        """The largest estimate in bytes."""
        return max(estimate.total for estimate in self.estimates)

    @property
    def usable(self) -> int:
        """The budget without its margin, in bytes."""
        return int(self.memory * (1 - MARGIN))

    @property
    def fits(self) -> bool:
        """Whether the largest estimate keeps the margin."""
        return self.peak <= self.usable

    def to_dict(self) -> dict:
        """The plan for JSON."""
        estimates = [{**asdict(estimate), "total": estimate.total} for estimate in self.estimates]
        return {**asdict(self), "estimates": estimates, "peak": self.peak}


def parse_memory(text: str) -> int:
    """Read an amount of memory: `"8GB"` is 8e9 bytes, `"8GiB"` is 8 * 2**30, a bare number is bytes.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"memory is {text!r}: pass a number and a unit, for example 8GB, 512MiB or 24GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process may take on a device in all: what it holds, and what is free now.

    Raises:
        ValueError: for a device other than a CPU or a CUDA device that is there.
    """
    device = _checked_device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {str(device)!r} and there is none here: pass memory to plan for another machine")
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free + psutil.Process().memory_info().rss


def _checked_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}: memory is planned for 'cpu' and 'cuda'")
    return device


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make, while they live, and keeps the peak.

    Args:
        known: tensors that do not count.
        mapped_bytes: tensors below this size count as a heap does, which keeps its highest size; None counts all alike.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), mapped_bytes: int | None = None):
        super().__init__()
        self.mapped_bytes = mapped_bytes
        self.large = self.small = 0
        # Heap sizes as they grew, each with the most that large tensors held at that size.
        self.steps = [(0, 0)]
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def peak(self, heap_factor: float = 1.0) -> int:
        """The highest sum of the heap, times a factor for its holes, and of large tensors."""
        return max(int(heap * heap_factor) + large for heap, large in self.steps)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        heap, large = self.steps[-1]
        if self.mapped_bytes is not None and size < self.mapped_bytes:
            self.small += size
            weakref.finalize(storage, self._free_small, key, size)
            if self.small > heap:
                self.steps.append((self.small, self.large))
        else:
            self.large += size
            weakref.finalize(storage, self._free_large, key, size)
            self.steps[-1] = (heap, max(large, self.large))

    def _free_small(self, key: int, size: int) -> None:
        self._seen.remove(key)
        self.small -= size

    def _free_large(self, key: int, size: int) -> None:
        self._seen.remove(key)
        self.large -= size


@dataclass(frozen=True)
class _ChunkMemory:
    """What the network takes at one spatial extent, caches included, and the bytes of the caches alone."""

    live: LiveBytes
    cache: int


class MemoryEstimator:
    """Estimates the peak memory of a model's operations without running them.

    Args:
        vae: the model as it is to be used: fused or not, with its evaluation switches. It may be on the meta device.
        device: `"cpu"` or `"cuda"`, which need not be there; None is the model's.
        dtype: to use the model in; None is the model's.
        heap_factor: see this module; for calibration.
        runtime: bytes that a process holds without the model; None is this process's.

    Raises:
        ValueError: for another device, or a model on the meta device without `device`.
    """

    def __init__(
        self,
        vae: ModelMixin,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        heap_factor: float = HEAP_FACTOR,
        runtime: int | None = None,
    ):
        if device is None and vae.device.type == "meta":
            raise ValueError("vae is on the meta device: pass device, 'cpu' or 'cuda', where it is to be used")
        self.device = _checked_device(vae.device if device is None else device)
        self.dtype = vae.dtype if dtype is None else dtype
        self.config, self.groups, self.heap_factor = vae.config, vae.groups, heap_factor
        self.group, self.ratio = vae.temporal_compression_ratio, vae.spatial_compression_ratio
        self.runtime = _runtime_bytes(vae, self.device) if runtime is None else runtime
        self._mode = FakeTensorMode()
        self._vae = self._without_data(vae)
        self._tensors = _weights(self._vae)
        self.weights = _storage_bytes(self._tensors)
        self._traced: dict[tuple, _ChunkMemory] = {}

    def _without_data(self, vae: ModelMixin) -> ModelMixin:
        # `deepcopy` takes what its memo holds for a tensor, so that no data are copied.
        memo: dict[int, torch.Tensor] = {}
        with self._mode:
            for tensor in [*vae.parameters(), *vae.buffers()]:
                dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=self.device)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                memo[id(tensor)] = torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake
            traced = remove_hook_from_module(copy.deepcopy(vae, memo), recurse=True).eval()
            if any(isinstance(module, KernelLayer) and module.fused for module in vae.modules()):
                traced.fuse_tdc()  # anew: which kernels are fused depends on device and dtype
        traced.disable_tiling()
        traced.disable_slicing()
        return traced

    def estimate(
        self,
        operation: str,
        height: int,
        width: int,
        num_frames: int | None,
        *,
        batch_size: int = 1,
        groups_per_chunk: int = 1,
        tile: tuple[int, int] | None = None,
        clip_held: bool = False,
    ) -> MemoryEstimate:
        """Estimate the peak of one operation.

        Args:
            operation: `"encode"` or `"decode"`.
            height, width: of the frames in pixels, multiples of the spatial compression.
            num_frames: of the clip that goes through in one call; None for a stream of any length.
            batch_size: clips at once.
            groups_per_chunk: as the model's attribute.
            tile: height and width of a tile in pixels, with `enable_tiling`'s default strides; None for no tiling.
            clip_held: whether the caller keeps the clip while its latents are decoded.

        Raises:
            ValueError: for an unknown operation, or numbers that the model would refuse.
        """
        self._check(operation, height, width, num_frames, batch_size, groups_per_chunk)
        grid = None if tile is None else tile_grid(tile, self.ratio)
        if grid is not None and grid.covers(height // self.ratio, width // self.ratio):
            grid = None
        extent = (height, width) if grid is None else (grid.height * self.ratio, grid.width * self.ratio)
        tiles = self.tiles(height, width, tile)
        lengths = self._chunk_lengths(operation, num_frames, groups_per_chunk)
        chunk = self._trace(operation, batch_size, *extent, lengths, groups_per_chunk)

        frame = batch_size * height * width * self.dtype.itemsize
        colours = self.config.in_channels if operation == "encode" else self.config.out_channels
        if num_frames is None:
            # What came in, what waits for the rest of its group or is blended from tiles, and what was yielded last.
            video = 3 * groups_per_chunk * self.group * frame * colours
            cache = 2 * (tiles - 1) * chunk.cache
        else:
            groups = -(-num_frames // self.group)
            latents = frame // self.ratio**2 * self.config.latent_channels * groups
            # A posterior is its moments, and log-variance, deviation and variance made from them.
            video = num_frames * frame * colours + (5 if operation == "encode" else 1) * latents
            if operation == "decode" and clip_held:
                video += num_frames * frame * self.config.in_channels
            cache = 0
        runtime = self.runtime + (FIRST_USE_BYTES if self.device.type == "cpu" else 0)
        return MemoryEstimate(operation, runtime, self.weights, video, cache, chunk.live.peak(self.heap_factor))

    def tiles(self, height: int, width: int, tile: tuple[int, int] | None) -> int:
        """How many tiles a frame has, all in pixels."""
        if tile is None:
            return 1
        return sum(1 for _ in tile_grid(tile, self.ratio).tiles(height // self.ratio, width // self.ratio, 1))

    def _check(
        self, operation: str, height: int, width: int, num_frames: int | None, batch_size: int, groups_per_chunk: int
    ) -> None:
        if operation not in _OPERATIONS:
            raise ValueError(f"operation is {operation!r}: pass 'encode' or 'decode'")
        for name, size in (("height", height), ("width", width)):
            if size < self.ratio or size % self.ratio != 0:
                raise ValueError(
                    f"{name} is {size}, not a positive multiple of the spatial compression {self.ratio}: pass "
                    f"{max(1, -(-size // self.ratio)) * self.ratio}, to which frames are padded"
                )
        counts = {"batch_size": batch_size, "groups_per_chunk": groups_per_chunk}
        if num_frames is not None:
            counts["num_frames"] = num_frames
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}: pass at least 1")

    def _chunk_lengths(self, operation: str, num_frames: int | None, groups_per_chunk: int) -> tuple[int, ...]:
        """Frames, or latent frames, of the first chunks; later ones are like the last of these."""
        scale = self.group if operation == "encode" else 1
        if num_frames == 1 and operation == "encode":
            return (1,)
        alone = self.groups.alone
        left = 2 * groups_per_chunk if num_frames is None else -(-(num_frames - alone) // self.group)
        lengths = [1] * alone
        while left > 0 and len(lengths) < alone + 2:
            lengths.append(min(groups_per_chunk, left) * scale)
            left -= groups_per_chunk
        return tuple(lengths)

    def _trace(
        self, operation: str, batch: int, height: int, width: int, lengths: tuple[int, ...], groups_per_chunk: int
    ) -> _ChunkMemory:
        key = (operation, batch, height, width, lengths, groups_per_chunk)
        if key in self._traced:
            return self._traced[key]
        self._vae.groups_per_chunk = groups_per_chunk
        live = LiveBytes(self._tensors, MAPPED_BYTES if self.device.type == "cpu" else None)
        encodes, cache = operation == "encode", None
        channels = self.config.in_channels if encodes else self.config.latent_channels
        size = (height, width) if encodes else (height // self.ratio, width // self.ratio)
        with self._mode, torch.no_grad():
            for length in lengths:
                x = torch.empty((batch, channels, length, *size), device=self.device, dtype=self.dtype)
                with live:
                    if encodes and length == 1 and not self.groups.alone:
                        self._vae.encode(x)  # an image
                    else:
                        step = self._vae.encode_chunk if encodes else self._vae.decode_chunk
                        cache = step(x, cache)[1]
        self._traced[key] = _ChunkMemory(live, _storage_bytes(tree_leaves(cache)))
        return self._traced[key]


def _weights(vae: ModelMixin) -> list[torch.Tensor]:
    """Parameters, buffers and fused kernels."""
    fused = [tensor for module in vae.modules() if isinstance(module, KernelLayer) for tensor in module.fused_tensors()]
    return [*vae.parameters(), *vae.buffers(), *fused]


def _storage_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    packed, storages = 0, {}
    for tensor in tensors:
        if tensor is not None and tensor.is_mkldnn:  # a packed kernel, which has no storage to ask
            packed += tensor.numel() * tensor.element_size()
        elif tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return packed + sum(storages.values())


def _runtime_bytes(vae: ModelMixin, device: torch.device) -> int:
    """What the process holds on a device besides this model."""
    resident = _storage_bytes(t for t in _weights(vae) if t.device.type == device.type)
    if device.type == "cpu":
        return max(0, psutil.Process().memory_info().rss - resident)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return max(0, torch.cuda.memory_allocated(device) - resident)
    return CUDA_CONTEXT_BYTES


def tile_grid(tile: tuple[int, int], ratio: int) -> TileGrid:
    """The grid that `enable_tiling` makes of a tile's height and width in pixels, with its default strides."""
    height, width = tile
    return TileGrid.from_pixels(height, width, *(max(1, size * 3 // 4 // ratio) * ratio for size in tile), ratio)


def candidate_tiles(height: int, width: int, ratio: int) -> list[tuple[int, int]]:
    """Tile sizes in pixels that cut a frame into equal parts along each axis, from the least work to the most.

    Each axis has the shortest tile for its number of tiles, none below `MIN_TILE` pixels, so that no part of the frame is
    worked on more often than the overlap of a quarter asks for.
    """
    choices = []
    for length in (height // ratio, width // ratio):
        shortest: dict[int, int] = {}
        for tile in range(length, 0, -1):
            stride = max(1, tile * 3 // 4)
            shortest[1 if tile >= length else -(-(length - tile) // stride) + 1] = tile
        choices.append({tile: n for n, tile in shortest.items() if tile == length or tile * ratio >= MIN_TILE})
    work = {
        (h * ratio, w * ratio): rows * columns * h * w for h, rows in choices[0].items() for w, columns in choices[1].items()
    }
    return sorted((tile for tile in work if tile != (height, width)), key=lambda tile: (work[tile], -tile[0] * tile[1]))


def plan(
    vae: ModelMixin,
    height: int,
    width: int,
    num_frames: int | None = None,
    memory: int | str | None = None,
    *,
    operations: Sequence[str] = _OPERATIONS,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_groups: int = MAX_GROUPS,
) -> MemoryPlan:
    """Choose chunk length and tiles for a video, so that encoding and decoding it fit into a budget.

    Chunks change no result, tiles do (they are blended), so that tiles come last: the longest chunks without tiles, then
    the tiles with the least work. `MARGIN` of the budget is left free.

    Args:
        vae: the model; on the meta device too, with `device`.
        height, width: of the video in pixels, multiples of the spatial compression.
        num_frames: of a clip for `encode` and `decode`; None for `encode_stream` and `decode_stream`, whatever their length.
        memory: the budget of the process on the device, in bytes or as `"8GB"`; None is what is available now.
        operations: `"encode"`, `"decode"` or both, of which the larger counts; with both, the clip is there while its
            latents are decoded.
        batch_size: clips at once.
        device, dtype: that the model is to be used with; None for those it has.
        max_groups: the most groups a chunk.

    Raises:
        ValueError: if nothing fits, with what the smallest setting takes; for arguments that the model would refuse.
    """
    estimator = MemoryEstimator(vae, device, dtype)
    if memory is None:
        memory = available_memory(estimator.device)
    budget = parse_memory(memory) if isinstance(memory, str) else memory
    search = _Search(estimator, height, width, num_frames, batch_size, budget, tuple(operations))
    most = max_groups if num_frames is None else min(max_groups, -(-num_frames // estimator.group))
    best = search.tried(1, None)
    if num_frames is not None and most > 1 and most * estimator.group >= num_frames:
        at_once = search.tried(most, None)  # no caches: this may take less than two chunks
        if at_once.fits:
            return at_once
    if best.fits:
        while best.groups_per_chunk < most:
            longer = search.tried(min(2 * best.groups_per_chunk, most), None)
            if not longer.fits:
                break
            best = longer
        return best
    smallest = best
    for tile in candidate_tiles(height, width, estimator.ratio):
        if search.at_least(tile) > best.usable:
            continue
        attempt = search.tried(1, tile)
        if attempt.fits:
            return attempt
        smallest = min(smallest, attempt, key=lambda plan: plan.peak)
    raise ValueError(_too_little(smallest))


@dataclass
class _Search:
    """Plans for one video, and a lower bound for those that are not worth their time."""

    estimator: MemoryEstimator
    height: int
    width: int
    num_frames: int | None
    batch_size: int
    memory: int
    operations: tuple[str, ...]
    known: list[tuple[int, MemoryEstimate]] = field(default_factory=list)

    def tried(self, groups: int, tile: tuple[int, int] | None) -> MemoryPlan:
        """Estimate all operations with a setting."""
        held = self.num_frames is not None and len(set(self.operations)) == 2
        estimates = tuple(
            self.estimator.estimate(
                operation,
                self.height,
                self.width,
                self.num_frames,
                batch_size=self.batch_size,
                groups_per_chunk=groups,
                tile=tile,
                clip_held=held,
            )
            for operation in self.operations
        )
        extent = (self.height, self.width) if tile is None else tile
        self.known += [(extent[0] * extent[1], estimate) for estimate in estimates if groups == 1]
        settings = (self.num_frames is None, groups, tile, self.estimator.tiles(self.height, self.width, tile))
        return MemoryPlan(self.height, self.width, self.num_frames, self.batch_size, *settings, self.memory, estimates)

    def at_least(self, tile: tuple[int, int]) -> int:
        """What a tile takes if activations shrink in proportion to its area; they shrink less."""
        area = tile[0] * tile[1]
        return max(
            int(estimate.total - estimate.cache - estimate.activations * max(0.0, 1 - area / larger))
            for larger, estimate in self.known
        )


def _too_little(smallest: MemoryPlan) -> str:
    worst = max(smallest.estimates, key=lambda estimate: estimate.total)
    needed = smallest.peak / (1 - MARGIN) / 1e9
    message = (
        f"memory is {smallest.memory / 1e9:.2f} GB, too little for {smallest.height}x{smallest.width}: the smallest setting "
        f"takes {needed:.2f} GB ({MARGIN:.0%} of them kept free) to {worst.operation}, of which the process without the "
        f"model {worst.runtime / 1e9:.2f}, the weights {worst.weights / 1e9:.2f}, whole clips {worst.video / 1e9:.2f} GB: "
    )
    if worst.video > worst.activations and not smallest.streamed:
        return message + "stream it (num_frames=None, encode_stream and decode_stream)"
    return message + "pass more memory, a smaller size, or dtype=torch.bfloat16"


def apply_plan(vae: ModelMixin, plan: MemoryPlan) -> None:
    """Set a model's chunk length and tiling as planned."""
    vae.groups_per_chunk = plan.groups_per_chunk
    if plan.tile is None:
        vae.disable_tiling()
    else:
        vae.enable_tiling(tile_sample_min_height=plan.tile[0], tile_sample_min_width=plan.tile[1])
