"""How much memory encoding and decoding take, and which chunk length and tiles fit into a budget. Not in the paper.

One chunk of each operation is recorded without data (`memory_trace.py`), and its peak read at every size of tiles and every
length of chunks. What a chunk does not show is exact arithmetic. All in bytes:

    peak = runtime + weights + video + cache + activations

| term | what it is |
| --- | --- |
| runtime | the process with its libraries and whatever else it holds now without the model, and `FIRST_USE_BYTES` on CPUs |
| weights | parameters and fused kernels; of an offloaded model too, whose weights are there by turns, all of them |
| video | whole clips: the clip, its posterior or its frames. Streams: a few chunks of them |
| cache | the caches of tiles other than the one at work, and of the other stream if both run. A whole clip keeps none |
| activations | the peak of a chunk of `groups_per_chunk` groups at the size of a tile, its caches included |

`HEAP_FACTOR` and `FIRST_USE_BYTES` are the two calibrated numbers: `python benchmarks/vae_memory.py --calibrate` measures
both over a grid of small sizes.

Inference only: training keeps every activation, which `benchmarks/train_step.py` measures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from diffusers.models.modeling_utils import ModelMixin

from ..operators.frame_conv import KernelLayer
from .memory_trace import HEAP_FACTOR, MAPPED_BYTES, MemoryTrace, ModelWithoutData
from .tiling import TileGrid

# What the first encoding or decoding adds to a process for good: code of the libraries, kernels made for this processor.
FIRST_USE_BYTES = 24 * 2**20
# What a CUDA context takes beside torch's allocator, where none exists yet to ask. Assumed: 0.3 to 0.6 GB are usual.
CUDA_CONTEXT_BYTES = 512 * 2**20
# A plan keeps this share of the budget free, which is how far off an estimate may be.
MARGIN = 0.15
# More groups at once than this gain nothing.
MAX_GROUPS = 8
# Smaller tiles than this, in pixels, see too little of the frame around them.
MIN_TILE = 128

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
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
    """Read an amount of memory: `"8GB"` is 8e9 bytes, `"8GiB"` is 8 * 2**30.

    Raises:
        ValueError: for anything else, a number without a unit included.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", text)
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
        self.device = _checked_device(_device_of(vae) if device is None else device)
        self.dtype = vae.dtype if dtype is None else dtype
        self.config, self.groups, self.heap_factor = vae.config, vae.groups, heap_factor
        self.ratio, self.slices = vae.spatial_compression_ratio, vae.use_slicing
        self.runtime = _runtime_bytes(vae, self.device) if runtime is None else runtime
        self._model = ModelWithoutData(vae, self.device, self.dtype)
        given = dict(vae.named_parameters()) if dtype is None else {}
        parameters = self._model.vae.named_parameters()
        self.weights = self._model.fused_bytes + sum(p.numel() * given.get(name, p).itemsize for name, p in parameters)
        self._traces: dict[tuple, MemoryTrace] = {}

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
        both: bool = False,
    ) -> MemoryEstimate:
        """Estimate the peak of one operation.

        Args:
            operation: `"encode"` or `"decode"`.
            height, width: of the frames in pixels, multiples of the spatial compression.
            num_frames: of the clip that goes through in one call; None for a stream of any length.
            batch_size: clips at once.
            groups_per_chunk: as the model's attribute.
            tile: height and width of a tile in pixels, with `enable_tiling`'s default strides; None for no tiling.
            both: whether the other operation is done as well: the clip is kept while its latents are decoded, and of a
                stream the other's caches.

        Raises:
            ValueError: for an unknown operation, or numbers that the model would refuse.
        """
        self._check(operation, height, width, num_frames, batch_size, groups_per_chunk)
        tiles, area = self.tiles(height, width, tile), 1.0
        if tile is not None and tiles > 1:
            area = min(tile[0], height) * min(tile[1], width) / (height * width)
        at_once = 1 if self.slices else batch_size
        image = operation == "encode" and num_frames == 1 and self.config.temporal_padding == "replicate"
        trace = self._trace(operation, at_once, height, width, 1 if image else self.groups.size)

        frame = batch_size * height * width * self.dtype.itemsize
        colours = self.config.in_channels if operation == "encode" else self.config.out_channels
        groups, goes_on = groups_per_chunk, True
        if num_frames is None:
            # What came in, what waits for the rest of its group or is blended from tiles, and what was yielded last.
            video = 3 * groups_per_chunk * self.groups.size * frame * colours
            cache = (tiles - 1) * trace.cache(area)
            if self.slices:  # all clips, before and after
                cache = 2 * batch_size * tiles * trace.cache(area)
            if both:
                other = self._trace(
                    "decode" if operation == "encode" else "encode", at_once, height, width, self.groups.size
                )
                cache += tiles * other.cache(area) * (batch_size // at_once)
        else:
            count = self.groups.latent_frames(num_frames)
            latents = frame // self.ratio**2 * self.config.latent_channels * count
            # A posterior is its moments, and log-variance, deviation and variance made from them.
            result = (5 if operation == "encode" else 1) * latents
            video = num_frames * frame * colours + result
            if operation == "decode" and both:
                video += num_frames * frame * self.config.in_channels
            if self.slices and batch_size > 1:  # one clip's result, before it is put beside the others
                video += (2 * latents if operation == "encode" else num_frames * frame * colours) // batch_size
            cache, groups = 0, min(groups_per_chunk, count)
            goes_on = count > groups_per_chunk
        runtime = self.runtime + (FIRST_USE_BYTES if self.device.type == "cpu" else 0)
        mapped = MAPPED_BYTES if self.device.type == "cpu" else None
        activations = trace.peak(area, groups, goes_on, mapped, self.heap_factor if mapped else 1.0)
        return MemoryEstimate(operation, runtime, self.weights, video, cache, activations)

    def tiles(self, height: int, width: int, tile: tuple[int, int] | None) -> int:
        """How many tiles a frame has, all in pixels."""
        if tile is None:
            return 1
        return tile_grid(tile, self.ratio).count(height // self.ratio, width // self.ratio)

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

    def _trace(self, operation: str, batch: int, height: int, width: int, frames: int) -> MemoryTrace:
        """The recording of one group (or image) of whole frames."""
        encodes = operation == "encode"
        key = (operation, batch, height, width, frames)
        if key not in self._traces:
            self._traces[key] = self._model.trace(encodes, batch, height, width, frames if encodes else 1)
        return self._traces[key]


def _device_of(vae: ModelMixin) -> torch.device:
    """Where a model computes, which an offloaded one knows by its hooks.

    Raises:
        ValueError: for a model on the meta device.
    """
    if vae.device.type != "meta":
        return vae.device
    for module in vae.modules():
        if (device := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
            return torch.device(device)
    raise ValueError("vae is on the meta device: pass device, 'cpu' or 'cuda', where it is to be used")


def _weights(vae: ModelMixin) -> list[torch.Tensor]:
    """Parameters, buffers and fused kernels."""
    fused = [tensor for module in vae.modules() if isinstance(module, KernelLayer) for tensor in module.fused_tensors()]
    return [*vae.parameters(), *vae.buffers(), *fused]


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    without_storage, storages = 0, {}
    for tensor in tensors:
        if tensor.is_mkldnn or type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # packed, quantised
            without_storage += tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return without_storage + sum(storages.values())


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
    return TileGrid.with_defaults(*tile, None, None, ratio)


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
    most = max_groups if num_frames is None else min(max_groups, estimator.groups.latent_frames(num_frames))
    operations = tuple(operations)

    def with_setting(groups: int, tile: tuple[int, int] | None) -> MemoryPlan:
        estimates = tuple(
            estimator.estimate(
                operation,
                height,
                width,
                num_frames,
                batch_size=batch_size,
                groups_per_chunk=groups,
                tile=tile,
                both=len(set(operations)) == 2,
            )
            for operation in operations
        )
        tiles = estimator.tiles(height, width, tile)
        settings = (num_frames is None, groups, tile, tiles, budget, estimates)
        return MemoryPlan(height, width, num_frames, batch_size, *settings)

    def settings() -> Iterator[MemoryPlan]:
        """From the fastest to the one that takes the least."""
        lengths = {most, *(2**k for k in range(most.bit_length()))}
        yield from (with_setting(groups, None) for groups in sorted(lengths, reverse=True))
        yield from (with_setting(1, tile) for tile in candidate_tiles(height, width, estimator.ratio))

    refused = []
    for chosen in settings():
        if chosen.fits:
            return chosen
        refused.append(chosen)
    raise ValueError(_too_little(min(refused, key=lambda plan: plan.peak)))


def _too_little(smallest: MemoryPlan) -> str:
    worst = max(smallest.estimates, key=lambda estimate: estimate.total)
    needed = math.ceil(smallest.peak / (1 - MARGIN) / 1e7 + 0.5) / 100  # of which a plan can be made
    message = (
        f"memory is {smallest.memory / 1e9:.2f} GB, too little for {smallest.height}x{smallest.width}: the smallest setting "
        f"takes {needed:.2f} GB ({MARGIN:.0%} of them kept free) to {worst.operation}, of which the process without the "
        f"model {worst.runtime / 1e9:.2f}, the weights {worst.weights / 1e9:.2f}, frames {worst.video / 1e9:.2f}, caches "
        f"of tiles and streams {worst.cache / 1e9:.2f} GB: "
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
