"""What the processor at hand can do."""

from __future__ import annotations

import os

import torch

# Instruction sets that the oneDNN library may be limited to by ONEDNN_MAX_CPU_ISA and that still multiply bfloat16.
_ONEDNN_WITH_BFLOAT16 = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 by instructions of its own. Elsewhere it is emulated, and slower than float32."""
    kind = torch.device(device).type
    if kind == "cpu":
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
        # cpuinfo's names: two of x86, one of ARM.
        able = any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return able and any(name in limit for name in _ONEDNN_WITH_BFLOAT16)
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    return False


def usable_processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
