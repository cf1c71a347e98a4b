"""Image VAE weights: reading them from any layout, and inflating them to a video VAE (Sec. 3.2, Eq. 3 and 4).

`read_image_vae` understands diffusers' and BFL's (latent-diffusion) layouts, in a file, a folder or a hub repository.
`inflate` copies the weights by name; the temporal layers that an image VAE does not have keep the initialisation that makes
a fresh video VAE select and broadcast keyframes.
"""

import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import nn

from ..files import read_json
from ..operators.tdc import TemporalConv3d
from .image_files import HUB_OPTIONS, WeightFile, load_weights, locate

__all__ = ["HUB_OPTIONS", "ImageVAE", "InflationReport", "inflate", "read_image_vae"]


@dataclass(frozen=True)
class _Family:
    """Models whose image VAEs are of one shape, by what tells them apart in files that come without a configuration.

    Args:
        name: for messages.
        latent_channels: of its VAEs.
        scaling_factor, shift_factor: of its latents.
        neighbour: part of a weight's name that a whole checkpoint of it has.
        told: pattern of what its files say that they are, or are called.
    """

    name: str
    latent_channels: int
    scaling_factor: float
    shift_factor: float | None
    neighbour: str
    told: str


# Of those with equal shapes, the first one is assumed where nothing tells.
_FAMILIES = (
    _Family("FLUX.1", 16, 0.3611, 0.1159, "double_blocks.", r"flux|^ae\."),
    _Family("Stable Diffusion 3", 16, 1.5305, 0.0609, "joint_blocks.", r"sd-?_?3|stable-diffusion-(v?3)"),
    _Family(
        "Stable Diffusion 1.x", 4, 0.18215, None, "cond_stage_model.", r"sd-?_?v?[12]|stable-diffusion-v?[12]|ft-(mse|ema)"
    ),
    _Family("Stable Diffusion XL", 4, 0.13025, None, "conditioner.embedders.", r"sd-?_?xl|stable-diffusion-xl"),
)

# What both configurations have in common.
_SHARED_CONFIG = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
    "mid_block_add_attention",
    "use_quant_conv",
    "use_post_quant_conv",
    "scaling_factor",
    "shift_factor",
)


@dataclass
class ImageVAE:
    """An image VAE as read: its `AutoencoderKL` configuration and its weights in diffusers' layout.

    Args:
        config: keyword arguments of `AutoencoderKL`.
        state: weights by diffusers' names.
        source: where they came from.
        assumptions: what the source did not say and was assumed, one sentence each.
    """

    config: dict
    state: dict[str, torch.Tensor]
    source: str
    assumptions: list[str] = field(default_factory=list)

    def video_config(self) -> dict:
        """The part of the configuration that a video VAE shares; what it does not name has `AutoencoderKL`'s defaults."""
        defaults = {name: p.default for name, p in inspect.signature(AutoencoderKL.__init__).parameters.items()}
        return {name: self.config.get(name, defaults[name]) for name in _SHARED_CONFIG}

    def build(self) -> AutoencoderKL:
        """The image VAE itself, in eval mode."""
        vae = AutoencoderKL.from_config(self.config)
        vae.load_state_dict(self.state)
        return vae.eval()


@dataclass
class InflationReport:
    """What `inflate` did, as parameter names.

    Args:
        copied: taken over as they are (norms, attention, spatial resampling, biases).
        inflated: 2-D kernels put into the anchor slice of a temporal operator.
        widened: of these two, those whose latent channels were extended.
        created: parameters an image VAE does not have, initialised by Eq. 3 and 4.
    """

    copied: list[str]
    inflated: list[str]
    widened: list[str]
    created: list[str]


# Reading ---------------------------------------------------------------------------------------------------------------


