#!/usr/bin/env python3
"""What encoding, decoding and training should take on a GPU, counted without one: VC-VAE beside diffusers' video VAEs.

The models run on fake CUDA tensors, which have shapes, strides and a device but no data. Every kernel that PyTorch would
start is counted: its floating-point operations, the bytes that it reads and writes, by kind, and the memory alive at the
worst moment. A kernel takes the longest of three times: its arithmetic at a share of the peak rate, its bytes at the
memory's bandwidth, and a launch. All figures are estimates, from assumptions that are the same for all models and are
options. Where there is a GPU, or with `--measure`, the models run for real as well, and what they took stands beside it.

What PyTorch does inside of an operation on CUDA is counted as well: a convolution whose input and kernel are both stored
with the channels first is transposed by cuDNN there and back in half precision, one with a bias adds it in a pass of its
own, and group norm makes its input contiguous.

Gradients of fake CUDA tensors are computed only where PyTorch finds a GPU. Elsewhere training steps are counted on fake
tensors of the CPU, by the ways that a GPU takes. There autocast leaves the peers' group norms in bfloat16; on CUDA they and
what follows are float32, and larger.

`--compiled` reads Inductor's schedule instead: the kernels that are left when it has fused what it fuses, and what it cannot
look into (convolutions, matrix products, the package's own kernels). Group norm is its own reduction then, SiLU and biases
go with their neighbours; live memory is not read.

    python benchmarks/gpu_estimate.py --size 480x832 --frames 16
    python benchmarks/gpu_estimate.py --compiled
    python benchmarks/gpu_estimate.py --operation train train-checkpointed --size 256x256 --json estimate.json
"""

from __future__ import annotations

import argparse
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import (
    DTYPES,
    MODELS,
    add_common_options,
    console,
    environment,
    parse_size,
    plain,
    report,
    run,
    table,
)
from gpu_measure import latents_of, measure
from inductor_schedule import schedule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vc_vae_diffusers.operators.evaluation import FourFrames, InSpace, OfDifferences, Pairwise
from vc_vae_diffusers.operators.evaluation.fusing import KernelLayer
from vc_vae_diffusers.operators.evaluation.gpu_ops import INDUCTOR

aten = torch.ops.aten
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
KINDS = (
    "convolution",
    "combinations",
    "matrix",
    "norm",
    "activation",
    "bias",
    "layout",
    "copies",
    "pointwise",
    "optimizer",
    "other",
)
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
_KIND_OF = {
    "matrix": "mm bmm addmm baddbmm _scaled_dot _softmax _efficient_attention _flash_attention",
    "combinations": "combine",
    "norm": "native_group_norm native_layer_norm var mean rsqrt norm_silu linalg_vector_norm",
    "activation": "silu sigmoid relu gelu leaky_relu",
    "copies": "cat stack slice select index constant_pad pad repeat copy upsample unfold roll scatter gather embedding fill "
    "zero new_zeros zeros",
    "optimizer": "_foreach _fused_adam",
}


@dataclass(frozen=True)
class Machine:
    """The assumptions.

    Args:
        tflops: peak rate in TFLOP/s of half precision; float32 has half of it (TF32).
        share: of the peak that convolutions and matrix products reach.
        bandwidth: of memory, in TB/s.
        launch: the least time of a kernel, in microseconds.
    """

    tflops: float = 790.0
    share: float = 0.5
    bandwidth: float = 3.0
    launch: float = 5.0

    def seconds(self, flops: float, size: float, itemsize: int) -> float:
        """The time of one kernel."""
        rate = self.tflops * 1e12 * self.share / (1 if itemsize <= 2 else 2)
        return max(self.launch * 1e-6, flops / rate, size / (self.bandwidth * 1e12))


@dataclass
class Total:
    """What was counted of one kind."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Tally:
    """What a run would do on the GPU."""

    kinds: dict[str, Total] = field(default_factory=lambda: {kind: Total() for kind in KINDS})
    layouts: Counter = field(default_factory=Counter)
    transfers: Counter = field(default_factory=Counter)
    peak: int = 0

    def add(
        self, machine: Machine, kind: str, size: float, flops: float = 0.0, launches: int = 1, itemsize: int = 2
    ) -> None:
        """Count launches of one kind that share bytes and operations."""
        total = self.kinds[kind]
        total.launches += launches
        total.flops += flops
        total.bytes += size
        total.seconds += launches * machine.seconds(flops / launches, size / launches, itemsize)

    def summary(self, frames: int) -> dict[str, Any]:
        """For tables and JSON; times by frame."""
        kinds = {kind: vars(total) for kind, total in self.kinds.items() if total.launches}
        sums = {key: sum(total[key] for total in kinds.values()) for key in ("launches", "flops", "bytes", "seconds")}
        return {
            **sums,
            "ms_per_frame": 1e3 * sums["seconds"] / frames,
            "peak_live_bytes": self.peak,
            "kinds": kinds,
            "convolution_layouts": dict(self.layouts),
            "transfers_and_waits": dict(self.transfers),
        }


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether PyTorch takes a tensor of frames or clips to have its channels last."""
    layout = LAYOUTS.get(x.ndim)
    return layout is not None and x.is_contiguous(memory_format=layout) and not (x.is_contiguous() and x.shape[1] > 1)


