"""Plain temporal convolutions to TDC and back, with equal outputs: layers of this package, and those of any model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .tdc import (
    CausalConv3d,
    CausalTDC,
    GroupCausalConv3d,
    GroupCausalTDC,
    TemporalConv3d,
    TemporalInteractionConv3d,
    TemporalInteractionTDC,
)

_TDC_OF = {
    GroupCausalConv3d: GroupCausalTDC,
    CausalConv3d: CausalTDC,
    TemporalInteractionConv3d: TemporalInteractionTDC,
}
_CONV_OF = {tdc: conv for conv, tdc in _TDC_OF.items()}


def fold_tdc(weight: torch.Tensor, anchor: int) -> torch.Tensor:
    """Return the plain kernel that equals the difference form (Eq. 5, 6, 7).

    `W_a*X_a + sum_k W_k*(X_k - X_a)` is `sum_k W_k*X_k + (W_a - sum_k W_k)*X_a`, sums over `k != a`. Differentiable.

    Args:
        weight: `(out, in, slices, ...)`, the slices of the difference form.
        anchor: index of the anchor's slice.
    """
    slices = list(weight.unbind(2))
    anchor %= len(slices)
    slices[anchor] = slices[anchor] - sum(w for k, w in enumerate(slices) if k != anchor)
    return torch.stack(slices, dim=2)


def unfold_tdc(kernel: torch.Tensor, anchor: int) -> torch.Tensor:
    """Return the slices of the difference form that equals a plain kernel: the inverse of `fold_tdc`."""
    slices = list(kernel.unbind(2))
    slices[anchor] = kernel.sum(2)
    return torch.stack(slices, dim=2)


# Layers of this package -------------------------------------------------------------------------------------------------


def to_tdc(conv: TemporalConv3d) -> TemporalConv3d:
    """Return the TDC layer that computes what a trained plain layer computes. The layer given is left alone.

    Raises:
        ValueError: if `conv` is not one of the plain operators, or not in float32 or float64: the anchor's slice is a sum of
            taps, and what half precision rounds off it is a large part of a weak tap.
    """
    if type(conv) not in _TDC_OF:
        names = ", ".join(c.__name__ for c in _TDC_OF)
        raise ValueError(f"conv is a {type(conv).__name__}, it must be one of {names}; `apply_tdc` takes any model")
    _check_precision(conv.weight, "conv")
    return _twin(conv, _TDC_OF[type(conv)], unfold_tdc(conv.weight.detach(), conv.anchor))


def to_conv(tdc: TemporalConv3d) -> TemporalConv3d:
    """Return the plain layer that computes what a TDC layer computes: the inverse of `to_tdc`.

    Raises:
        ValueError: if `tdc` is not one of the TDC operators.
    """
    if type(tdc) not in _CONV_OF:
        names = ", ".join(c.__name__ for c in _CONV_OF)
        raise ValueError(f"tdc is a {type(tdc).__name__}, it must be one of {names}; `remove_tdc` takes any model")
    return _twin(tdc, _CONV_OF[type(tdc)], tdc.plain_kernel().detach())


def _twin(layer: TemporalConv3d, twin_class: type[TemporalConv3d], weight: torch.Tensor) -> TemporalConv3d:
    """Build a layer of another class with the same settings, the given weight and a copy of the bias."""
    settings = {"group_size": layer.group_size} if isinstance(layer, GroupCausalConv3d) else {}
    twin = twin_class(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        bias=layer.bias is not None,
        temporal_padding=layer.temporal_padding,
        device=weight.device,
        dtype=weight.dtype,
        **settings,
    )
    twin.ways = layer.ways
    with torch.no_grad():
        twin.weight.copy_(weight)
        if layer.bias is not None and twin.bias is not None:
            twin.bias.copy_(layer.bias).requires_grad_(layer.bias.requires_grad)
    twin.weight.requires_grad_(layer.weight.requires_grad)
    return twin.train(layer.training)


def _check_precision(weight: torch.Tensor, name: str) -> None:
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} is in {weight.dtype}, it must be in float32 or float64, for what slices round off is much of a weak "
            "tap: call .float() first, and train under autocast"
        )


# Layers of other models -------------------------------------------------------------------------------------------------


class TDCParametrization(nn.Module):
    """Makes a foreign `nn.Conv3d` learn TDC slices: its `weight` becomes `fold_tdc(slices)` (torch parametrization).

    Saved and loaded is the plain kernel, under its own name, so that weights go to and come from the model as it was.
    """

    def __init__(self, anchor: int):
        super().__init__()
        self.anchor = anchor

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return fold_tdc(slices, self.anchor)

    def right_inverse(self, kernel: torch.Tensor) -> torch.Tensor:
        return unfold_tdc(kernel.to(torch.promote_types(kernel.dtype, torch.float32)), self.anchor)


class TDCSlices(parametrize.ParametrizationList):
    """Keeps the slices in float32 where the model goes to half precision: what is rounded is the kernel, as without TDC.

    The anchor's slice is a sum of taps: rounded itself, it would be off by much of a weak tap.
    """

    dtype: torch.dtype  # of the kernel

    def forward(self) -> torch.Tensor:
        return super().forward().to(self.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "TDCSlices":
        """What `.to()`, `.half()` and their like call: `fn` of one tensor."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.original.device)).dtype

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device, torch.float32)

        return super()._apply(kept, recurse)