def read_image_vae(source: str | Path, subfolder: str | None = None, **hub_options) -> ImageVAE:
    """Read an image VAE.

    Args:
        source: a safetensors file (`loss.*` and `model_ema.*` that training left in it are not read), a folder, or a hub id.
            In a folder or repository the VAE is looked for in `subfolder`
            (or, when that is None, at the root and in `vae/`), then as BFL's `ae.safetensors`.
        subfolder: of the folder or repository.
        hub_options: `token`, `revision`, `variant`, `cache_dir`, `local_files_only`; and `use_safetensors=False` for pickled
            weights, of which tensors alone are read.

    Raises:
        ValueError: if keys are missing or left over, naming them, or the file is not safetensors.
        OSError: if there is nothing to read; for a gated repository it says how to get access.
    """
    config_file, weights_files = locate(str(source), subfolder, hub_options)
    read_from = str(weights_files[0])
    weights = load_weights(weights_files, pickled=hub_options.get("use_safetensors") is False)
    state = _to_diffusers_layout(weights.state, read_from)
    assumptions: list[str] = []
    if config_file is None:
        config = _guess_config(state, read_from, _told_family(weights, weights_files[0]), assumptions)
    else:
        config = _read_config(config_file)
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        assumptions.append("its latents_mean and latents_std are left out, they mean something else for video: pass them")
    _check_keys(state, config, read_from)
    return ImageVAE(config, state, str(source), assumptions)


def _read_config(config_file: Path) -> dict:
    """The configuration of an `AutoencoderKL`, without diffusers' own notes in it."""
    config = read_json(config_file)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(
            f"{config_file} is of {config['_class_name']}, only an AutoencoderKL can be inflated: pass the "
            "folder or subfolder of one"
        )
    return {k: v for k, v in config.items() if not k.startswith("_")}


# Names of the attention in diffusers before 0.18, still found in files.
_OLD_ATTENTION_RULES = (
    (r"\.attentions\.0\.query\.", r".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", r".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", r".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", r".attentions.0.to_out.0."),
)


def _to_diffusers_layout(state: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Rename BFL's (latent-diffusion's) keys; 1x1 convolutions of the attention become linear."""
    if any(name.startswith("encoder.down.0.") for name in state):
        return _from_ldm(state)
    if not any(name.startswith("encoder.down_blocks.0.") for name in state):
        some = sorted(state)[:5]
        raise ValueError(f"{source} is not an image VAE in diffusers' or BFL's layout: its keys start with {some}")
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _OLD_ATTENTION_RULES:
            name = re.sub(pattern, replacement, name)
        if re.search(r"attentions\.0\.to_(q|k|v|out\.0)\.weight$", name) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


def _from_ldm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What diffusers makes of the layout, and under its own name what it has no place for, to be reported."""
    stages = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages}
    converted = {
        name: tensor for name, tensor in convert_ldm_vae_checkpoint(dict(state), blocks).items() if tensor is not None
    }
    placed = {tensor.data_ptr() for tensor in converted.values()}
    return {**converted, **{name: tensor for name, tensor in state.items() if tensor.data_ptr() not in placed}}


def _told_family(weights: WeightFile, path: Path) -> _Family | None:
    """What a file belongs to, by the weights beside the VAE's, by what it says, or by its name."""
    for family in _FAMILIES:
        if any(family.neighbour in name for name in weights.neighbours):
            return family
    for text in (weights.architecture, path.name):
        for family in _FAMILIES:
            if text and re.search(family.told, text.lower()):
                return family
    return None


def _guess_config(state: dict[str, torch.Tensor], source: str, told: _Family | None, assumptions: list[str]) -> dict:
    """Read the architecture off the shapes; say what they cannot tell."""
    stages = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down_blocks."))
    first_convs = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(stages)]
    telling = ["encoder.conv_in.weight", *first_convs, "decoder.conv_in.weight", "decoder.conv_out.weight"]
    missing = [name for name in telling if name not in state]
    if missing:
        raise ValueError(f"{source} does not hold a whole image VAE; missing keys: {', '.join(missing)}")
    channels = [state[name].shape[0] for name in first_convs]
    layers = 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.down_blocks.0.resnets."))
    latent_channels = state["decoder.conv_in.weight"].shape[1]
    families = [family for family in _FAMILIES if family.latent_channels == latent_channels]
    if not families:
        raise ValueError(
            f"{source} has {latent_channels} latent channels and comes without a configuration, so that its scaling factor "
            "is unknown: pass the folder of a diffusers VAE"
        )
    family = told if told in families else families[0]
    scaling_factor, shift_factor = family.scaling_factor, family.shift_factor
    others = ", ".join(f"{other.name}'s is {other.scaling_factor}" for other in families if other is not family)
    others = (
        f"as the file tells; {others}"
        if told in families
        else f"{others}: pass scaling_factor and shift_factor, or --scaling-factor and --shift-factor, if it is that one's"
    )
    assumptions.append(
        f"no configuration came with the file: scaling_factor {scaling_factor} and shift_factor {shift_factor} of "
        f"{family.name} ({others}) and 32 norm groups were assumed"
    )
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
    }