class KernelCount(TorchDispatchMode):
    """Counts the kernels that operations on fake tensors would start.

    Args:
        machine: the assumptions.
        known: tensors that were there before, which the peak leaves out.
        device: of the tensors that count.
    """

    def __init__(self, machine: Machine, known: Iterable[torch.Tensor] = (), device: str = "cuda"):
        super().__init__()
        self.machine, self.tally, self.device = machine, Tally(), device
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._live = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in CONVOLUTIONS:
            result = self._convolution(func, args, result)
        elif not self._is_free(func, args, kwargs, result):
            self._other(func, packet, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                self._hold(tensor.untyped_storage())
        return result

    # What takes time

    def _is_free(self, func, args, kwargs, result) -> bool:
        """Views, allocations, and what stays on the host; transfers are noted here."""
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero") and devices == {"cuda"}:
            self.tally.transfers[name] += 1
            return True
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self.tally.transfers[
                "host to device" if name == "copy_" or result.device.type == self.device else "device to host"
            ] += 1
            return True
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if (
            self.device not in devices
            or not (made or func._schema.is_mutable)
            or name.startswith(("empty", "new_empty", "detach", "lift"))
        ):
            return True
        if func._schema.is_mutable:
            return False
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        return all(x.untyped_storage()._cdata in given for x in made)

    def _add(self, kind: str, size: float, flops: float = 0.0, launches: int = 1, itemsize: int = 2) -> None:
        self.tally.add(self.machine, kind, size, flops, launches, itemsize)

    def _convolution(self, func, args, result):
        backward = func.overloadpacket is aten.convolution_backward
        x, weight = args[1:3] if backward else args[:2]
        bias = args[3] if backward else args[2]
        y = args[0] if backward else result
        itemsize = x.element_size()
        flops = flop_registry[func.overloadpacket](*args, out_val=result)
        last = is_channels_last(x) or is_channels_last(weight)
        frames, pixels = _bytes(x), _bytes(y)
        self.tally.layouts["channels last" if last else "channels first"] += 1
        if not last and itemsize == 2 and x.ndim >= 4:  # tensor cores want the channels last
            self._add("layout", 2 * frames + 2 * pixels, launches=2)
        elif last and not is_channels_last(x):
            self._add("layout", 2 * frames)
        if last and not is_channels_last(weight):
            self._add("layout", 2 * _bytes(weight))
        if backward:
            outputs = [part for part in result if part is not None]
            products = max(1, sum(args[-1][:2]))
            self._add("convolution", products * pixels + frames + sum(map(_bytes, outputs)), flops, products, itemsize)
            if args[-1][2]:
                self._add("bias", pixels)
        else:
            self._add("convolution", frames + _bytes(weight) + pixels, flops, itemsize=itemsize)
            if bias is not None:
                self._add("bias", 2 * pixels)
        if not last or x.ndim not in LAYOUTS:
            return result
        # Without CUDA PyTorch does not know what cuDNN would give.
        layout = LAYOUTS[x.ndim]
        if not backward:
            return result.contiguous(memory_format=layout)
        return tuple(
            part.contiguous(memory_format=layout) if part is not None and part.ndim in LAYOUTS else part for part in result
        )

    def _other(self, func, packet, args, kwargs, result) -> None:
        name = packet.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if not made:  # in place, without a result
            made, given = given[:1], given[1:]
        itemsize = made[0].element_size()
        size, launches = sum(map(_bytes, given)) + sum(map(_bytes, made)), 1
        if func._schema.is_mutable and name.startswith(("copy_", "fill_", "zero_")):
            size -= _bytes(made[0])  # what is overwritten is not read
        if packet in (aten.native_group_norm, aten.native_group_norm_backward):
            frames = max(map(_bytes, given))
            for x in given[: 1 if packet is aten.native_group_norm else 2]:
                if not x.is_contiguous():
                    self._add("layout", 2 * frames)
            size, launches = size + frames, 3  # statistics, what they make of the parameters, the result
        elif name == "norm_silu":
            size, launches = size + _bytes(made[0]), 3
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result) if packet in flop_registry else 0.0
        self._add(self._kind(name, given, made), size, flops, launches, itemsize)

    @staticmethod
    def _kind(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> str:
        if name in ("clone", "_to_copy", "contiguous"):
            same = given[0].shape == made[0].shape and given[0].stride() == made[0].stride()
            return "copies" if same else "layout"
        for kind, prefixes in _KIND_OF.items():
            if name.startswith(tuple(prefixes.split())):
                return kind
        return "pointwise"

    # What lives

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self._live += storage.nbytes()
        self.tally.peak = max(self.tally.peak, self._live)
        weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _bytes(x: torch.Tensor) -> int:
    """Bytes of a tensor's own elements: what is repeated without a copy counts once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def fake_model(name: str, dtype: torch.dtype, train: bool = False, device: str = "cuda") -> torch.nn.Module:
    """A model without data, on a device that need not be there; to be called under a `FakeTensorMode`."""
    with torch.device(device):
        vae = MODELS[name].build()
    vae.eval().requires_grad_(train)
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    if MODELS[name].ours and not train:
        vae.fuse_tdc()
    if MODELS[name].ours and device == "cpu":
        take_ways_of_gpus(vae)
    return vae.train(train)


def take_ways_of_gpus(vae: torch.nn.Module) -> None:
    """Have a VC-VAE on the CPU trained as it would be on a GPU."""
    of_cpus = (InSpace, FourFrames, Pairwise, OfDifferences)
    for layer in vae.modules():
        if isinstance(layer, KernelLayer):
            ways = [way for way in layer.ways if not isinstance(way, of_cpus)]
            layer.ways = tuple(replace(way, always=True) if hasattr(way, "always") else way for way in ways)


def train_step(vae: torch.nn.Module, clip: torch.Tensor, optimizer: torch.optim.Optimizer, autocast: bool) -> None:
    """One step of `train_step.py`."""
    with torch.autocast(clip.device.type, torch.bfloat16, enabled=autocast):
        posterior = vae.encode(clip).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = (reconstruction.float() - clip).abs().mean()
        loss = loss + 1e-8 * 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).float().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def count(name: str, operation: str, options: argparse.Namespace, machine: Machine) -> dict[str, Any] | None:
    """Count one operation of one model; None if the model cannot do it."""
    train = operation.startswith("train")
    dtype = torch.float32 if train else DTYPES[options.dtype]
    frames = MODELS[name].frames(options.frames)
    device = "cpu" if train and not torch.cuda.is_available() else "cuda"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(train):
        vae = fake_model(name, dtype, train, device)
        if MODELS[name].ours:
            vae.groups_per_chunk = options.groups_per_chunk
        clip = torch.empty(1, 3, frames, *options.size, dtype=dtype, device=device)
        known = [*vae.parameters(), *vae.buffers()]
        if MODELS[name].ours:
            known += [x for layer in vae.modules() if hasattr(layer, "fused_tensors") for x in layer.fused_tensors()]
        if train:
            if operation == "train-checkpointed":
                if not vae._supports_gradient_checkpointing:
                    return None
                vae.enable_gradient_checkpointing()
            optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-5, foreach=True)
            train_step(vae, clip, optimizer, options.autocast)  # the optimizer's state is there from the second step on
            known += [x for state in optimizer.state.values() for x in state.values()]
            with KernelCount(machine, [*known, clip], device) as counter:
                train_step(vae, clip, optimizer, options.autocast)
        else:
            x = clip if operation == "encode" else latents_of(vae, clip)
            with KernelCount(machine, [*known, x]) as counter:
                run(vae, operation, x)
    return {"model": name, "operation": operation, "frames": frames, **counter.tally.summary(frames)}


def read_schedule(name: str, operation: str, options: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """What Inductor's schedule of one operation of one model comes to."""
    dtype, frames, tally = DTYPES[options.dtype], MODELS[name].frames(options.frames), Tally()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        vae = fake_model(name, dtype)
        if MODELS[name].ours:
            vae.groups_per_chunk = options.groups_per_chunk
        clip = torch.empty(1, 3, frames, *options.size, dtype=dtype, device="cuda")
        x = clip if operation == "encode" else latents_of(vae, clip)
        kernels = schedule(lambda x: run(vae, operation, x), x, INDUCTOR if MODELS[name].ours else {})
    kinds = {"reduction": "norm", "norm_silu": "norm", "combine": "combinations"}
    for kernel in kernels:
        size, launches = kernel.bytes, 1
        if kernel.kind == "convolution":
            tally.layouts["channels last" if kernel.channels_last else "channels first"] += 1
            if not kernel.channels_last and dtype.itemsize == 2:  # tensor cores want the channels last
                tally.add(machine, "layout", 2 * kernel.moved, launches=2)
        elif kernel.kind == "norm_silu":  # read for the statistics, and once more
            size, launches = size + kernel.bytes // 2, 3
        kind = kinds.get(kernel.kind, kernel.kind if kernel.kind in KINDS else "other")
        tally.add(machine, kind, size, kernel.flops, launches, dtype.itemsize)
    return {"model": name, "operation": operation, "frames": frames, **tally.summary(frames)}


def tables(rows: list[dict[str, Any]], options: argparse.Namespace) -> list:
    """Totals of every run, and what each kind takes."""
    size, how = f"{options.size[0]}x{options.size[1]}", "compiled" if options.compiled else "eager"
    columns = ["model", "", "frames", "TFLOP", "launches", "GB", "ms/frame", "peak live GB", "conv. channels last", "waits"]
    ran = f"measured on {options.device}" if options.measure else "nothing ran on a GPU"
    columns += ["measured ms/frame", "peak GB"] if options.measure else []
    made = [table(f"Estimated, {ran}: {size}, {options.dtype}, {how}", columns)]
    by_kind = table("The same, ms/frame by kind (GB)", ["model", "", *KINDS])
    for row in rows:
        layouts = row["convolution_layouts"]
        last = layouts.get("channels last", 0)
        cells = [
            f"{row['flops'] / 1e12:.1f}",
            str(row["launches"]),
            f"{row['bytes'] / 1e9:.0f}",
            f"{row['ms_per_frame']:.2f}",
        ]
        peak = "" if options.compiled else f"{row['peak_live_bytes'] / 1e9:.1f}"
        cells += [peak, f"{last} of {sum(layouts.values())}"]
        cells.append(str(sum(row["transfers_and_waits"].values())))
        if options.measure:
            cells += [f"{row['measured_ms_per_frame']:.2f}", f"{row['measured_peak_bytes'] / 1e9:.2f}"]
        made[0].add_row(row["model"], row["operation"], str(row["frames"]), *cells)
        kinds = []
        for kind in KINDS:
            total = row["kinds"].get(kind)
            kinds.append(f"{1e3 * total['seconds'] / row['frames']:.2f} ({total['bytes'] / 1e9:.0f})" if total else "")
        by_kind.add_row(row["model"], row["operation"], *kinds)
    rates = f"{options.share:g} of {options.tflops:g} TFLOP/s, {options.bandwidth:g} TB/s, {options.launch:g} us a launch"
    made[0].caption = f"convolutions at {rates}; live memory without weights"
    return [*made, by_kind]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["vcvae-4x8x8", "wan", "hunyuanvideo-untiled", "cogvideox"]
    operations = ["encode", "decode", "train", "train-checkpointed"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=models, metavar="NAME")
    parser.add_argument("--operation", nargs="+", choices=operations, default=operations[:2], metavar="NAME")
    parser.add_argument("--compiled", action="store_true", help="encode and decode as Inductor would run them")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of encoding and decoding")
    parser.add_argument("--no-autocast", dest="autocast", action="store_false", help="train in float32 alone, not bfloat16")
    parser.add_argument("--size", type=parse_size, default=(480, 832), help="HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--groups-per-chunk", type=int, default=1, help="VC-VAE's groups_per_chunk")
    parser.add_argument("--tflops", type=float, default=Machine.tflops, help="peak of half precision, in TFLOP/s")
    parser.add_argument("--share", type=float, default=Machine.share, help="of the peak that convolutions reach")
    parser.add_argument("--bandwidth", type=float, default=Machine.bandwidth, help="of memory, in TB/s")
    parser.add_argument("--launch", type=float, default=Machine.launch, help="the least time of a kernel, in microseconds")
    there = torch.cuda.is_available()
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=there, help="run on --device as well")
    parser.add_argument("--runs", type=int, default=5, help="of a measurement, after two")
    add_common_options(parser)
    parser.set_defaults(device="cuda" if there else "cpu")
    options = parser.parse_args(arguments)
    if options.compiled and (trained := [name for name in options.operation if name.startswith("train")]):
        parser.error(f"--operation {' '.join(trained)}: --compiled reads encode and decode only, leave one of them out")
    torch.set_num_threads(options.threads)
    machine = Machine(options.tflops, options.share, options.bandwidth, options.launch)
    rows = []
    for name in options.models:
        for operation in options.operation:
            console(f"{name}: {operation}")
            row = (read_schedule if options.compiled else count)(name, operation, options, machine)
            if row is None:
                console(f"{name} supports no gradient checkpointing: left out")
            else:
                rows.append({**row, **(measure(name, operation, options) if options.measure else {})})
    results = {"environment": environment(options.device, options.threads), "options": plain(options), "rows": rows}
    report(results, options.json, tables(rows, options))


if __name__ == "__main__":
    main()
