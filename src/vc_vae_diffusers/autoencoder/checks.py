"""What `AutoencoderKLVCVAE` refuses, in one sentence each: configurations, videos and weights. Not in the paper."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.activations import ACT2CLS
from torch import nn

from ..names import some

# What makes a tensor of whatever people have.
PROCESSOR = "vc_vae_diffusers.VCVAEVideoProcessor.for_vae(vae).preprocess_video"
# What arguments that hold pixels, and not latents, are called.
_PIXELS = ("x", "frames", "sample")

_CHOICES = {
    "temporal_operator": ("tdc", "conv"),
    "temporal_causality": ("group", "causal"),
    "temporal_padding": ("replicate", "zeros"),
    "first_frame": ("in_sequence", "separate"),
    "frame_convention": ("4k", "4k+1"),
    "act_fn": tuple(ACT2CLS),
}


# Beyond any network, and small enough that a damaged or hostile config.json takes neither the memory nor the day.
_MOST_CHANNELS, _MOST_LAYERS, _MOST_STAGES = 2**14, 64, 12


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_CHANNELS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _all(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(rule, value))


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "norm_num_groups"),
        (_is_count, f"an integer of at least 1 and at most {_MOST_CHANNELS}"),
    ),
    "layers_per_block": (
        lambda value: _is_count(value) and value <= _MOST_LAYERS,
        f"an integer of at least 1 and at most {_MOST_LAYERS}",
    ),
    **dict.fromkeys(
        ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "invert_scale_latents"),
        (_is_flag, "true or false"),
    ),
    "block_out_channels": (
        lambda value: _all(_is_count)(value) and 0 < len(value) <= _MOST_STAGES,
        f"a list of integers of at least 1 and at most {_MOST_CHANNELS}, one for each of at most {_MOST_STAGES} stages",
    ),
    "temporal_downsample": (_all(_is_flag), "a list of true and false"),
    "scaling_factor": (_is_positive, "a positive number"),
    "shift_factor": (_or_none(_is_number), "a number, or null for none"),
    "latents_mean": (_or_none(_all(_is_number)), "a list of numbers, or null for the shift"),
    "latents_std": (_or_none(_all(_is_positive)), "a list of positive numbers, or null for one over the scale"),
}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that makes no network, field by field.

    Raises:
        ValueError: naming the field, its value and what it must be.
    """
    for name, (rule, wanted) in _FIELDS.items():
        if not rule(config[name]):
            raise ValueError(
                f"{name} is {config[name]!r}, it must be {wanted}: correct it (in a saved model, in config.json)"
            )
    for name, allowed in _CHOICES.items():
        if config[name] not in allowed:
            near = difflib.get_close_matches(str(config[name]), allowed, 1)
            choose = f"choose {near[0]!r}" if near else "choose one"
            raise ValueError(f"{name} is {config[name]!r}, it must be one of {allowed}: {choose}")
    channels = tuple(config["block_out_channels"])
    if len(config["temporal_downsample"]) != len(channels) - 1:
        raise ValueError(
            f"temporal_downsample is {tuple(config['temporal_downsample'])}, it must have one flag for each of the "
            f"{len(channels) - 1} spatial downsamplings of block_out_channels {channels}"
        )
    for width in channels:
        if width % config["norm_num_groups"] != 0:
            raise ValueError(
                f"block_out_channels has {width}, not a multiple of norm_num_groups {config['norm_num_groups']}: "
                "change one of them"
            )
    for name in ("latents_mean", "latents_std"):
        if config[name] is not None and len(config[name]) != config["latent_channels"]:
            raise ValueError(
                f"{name} has {len(config[name])} values, it must have one for each of the {config['latent_channels']} "
                "latent channels"
            )


def unknown_arguments(given: Iterable[str], known: Iterable[str]) -> str:
    """What is unknown among argument names, each with the known one it resembles; empty if there is nothing."""
    known = set(known)
    described = []
    for name in sorted(set(given) - known):
        near = difflib.get_close_matches(name, known, 1)
        described.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return ", ".join(described)