def _check_keys(state: dict[str, torch.Tensor], config: dict, source: str) -> None:
    with torch.device("meta"):
        expected = {k: v.shape for k, v in AutoencoderKL.from_config(config).state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    wrong = sorted(k for k in set(expected) & set(state) if expected[k] != state[k].shape)
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not hold the AutoencoderKL of its configuration; {'; '.join(problems)}")


# Inflating -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def inflate(video_vae: nn.Module, image_vae: ImageVAE) -> InflationReport:
    """Give a freshly built video VAE the weights of an image VAE, by name (Sec. 3.2).

    A 2-D kernel goes into the anchor slice of its temporal operator, all other slices are zero: center initialisation for
    group causal layers, tail for causal ones. With more latent channels than the image VAE has, the first ones are the image
    VAE's and the rest zero: means, log-variances and the decoder's input (Sec. 4.1). Not in the paper: quant convolutions
    are widened by the identity, since zeros on both sides would never learn.

    Args:
        video_vae: with the module names of `AutoencoderKL`; changed in place.
        image_vae: from `read_image_vae`.

    Raises:
        ValueError: if a weight of the image VAE has no place, or does not fit.
    """
    state = dict(image_vae.state)
    operators = {f"{name}.weight": m for name, m in video_vae.named_modules() if isinstance(m, TemporalConv3d)}
    report = InflationReport([], [], [], [])
    for name, parameter in video_vae.named_parameters():
        if name not in state:
            report.created.append(name)
            continue
        value = state.pop(name).to(parameter)
        operator = operators.get(name)
        shape = parameter.shape if operator is None else parameter[:, :, 0].shape
        if value.shape != shape:
            value = _widen(name, value, shape)
            report.widened.append(name)
        if operator is None:
            parameter.copy_(value)
            report.copied.append(name)
        else:
            parameter.zero_()
            parameter[:, :, operator.anchor] = value
            report.inflated.append(name)
    if state:
        raise ValueError(
            f"the video VAE has no place for {sorted(state)} of {image_vae.source}: build it with the same layers"
        )
    return report


def _widen(name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Extend the latent channels of one tensor; moments are extended in both halves."""
    module, kind = name.rsplit(".", 1)
    moments = module in ("encoder.conv_out", "quant_conv")
    if module not in ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in") or any(
        new < old for new, old in zip(shape, value.shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {tuple(value.shape)} in the image VAE and {tuple(shape)} in the video VAE")
    rows = _latent_index(value.shape[0], shape[0], moments)
    if kind == "bias":
        widened = value.new_zeros(shape)
        widened[rows] = value
        return widened
    columns = _latent_index(value.shape[1], shape[1], moments)
    if module in ("quant_conv", "post_quant_conv"):
        widened = torch.eye(shape[0], dtype=value.dtype, device=value.device)[:, :, None, None]
    else:
        widened = value.new_zeros(shape)
    widened[rows[:, None], columns] = value
    return widened


def _latent_index(old: int, new: int, moments: bool) -> torch.Tensor:
    """Where `old` channels go among `new`: in front, or in front of each half for means and log-variances."""
    if old == new or not moments:
        return torch.arange(old)
    return torch.cat([torch.arange(old // 2), new // 2 + torch.arange(old // 2)])
