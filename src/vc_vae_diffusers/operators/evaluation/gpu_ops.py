"""What GPUs do in one pass where PyTorch takes several: operators for inference, registered with PyTorch, made by Triton.

On CUDA, PyTorch adds the bias of a convolution in a pass of its own, at a third of the memory's bandwidth, and group norm
copies frames whose channels are last; on an H200 both take about as long as the convolutions. `combine` makes linear
combinations of frames, bias included; `norm_silu` is group norm and SiLU. `serve` says where they can be used. They have no
gradients, and the compiler makes the same of plain PyTorch, so that under both they are not.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch._subclasses.fake_tensor import is_fake

logger = logging.getLogger(__name__)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# For the compiler on GPUs: what a norm makes of frames is computed in the pass that uses it, all six combinations of a tile
# at once, and not written in float32 before. Read from Inductor's schedule (`benchmarks/gpu_estimate.py --compiled`).
INDUCTOR = {"realize_reads_threshold": 16, "realize_opcount_threshold": 100}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serve(x: torch.Tensor, always: bool = False) -> bool:
    """Whether these operators can be used for a tensor: for inference, on GPUs that Triton knows or `always`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if x.device.type != "cuda":
        return always
    if not _HAS_TRITON or x.dtype not in _DTYPES:
        return False
    return is_fake(x) or _works(x.device.index or 0)


def compiled(x: torch.Tensor) -> bool:
    """Whether the compiler is at work for a GPU, which makes one pass of sums by itself."""
    return torch.compiler.is_compiling() and x.device.type == "cuda"


@cache
def _works(index: int) -> bool:
    """Whether a GPU has bfloat16, and its Triton makes kernels that give what plain PyTorch gives: tried once."""
    if torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        with torch.inference_mode(False), torch.no_grad():
            reason = None if _agree(f"cuda:{index}") else "its results are wrong"
    except Exception as error:  # whatever keeps Triton from working: no compiler, no driver it knows, a version
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        logger.warning(f"Triton does not work on cuda:{index} ({reason}): PyTorch's own kernels are used, which are slower")
    return reason is None


def _agree(device: str) -> bool:
    """Whether both kernels give what plain PyTorch gives."""
    x = torch.linspace(-1, 1, 2 * 8 * 3 * 5, device=device).view(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    weight, matrix = torch.linspace(0.5, 1, 8, device=device), [1.0, 0.5, 0.0, -2.0]
    parts = [x.movedim(1, -1), x.flip(0).movedim(1, -1)]
    ours, plain = (x.new_empty(2, *parts[0].shape) for _ in range(2))
    _combine(ours, parts, matrix, weight)
    _combine_plainly(plain, parts, matrix, weight)
    norm, plain_norm = (norm(x, weight, weight, 4, 1e-6, True) for norm in (_norm_silu, _norm_silu_plainly))
    return torch.allclose(ours, plain, atol=1e-3) and torch.allclose(norm, plain_norm, atol=1e-3)


def combine(
    y: torch.Tensor, parts: Sequence[torch.Tensor], matrix: Sequence[Sequence[float]], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Write linear combinations of `parts` into y, summed in float32, plus a bias.

    Args:
        y: `(rows, n, H, W, C)`, each `(H, W, C)` dense.
        parts: as many as the matrix has columns, `(n, H, W, C)`, each `(H, W, C)` dense.
        matrix: the factors of every row.
        bias: `(C,)` or None.

    Returns:
        y.
    """
    torch.ops.vc_vae_diffusers.combine(y, list(parts), [factor for row in matrix for factor in row], bias)
    return y


def norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """Group norm of frames `(N, C, H, W)` in `channels_last`, then SiLU if asked for; statistics in float32."""
    return torch.ops.vc_vae_diffusers.norm_silu(x, weight, bias, groups, eps, silu)


def norm_serves(x: torch.Tensor, groups: int) -> bool:
    """Whether `norm_silu` takes frames: Triton's blocks are powers of two."""
    channels = x.shape[1]
    powers = channels & (channels - 1) == 0 and groups & (groups - 1) == 0 and channels <= 4096
    return serve(x) and powers and x.is_contiguous(memory_format=torch.channels_last)


_LIBRARY = torch.library.Library("vc_vae_diffusers", "DEF")
_LIBRARY.define("combine(Tensor(a!) y, Tensor[] parts, float[] matrix, Tensor? bias) -> ()")
_LIBRARY.define("norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor")


def _combine(y: torch.Tensor, parts: list[torch.Tensor], matrix: list[float], bias: torch.Tensor | None) -> None:
    from . import triton_kernels

    triton_kernels.combine(y, parts, matrix, bias)


def _norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    from . import triton_kernels

    return triton_kernels.norm_silu(x, weight, bias, groups, eps, silu)


def _combine_plainly(y: torch.Tensor, parts: list[torch.Tensor], matrix: list[float], bias: torch.Tensor | None) -> None:
    kind = torch.promote_types(y.dtype, torch.float32)
    start = 0.0 if bias is None else bias.to(kind)
    for row, into in enumerate(y):
        factors = matrix[row * len(parts) : (row + 1) * len(parts)]
        into.copy_(sum((factor * part.to(kind) for factor, part in zip(factors, parts, strict=True) if factor), start))


def _norm_silu_plainly(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    y = torch.nn.functional.group_norm(x.to(kind), groups, weight.to(kind), bias.to(kind), eps)
    return (torch.nn.functional.silu(y) if silu else y).to(x.dtype, memory_format=torch.channels_last)


_LIBRARY.impl("combine", _combine, "CUDA")
_LIBRARY.impl("combine", _combine_plainly, "CPU")
_LIBRARY.impl("norm_silu", _norm_silu_plainly, "CPU")
_LIBRARY.impl("norm_silu", _norm_silu, "CUDA")


@torch.library.register_fake("vc_vae_diffusers::combine", lib=_LIBRARY)
def _(y, parts, matrix, bias):
    return None


@torch.library.register_fake("vc_vae_diffusers::norm_silu", lib=_LIBRARY)
def _(x, weight, bias, groups, eps, silu):
    return torch.empty_like(x)