def check_video(x: Any, name: str, channels: int, multiple: int, dtype: torch.dtype) -> None:
    """Refuse what is no video or no latents that the model takes.

    Args:
        x: what was passed.
        name: the argument's.
        channels, dtype: that x must have.
        multiple: what H and W must be divisible by.

    Raises:
        ValueError: naming the argument, its shape or type, the rule and what to pass.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}, it must be a tensor: {_how_to_make_a_tensor(x, name)}")
    if x.ndim != 5:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, it must be (batch, channels, frames, height, width): add the frame axis of "
            "an image with .unsqueeze(2)"
        )
    if x.shape[1] != channels:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and so {x.shape[1]} channels, the model takes {channels}: the order is "
            "(batch, channels, frames, height, width)"
        )
    for axis, size in (("clips", x.shape[0]), ("frames", x.shape[2])):
        if size == 0:
            raise ValueError(f"{name} has no {axis}, shape {tuple(x.shape)}: pass at least one")
    for axis, size in (("height", x.shape[3]), ("width", x.shape[4])):
        if size == 0 or size % multiple != 0:
            raise ValueError(
                f"{name} has {axis} {size}, not a positive multiple of the spatial compression {multiple}: pad to "
                f"{max(1, -(-size // multiple)) * multiple} and crop the result, as `vcvae reconstruct` does"
            )
    if not x.is_floating_point():
        to_range = ""
        if x.dtype == torch.uint8 and name in _PIXELS:
            to_range = f": pass {name}.to(vae.dtype) / 127.5 - 1, or the video through {PROCESSOR}"
        raise ValueError(f"{name} is {x.dtype}, it must be {dtype}, pixels in [-1, 1]{to_range}")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} is {x.dtype}, the model {dtype}: pass {name}.to(vae.dtype), or load the model with dtype")


def _how_to_make_a_tensor(x: Any, name: str) -> str:
    if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor):
        return "join frames with torch.stack(frames, dim=1)[None], clips with torch.cat"
    if name in _PIXELS and (isinstance(x, (list, tuple, str)) or hasattr(x, "__array__") or hasattr(x, "__fspath__")):
        stream = "" if isinstance(x, (list, tuple)) or hasattr(x, "__array__") else ", or stream it with video.VideoReader"
        return f"pass {PROCESSOR}(…) of it{stream}"
    return "pass one of shape (batch, channels, frames, height, width)"


def check_weights(model: nn.Module, info: Mapping[str, Any], source: Any) -> None:
    """Refuse a model that was not read whole, or that holds no numbers.

    Args:
        model: as loaded.
        info: diffusers' loading information.
        source: where it came from.

    Raises:
        ValueError: naming the weights.
    """
    if missing := info.get("missing_keys"):
        raise ValueError(
            f"{source} lacks {len(missing)} weights of its configuration ({some(missing)}): the file is incomplete or of "
            "another configuration, fetch it again (for a network with new weights, from_config)"
        )
    there = {name: p.detach() for name, p in model.named_parameters() if p.device.type != "meta" and p.is_floating_point()}
    if broken := [name for name, parameter in there.items() if not _is_finite(parameter)]:
        raise ValueError(
            f"{source} has NaN or infinite weights ({some(broken)}): the file is damaged, its training diverged, or the "
            f"numbers are too large for {model.dtype}; take another checkpoint or dtype"
        )


def _is_finite(parameter: torch.Tensor) -> bool:
    if type(parameter) not in (torch.Tensor, nn.Parameter):  # of a library that quantises
        parameter = parameter.dequantize()
    if parameter.itemsize == 1:  # float8 knows no sum
        parameter = parameter.float()
    # A sum tells, without a tensor of flags; in float32, which sums of half precision do not exceed.
    return bool(parameter.sum(dtype=torch.promote_types(parameter.dtype, torch.float32)).isfinite())
