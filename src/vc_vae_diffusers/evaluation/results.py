"""The result file: one JSON with the protocol, the samples, and for every model its settings, averages and per-video values.

`docs/evaluation.md` lists the fields. Numbers that JSON does not have are the strings `"inf"` and `"nan"`.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, write_json

SCHEMA = "vc_vae_diffusers.evaluation/1"
PACKAGES = (
    *(
        "vc_vae_diffusers",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "safetensors",
        "numpy",
        "scipy",
        "av",
        "pillow",
    ),
    *("lpips", "torchvision", "rapidfuzz", "onnxruntime", "rapidocr", "opencv-python-headless", "dlib-bin"),
)


def package_versions() -> dict[str, str]:
    """Versions of Python, of the system and of the packages a number may depend on; missing packages are left out."""
    from importlib import metadata  # slow, and only needed here

    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def new_result(protocol: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
    """A result without models."""
    return {"schema": SCHEMA, "protocol": dict(protocol), "samples": dict(samples), "models": []}


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """Read a result file; `"inf"` and `"nan"` become floats.

    Raises:
        ValueError: if it is not one, naming what is missing.
    """
    path = Path(path)
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; give a result file, which `vcvae evaluate` writes") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        found = result.get("schema") if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"{path} has the schema {found!r}, but {SCHEMA!r} is read here; evaluate again")
    for key in ("protocol", "samples", "models"):
        if key not in result:
            raise ValueError(f"{path} has no {key!r}; give a file that `vcvae evaluate` wrote")
    return _map_numbers(result, _from_json)


def write_result(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json_ready(result), indent=1)


def json_ready(value: Any) -> Any:
    """A copy in which infinite and undefined numbers are the strings `"inf"` and `"nan"`."""
    return _map_numbers(value, _to_json)


def find_model(result: Mapping[str, Any], label: str) -> dict[str, Any] | None:
    """The entry of a model by its label."""
    return next((model for model in result["models"] if model["label"] == label), None)


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of finite values; `nan` where there are too few."""
    values = list(values)
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _map_numbers(value: Any, convert) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_numbers(item, convert) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_numbers(item, convert) for item in value]
    return convert(value)


def _to_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value