_SLICES = "parametrizations.weight.original"


def _save_kernel(layer: Any, state: dict, prefix: str, local_metadata: dict) -> None:
    """State dicts hold the plain kernel in the place of the slices."""
    if prefix + _SLICES in state:
        slices = state.pop(prefix + _SLICES)
        state[prefix + "weight"] = layer.parametrizations.weight[0](slices).to(layer.parametrizations.weight.dtype)


def _load_kernel(layer: Any, state: dict, prefix: str, local_metadata: dict, *args) -> None:
    """The inverse of `_save_kernel`."""
    if prefix + "weight" in state:
        kernel = state.pop(prefix + "weight")
        if local_metadata.get("assign_to_params_buffers"):  # the layer takes what is loaded as it is, its dtype too
            layer.parametrizations.weight.dtype = kernel.dtype
        state[prefix + _SLICES] = layer.parametrizations.weight[0].right_inverse(kernel)


def _is_parametrized(layer: Any) -> bool:
    """Whether a layer learns TDC slices."""
    return parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], TDCParametrization)


def _parametrize(layer: Any, anchor: int) -> nn.Conv3d:
    parametrize.register_parametrization(layer, "weight", TDCParametrization(anchor))
    slices = layer.parametrizations.weight
    slices.dtype, slices.__class__ = slices.original.dtype, TDCSlices
    slices.original.grad = None  # it was the kernel's
    layer.tdc_hooks = (
        layer.register_state_dict_post_hook(_save_kernel),
        layer.register_load_state_dict_pre_hook(_load_kernel),
    )
    return layer


def _unparametrize(layer: Any) -> nn.Conv3d:
    for handle in layer.tdc_hooks:
        handle.remove()
    del layer.tdc_hooks
    slices = layer.parametrizations.weight.original
    slices.data, slices.grad = layer.weight.detach(), None
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return layer


# Whole models -----------------------------------------------------------------------------------------------------------


def apply_tdc(module: nn.Module, causality: str = "causal") -> list[str]:
    """Turn the temporal convolutions of any model into TDC, in place and with equal outputs.

    Plain operators of this package are replaced by their TDC twins. Any other `nn.Conv3d` with two or more temporal taps
    keeps its class and gets a `TDCParametrization`: the trained parameter is then `parametrizations.weight.original`, the
    slices. Optimizers must be created afterwards. What is saved stays a plain kernel under its own name, and loads into the
    model as it was; after loading, call this again to go on. A model that goes to half precision afterwards keeps these
    slices in float32, and rounds its kernels as it would without TDC. accelerate's offloading asks for parameters by their
    saved names: call `remove_tdc` before it.

    A model whose configuration has a `temporal_operator` (`AutoencoderKLVCVAE`) has it changed with its weights: give the
    whole model then, and not a part.

    Args:
        module: a model, for example diffusers' `AutoencoderKLWan`.
        causality: where the anchor of a foreign kernel is: its last tap (`"causal"`) or its middle one (`"group"`).

    Returns:
        The names of the converted layers.

    Raises:
        ValueError: for an unknown `causality`, for half precision, for weights that something else parametrizes, offloads,
            shards or casts, or if there is nothing to convert. The model is then as it was.
    """
    if causality not in ("causal", "group"):
        raise ValueError(f"causality is {causality!r}: pass 'causal' or 'group'")

    converted = _convert(module, functools.partial(_change_to_tdc, causality))
    if not converted:
        what = f"module is a {type(module).__name__}"
        if any(type(layer) in _CONV_OF or _is_parametrized(layer) for layer in module.modules()):
            raise ValueError(f"{what} whose temporal convolutions are TDC already: nothing to convert, see `remove_tdc`")
        raise ValueError(f"{what} without a plain temporal convolution: nothing to convert")
    _configure(module, "tdc")
    return converted


