"""The model as programs that need neither this package nor, as ONNX, PyTorch: a group in, latents and the next cache out.

A stream starts without a past, so its first group is a program of its own; all later ones share one. The cache is what it is
in Python, flat: a list of tensors that a program returns and the next call takes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from vc_vae_diffusers import AutoencoderKLVCVAE, __version__

from ..extras import install_hint
from ..files import whole_file, write_json
from ..operators.conversion import remove_tdc
from ..operators.evaluation.fusing import KernelLayer

Format = Literal["onnx", "torch"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2"}
PROGRAMS = ("encode_start", "encode_next", "decode_start", "decode_next")
DESCRIPTION = "vcvae_export.json"
# What latents are, for who uses them elsewhere.
_OF_LATENTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_SHAPE = ("temporal_compression_ratio", "spatial_compression_ratio", "latent_channels", "first_frame", "frame_convention")
_TRACED, _TRIED = (6, 10), (9, 5)  # height and width in cells: one to follow the model with, another to try the program with
_MOST_CELLS = 1024
# Between eager and exported, of the largest value: other kernels round differently, wrong programs are off by far more.
_TOLERANCE = 1e-4


class _Step(nn.Module):
    """One call of the model on a group, its cache a flat list."""

    def __init__(self, vae: AutoencoderKLVCVAE, encodes: bool, structure: pytree.TreeSpec | None):
        super().__init__()
        self.vae, self.encodes, self.structure = vae, encodes, structure

    def forward(self, x: torch.Tensor, cache: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        nested = None if self.structure is None else pytree.tree_unflatten(list(cache), self.structure)
        out, following = (self.vae.encode_chunk if self.encodes else self.vae.decode_chunk)(x, nested)
        return (out, *pytree.tree_leaves(following))


@dataclass(frozen=True)
class Program:
    """A step followed through an example, and how the tensors that go in and come out are called."""

    name: str
    step: _Step
    exported: ExportedProgram
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


def export_model(
    vae: AutoencoderKLVCVAE, folder: Path, kind: Format = "onnx", *, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Write four programs, `encode_start`, `encode_next`, `decode_start` and `decode_next`, and their description.

    Batch 1, float32, one group of frames a call, any height and width (dynamic dimensions) from 2 to 1,024 cells of the
    latents. Kernels are plain ones, folded from TDC (Eq. 5), so programs hold convolutions only. Every program is tried
    against the model at another size than it was made with. The model itself stays as it is.

    Args:
        vae: the model; weights in half precision are exported as float32.
        folder: to write to; it is made. Files of the same names are replaced; the description is written last.
        kind: "onnx" for ONNX files, "torch" for archives of `torch.export`.
        progress: told what is done next.

    Returns:
        The description, as in `vcvae_export.json`: configuration, statistics of latents, and of every program its file, the
        names and shapes of what goes in and comes out, and its difference from the model as a part of the largest value.

    Raises:
        ImportError: if ONNX is wanted and onnx, onnxscript or onnxruntime is missing.
        ValueError: for an unknown kind, and if a program does not compute what the model does.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"--format: {kind!r} is none of {', '.join(SUFFIXES)}.")
    if kind == "onnx":
        _check_onnx()
    folder.mkdir(parents=True, exist_ok=True)
    # A description without its programs, or programs of another kind beside it, would be taken for whole.
    for old in (DESCRIPTION, *(f"{name}{suffix}" for name in PROGRAMS for suffix in SUFFIXES.values())):
        (folder / old).unlink(missing_ok=True)
    plain = _plain(vae)
    programs = {}
    with torch.no_grad():
        for name in PROGRAMS:
            progress(name)
            program = _exported(plain, name)
            path = folder / f"{name}{SUFFIXES[kind]}"
            run = (_write_onnx if kind == "onnx" else _write_torch)(program, path)
            programs[name] = {"file": path.name, **_described(program), "difference": _difference(program, run)}
    description = {
        "format": f"vcvae-{kind}",
        "version": 1,
        "package": f"vc_vae_diffusers {__version__}",
        "config": {name: vae.config[name] for name in (*_SHAPE, *_OF_LATENTS)},
        "start": {
            "frames": vae.groups.total(1),
            "first_frame_repeated": vae.groups.front_padded,
            "frames_back": vae.groups.frames(1),
        },
        "programs": programs,
    }
    write_json(folder / DESCRIPTION, description)
    return description


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs {error.name}: {install_hint('export')}") from error


def _plain(vae: AutoencoderKLVCVAE) -> AutoencoderKLVCVAE:
    """A copy on the CPU in float32 with plain kernels, evaluated as defined: what is fast differs by runtime."""
    plain = copy.deepcopy(vae)
    plain.eval().requires_grad_(False).cpu().float()
    plain.use_tiling = plain.use_slicing = False
    remove_tdc(plain)
    for layer in plain.modules():
        if isinstance(layer, KernelLayer):
            layer.ways = layer.ways[-1:]
    return plain


def _example(vae: AutoencoderKLVCVAE, encodes: bool, cells: tuple[int, int], start: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if not encodes:
        return torch.randn(1, vae.config.latent_channels, 1, *cells, generator=generator)
    frames = vae.groups.total(1) if start else vae.groups.size
    height, width = (side * vae.spatial_compression_ratio for side in cells)
    return torch.rand(1, vae.config.in_channels, frames, height, width, generator=generator) * 2 - 1


def _arguments(
    vae: AutoencoderKLVCVAE, encodes: bool, starts: bool, cells: tuple[int, int]
) -> tuple[torch.Tensor, list[torch.Tensor], pytree.TreeSpec | None]:
    """What a call takes: the group, the cache and how this is nested."""
    if starts:
        return _example(vae, encodes, cells), [], None
    _, cache = (vae.encode_chunk if encodes else vae.decode_chunk)(_example(vae, encodes, cells))
    leaves, structure = pytree.tree_flatten(cache)
    return _example(vae, encodes, cells, start=False), leaves, structure


def _exported(vae: AutoencoderKLVCVAE, name: str) -> Program:
    encodes, starts = name.startswith("encode"), name.endswith("start")
    x, cache, structure = _arguments(vae, encodes, starts, _TRACED)
    step = _Step(vae, encodes, structure)
    rows, columns = Dim("rows", min=2, max=_MOST_CELLS), Dim("columns", min=2, max=_MOST_CELLS)

    def dynamic(tensor: torch.Tensor) -> dict[int, Any]:
        pixels = tensor.shape[3] // _TRACED[0]
        return {3: pixels * rows if pixels > 1 else rows, 4: pixels * columns if pixels > 1 else columns}

    exported = export(step, (x, cache), dynamic_shapes=(dynamic(x), [dynamic(tensor) for tensor in cache]), strict=False)
    result, *following = step(x, cache)
    first, made = ("frames", "moments") if encodes else ("latents", "frames")
    inputs = {first: x, **{f"cache_{k}": tensor for k, tensor in enumerate(cache)}}
    outputs = {made: result, **{f"next_cache_{k}": tensor for k, tensor in enumerate(following)}}
    return Program(name, step, exported, inputs, outputs)


Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def _write_torch(program: Program, path: Path) -> Run:
    with whole_file(path) as partial:
        torch.export.save(program.exported, partial)
    loaded = torch.export.load(path).module()
    return lambda tensors: list(loaded(tensors[0], tensors[1:]))


def _write_onnx(program: Program, path: Path) -> Run:
    with warnings.catch_warnings():  # of the exporter about itself
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program.exported,
            input_names=list(program.inputs),
            output_names=list(program.outputs),
            dynamo=True,
            verbose=False,
        )
    with whole_file(path) as partial:
        cast(Any, made).save(partial, external_data=False)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(program.inputs, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(program.outputs), feed)]

    return run


def _difference(program: Program, run: Run) -> float:
    """The largest one from the model, as a part of the largest value, at a size that the program was not made with."""
    step = program.step
    x, cache, _ = _arguments(step.vae, step.encodes, step.structure is None, _TRIED)
    worst = 0.0
    for ours, theirs in zip(step(x, cache), run([x, *cache]), strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"{program.name}: the program gives {tuple(theirs.shape)}, the model {tuple(ours.shape)}.")
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-6)))
    if not worst < _TOLERANCE:
        raise ValueError(f"{program.name}: the program is {worst:.1e} off the model; this is a fault of the exporter.")
    return worst


def _described(program: Program) -> dict[str, Any]:
    """Names and shapes; "8h" stands for 8 times a free integer h."""
    return {
        "inputs": [{"name": name, "shape": _shape(tensor)} for name, tensor in program.inputs.items()],
        "outputs": [{"name": name, "shape": _shape(tensor)} for name, tensor in program.outputs.items()],
    }


def _shape(tensor: torch.Tensor) -> list[int | str]:
    pixels = tensor.shape[3] // _TRACED[0]
    factor = "" if pixels == 1 else str(pixels)
    return [*tensor.shape[:3], f"{factor}h", f"{factor}w"]