def _change_to_tdc(causality: str, name: str, layer: Any) -> "_Change | None":
    """How `apply_tdc` converts a layer; None if it stays."""
    if type(layer) in _TDC_OF:
        _check_precision(layer.weight, name)
        return _Change(lambda: to_tdc(layer))
    if not isinstance(layer, nn.Conv3d) or isinstance(layer, TemporalConv3d) or layer.kernel_size[0] == 1:
        return None
    if _is_parametrized(layer):
        return None
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"the weight of {name} has a parametrization already: remove it before")
    _check_precision(layer.weight, name)
    anchor = layer.kernel_size[0] // 2 if causality == "group" else layer.kernel_size[0] - 1
    kernel = layer.weight.detach()

    def undo() -> None:
        _unparametrize(layer).weight.data = kernel

    return _Change(lambda: _parametrize(layer, anchor), undo)


def remove_tdc(module: nn.Module) -> list[str]:
    """Undo `apply_tdc` in place, keeping what was learned: every layer holds its plain kernel again.

    Returns:
        The names of the converted layers.

    Raises:
        ValueError: if `module` is itself an operator, or weights are offloaded, sharded or cast. The model is as it was.
    """

    def plan(name: str, layer: Any) -> _Change | None:
        if type(layer) in _CONV_OF:
            return _Change(lambda: to_conv(layer))
        return _Change(lambda: _unparametrize(layer)) if _is_parametrized(layer) else None

    converted = _convert(module, plan)
    if converted:
        _configure(module, "conv")
    return converted


@dataclass
class _Change:
    """How a layer is converted: `make` returns what takes its place, another layer or itself, which `undo` restores then."""

    make: Callable[[], nn.Module]
    undo: Callable[[], None] = lambda: None


def _convert(module: nn.Module, plan: Callable[[str, nn.Module], _Change | None]) -> list[str]:
    """Change layers, each once, whatever names it has; or none, if one of them cannot be.

    Args:
        module: the model.
        plan: of a name and a layer to its change, or None if it stays. Raises for what cannot be changed, before any is.

    Returns:
        The names of the changed layers.
    """
    named = list(module.named_modules(remove_duplicate=False))
    names = {layer: name for name, layer in reversed(named)}
    changes = {layer: change for layer, name in names.items() if (change := plan(name, layer)) is not None}
    if module in changes and isinstance(module, TemporalConv3d):
        raise ValueError("module is itself a temporal operator: use `to_tdc` or `to_conv`, which return a new layer")
    _check_wrappers(module, {layer: names[layer] for layer in changes})
    made: dict[nn.Module, nn.Module] = {}
    try:
        for layer, change in changes.items():
            made[layer] = change.make()
    except Exception:
        for layer in made:
            changes[layer].undo()
        raise
    converted = [(name, made[layer]) for name, layer in named if layer in made]
    for name, layer in converted:
        if name:
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
    return [name for name, _ in converted]


def _check_wrappers(module: nn.Module, layers: dict[nn.Module, str]) -> None:
    """Refuse a model whose weights something else moves, shards or casts, for it knows the layers as they are now.

    Args:
        module: the model.
        layers: those to be changed, and their names.
    """
    for name, part in module.named_modules():
        if hooks := getattr(getattr(part, "_diffusers_hook", None), "hooks", None):
            raise ValueError(
                f"{name or 'module'} has hooks of diffusers ({', '.join(hooks)}), which know its layers as they are: "
                "convert first, then call enable_group_offload or enable_layerwise_casting"
            )
        if hasattr(part, "reshard"):  # of FSDP, whether its weights are gathered now or not
            raise ValueError(f"the weights of {name or 'module'} are sharded: convert first, then shard")
    for layer, name in layers.items():
        if any(p.is_meta for p in layer.parameters()) and hasattr(layer, "_hf_hook"):
            raise ValueError(f"the weight of {name} is offloaded: convert first, then offload")
        if isinstance(layer, TemporalConv3d) and (layer._forward_hooks or layer._forward_pre_hooks):
            raise ValueError(f"{name} has hooks, which the layer in its place would lack: convert first, then register them")


def _configure(module: nn.Module, operator: str) -> None:
    """Let the configurations in a model say what its weights are now."""
    part: Any
    for part in module.modules():
        if "temporal_operator" in getattr(part, "config", {}):
            part.register_to_config(temporal_operator=operator)
